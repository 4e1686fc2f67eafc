"""What this machine has free and how fast it multiplies, measured in a fraction of a second."""

import time
from functools import cache
from pathlib import Path

import psutil
import torch

from luthier.models.placement import Placement

# Of the speed of large products, the share that a whole training step reaches: attention, norms and the
# optimizer move memory and multiply little (measured, see `benchmarks/memory_estimate.py`).
STEP_SHARE = 0.6
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


def training_speed(placement: Placement) -> float:
    """Floating-point operations per second of a training step."""
    return STEP_SHARE * product_speed(placement.autocast or placement.dtype, placement.device)
