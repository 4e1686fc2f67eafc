"""Causal attention of a short document in half precision on a CPU: stored in half, computed in float32.

    O = softmax(s Q K^T + causal mask) V

torch's kernel for a CPU is slower in bfloat16 than in float32 where the processor has no matrix unit for it
(AMX): its blocks are too small for bfloat16's products to pay for their packing. On 170 tokens the backward
pass takes about half the time in float32; the longer the document, the larger the blocks, and at LONGEST
tokens both take about the same (`benchmarks/attention_cpu.py`).

What is kept for the backward pass stays in half precision, so the memory is that of the half kernel.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LONGEST = 256  # tokens
_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def pays(query: Tensor, value: Tensor) -> bool:
    """Whether `half_attention` can take these, (batch, heads, seq, dim), and is faster than torch's own."""
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[2] <= LONGEST
        and query.shape[-1] == value.shape[-1]
        and not _matrix_unit()
    )


@cache
def _matrix_unit() -> bool:
    return torch.cpu._is_amx_tile_supported()


def half_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention in the dtype of its inputs.

    Args:
        query: (batch, heads, seq, dim); key, value: (batch, kv heads, seq, dim).
        scale: s; 1 / sqrt(dim) by default.
    """
    output: Tensor = _HalfAttention.apply(query, key, value, scale)
    return output


class _HalfAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        output, normaliser = _attention(query.float(), key.float(), value.float(), 0.0, True, scale=scale)
        output = output.to(query.dtype)
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, output, normaliser)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, normaliser = ctx.saved_tensors
        query, key, value, output = (t.float() for t in saved)
        grads = _attention_backward(
            grad.float(), query, key, value, output, normaliser, 0.0, True, scale=ctx.scale
        )
        return *(g.to(grad.dtype) for g in grads), None
