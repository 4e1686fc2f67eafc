"""Train the model with a method and an objective; an interrupted stage goes on from its last checkpoint."""

import json
import logging
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from luthier.alignment.trainer import trainer as make_trainer
from luthier.errors import RecipeError
from luthier.models.saving import save
from luthier.recipe.context import Context
from luthier.recipe.schema import TuneStage, is_adapter
from luthier.recipe.stages import StageResult
from luthier.tuning.attach import trainable

log = logging.getLogger("luthier.recipe")

# Ten checkpoints in a run, of which the last is kept beside the best: enough to resume, and little disk.
CHECKPOINTS = {"save_strategy": "steps", "save_steps": 0.1, "save_total_limit": 2}


def run(stage: TuneStage, context: Context) -> StageResult:
    """`adapter/` or `model/`: what was trained, with the tokenizer.

    Raises:
        RecipeError: the stages before left an adapter, on which no second method can stand.
        TrainingError: the training must not go on; its last good checkpoint is kept.
        KeyboardInterrupt: it was stopped by Ctrl-C, after a checkpoint.
    """
    if context.upstream is not None and context.upstream.adapter:
        raise RecipeError(
            f"Stage '{stage.name}' tunes a model that carries an adapter already.",
            fix="Merge it before: put the stage `- export: {merge: true}` between the two.",
        )
    method = stage.method.method(**stage.method.options)
    objective = stage.objective.method(**stage.objective.options)
    learns = not is_adapter(stage.method)
    model, tokenizer = context.lend(train=learns)
    # After loading, so that the adapter is the same whether the model was loaded for this stage or before it.
    set_seed(context.recipe.seed)
    checkpoints = context.work / "checkpoints"
    owned = {"output_dir": str(checkpoints), "seed": context.recipe.seed}
    trainer = make_trainer(
        objective,
        model,
        stage.data,
        method=method,
        args=CHECKPOINTS | stage.training | owned,
        tokenizer=tokenizer,
        eval_data=stage.eval_data,
    )
    last = last_checkpoint(checkpoints) if context.resume else None
    if last is not None:
        log.info("goes on from %s", last.name)
    output = trainer.train(resume_from_checkpoint=str(last) if last else None)
    model = trainer.accelerator.unwrap_model(trainer.model)
    learning, total = trainable(model)
    save(model, context.work / ("adapter" if isinstance(model, PeftModel) else "model"), tokenizer)
    return StageResult(
        metrics=_metrics(output.metrics, trainer.state),
        history=trainer.state.log_history,
        details={"resumed_from": last.name if last else None, "steps": trainer.state.global_step},
        trainable=learning,
        total=total,
        left=(model, tokenizer, learns),
    )


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole: its state, written last, can be read."""
    found = sorted(
        folder.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True
    )
    for path in found:
        try:
            json.loads((path / TRAINER_STATE_NAME).read_text())
        except (OSError, ValueError):
            continue
        return path
    return None


def _metrics(measured: dict[str, float], state: TrainerState) -> dict[str, Any]:
    return {"loss": measured["train_loss"], "steps": state.global_step}
