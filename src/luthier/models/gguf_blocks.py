"""How a matrix becomes the blocks of a GGUF file, and what the blocks stand for.

A block kind holds 32 neighbours of a row (b is the bits of an element, d and m are float16):

    Q4_0, Q5_0   w' = d (q - 2^(b-1))      Q8_0   w' = d q
    Q4_1, Q5_1   w' = d q + m

Plain weights are rounded by the package gguf, which follows llama.cpp's reference. A layer that has codes
already keeps them wherever the kind can: its levels, code - zero, go into the file as they are, with d = the
scale of their group. So they come out exactly where the scale is a float16 number, and within the rounding of
the scale to float16 (a share of 2^-11) where it is not. Rounding such a layer anew would move every weight:
the package takes d from the greatest weight of a block, which is another grid.
"""

import importlib.util
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from luthier.compression.linear import QuantizedLinear
from luthier.errors import ModelError, did_you_mean

BLOCK = 32
# Bits an element takes in the file, its share of d and m included.
BITS = {"F32": 32, "F16": 16, "BF16": 16, "Q8_0": 8.5, "Q5_1": 6, "Q5_0": 5.5, "Q4_1": 5, "Q4_0": 4.5}
PLAIN = ("F32", "F16", "BF16")
# Levels that the kinds without an offset m can hold.
LEVELS = {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-128, 127)}


def require(kind: str) -> None:
    """Raise ModelError for an unknown kind, or where the package gguf is missing."""
    if kind not in BITS:
        raise ModelError(f"Unknown GGUF type '{kind}'.", fix=did_you_mean(kind.upper(), BITS))
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            "Writing a GGUF file needs the package gguf, which is not installed.",
            fix="Install it: pip install 'luthier[gguf]'.",
        )


def type_of(kind: str) -> Any:
    """The package's own name of a kind."""
    import gguf

    return gguf.GGMLQuantizationType[kind]


def nbytes(shape: tuple[int, ...], kind: str) -> int:
    """Size in the file of a matrix or vector."""
    return int(np.prod(shape) * BITS[kind] / 8)


def encode(name: str, owner: nn.Module, part: str, kind: str) -> NDArray[Any]:
    """The array (rows, bytes or values of a row) in which the file holds `part` of a module.

    Args:
        name: for messages.
        part: "weight" or "bias".

    Raises:
        ModelError: there are values that are not finite, or too large for the kind.
    """
    # A layer with tensors of its own is more than its codes.
    if part == "weight" and isinstance(owner, QuantizedLinear) and not owner.OWN and kind in LEVELS:
        held = levels(owner)
        if held is not None and _fits(*held, kind):
            return pack(*held, kind)
    values = _values(owner, part)
    if not np.isfinite(values).all():
        raise ModelError(f"{name} has values that are not finite.", fix="Load the model again, or repair it.")
    import gguf

    with np.errstate(over="ignore"):
        data = gguf.quantize(values, type_of(kind))
    if kind != "F32" and not np.isfinite(decode(data, kind)).all():
        raise ModelError(
            f"{name} has values up to {np.abs(values).max():.3g}, too large for {kind}.",
            fix="Choose gguf_type BF16 or F32.",
        )
    return data


def decode(data: NDArray[Any], kind: str) -> NDArray[np.float32]:
    """What an encoded array stands for, in float32."""
    import gguf

    return gguf.dequantize(data, type_of(kind))


def levels(layer: QuantizedLinear) -> tuple[NDArray[np.int16], NDArray[np.float32]] | None:
    """The levels of a quantised layer (rows, columns), and the scale of each block of 32 (rows, blocks).

    None where a block of 32 has no scale of its own, because groups end inside it.
    """
    rows, columns = layer.codes.shape
    if columns % BLOCK or layer.scheme.width(columns) % BLOCK:
        return None
    found = layer.codes.to(torch.int16)
    if layer.zero is not None:
        found = found - _spread(layer.zero.to(torch.int16), rows, columns)
    scale = _spread(layer.scale.float(), rows, columns // BLOCK)
    return found.cpu().numpy(), scale.cpu().numpy()


def pack(found: NDArray[np.int16], scale: NDArray[np.float32], kind: str) -> NDArray[np.uint8]:
    """Levels (rows, columns) with a scale a block (rows, blocks), as the bytes (rows, bytes of a row)."""
    rows = len(found)
    d = scale.astype(np.float16).reshape(-1, 1).view(np.uint8)
    blocks = found.reshape(-1, BLOCK)
    if kind == "Q8_0":
        parts: list[NDArray[Any]] = [d, blocks.astype(np.int8).view(np.uint8)]
    else:
        codes = (blocks - LEVELS[kind][0]).astype(np.uint8)
        # The low four bits: the first half of the block below, the second half above.
        low = (codes[:, : BLOCK // 2] & 15) | (codes[:, BLOCK // 2 :] & 15) << 4
        high = [np.packbits(codes >> 4, axis=1, bitorder="little")] if kind == "Q5_0" else []
        parts = [d, *high, low]
    return np.concatenate(parts, axis=1).reshape(rows, -1)


def _fits(found: NDArray[np.int16], scale: NDArray[np.float32], kind: str) -> bool:
    """Whether a kind holds these levels, and float16 these scales with the precision that it has."""
    low, high = LEVELS[kind]
    if found.min() < low or found.max() > high:
        return False
    normal = np.finfo(np.float16)
    near = (normal.tiny <= np.abs(scale)) & (np.abs(scale) <= normal.max)
    with np.errstate(over="ignore"):
        return bool((near | (scale.astype(np.float16) == scale)).all())


def _spread(values: Tensor, rows: int, columns: int) -> Tensor:
    """Numbers of groups (rows, groups), or (1, 1) of a whole, as one for each of `columns`."""
    return values.repeat_interleave(columns // values.shape[1], 1).expand(rows, columns)


def _values(owner: nn.Module, part: str) -> NDArray[np.float32]:
    if part == "weight" and isinstance(owner, QuantizedLinear):
        found = owner.whole_weight()  # not its weight: that is rounded to the model's dtype
    else:
        found = getattr(owner, part).detach()
    return np.ascontiguousarray(found.float().cpu().numpy())
