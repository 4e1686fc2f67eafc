"""LoRA-FA: LoRA with A frozen at its random start; only B learns, and the layer's input is not kept.

Paper: Zhang et al., 2023, "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models
Fine-tuning", arXiv 2308.03303.
Pick it when activations fill the memory and recomputing them (gradient checkpointing) is too slow, or to
halve the optimiser's state; at equal rank it learns a little less than LoRA.
Cost: r out parameters a linear layer.

A frozen weight W (out, in) gets an update of rank r whose row space is that of A, for good:

    y = W x + b + s B A D(x),    A (r, in) ~ U(-1/sqrt(in), 1/sqrt(in)) frozen,    B (out, r) = 0 at the start

D is dropout. Trained: B, and the new head of a classifier. Frozen: W, b, A. With dL/dy = g (N, out):

    dL/dB = s g^T (X A^T),    dL/dX = g W + s (g B) A

so a layer keeps X A^T (N, r) for the backward pass, and not X (N, in); what X costs is saved where nothing
else keeps it. A block of SmolLM2-135M keeps for each token, at r = 16 on a bfloat16 base: with LoRA 14.1 kB,
here 11.8 kB in our trainers, whose fused LoRA keeps little already; 37.4 kB and 17.4 kB with PEFT's layers.

A step dB moves W by s dB A. Of all of them the nearest to the gradient G (out, in) of W itself is

    min_dB ||s dB A - G||_F:    dB = G A^T (A A^T)^-1 / s = dL/dB P,    P = (A A^T)^-1 / s^2

`projection: full` (a later version of the paper) gives the optimiser dL/dB P, so that a step of plain descent
moves W by G projected on the rows of A, whatever their scale; `none` (the first version) gives it dL/dB.
Adam, which scales every entry anyway, learns alike from both.

The authors' code is PEFT's `LoraFAOptimizer`. Ours corrects the gradient where it arises: for any optimiser,
before clipping, for several adapters (PEFT's pairs A and B by the order of their names, and raises), with P
computed once in float64 (PEFT's: anew in each step, and multiplied in bfloat16 wherever that is available).
Embeddings are refused: they have no input to save, and PEFT's never learn. The file is an ordinary LoRA's.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from luthier.errors import MethodError
from luthier.options import option
from luthier.tuning.lora_factors import FactorConfig, Factors, FactorVariant
from luthier.tuning.peft_options import peft_options


@peft_options
@dataclass
class Config(FactorConfig):
    """Options of LoRA-FA; the rarer fields of `peft.LoraConfig` can be given too."""

    r: int = option(16, "rank of the update; a larger one keeps little more", ge=1)
    lora_alpha: int = option(32, "scale: the update is multiplied by alpha / r", ge=1)
    lora_dropout: float = option(
        0.0, "dropout on the input of the adapter; it keeps that input after all", ge=0, lt=1
    )
    target_modules: list[str] | str | None = option(
        "all-linear", "names of the layers to adapt, a regular expression, or all-linear (all but the head)"
    )
    use_rslora: bool = option(False, "scale by alpha / sqrt(r), which keeps large ranks learning")
    init_lora_weights: bool | str = option(True, "start of A: true (uniform) or gaussian")
    projection: str = option(
        "full",
        "the gradient of B: corrected for what it moves in W, or as it is",
        choices=("full", "none"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise MethodError(
                f"init_lora_weights: {self.init_lora_weights} is no random start of A, from B = 0.",
                fix="Choose from: true, gaussian.",
            )

    def variant(self) -> FactorVariant:
        return FrozenA(self)

    def frozen(self, model: nn.Module) -> Iterable[str]:
        """The adapter's parameters that do not learn."""
        return (name for name, _ in model.named_parameters() if ".lora_A." in name)


def correction(a: Tensor, scale: float) -> Tensor:
    """P = (A A^T)^+ / s^2 (r, r) in fp32 for A (r, in); the pseudo-inverse where r > in."""
    wide = a.detach().to("cpu", torch.float64)
    return (torch.linalg.pinv(wide @ wide.T, hermitian=True) / scale**2).to(a.device, torch.float32)


class Corrected(torch.autograd.Function):
    """B as it is; its gradient times P."""

    @staticmethod
    def forward(ctx: Any, b: Tensor, p: Tensor) -> Tensor:
        ctx.save_for_backward(p)
        return b.view_as(b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (p,) = ctx.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False):
            return (gradient.float() @ p).to(gradient.dtype), None


class FrozenA(FactorVariant):
    """One adapter on one layer."""

    def __init__(self, config: Config):
        super().__init__(config)
        self._known: tuple[Any, Tensor] | None = None  # P, and what it was computed from

    def init(self, module: Any, adapter_name: str, **options: Any) -> None:
        # PEFT's own list of what it must not open when it switches adapters.
        module.frozen_peft_weight_names = {**module.frozen_peft_weight_names, adapter_name: ("lora_A",)}
        module._freeze_non_trainable_peft_weights(adapter_name)

    def factors(self, layer: Any, name: str) -> Factors:
        return self.formula(layer, name)  # there is no callback to miss

    def formula(self, layer: Any, name: str) -> Factors:
        a, b, scale = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
        if self.config.projection == "full" and torch.is_grad_enabled() and b.requires_grad:
            b = Corrected.apply(b, self.p(a, scale))
        return a, b, scale

    def p(self, a: Tensor, scale: float) -> Tensor:
        """P, computed anew where A was loaded, moved or cast, or the scale changed."""
        source = (id(a), a._version, a.dtype, a.device, scale)
        if self._known is None or self._known[0] != source:
            self._known = (source, correction(a, scale))
        return self._known[1]
