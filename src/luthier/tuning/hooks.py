"""What a tuning method adds to any trainer: callbacks, and parameter groups with rates of their own.

A method says so on its config, by duck typing: `callbacks(model)`, `parameter_groups(model, args)` and
`row_inputs(rows)`. A trainer asks here and need not know the method:

    trainer callbacks      += callbacks(model), which get its loss where they have an attribute loss_of
    optimizer's parameters  = parameter_groups(model, args) or the trainer's own
    the model's inputs     += row_inputs(model, rows), one number a row
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from luthier.tuning.attach import tuning_of


def callbacks(model: nn.Module) -> list[TrainerCallback]:
    """The callbacks of the model's tuning method; none where it has none or no method is attached."""
    ask = getattr(tuning_of(model), "callbacks", None)
    return ask(model) if ask else []


def parameter_groups(model: nn.Module, args: TrainingArguments) -> list[dict[str, Any]] | None:
    """The optimiser's groups with their `lr` and `weight_decay`, or None where the trainer's own are right.

    The groups hold every parameter that the method will ever train, also those that are frozen at the start
    (`transformers.Trainer` collects only those that require grad when the optimiser is made).
    """
    ask = getattr(tuning_of(model), "parameter_groups", None)
    return ask(model, args) if ask else None


def row_inputs(model: nn.Module, rows: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """What the model takes with a batch of these canonical rows besides their tokens: name to a number a row.

    Raises:
        DataError: rows that lack what the method needs.
    """
    ask = getattr(tuning_of(model), "row_inputs", None)
    return ask(rows) if ask else {}


def of_batch(
    inputs: Mapping[str, Sequence[int]], rows: Iterable[int], device: Any = None
) -> dict[str, Tensor]:
    """Of what `row_inputs` gave, the tensors for a batch of the rows of these indices."""
    return {name: torch.tensor([values[i] for i in rows], device=device) for name, values in inputs.items()}


def save_adapter(model: PeftModel, folder: Path | str) -> None:
    """Write the adapter as PEFT's files, such that it fits the base as it was loaded.

    A method whose initialisation changed the base (PiSSA) writes a converted one.
    """
    ask = getattr(tuning_of(model), "save_adapter", None)
    if ask:
        ask(model, folder)
    else:
        model.save_pretrained(str(folder))
