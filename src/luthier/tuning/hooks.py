"""What a tuning method adds to any trainer: callbacks, and parameter groups with rates of their own.

A method says so on its config, by duck typing: `callbacks(model)` and `parameter_groups(model, args)`. A
trainer asks here and need not know the method:

    trainer callbacks      += callbacks(model)
    optimizer's parameters  = parameter_groups(model, args) or the trainer's own
"""

from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
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


def save_adapter(model: PeftModel, folder: Path | str) -> None:
    """Write the adapter as PEFT's files, such that it fits the base as it was loaded.

    A method whose initialisation changed the base (PiSSA) writes a converted one.
    """
    ask = getattr(tuning_of(model), "save_adapter", None)
    if ask:
        ask(model, folder)
    else:
        model.save_pretrained(str(folder))
