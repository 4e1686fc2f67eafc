"""RMS normalisation under a frozen weight that keeps its input as it came, not a float32 copy.

Source: Zhang & Sennrich, 2019, "Root Mean Square Layer Normalization", arXiv 1910.07467.

    n = x / sqrt(mean(x^2) + eps)    y = w * n            x (..., hidden), in float32 from x to n
    dx = (g' - n mean(g' n)) / sqrt(mean(x^2) + eps),     g' = w * dy

transformers writes it in single operations, whose backward needs x in float32: in SmolLM2-135M twice 2.3 KB a
token and block, where x itself has half of that.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from luthier.acceleration.replaced import replaced


def fused(model: nn.Module) -> AbstractContextManager[int]:
    """Inside, every RMS norm of `model` whose weight is frozen runs as one operation. Yields their number."""
    return replaced(model, why_not, _forward)


@torch.no_grad()
def why_not(module: nn.Module) -> str | None:
    """Why a module is no RMS norm as above, or None. Tried on one row: it must come out bit by bit."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or not isinstance(eps, float):
        return "no RMS norm"
    if weight.requires_grad:
        return "its weight learns"
    if weight.is_meta:
        return None  # a model without numbers, whose memory is estimated
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, len(weight), generator=generator).to(weight)
    if not torch.equal(_forward(module, x), type(module).forward(module, x)):
        return "norm of another kind"
    return None


def _forward(self: nn.Module, x: Tensor) -> Tensor:
    if self.weight.requires_grad:  # a tuner has put one that learns in the place of the frozen one
        y: Tensor = type(self).forward(self, x)
    else:
        y = _RMSNorm.apply(x, self.weight, self.variance_epsilon)
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)  # (..., 1)
        ctx.save_for_backward(x, inverse, weight)
        return weight * (wide * inverse).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, inverse, weight = ctx.saved_tensors
        g = (grad * weight).float()
        n = x.float().mul_(inverse) if x.dtype != torch.float32 else x * inverse
        g -= n.mul_((g * n).mean(-1, keepdim=True))
        return g.mul_(inverse).to(x.dtype), None, None
