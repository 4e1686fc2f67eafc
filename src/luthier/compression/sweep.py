"""The column sweep of Optimal Brain Surgeon, which GPTQ, SparseGPT and both at once share.

A weight matrix W (rows, columns) is to be moved to W' whose entries are on a grid, or zero, such that the
output on the calibration inputs changes least: min tr((W - W') H (W - W')^T). The columns are settled one
after the other; what a column loses is made up for by the columns that are not settled yet (Frantar et al.,
2022, arXiv 2210.17323; Frantar and Alistarh, 2023, arXiv 2301.00774). With H^-1 = U^T U, U upper triangular,

    e_j = (w_j - w'_j) / U_jj,     W_:,k -= e_j U_jk for all k > j,     |W - W'|_H^2 = sum e_j^2

The last is exact, with the damped H. Columns are worked on in blocks, those to the right of a block being
brought up to date once: this changes speed, not the result.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from luthier.acceleration import native
from luthier.compression.grid import Grid
from luthier.errors import MethodError

log = logging.getLogger("luthier.compression")

MOST_DAMPING = 10.0
LEAF = 64  # size from which on a triangle is inverted at once
_FACTORS = WeakIdKeyDictionary()  # of each Hessian that is in use the last factor


@dataclass
class Swept:
    """What a sweep left.

    Attributes:
        weight: W' (rows, columns), float32.
        errors: the e_j, (rows, columns), in the order in which the columns were settled.
        damping: as a share of the mean of the diagonal: more than what was asked where that did not do.
    """

    weight: Tensor
    errors: Tensor
    damping: float


Settle = Callable[[Tensor, int], Tensor]
"""Takes a column (rows,) as it now is and its index in W; returns what it becomes."""

Look = Callable[[Tensor, Tensor, Tensor], Tensor | None]
"""Takes the next columns (rows, n) as they now are, U_jj of each (n,) and their indices in W (n,). Returns
the mask of entries (rows, n) that become zero, or None where none does."""


def inverse_factor(hessian: Tensor, damping: float, order: Tensor | None = None) -> tuple[Tensor, float]:
    """U of H^-1 = U^T U with `damping` of the mean diagonal added, and the damping that was needed.

    Where H is not positive definite even so, the damping is raised tenfold until it is, and this is said.

    Args:
        order: indices of the columns in their order in U; default: that of H. An input that is always zero
            counts as if it had 1 on the diagonal.

    Raises:
        MethodError: no damping helps: the inputs are not finite.
    """
    if not hessian.sum().isfinite():  # of any entry, without a copy
        raise MethodError(
            "The inputs of a layer are not finite on the calibration data.", fix="Use another dtype or data."
        )
    order = torch.arange(len(hessian), device=hessian.device) if order is None else order
    # With its columns in the opposite order H has the factor R of H = R R^T, so that U = R^-1.
    back = order.flip(0)
    used = damping
    while True:
        damped = hessian[back[:, None], back]
        diagonal = damped.diagonal()
        diagonal[diagonal == 0] = 1
        diagonal.add_(used * diagonal.mean())
        _, failed = torch.linalg.cholesky_ex(damped, out=(damped, order.new_empty((), dtype=torch.int32)))
        if not failed:
            damped = damped.flip(0, 1)
            upper = _inverse(damped)
            if upper.sum().isfinite():
                break
        used = max(10 * used, 1e-4)
        if used > MOST_DAMPING:
            raise MethodError("The Hessian of a layer cannot be inverted.", fix="Use more calibration data.")
    if used > damping:
        log.warning("a Hessian was not positive definite: damping raised from %g to %g", damping, used)
    return upper, used


def _inverse(upper: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix, half by half: most of it are products."""
    size = len(upper)
    if size <= LEAF:
        return torch.linalg.solve_triangular(upper, torch.eye(size).to(upper), upper=True)
    half = size // 2
    first, last = _inverse(upper[:half, :half]), _inverse(upper[half:, half:])
    found = torch.zeros_like(upper)
    found[:half, :half], found[half:, half:] = first, last
    found[:half, half:] = -(first @ upper[:half, half:] @ last)
    return found


def _factor_in_order(hessian: Tensor, order: Tensor, damping: float) -> tuple[Tensor, float]:
    """U of H with its columns in an order, and its damping. Layers that share an H share it too."""
    version, known_order, known_damping, found = _FACTORS.get(hessian, (None, None, None, None))
    if version == hessian._version and known_damping == damping and torch.equal(known_order, order):
        return found
    found = inverse_factor(hessian, damping, order)
    _FACTORS[hessian] = (hessian._version, order, damping, found)
    return found


def sweep(
    weight: Tensor,
    hessian: Tensor,
    *,
    settle: Settle | None = None,
    look: Look | None = None,
    look_every: int = 128,
    order: Tensor | None = None,
    block: int = 128,
    damping: float = 0.01,
) -> Swept:
    """Settle the columns of W one by one.

    Args:
        weight: (rows, columns), float32; not changed.
        hessian: (columns, columns), float32; not changed. An input that is always zero has its column zeroed.
        settle: what a column becomes; default: as it is. It sees zeros where `look` chose them.
        look: is shown the next `look_every` columns before they are settled.
        order: indices of the columns in the order in which they are settled; default: from left to right.
        block: columns between two updates of all that follow; made a multiple of `look_every`.
        damping: share of the mean of H's diagonal that is added to the diagonal.
    """
    columns = weight.shape[1]
    order = torch.arange(columns, device=weight.device) if order is None else order
    w = weight[:, order]
    w[:, hessian.diagonal()[order] == 0] = 0
    upper, used = _factor_in_order(hessian, order, damping)
    errors = torch.zeros_like(w)
    block = -(-block // look_every) * look_every if look is not None else block
    for start in range(0, columns, block):
        end = min(start + block, columns)
        _sweep_block(w, errors, upper, start, end, order, settle, look, look_every)
        w[:, end:].addmm_(errors[:, start:end], upper[start:end, end:], alpha=-1)
    found = torch.empty_like(w)
    found[:, order] = w
    return Swept(found, errors, used)


def _sweep_block(
    w: Tensor,
    errors: Tensor,
    upper: Tensor,
    start: int,
    end: int,
    order: Tensor,
    settle: Settle | None,
    look: Look | None,
    look_every: int,
) -> None:
    """Settle columns start to end, w and errors in place."""
    every = look_every if look is not None else end - start
    for first in range(start, end, every):
        last = min(first + every, end)
        zeros: Tensor | None = None
        if look is not None:
            zeros = look(w[:, first:last], upper.diagonal()[first:last], order[first:last])
        settle_here = _natively if _has_kernel(w, settle) else _column_by_column
        settle_here(w, errors, upper, (first, last, end), order, settle, zeros)


def _has_kernel(w: Tensor, settle: Settle | None) -> bool:
    known = settle is None or isinstance(settle, Rounding)
    return known and w.dtype == torch.float32 and w.device.type == "cpu" and native.here()


def _natively(
    w: Tensor,
    errors: Tensor,
    upper: Tensor,
    columns: tuple[int, int, int],
    order: Tensor,
    settle: Settle | None,
    zeros: Tensor | None,
) -> None:
    grid = None
    if isinstance(settle, Rounding):
        group = order // settle.width if settle.width else torch.zeros_like(order)
        # A matrix with one scale for all has it once: (1, 1).
        scales, zeros_of = (
            None if part is None else part.expand(-1, len(w)).contiguous()
            for part in (settle.scales, settle.zeros)
        )
        grid = (scales, zeros_of, group, settle.low, settle.high)
    zeros = None if zeros is None else zeros.contiguous()
    native.sweep(w, errors, upper.contiguous(), columns, grid=grid, zeros=zeros)


def _column_by_column(
    w: Tensor,
    errors: Tensor,
    upper: Tensor,
    columns: tuple[int, int, int],
    order: Tensor,
    settle: Settle | None,
    zeros: Tensor | None,
) -> None:
    start, stop, end = columns
    # Columns as rows: contiguous memory for what is touched each time, (end - start, rows).
    part, factor = w[:, start:end].T.contiguous(), upper[start:end, start:end]
    lost = torch.empty_like(part[: stop - start])
    mask = None if zeros is None else zeros.T
    indices, divisors = order[start:stop].tolist(), factor.diagonal().tolist()
    for j, (index, column, loss) in enumerate(zip(indices, part.unbind(), lost.unbind(), strict=False)):
        new = column if mask is None else column.masked_fill(mask[j], 0)
        if settle is not None:
            new = settle(new, index)
        torch.sub(column, new, out=loss).div_(divisors[j])
        part[j + 1 :].addr_(factor[j, j + 1 :], loss, alpha=-1)
        column.copy_(new)
    w[:, start:end], errors[:, start:stop] = part.T, lost.T


class Rounding:
    """Moves a column of the matrix to its grid."""

    def __init__(self, grid: Grid):
        self.scales = grid.scale.float().T.contiguous()  # (groups, rows)
        self.zeros = grid.zero.float().T.contiguous() if grid.zero.any() else None
        self.low, self.high = grid.scheme.low, grid.scheme.high
        self.width = grid.scheme.group_size

    def __call__(self, column: Tensor, index: int) -> Tensor:
        group = index // self.width if self.width else 0
        codes = torch.div(column, self.scales[group]).round_()
        if self.zeros is not None:
            zero = self.zeros[group]
            return codes.add_(zero).clamp_(self.low, self.high).sub_(zero).mul_(self.scales[group])
        return codes.clamp_(self.low, self.high).mul_(self.scales[group])
