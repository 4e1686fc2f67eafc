"""Delta-LoRA: a LoRA whose every step moves the frozen weight too.

Paper: Zi et al., 2023, "Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices",
arXiv 2309.02411.
Pick it when LoRA learns too slowly at a rate that must not be raised; where the rate can be tuned, LoRA does
as well.
Cost: r(in + out) parameters a linear layer, as LoRA; the same again held, and up to twice LoRA's operations,
from the step on at which the weight moves. Nothing once merged.

With A (r, in), B (out, r), s = alpha / r, the optimiser steps from (A, B) to (A', B') and then, from step K
on, the weight W (out, in) moves by the change of the product, without a gradient of its own:

    y = W x + b + s B A x,        W <- W + lambda s (B' A' - B A)      (t >= K)

The changes add up. With A_K and B_K the factors at step K, the weight after any step is

    W + s B A = W0 + (1 + lambda) s B A - lambda s B_K A_K

which needs no W to be written to: W0 stays as it is, and the method is LoRA with the factors

    A* = [A; A_K],   B* = [(1 + lambda) B, -lambda B_K],   and the gradient of B A where that of B* A* is

That is what runs here: the same outputs and the same steps of any optimiser, and beyond the literal form it
is exact in half precision (a step's change is mostly below the resolution of a bfloat16 W), works on
quantised and tied weights, and lets adapters share a base.

The sum shows what the title does not: the model differs from W0 by a matrix of rank 2r at most, r with
`start_steps: 0`. It is LoRA with a forward scale larger by 1 + lambda: the honest baseline is LoRA at that
scale.

Trained: A and B, and the new head of a classifier. Start: A uniform, B = 0, so the model starts as the base.
There is no dropout on the branch: with it the gradient of B A would not be that of W, which is the method's
reason.

`luthier.save` writes an ordinary LoRA of rank 2r for W0. Checkpoints, and PEFT's own `save_pretrained`, hold
A, B, A_K and B_K under a type of their own, so that PEFT without luthier refuses them and does not drop a
part. `start_steps` is by default a share of the run: the paper's hundreds of steps would outlast a short one.
There is no official code.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from transformers import TrainerCallback

from luthier import checks
from luthier.errors import MethodError, TrainingError
from luthier.options import option
from luthier.tuning.lora_factors import (
    FactorConfig,
    Factors,
    FactorVariant,
    adapter_state,
    factor_layers,
    write_lora,
)
from luthier.tuning.peft_options import peft_options
from luthier.tuning.registration import register, registered_type


@peft_options
@dataclass
class Config(FactorConfig):
    """Options of Delta-LoRA; the rarer fields of `peft.LoraConfig` can be given too."""

    r: int = option(8, "rank of the factors", ge=1)
    lora_alpha: int = option(16, "scale: the product is multiplied by alpha / r", ge=1)
    target_modules: list[str] | str | None = option(
        "all-linear", "names of the layers to adapt, a regular expression, or all-linear (all but the head)"
    )
    use_rslora: bool = option(False, "scale by alpha / sqrt(r)")
    update_ratio: float = option(0.5, "lambda: how far the weight moves with the product", ge=0)
    start_steps: float = option(0.1, "K: steps before the weight moves; below 1 a share of the run", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = registered_type(type(self))
        if self.lora_dropout:
            raise MethodError(
                f"lora_dropout: {self.lora_dropout} does not go with delta_lora: the gradient of the product "
                "would not be that of the weight.",
                fix="Leave it out.",
            )
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise MethodError(
                f"init_lora_weights: {self.init_lora_weights} changes the base or starts with B at work.",
                fix="Choose from: true, gaussian.",
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields of `adapter_config.json`, ours too: a checkpoint is of our own type."""
        return peft.LoraConfig.to_dict(self)

    def variant(self) -> FactorVariant:
        return Moving(self)

    def callbacks(self, model: nn.Module) -> list[TrainerCallback]:
        return [MoveBase(self, model)]

    def save_adapter(self, model: peft.PeftModel, folder: Path | str) -> None:
        """Write an ordinary LoRA for the original base: of rank 2r once the weight has moved."""
        self.require_watched()
        state, doubled = plain_state(adapter_state(model), self.update_ratio)
        grow = 2**0.5 if self.use_rslora else 2
        write_lora(model, state, folder, rank=lambda r: r * (1 + doubled), grow=grow if doubled else 1)

    def first_step(self, steps: int) -> int:
        """K in a run of `steps` steps."""
        return math.ceil(self.start_steps * steps) if self.start_steps < 1 else round(self.start_steps)


def moved(a: Tensor, b: Tensor, a_k: Tensor, b_k: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """A* (2r, in) and B* (out, 2r), whose product has the gradient of B A for A (r, in) and B (out, r)."""
    # Their values are A and (1 + lambda) B; what reaches A through the larger B is divided again.
    a = a.detach() + (a - a.detach()) / (1 + ratio)
    b = (1 + ratio) * b.detach() + (b - b.detach())
    return torch.cat([a, a_k]), torch.cat([b, -ratio * b_k], dim=1)


def plain_state(state: dict[str, Tensor], ratio: float) -> tuple[dict[str, Tensor], bool]:
    """An adapter's tensors as those of an ordinary LoRA, and whether their rank is doubled."""
    found, doubled = {}, False
    for name, tensor in state.items():
        if ".lora_start." in name:
            continue
        layer, _, end = name.rpartition(".lora_")
        start = {side: state.get(f"{layer}.lora_start.weight_{side}") for side in "AB"}
        if end == "A.weight" and start["A"] is not None:
            tensor = torch.cat([tensor, start["A"]])
            doubled = doubled or len(start["A"]) > 0
        elif end == "B.weight" and start["B"] is not None:
            tensor = torch.cat([(1 + ratio) * tensor, -ratio * start["B"]], dim=1)
        found[name] = tensor
    return found, doubled


class Start(nn.Module):
    """A_K (r, in) and B_K (out, r) from the step on at which the weight moves; None before."""

    weight_A: Tensor | None
    weight_B: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight_A", None)
        self.register_buffer("weight_B", None)

    def set(self, a: Tensor | None, b: Tensor | None) -> None:
        self.weight_A, self.weight_B = a, b


class Moving(FactorVariant):
    """LoRA on a weight that moves with it."""

    def init(self, module: Any, adapter_name: str, **options: Any) -> None:
        if not hasattr(module, "lora_start"):
            module.lora_start = nn.ModuleDict()
        module.lora_start[adapter_name] = Start()

    def remove(self, layer: Any, name: str) -> None:
        del layer.lora_start[name]

    def load(self, layer: Any, name: str, state: dict[str, Tensor], prefix: str) -> None:
        keys = [f"{prefix}lora_start.{name}.weight_{side}" for side in "AB"]
        device = layer.lora_A[name].weight.device
        held = [torch.empty_like(state[key], device=device) if key in state else None for key in keys]
        layer.lora_start[name].set(*held)

    def formula(self, layer: Any, name: str) -> Factors:
        a, b, scale = super().formula(layer, name)
        start = layer.lora_start[name]
        if start.weight_A is None:
            return a, b, scale
        return *moved(a, b, start.weight_A, start.weight_B, self.config.update_ratio), scale


class MoveBase(TrainerCallback):
    """Lets the weights move from step K on."""

    def __init__(self, config: Config, model: nn.Module):
        self.config = config
        self.model: Any = model
        self.starts: list[tuple[Any, Start]] = []
        self.name = ""
        self.first = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.name = self.model.active_adapter
        self.starts = [(m, m.lora_start[self.name]) for m in factor_layers(self.model, self.name)]
        self.first = self.config.first_step(state.max_steps)
        if state.global_step > self.first and not self.moves:
            raise TrainingError(
                f"The checkpoint of step {state.global_step} does not hold the factors of step {self.first}, "
                "at which the weights began to move.",
                fix="Resume from a checkpoint of delta_lora, or start again.",
            )
        self.config.watch.begin()
        checks.record(
            "before",
            "the weights will move",
            self.first < state.max_steps,
            self.first,
            state.max_steps,
            "step at which they begin, of all steps",
            fix="Lower start_steps.",
            refuse=False,
        )

    @property
    def moves(self) -> bool:
        return any(start.weight_A is not None for _, start in self.starts)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < self.first or self.moves:
            return
        factors = [
            (start, layer.lora_A[self.name].weight.detach(), layer.lora_B[self.name].weight.detach())
            for layer, start in self.starts
        ]
        # Where B is zero yet there is nothing to hold, and the rank stays r.
        empty = not any(b.any() for _, _, b in factors)
        for start, a, b in factors:
            rank = 0 if empty else len(a)
            start.set(a[:rank].clone(), b[:, :rank].clone())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.config.watch.end()


class Tuner(LoraModel):
    """PEFT's LoRA, under a type of its own for what its files hold besides."""

    prefix = "lora_"

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        # PEFT finds the adapter's names in the model, where those of the start are not before it is there.
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        bare, named = ".lora_start.weight_", f".lora_start.{adapter_name}.weight_"
        return {name.replace(bare, named): tensor for name, tensor in found.items()}


register("delta_lora", Config, Tuner)
