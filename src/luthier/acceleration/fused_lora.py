"""The linear layer with a LoRA on it as one operation: no float32 copies of its input, half of the passes.

Sources: the backward pass by hand as in unslothai/unsloth; Cherniuk et al., 2023, "Run LoRA Run: Faster and
Lighter LoRA Implementations", arXiv 2312.03415 (which order of products is cheapest).

x (N, in), W (out, in), A (r, in), B (out, r), s the scale, g = dL/dy (N, out):

    u = x A^T        y = x W^T + b;  y += s u B^T        saved: u, x where A learns, references to W, A, B
    v = s g B        dx = g W;  dx += v A        dA = v^T x        dB = s g^T u

PEFT computes the same with autograd: it casts x to the adapter's float32 in every adapted layer, keeps
the copies, and makes s u B^T and the sum as new (N, out) tensors. Here the small A and B are cast to the
dtype of x and their gradients come back in float32, so the adapter still learns in float32.

A layer is fused where it is plain: one active LoRA without variant (DoRA), bias or dropout, on a frozen
`nn.Linear` or `Conv1D`. Two kinds more count as plain: a method that computes with factors of its own
(`tuning/lora_factors.py`), which are A and B then; and AdaLoRA's P diag(l) Q, as B = P and A = diag(l) Q. The
rest is left to PEFT, and said. The layer's class, its parameters and its state dict stay as they are;
merging, disabling and saving are PEFT's.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from peft.tuners.adalora import SVDLinear
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from luthier.tuning.lora_factors import FactorLayer, FactorVariant

log = logging.getLogger("luthier.acceleration")


@dataclass
class Fusion:
    """How many adapted layers run fused, and why the others do not (reason -> number of layers)."""

    fused: int = 0
    left: Counter[str] = field(default_factory=Counter)

    def line(self) -> str:
        left = ", ".join(f"{count} left to PEFT ({reason})" for reason, count in self.left.items())
        return f"{self.fused} LoRA layers fused" + (f"; {left}" if left else "")


def fuse(model: nn.Module) -> Fusion:
    """Let every plain LoRA layer of `model` run as one operation. Undone by `unfuse`."""
    report = Fusion()
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        reason = why_not(module)
        if reason is None:
            module.forward = MethodType(_forward, module)  # a bound method follows the module when copied
            report.fused += 1
        else:
            report.left[reason] += 1
    if report.fused or report.left:
        log.info("%s", report.line())
    return report


def unfuse(model: nn.Module) -> None:
    """Take away what `fuse` did."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.__dict__.pop("forward", None)


@contextmanager
def fused(model: nn.Module) -> Iterator[Fusion]:
    """Inside, every plain LoRA layer of `model` runs as one operation."""
    before = any(isinstance(m, LoraLayer) and "forward" in m.__dict__ for m in model.modules())
    report = fuse(model)
    try:
        yield report
    finally:
        if not before:  # whoever fused it already, such as a trainer, goes on with it
            unfuse(model)


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> Tensor:
    """x W^T + bias + scaling (x A^T) B^T, with gradients for x, A and B.

    Args:
        x: (..., in), in the dtype that the products run in (autocast's where that is on).
        weight: (out, in), frozen; bias: (out,), frozen.
        a: (r, in); b: (out, r), in any floating dtype; their gradients have the same.
    """
    y: Tensor = _LoraLinear.apply(x, weight, bias, a, b, scaling)
    return y


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.dtype_x, ctx.scaling = x.dtype, scaling
        with torch.autocast(device, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)  # (N, in)
            y, u = product(rows, weight, bias, a, b, scaling)
        # x is as wide as the model, u as the rank; only the gradient of A needs x (LoRA-FA's A has none).
        ctx.save_for_backward(rows if ctx.needs_input_grad[3] else None, u, weight, a, b)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        g = grad.reshape(-1, grad.shape[-1])
        needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:5])
        rows, u, weight, a, b = ctx.saved_tensors
        dx, da, db = gradients(g, rows, u, weight, a, b, ctx.scaling, needed)
        if dx is not None:
            dx = dx.view(*grad.shape[:-1], dx.shape[-1]).to(ctx.dtype_x)
        return dx, None, None, da, db, None


def product(
    rows: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """y (N, out) and u (N, r) of rows (N, in), in their dtype."""
    dtype = rows.dtype
    u = rows @ a.to(dtype).t()
    y = nn.functional.linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
    return y.addmm_(u, b.to(dtype).t(), alpha=scaling), u


def gradients(
    grad: Tensor,
    rows: Tensor | None,
    u: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx (N, in), dA and dB for the gradient (N, out) of `product`; None for what is not needed.

    Args:
        rows: needed for dA alone.
    """
    g = grad.to(u.dtype)
    v = (g @ b.to(g.dtype)).mul_(scaling)  # (N, r)
    dx = (g @ weight.to(g.dtype)).addmm_(v, a.to(g.dtype)) if needed[0] else None
    da = (v.t() @ rows).to(a.dtype) if needed[1] and rows is not None else None
    # (r, out) and then transposed: the product with the long side last is the faster one.
    db = (u.t() @ g).mul_(scaling).t().to(b.dtype) if needed[2] else None
    return dx, da, db


def _forward(self: Linear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`forward` of a fused layer; what has changed since (disabled, merged) is left to PEFT."""
    if args or kwargs or why_not(self) is not None:
        return type(self).forward(self, x, *args, **kwargs)
    return lora_linear(x, *factors(self))


def factors(layer: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor, float]:
    """W (out, in), bias (out,), A (k, in), B (out, k) and s of a layer that `why_not` has nothing against."""
    name = layer.active_adapters[0]
    base = layer.base_layer
    weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
    if isinstance(layer, SVDLinear):
        # The scale goes into the small factor: as a number it would have to come back from the device.
        value = layer.lora_E[name] * (layer.scaling[name] / (layer.ranknum[name] + 1e-5))
        return weight, base.bias, layer.lora_A[name] * value, layer.lora_B[name], 1.0
    if variant := layer.lora_variant.get(name):
        return weight, base.bias, *variant.factors(layer, name)
    return weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]


def why_not(layer: LoraLayer) -> str | None:
    """Why a layer cannot run fused now, or None."""
    if type(layer) not in (Linear, SVDLinear) and not isinstance(layer, FactorLayer):
        return f"{type(layer).__name__} layer"
    if layer.disable_adapters:
        return "disabled"
    if layer.merged:
        return "merged"
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or len(layer.active_adapters) != 1:
        return f"{len(layer.active_adapters)} active adapters"
    name = active[0]
    if name in layer.lora_variant and not isinstance(layer.lora_variant[name], FactorVariant):
        return type(layer.lora_variant[name]).__name__.removesuffix("LinearVariant")
    dropout = layer.lora_dropout[name]
    if getattr(dropout, "p", 0.0) and dropout.training:
        return "dropout"
    base, a, b = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
    if type(base) not in (nn.Linear, Conv1D):
        return f"base layer {type(base).__name__}"
    if any(parameter.requires_grad for parameter in base.parameters(recurse=False)):
        return "the base learns too"
    if getattr(b, "bias", None) is not None:
        return "bias"
    for module in (base,) if isinstance(layer, SVDLinear) else (base, a, b):
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return "hooks"
    return None
