"""Which dtype is faster on this CPU: SmolLM2-135M, forward and backward, float32 against bfloat16.

    python benchmarks/dtype_cpu.py [--batch 4] [--length 256] [--steps 5]

ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 (or AVX2) hides the instructions above that level, as on an older CPU.
The settings are timed in turn, so that other load on the machine hits all of them; medians are printed.
"""

import argparse
import os
import statistics
import time

import torch

import luthier

SETTINGS = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "float32 weights, bfloat16 products": ("float32", torch.bfloat16),
}


def step(model: torch.nn.Module, ids: torch.Tensor, autocast: torch.dtype | None) -> float:
    """Seconds of one forward and backward pass of ids (batch, seq)."""
    start = time.perf_counter()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    model.zero_grad()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    models = {name: luthier.load("smollm2-135m", dtype=dtype)[0] for name, (dtype, _) in SETTINGS.items()}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(49152, (options.batch, options.length), generator=generator)
    times: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for turn in range(options.steps + 1):
        for name, (_, autocast) in SETTINGS.items():
            seconds = step(models[name], ids, autocast)
            if turn:  # the first one warms up
                times[name].append(seconds)
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA", "all")
    print(
        f"{options.batch} x {options.length} tokens, {torch.get_num_threads()} threads, instructions: {isa}"
    )
    for name, found in times.items():
        median = statistics.median(found)
        print(f"  {name:<36} {median:6.2f} s  {options.batch * options.length / median:7.0f} tokens/s")


if __name__ == "__main__":
    main()
