"""Linear layers, attention and RMS norms in float32, without a gradient, faster than torch computes them.

torch hands products of matrices to MKL, which does not use all of what the CPUs of another maker have: on a
Zen 5 it makes 100 billion operations a second and core, oneDNN 230, both exact to float32. The operator that
is called here is the one to which torch's own compiler lowers linear layers.

Attention is that of `attention.cpp` where the machine has it (`benchmarks/attention_float32.py`), norms are
those of `norm.cpp`: transformers writes a norm in six operations, each of which reads all there is.
"""

from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from luthier.acceleration import native
from luthier.acceleration.replaced import replaced

_available = torch.backends.mkldnn.is_available()
_product: Any = torch.ops.mkldnn._linear_pointwise.default if _available else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, as `torch.nn.functional.linear`.

    Args:
        x: (..., in). Other dtypes than float32, other devices, and what needs a gradient go torch's way.
        weight: (out, in).
    """
    if _taken(x, weight):
        # For parts of larger matrices the operator has a loop a hundred times slower.
        return _product(x.contiguous(), weight.contiguous(), bias, "none", [], "")
    return functional.linear(x, weight, bias)


def _taken(x: Tensor, weight: Tensor) -> bool:
    return (
        _product is not None
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and _here(x, weight)
    )


def _here(*tensors: Tensor) -> bool:
    """Whether they lie in the computer's own memory and need no gradient."""
    learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return not learns and all(tensor.device.type == "cpu" for tensor in tensors)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(s q k^T) v, as `torch.nn.functional.scaled_dot_product_attention`, which does what is not here:
    masks, dropout, a cache, gradients, float64, other devices. Half precision is computed in float32."""
    parts = (query, key, value)
    plain = attn_mask is None and not dropout_p and (scale is None or scale > 0)
    if plain and _same_text(*parts, enable_gqa) and _here(*parts) and native.here():
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        q, k, v = (part.float() if part.stride(-1) == 1 else part.float().contiguous() for part in parts)
        return native.attention(q, k, v, scale, causal=is_causal).to(query.dtype)
    return functional.scaled_dot_product_attention(
        *parts, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _same_text(query: Tensor, key: Tensor, value: Tensor, grouped: bool) -> bool:
    """Whether queries and keys, (batch, heads, seq, dim), are of one text, as the kernel takes them."""
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape or not query.numel():
        return False
    if not query.dtype == key.dtype == value.dtype or query.dtype == torch.float64:
        return False
    batch, heads, seq, dim = query.shape
    kv_heads = key.shape[1] if grouped else heads
    return key.shape == (batch, kv_heads, seq, dim) and heads % kv_heads == 0 and dim % 16 == 0


def norms(model: nn.Module) -> AbstractContextManager[int]:
    """Inside, the RMS norms of `model` compute so. Yields their number."""
    return replaced(model, why_no_norm, _norm)


@torch.no_grad()
def why_no_norm(module: nn.Module) -> str | None:
    """Why a module is no w x / sqrt(mean(x^2) + eps) that the machine has a kernel for, or None."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or not isinstance(eps, float):
        return "no RMS norm"
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or not native.here():
        return "no kernel"
    x = torch.randn(1, 2, len(weight), generator=torch.Generator().manual_seed(0))
    if not torch.allclose(_norm(module, x), type(module).forward(module, x), rtol=1e-5, atol=1e-6):
        return "norm of another kind"
    return None


def _norm(self: nn.Module, x: Tensor) -> Tensor:
    weight: Any = self.weight
    taken = x.dtype == weight.dtype == torch.float32 and x.shape[-1] == len(weight) and x.numel() > 0
    if taken and _here(x, weight) and native.here():
        return native.rms_norm(x.contiguous(), weight.contiguous(), cast(float, self.variance_epsilon))
    y: Tensor = type(self).forward(self, x)
    return y


_STANDING_IN: dict[Any, Any] = {
    functional.linear: linear,
    functional.scaled_dot_product_attention: attention,
}


class Float32(TorchFunctionMode):
    """Inside `with Float32():` linear layers and attention that need no gradient compute so."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _STANDING_IN.get(function, function)(*args, **(kwargs or {}))
