"""Is the attention of short bfloat16 documents faster when it computes in float32?

    python benchmarks/attention_cpu.py

One document with the heads of SmolLM2-135M (9, of which 3 have keys, of 64 numbers): torch's bfloat16 kernel
against `luthier.acceleration.half_attention`, forward and backward, in turns. Result: benchmarks/README.md.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from luthier.acceleration.half_attention import half_attention

LENGTHS = (32, 64, 128, 170, 256, 512, 1024)
ROUNDS = 15


def torchs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def measure(attend: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[float, float]:
    """Milliseconds of the forward and the backward pass."""
    start = time.perf_counter()
    output = attend(*inputs)
    middle = time.perf_counter()
    torch.autograd.grad(output, inputs, torch.ones_like(output))
    return (middle - start) * 1e3, (time.perf_counter() - middle) * 1e3


def main() -> None:
    print("| tokens | torch: forward, backward, ms | ours: forward, backward, ms | faster |")
    print("|--:|--:|--:|--:|")
    for length in LENGTHS:
        inputs = [
            torch.randn(1, length, heads, 64, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
            for heads in (9, 3, 3)
        ]
        runs: dict[Callable[..., Tensor], list[tuple[float, float]]] = {torchs: [], half_attention: []}
        for _ in range(ROUNDS):
            for attend, found in runs.items():
                found.append(measure(attend, inputs))
        medians = [[statistics.median(part) for part in zip(*found, strict=True)] for found in runs.values()]
        (theirs, their_back), (ours, our_back) = medians
        print(
            f"| {length} | {theirs:.2f}, {their_back:.2f} | {ours:.2f}, {our_back:.2f} "
            f"| {(theirs + their_back) / (ours + our_back):.2f}x |",
            flush=True,
        )


if __name__ == "__main__":
    main()
