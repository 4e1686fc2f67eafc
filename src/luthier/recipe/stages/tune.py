"""Train the model with a method and an objective, or search a prompt for it; an interrupted stage goes on."""

import logging
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers.trainer_utils import get_last_checkpoint

from luthier.alignment.trainer import trainer as make_trainer
from luthier.data.load import Loaded
from luthier.errors import RecipeError
from luthier.evaluation import forgetting
from luthier.models import structure
from luthier.models.saving import save
from luthier.recipe.context import Context
from luthier.recipe.leakage import stage_data
from luthier.recipe.schema import TuneStage, is_adapter
from luthier.recipe.stages import StageResult
from luthier.tuning.attach import trainable

log = logging.getLogger("luthier.recipe")


def run(stage: TuneStage, context: Context) -> StageResult:
    """`adapter/` or `model/`: what was trained, with the tokenizer; `prompt/`: what a search found.

    Raises:
        RecipeError: the stages before left an adapter, on which no second method can stand.
        TrainingError: the training must not go on; its last good checkpoint is kept.
        KeyboardInterrupt: it was stopped by Ctrl-C, after a checkpoint.
    """
    if stage.searches:
        return _search(stage, context)
    if context.upstream is not None and context.upstream.adapter:
        raise RecipeError(
            f"Stage '{stage.name}' tunes a model that carries an adapter already.",
            fix="Merge it before: put the stage `- export: {merge: true}` between the two. Or write "
            "from_base: true, to start from the recipe's model again.",
        )
    method = context.method(stage.method)
    objective = stage.objective.method(**stage.objective.options)
    learns = not is_adapter(stage.method)
    data, held_out = stage_data(stage, context.work)
    model, tokenizer = context.lend(train=learns, quantization=getattr(method, "quantization", None))
    checkpoints = context.work / "checkpoints"
    trainer = make_trainer(
        objective,
        model,
        data,
        method=method,
        args=stage.training | {"output_dir": str(checkpoints), "seed": context.recipe.seed},
        tokenizer=tokenizer,
        eval_data=held_out,
        expected_memory=context.expected_memory,
    )
    last = get_last_checkpoint(str(checkpoints)) if context.resume else None
    if last is not None:
        log.info("goes on from %s", Path(last).name)
    speaks = structure.task(trainer.model) == "causal" and not context.trial
    general = forgetting.general_perplexity(trainer.model, tokenizer) if speaks else None
    measured = trainer.train(resume_from_checkpoint=last).metrics
    model = trainer.accelerator.unwrap_model(trainer.model)
    if general is not None:
        forgetting.record(general, forgetting.general_perplexity(model, tokenizer))
    learning, total = trainable(model)
    save(model, context.work / ("adapter" if isinstance(model, PeftModel) else "model"), tokenizer)
    return StageResult(
        metrics=_metrics(measured, trainer),
        history=trainer.state.log_history,
        details=_details(trainer, data, held_out),
        trainable=learning,
        total=total,
        left=(model, tokenizer, learns),
    )


def _search(stage: TuneStage, context: Context) -> StageResult:
    data, held_out = stage_data(stage, context.work)
    model, tokenizer = context.model()
    found = stage.method.method(**stage.method.options).search(
        model,
        tokenizer,
        data,
        eval_data=held_out,
        seed=context.recipe.seed,
        folder=context.work / "checkpoints",
    )
    found.save(context.work / "prompt")
    names = {"data": data} if held_out is None else {"data": data, "eval_data": held_out}
    return StageResult(
        metrics=found.scores,
        history=found.history,
        details={name: loaded.report.as_dict() for name, loaded in names.items()}
        | {"templates": found.templates, "labels": found.labels},
        trainable=0,
        total=trainable(model)[1],
    )


def _details(trainer: Any, data: Loaded, held_out: Loaded | None) -> dict[str, Any]:
    """What became of the data, record by record and row by row; and which checkpoint was the best."""
    names = {"data": data} if held_out is None else {"data": data, "eval_data": held_out}
    found: dict[str, Any] = {name: loaded.report.as_dict() for name, loaded in names.items()}
    for account, encoding in zip(found.values(), trainer.encodings, strict=True):
        account["encoding"] = encoding.as_dict()
    if trainer.state.best_global_step:
        found["best_step"] = trainer.state.best_global_step
    return found


def _metrics(measured: dict[str, float], trainer: Any) -> dict[str, Any]:
    """Of the whole training; the speed is that of the last session."""
    tokens = trainer.state.num_input_tokens_seen
    found: dict[str, Any] = {"steps": trainer.state.global_step, "tokens": tokens}
    found["tokens_per_second"] = (tokens - trainer.tokens_before) / measured["train_runtime"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if losses:
        found["loss"] = losses[-1]
    held_out = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if trainer.state.best_metric is not None:
        found["eval_loss"] = trainer.state.best_metric
    elif held_out:  # of the weights that are left, where no better ones were loaded again
        found["eval_loss"] = held_out[-1]
    return found
