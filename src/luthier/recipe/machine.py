"""What this machine has free and how fast it multiplies, measured in a fraction of a second."""

import sys
import time
from functools import cache
from pathlib import Path

import psutil
import torch

from luthier.models.placement import Placement

# The C library keeps holes between tensors that it cannot use again: resident memory over the tensors' own
# (measured on Linux with glibc, see `benchmarks/memory_estimate.py`; a GPU's allocator keeps next to none).
HOLES = 1.4
# A step is paced by its matrix products and by the memory that all else moves: attention, norms, sums. Passes
# over the memory of each tensor that is made.
PASSES = 6
# Seconds before the first step: loading, encoding, proofs.
START = 5.0
# Seconds that a block takes for a generated token beside reading its weights: Python, small operations.
TOKEN_OVERHEAD = 6e-4
# Bytes that the process holds with all libraries loaded and no model.
RUNTIME = 700 * 2**20


def available_memory(device: str) -> int:
    """Bytes that a run can still take on the device that holds its model; a container's limit counts."""
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(torch.device(device))
        return free
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())  # 'max' where there is none
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):
        return free
    return min(free, limit - used)


@cache
def product_speed(dtype: torch.dtype, device: str) -> float:
    """Floating-point operations per second of a matrix product of a layer's size, best of a few.

    The first products pay for starting threads and kernels; others may use the cores at the same time.
    """
    rows, size = 1024, 1536
    a = torch.ones(rows, size, dtype=dtype, device=device)
    b = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    started = time.perf_counter()
    while time.perf_counter() - started < 0.2:
        begin = time.perf_counter()
        out = a @ b
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
        del out
    return 2 * rows * size * size / best


@cache
def bandwidth(device: str) -> float:
    """Bytes per second that are read from memory, best of a few."""
    source = torch.ones(2**24, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        source.sum().item()
        best = min(best, time.perf_counter() - begin)
    return source.nbytes / best


def step_seconds(operations: float, written: float, placement: Placement) -> float:
    """Seconds of a training step that multiplies so much and makes tensors of so many bytes."""
    products = operations / product_speed(placement.autocast or placement.dtype, placement.device)
    return products + PASSES * written / bandwidth(placement.device)


def holes(device: str) -> float:
    return HOLES if device == "cpu" and sys.platform == "linux" else 1.05
