"""Integer grids: which numbers a quantised weight or activation may be.

A scheme says how many bits there are and which values share a step. A grid has the step (`scale`) and the
code of zero (`zero`) of each group of `group_size` neighbours along the input dimension:

    codes q = clamp(round(w / scale) + zero, -2^(b-1), 2^(b-1) - 1),    w' = (q - zero) scale

    symmetric:   zero = 0, scale = max|w| / ((2^b - 1) / 2)
    asymmetric:  scale = (max - min) / (2^b - 1) with 0 inside [min, max]

These are the conventions of compressed-tensors. The scale is rounded to the dtype in which it is stored
before any code is computed: a code that was found with a finer scale would not give back the same weight.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from luthier.errors import MethodError

TINY = 1e-10


@dataclass(frozen=True)
class Scheme:
    """How a linear layer is quantised.

    Attributes:
        bits: of a weight, 2 to 8.
        group_size: neighbours along the input that share a scale; None: the whole row; 0: the whole tensor.
        symmetric: no zero point.
        activation_bits: of the layer's input; None leaves it in floating point.
        activation_per: what shares an activation scale: each token (found as it comes), the whole tensor
            (found as it comes), or the whole tensor with a scale found at calibration ("static").
    """

    bits: int = 4
    group_size: int | None = 64
    symmetric: bool = True
    activation_bits: int | None = None
    activation_per: Literal["token", "tensor", "static"] = "token"

    @property
    def low(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def width(self, columns: int) -> int:
        """Columns of a group, in a matrix with so many columns."""
        return columns if not self.group_size else self.group_size

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def __str__(self) -> str:
        group = {None: "row", 0: "tensor"}.get(self.group_size, f"g{self.group_size}")
        text = f"W{self.bits} {group}{'' if self.symmetric else ' asym'}"
        return (
            text if self.activation_bits is None else f"{text} A{self.activation_bits} {self.activation_per}"
        )


@dataclass
class Grid:
    """Scales and zero points of a matrix (rows, columns): each (rows, groups), or (1, 1) of a whole."""

    scheme: Scheme
    scale: Tensor
    zero: Tensor

    def quantize(self, weight: Tensor) -> Tensor:
        """Codes (rows, columns), int8, of a matrix."""
        return self._codes(weight).to(torch.int8).view(weight.shape)

    def dequantize(self, codes: Tensor) -> Tensor:
        """The numbers that codes stand for, float32 (rows, columns)."""
        return self._numbers(self._grouped(codes).float()).view(codes.shape)

    def round(self, weight: Tensor) -> Tensor:
        """Each weight moved to its nearest point of the grid, float32."""
        return self._numbers(self._codes(weight)).view(weight.shape)

    def column(self, index: int) -> "Grid":
        """The grid of one column of the matrix: scale and zero (rows, 1)."""
        group = 0 if not self.scheme.group_size else index // self.scheme.group_size
        part = replace(self.scheme, group_size=None)
        return Grid(part, self.scale[:, group : group + 1], self.zero[:, group : group + 1])

    def _codes(self, weight: Tensor) -> Tensor:
        scale, zero = self._steps()
        codes = torch.div(self._grouped(weight).float(), scale).round_()
        if not self.scheme.symmetric:
            codes.add_(zero)
        return codes.clamp_(self.scheme.low, self.scheme.high)

    def _numbers(self, codes: Tensor) -> Tensor:
        scale, zero = self._steps()
        return codes * scale if self.scheme.symmetric else (codes - zero) * scale

    def _steps(self) -> tuple[Tensor, Tensor]:
        """Scale and zero as float32, as they stand for a grouped matrix."""
        return self.scale.float()[..., None], self.zero.float()[..., None]

    def _grouped(self, matrix: Tensor) -> Tensor:
        """A matrix, or some of its columns, as (rows, groups, width): those side by side share a scale."""
        groups = self.scale.shape[1]
        return matrix.reshape(len(matrix), groups, matrix.shape[1] // groups)


def require_divides(scheme: Scheme, columns: int, name: str) -> None:
    """Raise MethodError where the groups do not fill a row; says which sizes do."""
    if scheme.group_size and columns % scheme.group_size:
        fitting = [g for g in (16, 32, 64, 128, 256) if columns % g == 0]
        raise MethodError(
            f"group_size {scheme.group_size} does not divide the {columns} inputs of {name}.",
            fix=f"Choose one of {', '.join(map(str, fitting))}, or null for one scale a row."
            if fitting
            else "Write group_size: null, for one scale a row.",
        )


def fit(weight: Tensor, scheme: Scheme, dtype: torch.dtype = torch.float32, shrink: Any = 1.0) -> Grid:
    """The grid that covers a matrix from its least to its greatest value.

    Args:
        weight: (rows, columns).
        dtype: in which the scale is stored.
        shrink: factor on the range, a number or a tensor (rows, groups): values beyond are clipped.
    """
    rows, columns = weight.shape
    if scheme.group_size == 0:
        grouped = weight.float().reshape(1, 1, -1)
    else:
        grouped = weight.float().reshape(rows, -1, scheme.width(columns))  # (rows, groups, width)
    levels = 2**scheme.bits - 1
    if scheme.symmetric:
        scale = grouped.abs().amax(-1) * shrink / (levels / 2)
        scale = stored(scale, dtype)
        return Grid(scheme, scale, torch.zeros_like(scale, dtype=torch.int8))
    low, high = grouped.amin(-1).clamp(max=0) * shrink, grouped.amax(-1).clamp(min=0) * shrink
    scale = stored((high - low) / levels, dtype)
    zero = (scheme.low - torch.round(low / scale.float())).clamp(scheme.low, scheme.high)
    return Grid(scheme, scale, zero.to(torch.int8))


def stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As it will lie on disk. A group of zeros has scale 1: its codes are zero whatever it is."""
    rounded = scale.to(dtype)
    return torch.where(rounded.float() > TINY, rounded, torch.ones_like(rounded))


def round_activations(x: Tensor, bits: int, per: str, scale: Tensor | None = None) -> Tensor:
    """Inputs (..., features) moved to a symmetric grid of `bits`, in their own dtype; computed in float32.

    Gradients pass as if nothing had been rounded.
    """
    values = x.detach().float()
    step = activation_step(values, bits, per) if scale is None else scale.float()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return straight_through(x, (torch.round(values / step).clamp_(low, high) * step).to(x.dtype))


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, bit for bit, whose gradient is handed to x as it comes."""
    return _StraightThrough.apply(x, rounded)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def activation_step(values: Tensor, bits: int, per: str) -> Tensor:
    """The step of inputs: for each token (..., 1), or of the whole tensor, as a scalar."""
    peak = values.abs().amax(-1, keepdim=True) if per == "token" else values.abs().amax()
    return (peak / ((2**bits - 1) / 2)).clamp_min(TINY)
