"""Causal float32 attention without a gradient: milliseconds of `attention.cpp` against torch's kernel.

    python benchmarks/attention_float32.py [--threads 1]

2 texts of 512 tokens, 9 heads of 64 over 3 of keys and values (SmolLM2-135M). The least of twenty runs each,
which take turns; torch gets its keys and values repeated beforehand.
"""

import argparse
import time

import torch
from torch.nn.functional import scaled_dot_product_attention

from luthier.acceleration.float32 import attention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    q, k, v = (torch.randn(2, heads, 512, 64) for heads in (9, 3, 3))
    repeated = [part.repeat_interleave(3, 1) for part in (k, v)]
    ours, torchs = [], []
    for _ in range(20):
        start = time.perf_counter()
        found = attention(q, k, v, is_causal=True, enable_gqa=True)
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        expected = scaled_dot_product_attention(q, *repeated, is_causal=True)
        torchs.append(time.perf_counter() - start)
    assert torch.allclose(found, expected, atol=1e-5)
    print(f"ours {1e3 * min(ours):.1f} ms, torch {1e3 * min(torchs):.1f} ms: {min(torchs) / min(ours):.1f}x")


if __name__ == "__main__":
    main()
