"""A gated MLP with a LoRA on its last layer: what can be made again from gate and up is not kept.

Source: Shazeer, 2020, "GLU Variants Improve Transformer", arXiv 2002.05202 (the MLP); recomputing what is
cheap in the backward pass as in unslothai/unsloth.

    a = silu(gate)    h = a * up    y = h W^T + b + s (h A^T) B^T        gate, up, h (N, inner)

Autograd keeps gate, up, a and h; here gate and up are kept, and a and h are made again. In SmolLM2-135M a
and h are two of the four tensors of the MLP's width, which are the largest there are.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from luthier.acceleration import fused_lora
from luthier.acceleration.replaced import replaced

PARTS = (
    "gate_proj",
    "up_proj",
    "down_proj",
    "act_fn",
)  # as Llama, Mistral, Qwen, SmolLM and their kin name them
TOLERANCE = 1e-2  # half precision rounds what is added in another order


def fused(model: nn.Module) -> AbstractContextManager[int]:
    """Inside, every gated MLP of `model` that can be runs as one operation. Yields their number."""
    return replaced(model, why_not, _forward)


@torch.no_grad()
def why_not(module: nn.Module) -> str | None:
    """Why a module cannot run as silu(gate) * up with a fused LoRA behind it, or None. Tried on one row."""
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in PARTS):
        return "no gated MLP"
    down = module.down_proj
    reason = fused_lora.why_not(down) if isinstance(down, LoraLayer) else "no LoRA on down_proj"
    if reason or down._forward_hooks or down._forward_pre_hooks:
        return reason or "hooks"
    weight = down.base_layer.weight
    if weight.is_meta:
        return None  # a model without numbers, whose memory is estimated
    # Apart from the rest: where gate is small, every activation gives about the same y.
    points = torch.linspace(-4, 4, 33, device=weight.device)
    if not callable(module.act_fn) or not torch.allclose(module.act_fn(points), F.silu(points)):
        return "another activation"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, down.out_features, generator=generator).to(weight)
    try:
        expected = type(module).forward(module, x)
    except RuntimeError:  # its input has another width
        return "MLP of another kind"
    found = _forward(module, x)
    if not torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected.abs().max())):
        return "MLP of another kind"
    return None


def _forward(self: nn.Module, x: Tensor) -> Tensor:
    down: Any = self.down_proj
    # Merged, disabled or listened to since.
    if fused_lora.why_not(down) is not None or down._forward_pre_hooks or down._forward_hooks:
        y: Tensor = type(self).forward(self, x)
        return y
    return gated_down(self.gate_proj(x), self.up_proj(x), *fused_lora.factors(down))


def gated_down(
    gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> Tensor:
    """y of the equation above, with gradients for gate, up, A and B.

    Args:
        gate, up: (..., inner).
        weight: (out, inner), frozen; bias: (out,), frozen; a: (r, inner); b: (out, r).
    """
    y: Tensor = _GatedDown.apply(gate, up, weight, bias, a, b, scaling)
    return y


class _GatedDown(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        ctx.shape, ctx.scaling = gate.shape, scaling
        gate, up = (t.reshape(-1, t.shape[-1]) for t in (gate, up))  # (N, inner)
        with torch.autocast(gate.device.type, enabled=False):  # both are in its dtype already
            y, u = fused_lora.product(F.silu(gate).mul_(up), weight, bias, a, b, scaling)
        ctx.save_for_backward(gate, up, u, weight, a, b)
        return y.view(*ctx.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, u, weight, a, b = ctx.saved_tensors
        opened = F.silu(gate)
        g = grad.reshape(-1, grad.shape[-1])
        needed = (True, *ctx.needs_input_grad[4:6])
        hidden = opened * up if needed[1] else None
        dhidden, da, db = fused_lora.gradients(g, hidden, u, weight, a, b, ctx.scaling, needed)
        assert dhidden is not None
        dup = opened.mul_(dhidden)
        dgate = torch.ops.aten.silu_backward(dhidden.mul_(up), gate)
        return dgate.view(ctx.shape), dup.view(ctx.shape), None, None, da, db, None
