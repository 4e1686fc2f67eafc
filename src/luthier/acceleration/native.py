"""The kernels of the C++ files beside this one: compiled by the machine's own compiler when first needed,
then loaded.

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

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
INSTRUCTIONS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-mavx512vnni")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", *INSTRUCTIONS)
SECONDS = 120  # that a step of compiling may take; all take a few

_pointer, _long, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
ARGUMENTS = {
    "luthier_weight_only": [_int, *[_pointer] * 5, _int, *[_long] * 4, _int],
    "luthier_whole_numbers": [*[_pointer] * 5, _int, _float, _int, *[_long] * 4, _int],
    "luthier_one_row": [*[_pointer] * 3, *[_long] * 2, _int],
    "luthier_attention": [*[_pointer] * 5, _float, _int, *[_long] * 5, _int],
    "luthier_gram": [_pointer, _int, _int, *[_pointer] * 2, *[_long] * 2, _int],
    "luthier_square": [*[_pointer] * 2, *[_long] * 2, _int],
    "luthier_rms_norm": [*[_pointer] * 3, _float, *[_long] * 2, _int],
    "luthier_take_columns": [*[_pointer] * 3, *[_long] * 2, _int],
    "luthier_put_columns": [*[_pointer] * 3, *[_long] * 2, _int],
    "luthier_catch_up": [*[_pointer] * 3, *[_long] * 5, _int],
    "luthier_settle": [*[_pointer] * 8, _float, _float, _pointer, *[_long] * 4, _int],
    "luthier_factor": [*[_pointer] * 3, _long, _int],
}
RESULTS = {"luthier_square": ctypes.c_double, "luthier_settle": ctypes.c_double, "luthier_factor": _int}


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


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool) -> Tensor:
    """softmax(s q k^T) v in float32, (batch, heads, seq, dim).

    Args:
        query: (batch, heads, seq, dim), dim a multiple of 16; key, value: (batch, kv heads, seq, dim), kv
            heads a divisor of heads. Numbers of a row lie side by side.
        causal: a query sees the keys up to its own place.
    """
    batch, heads, seq, dim = query.shape
    y = query.new_empty(batch, seq, heads, dim)
    strides = [part.stride(axis) for part in (query, key, value) for axis in range(3)]
    library().luthier_attention(
        *(part.data_ptr() for part in (query, key, value, y)),
        (_long * 9)(*strides),
        scale,
        causal,
        *(batch, heads, key.shape[1], seq, dim),
        torch.get_num_threads(),
    )
    return y.transpose(1, 2)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w x / sqrt(mean(x^2) + eps), all in float32 and contiguous. x (..., width), weight (width,)."""
    y = torch.empty_like(x)
    library().luthier_rms_norm(
        x.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        eps,
        x.numel() // len(weight),
        len(weight),
        torch.get_num_threads(),
    )
    return y


def gram(x: Tensor, sums: Tensor, scale: Tensor | None = None, *, rounded: bool) -> None:
    """Add x^T x to `sums`, of which what lies left of the diagonal is not to be used.

    Args:
        x: (tokens, features), float32 or bfloat16, contiguous.
        sums: (features, features), float32, contiguous.
        scale: (tokens,), float32: what each token is multiplied by first.
        rounded: numbers are rounded to bfloat16 then; their products and sums are float32. Twice as fast.
    """
    library().luthier_gram(
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        rounded,
        None if scale is None else scale.data_ptr(),
        sums.data_ptr(),
        *x.shape,
        torch.get_num_threads(),
    )


def square(x: Tensor, hessian: Tensor) -> float:
    """tr(x H x^T), x rounded to bfloat16, which cancels out in large matrices: 1e-5 of it is usual.

    Args:
        x: (tokens, features); hessian: (features, features), symmetric; both float32 and contiguous.
    """
    found: float = library().luthier_square(
        x.data_ptr(), hessian.data_ptr(), *x.shape, torch.get_num_threads()
    )
    return found


def factor(hessian: Tensor) -> tuple[Tensor, Tensor] | None:
    """V (n, n), upper triangular with 1 on the diagonal, and r (n,) of H = V diag(r^2) V^T, or None where H
    (n, n), float32, contiguous and symmetric, is not positive definite."""
    unit, roots = torch.zeros_like(hessian), hessian.new_empty(len(hessian))
    positive = library().luthier_factor(
        *(part.data_ptr() for part in (hessian, unit, roots)), len(hessian), torch.get_num_threads()
    )
    return (unit, roots) if positive else None


def take_columns(matrix: Tensor, order: Tensor) -> Tensor:
    """matrix[:, order].T, contiguous. matrix (rows, columns), float32 and contiguous, order (columns,)."""
    made = matrix.new_empty(matrix.shape[::-1])
    library().luthier_take_columns(
        *(part.data_ptr() for part in (matrix, order, made)), *matrix.shape, torch.get_num_threads()
    )
    return made


def put_columns(columns: Tensor, order: Tensor) -> Tensor:
    """The matrix (rows, columns) of which `take_columns` gives these (columns, rows)."""
    matrix = columns.new_empty(columns.shape[::-1])
    library().luthier_put_columns(
        *(part.data_ptr() for part in (columns, order, matrix)), *matrix.shape, torch.get_num_threads()
    )
    return matrix


def catch_up(w: Tensor, changes: Tensor, unit: Tensor, columns: tuple[int, int, int]) -> None:
    """Add to some columns of w, in place, what the changes of others ask of them; see `settle`.

    Args:
        columns: first of the others, first that is brought up to date, first that is not.
    """
    library().luthier_catch_up(
        *(part.data_ptr() for part in (w, changes, unit)),
        w.shape[1],
        *(len(w), *columns),
        torch.get_num_threads(),
    )


def settle(
    w: Tensor,
    before: Tensor,
    changes: Tensor,
    unit: Tensor,
    roots: Tensor,
    columns: tuple[int, int],
    *,
    grid: tuple[Tensor, Tensor | None, Tensor, float, float] | None = None,
    zeros: Tensor | None = None,
) -> float:
    """Settle some columns of w as `luthier.compression.sweep` says, in place; all float32 and contiguous.

    Args:
        w, before, changes: (columns, rows).
        unit: V (columns, columns).
        roots: (columns,).
        columns: first that is settled, first that is not.
        grid: scale and zero (groups, rows), the group of each column (int64), least and greatest code;
            without it columns stay as they are, but for zeros.
        zeros: what becomes zero, bool (columns that are settled, rows).

    Returns:
        The sum of the squared errors.
    """
    scale, zero, group, low, high = grid or (None, None, None, 0.0, 0.0)
    parts = (w, before, changes, unit, roots, scale, zero, group)
    found: float = library().luthier_settle(
        *(None if part is None else part.data_ptr() for part in parts),
        *(low, high),
        None if zeros is None else zeros.data_ptr(),
        w.shape[1],
        *(len(w), *columns),
        torch.get_num_threads(),
    )
    return found


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
            function.argtypes, function.restype = types, RESULTS.get(name)
    except subprocess.CalledProcessError as error:
        return f"{compiler} fails: {next(iter(error.stderr.splitlines()), error.returncode)}"
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        return str(error)
    return loaded


def _compiled(compiler: str) -> Path:
    """The file of the library, made if it is not there."""
    source = b"".join(file.read_bytes() for file in [*HEADERS, *SOURCES])
    key = hashlib.sha256(source + repr((compiler, FLAGS)).encode()).hexdigest()[:16]
    target = cache_folder() / "kernels" / f"{key}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    log.info("Compiling kernels for this CPU into %s.", target)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        unlinked, linked = [f"{folder}/{file.stem}.o" for file in SOURCES], f"{folder}/kernels.so"
        compiling = [
            [*FLAGS, "-c", str(file), "-o", made] for file, made in zip(SOURCES, unlinked, strict=True)
        ]
        for step in [*compiling, ["-shared", *unlinked, "-o", linked]]:
            subprocess.run([compiler, *step], check=True, capture_output=True, text=True, timeout=SECONDS)
        os.replace(linked, target)
    return target
