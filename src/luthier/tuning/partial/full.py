"""Full fine-tuning: every weight learns.

Paper: Devlin et al., 2018, "BERT: Pre-training of Deep Bidirectional Transformers", arXiv 1810.04805 (the
recipe). Gradients freed as they come: Lv et al., 2023, "Full Parameter Fine-tuning for Large Language
Models with Limited Resources" (LOMO), arXiv 2306.09782. Layer-wise rates: Howard & Ruder, 2018, arXiv
1801.06146.
Pick it when data are plentiful, the domain is far from pretraining, or as the reference for every other
method.
Cost: 16 bytes a parameter in fp32 with AdamW (weights 4, gradients 4, state 8), and the activations.

    theta <- theta - lr (m / (sqrt(v) + eps) + wd theta)        over all theta, biases and norms without decay

`fused_backward` steps each parameter inside the backward pass, as soon as its gradient is complete, and
frees the gradient: one parameter's gradient lives at a time, 12 bytes a parameter instead of 16. The
result is that of the ordinary step to the last bit, for any element-wise optimiser; it excludes what
needs all gradients at once (clipping by the global norm, gradient accumulation, loss scaling), which are
refused.

`layer_lr_decay` = xi gives block l of L the rate lr xi^(L-l). Memory-lean optimisers (8-bit, GaLore,
Adafactor) are `training.optim`. Weights held in half precision are refused where the learning rate is too
small to move them.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from luthier.errors import MethodError, TrainingError
from luthier.options import option
from luthier.tuning import groups
from luthier.tuning.subset import Subset


@dataclass
class Config(Subset):
    """Options of full fine-tuning."""

    layer_lr_decay: float = option(1.0, "rate of a layer over that of the layer above it", gt=0, le=1)
    fused_backward: bool = option(False, "step each weight during the backward pass and free its gradient")

    def trained(self, model: nn.Module) -> set[str]:
        return {name for name, _ in model.named_parameters()}

    def callbacks(self, model: nn.Module) -> list[TrainerCallback]:
        fused = [FusedBackward()] if self.fused_backward else []
        return [*super().callbacks(model), *fused]

    def parameter_groups(self, model: nn.Module, args: TrainingArguments) -> list[dict[str, Any]] | None:
        if self.layer_lr_decay == 1:
            return None
        return groups.layered_groups(model, args, self.layer_lr_decay, self.trained(model))


class FusedBackward(TrainerCallback):
    """Steps every parameter as soon as its gradient is accumulated.

    Each parameter gets a view of the trainer's optimiser that holds it alone and shares its state, so that
    learning-rate schedule, checkpoint and resume stay the trainer's.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        _require_separable(args)
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                step = _stepper(optimizer, group, parameter)
                self._handles.append(parameter.register_post_accumulate_grad_hook(step))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _stepper(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: nn.Parameter) -> Any:
    alone = copy.copy(optimizer)  # shares `state`: moments live under the trainer's optimiser
    alone.param_groups = [{**group, "params": [parameter]}]

    def step(p: nn.Parameter) -> None:
        if not torch.isfinite(p.grad).all():
            raise TrainingError(
                f"A gradient of shape {tuple(p.shape)} is not finite; weights above it took this step up.",
                fix="Go on from the last checkpoint with a lower learning_rate, or train in float32.",
            )
        alone.param_groups[0].update(
            {k: v for k, v in group.items() if k != "params"}
        )  # the scheduler's rate
        alone.step()
        p.grad = None

    return step


def _require_separable(args: TrainingArguments) -> None:
    """Raise MethodError for settings that need all gradients at once."""
    wrong = {
        "gradient_accumulation_steps": (
            args.gradient_accumulation_steps,
            args.gradient_accumulation_steps > 1,
            1,
        ),
        "max_grad_norm": (args.max_grad_norm, args.max_grad_norm > 0, 0),
        "fp16": (args.fp16, args.fp16, False),
        "more than one process": (args.world_size, args.world_size > 1, 1),
    }
    for name, (found, fails, fix) in wrong.items():
        if fails:
            raise MethodError(
                f"fused_backward frees each gradient at once; it excludes {name} ({found}).",
                fix=f"Set {name}: {fix}, or fused_backward: false.",
            )
