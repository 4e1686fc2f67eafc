"""The kernels of `kernels.cpp`: compiled by the machine's own compiler when first needed, then loaded.

The library lies in Luthier's cache under a name that holds its source and flags; it appears there whole or
not at all. It is linked without an OpenMP runtime: the one that torch has loaded serves it too, so there is
one pool of threads. Where there is no compiler or no such CPU, torch's kernels do the work; so they do on
one with AMX, whose products of many rows are faster.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from luthier.models.gguf import cache_folder

log = logging.getLogger("luthier.acceleration")

SOURCE = Path(__file__).with_name("kernels.cpp")
INSTRUCTIONS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-mavx512vnni")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", *INSTRUCTIONS)
SECONDS = 120  # that compiling may take; it takes one or two

_pointer, _long, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
ARGUMENTS = {
    "luthier_weight_only": [_int, *[_pointer] * 5, _int, *[_long] * 4, _int],
    "luthier_whole_numbers": [*[_pointer] * 5, _int, _float, _int, *[_long] * 4, _int],
    "luthier_one_row": [*[_pointer] * 3, *[_long] * 2, _int],
}


def library() -> ctypes.CDLL:
    """The kernels.

    Raises:
        NotImplementedError: this machine has them not, and why.
    """
    found = _library()
    if isinstance(found, str):
        raise NotImplementedError(found)
    return found


def here() -> bool:
    """Whether this machine has the kernels."""
    return not isinstance(_library(), str)


def one_row(weight: Tensor, x: Tensor) -> Tensor:
    """x W^T, all in bfloat16 and contiguous. weight (out, in), x (1, in)."""
    y = x.new_empty(1, len(weight))
    library().luthier_one_row(
        weight.data_ptr(), x.data_ptr(), y.data_ptr(), x.shape[1], len(weight), torch.get_num_threads()
    )
    return y


@functools.cache
def _library() -> ctypes.CDLL | str:
    if not (torch.cpu._is_avx512_bf16_supported() and torch.cpu._is_vnni_supported()):
        return "the CPU has no AVX-512 BF16 and VNNI"
    if torch.cpu._is_amx_tile_supported():
        return "the CPU has AMX, which only torch's kernels use"
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        return "there is no C++ compiler (g++, or what CXX names)"
    try:
        loaded = ctypes.CDLL(str(_compiled(compiler)))
        for name, types in ARGUMENTS.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = types, None
    except subprocess.CalledProcessError as error:
        return f"{compiler} fails: {next(iter(error.stderr.splitlines()), error.returncode)}"
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        return str(error)
    return loaded


def _compiled(compiler: str) -> Path:
    """The file of the library, made if it is not there."""
    key = hashlib.sha256(SOURCE.read_bytes() + repr((compiler, FLAGS)).encode()).hexdigest()[:16]
    target = cache_folder() / "kernels" / f"{key}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    log.info("Compiling kernels for this CPU into %s.", target)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        unlinked, linked = f"{folder}/kernels.o", f"{folder}/kernels.so"
        for step in ([*FLAGS, "-c", str(SOURCE), "-o", unlinked], ["-shared", unlinked, "-o", linked]):
            subprocess.run([compiler, *step], check=True, capture_output=True, text=True, timeout=SECONDS)
        os.replace(linked, target)
    return target
