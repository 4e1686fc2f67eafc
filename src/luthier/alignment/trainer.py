"""One way to a trainer: any objective, any tuning method, any data, all of transformers' arguments.

trainer = luthier.trainer("sft", model, "train.jsonl", method=luthier.method("lora")(r=8))
trainer.train()
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from luthier import taxonomy
from luthier.data.load import Loaded, load
from luthier.data.spec import DataSpec
from luthier.data.tokenize import Encoded, EncodeReport
from luthier.errors import MethodError, ModelError
from luthier.models import structure, tokens
from luthier.tuning.attach import attach

SEED = 42  # transformers' own default
Data: TypeAlias = str | Path | DataSpec | Loaded | Encoded | Dataset

TASK = {"classification": "classification", "seq2seq": "seq2seq"}  # of an objective; causal otherwise


def trainer(
    objective: str | Any,
    model: nn.Module,
    data: Data,
    *,
    method: Any = None,
    args: TrainingArguments | dict[str, Any] | None = None,
    tokenizer: Any = None,
    eval_data: Data | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    expected_memory: int | None = None,
) -> Trainer:
    """A `transformers.Trainer` for an objective, ready for `train()`.

    Args:
        objective: its name, such as "sft", or its config for other options.
        model: a transformers model; with an adapter on it already, or a method applied, leave `method` out.
        data: a path, a spec, loaded rows, or encoded ones.
        method: config of a tuning method; it is attached after the seed is set.
        args: `TrainingArguments`, or a mapping of some of them (see `luthier.alignment.defaults`).
        tokenizer: by default the one in the model's folder.
        expected_memory: estimate of the peak in bytes, held against the real one at step 1.

    Raises:
        MethodError: unknown objective or method, or a method that does not fit the model.
        ModelError: a model of another task, or no tokenizer.
        DataError: data that the objective cannot use. RecipeError: wrong training arguments.
    """
    config = taxonomy.find(objective, "alignment")() if isinstance(objective, str) else objective
    module = sys.modules[type(config).__module__]
    if not hasattr(module, "trainer"):
        raise MethodError(
            f"{type(config).__name__} of {module.__name__} is not an objective.",
            fix="Give a name or config from the alignment branch; the tuning method goes into `method`.",
        )
    _require_task(model, module.__name__.rpartition(".")[2])
    seed = args.get("seed", SEED) if isinstance(args, dict) else getattr(args, "seed", SEED)
    set_seed(seed)  # before the method draws its initial weights
    if method is not None:
        model = attach(model, method)
    tokenizer = tokenizer if tokenizer is not None else _tokenizer(model)
    tokens.say_template("before", structure.base(model), tokenizer)
    held_out = None if eval_data is None else _rows(eval_data)
    found: Trainer = module.trainer(
        config,
        model,
        tokenizer,
        _rows(data, eval_data),
        args=args,
        eval_data=held_out,
        callbacks=callbacks,
        expected_memory=expected_memory,
    )
    return found


def _require_task(model: nn.Module, objective: str) -> None:
    wanted, found = TASK.get(objective, "causal"), structure.task(model)
    if found is not None and found != wanted:
        raise ModelError(
            f"The objective {objective} needs a model for {wanted}, and "
            f"{type(structure.base(model)).__name__} is for {found}.",
            fix=f'Load it with task="{wanted}".',
        )


def _rows(data: Data, held_out: Data | None = None) -> Loaded | Encoded:
    """Loaded or encoded rows; files are held against the held-out file for leaks."""
    if isinstance(data, Loaded | Encoded):
        return data
    if isinstance(data, Dataset):
        return Encoded(data, EncodeReport(len(data), None, examples=len(data)), list(range(len(data))))
    return load(data, eval_path=held_out if isinstance(held_out, str | Path | DataSpec) else None)


def _tokenizer(model: nn.Module) -> Any:
    base = structure.base(model)
    try:
        return tokens.load(base.name_or_path, base.name_or_path, False, None)
    except (ModelError, OSError, ValueError) as error:
        raise ModelError(
            f"There is no tokenizer beside the model ('{base.name_or_path}').", fix="Give tokenizer=."
        ) from error
