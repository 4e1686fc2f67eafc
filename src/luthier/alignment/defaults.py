"""Training arguments: all of transformers', with defaults that fit the model at hand.

A mapping is completed with the defaults below; of a `TrainingArguments` object a copy is taken as it is.

    learning_rate     2e-4 for an adapter, 2e-5 for the model's own weights
    bf16              products in bfloat16 where the model's own weights learn in float32 and it is fast here
    optim             fused AdamW
    logging_steps     a hundredth of the run; the loss of every step counts
    save_*            ten checkpoints in a run, of which the last two (and the best) are kept
    eval_*            where there is held-out data: as often as checkpoints; the best is loaded at the end
    report_to         nobody, unless asked
"""

import copy
import dataclasses
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from luthier.alignment import trackers
from luthier.errors import RecipeError, did_you_mean
from luthier.models.placement import place

ADAPTER_RATE = 2e-4
WEIGHTS_RATE = 2e-5


def arguments(
    given: TrainingArguments | dict[str, Any] | None,
    model: nn.Module,
    *,
    evaluates: bool = False,
    kind: type[TrainingArguments] = TrainingArguments,
) -> TrainingArguments:
    """The arguments of a run on `model`, which carries its tuning method already.

    Args:
        evaluates: there is held-out data.
        kind: `Seq2SeqTrainingArguments` for an encoder-decoder.

    Raises:
        RecipeError: an unknown argument, or a value that transformers refuses.
    """
    if isinstance(given, TrainingArguments):
        _require_trackers(given)
        own = copy.copy(given)  # trainers set some of them, and the caller may use the object again
        if kind is Seq2SeqTrainingArguments and not isinstance(given, kind):
            own = kind(**{f.name: getattr(given, f.name) for f in dataclasses.fields(given) if f.init})
        if not torch.accelerator.is_available():
            own.dataloader_pin_memory = False  # it does nothing there, and torch warns of it
        return own
    given = dict(given or {})
    for name in given:
        if name not in kind.__dataclass_fields__:
            raise RecipeError(
                f"'{name}' is not a training argument.", fix=did_you_mean(name, kind.__dataclass_fields__)
            )
    try:
        made = kind(**(_defaults(model, given, evaluates) | given))
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"transformers refuses the training arguments: {error}") from error
    _require_trackers(made)
    return made


def _require_trackers(args: TrainingArguments) -> None:
    """The Trainer would find out late, and in a traceback."""
    if found := trackers.unknown(args.report_to) or trackers.missing(args.report_to):
        raise RecipeError(f"{found[0]}.", fix=found[1])


def _defaults(model: nn.Module, given: dict[str, Any], evaluates: bool) -> dict[str, Any]:
    device = next(model.parameters()).device
    chosen: dict[str, Any] = {
        "use_cpu": device.type == "cpu",
        "learning_rate": ADAPTER_RATE if isinstance(model, PeftModel) else WEIGHTS_RATE,
        "bf16": not given.get("fp16") and _multiplies_in_bfloat16(model, device),
        "optim": "adamw_torch_fused",
        "logging_steps": 0.01,
        "logging_nan_inf_filter": False,  # a loss that is not finite stops the run; it is not to be hidden
        "report_to": "none",
        "dataloader_pin_memory": device.type not in ("cpu", "mps"),
        "save_strategy": "steps",
        "save_steps": 0.1,
        "save_total_limit": 2,
    }
    if evaluates:
        chosen |= {"eval_strategy": "steps", "eval_steps": 0.1}
        own = {**chosen, **given}
        paired = own["save_strategy"] == own["eval_strategy"] == "steps"
        if paired and own["save_steps"] == own["eval_steps"]:
            chosen |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    return chosen


def _multiplies_in_bfloat16(model: nn.Module, device: torch.device) -> bool:
    """Whether the model's own weights learn in float32 where `place` multiplies such weights in bfloat16."""
    if isinstance(model, PeftModel):
        return False
    learns = [p for p in model.parameters() if p.requires_grad]
    if not learns or any(p.dtype != torch.float32 for p in learns):
        return False
    return place(device=str(device), train=True).autocast == torch.bfloat16
