"""The column sweep of Optimal Brain Surgeon, which GPTQ, SparseGPT and both at once share.

A weight matrix W (rows, columns) is to be moved to W' whose entries are on a grid, or zero, such that the
output on the calibration inputs changes least: min tr((W - W') H (W - W')^T). The columns are settled one
after the other; what a column loses is made up for by the columns that are not settled yet (Frantar et al.,
2022, arXiv 2210.17323; Frantar and Alistarh, 2023, arXiv 2301.00774). With H^-1 = U^T U, U upper triangular,

    e_j = (w_j - w'_j) / U_jj,     W_:,k -= e_j U_jk for all k > j,     |W - W'|_H^2 = sum e_j^2

The last is exact, with the damped H. Columns are worked on in blocks, which are brought up to date with the
errors of all columns before when their turn comes: this changes speed, not the result.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from luthier.acceleration import native
from luthier.acceleration.float32 import linear
from luthier.compression.grid import Grid
from luthier.errors import MethodError

log = logging.getLogger("luthier.compression")

MOST_DAMPING = 10.0
LEAF = 96  # size up to which a matrix is factored at once
_FACTORS = WeakIdKeyDictionary()  # of each Hessian that is in use the last factor


@dataclass
class Swept:
    """What a sweep left.

    Attributes:
        weight: W' (rows, columns), float32.
        errors: the e_j, (rows, columns), in the order in which the columns were settled.
        damping: as a share of the mean of the diagonal: more than what was asked where that did not do.
        square: tr((W - W') H (W - W')^T), H without damping.
    """

    weight: Tensor
    errors: Tensor
    damping: float
    square: float


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
    damped = hessian.clone() if order is None else hessian.index_select(0, order).index_select(1, order)
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    mean, used = diagonal.mean(), damping
    diagonal.add_(used * mean)
    while (upper := _inverse_factor(damped)) is None or not upper.sum().isfinite():
        more = max(10 * used, 1e-4)
        if more > MOST_DAMPING:
            raise MethodError("The Hessian of a layer cannot be inverted.", fix="Use more calibration data.")
        diagonal.add_((more - used) * mean)
        used = more
    if used > damping:
        log.warning("a Hessian was not positive definite: damping raised from %g to %g", damping, used)
    return upper, used


def _inverse_factor(hessian: Tensor) -> Tensor | None:
    """U of H^-1 = U^T U, or None where H is not positive definite.

    H = R R^T with R = U^-1 upper triangular. Half by half, almost all of it are products:

        R_12 = H_12 U_22^T,    R_11 R_11^T = H_11 - R_12 R_12^T,    U_12 = -U_11 R_12 U_22
    """
    size = len(hessian)
    if size <= LEAF:  # with its rows and columns in the opposite order R is the usual, lower factor
        lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
        return None if failed else inverse.flip(0, 1).contiguous()
    half = size // 2
    last = _inverse_factor(hessian[half:, half:])
    if last is None:
        return None
    between = linear(hessian[:half, half:], last)
    first = _inverse_factor(hessian[:half, :half] - linear(between, between))
    if first is None:
        return None
    found = torch.zeros_like(hessian)
    found[:half, :half], found[half:, half:] = first, last
    torch.neg(linear(linear(first, between.T), last.T), out=found[:half, half:])
    return found


def _factor_in_order(hessian: Tensor, order: Tensor | None, damping: float) -> tuple[Tensor, float]:
    """U of H with its columns in an order, and its damping. Layers that share an H share it too."""
    version, known_order, known_damping, found = _FACTORS.get(hessian, (None, None, None, None))
    same = known_order is order is None or (None not in (known_order, order) and torch.equal(known_order, order))
    if version == hessian._version and known_damping == damping and same:
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
        block: columns that are brought up to date at once where nobody looks at them.
        damping: share of the mean of H's diagonal that is added to the diagonal.
    """
    columns = weight.shape[1]
    order = torch.arange(columns, device=weight.device) if order is None else order
    upper, used = _factor_in_order(hessian, order, damping)
    # Columns as rows, (columns, rows): contiguous memory for what is touched each time.
    before = weight.T.contiguous().index_select(0, order)
    diagonal = hessian.diagonal()[order]
    if not diagonal.all():
        before[diagonal == 0], diagonal[diagonal == 0] = 0, 1
    w, errors = before.clone(), torch.empty_like(before)
    catch_up, settle_columns = _catch_up, _column_by_column
    if _has_kernel(w, settle):
        catch_up, settle_columns = native.catch_up, _natively
        block = columns  # the kernel has blocks of its own
    every = block if look is None else look_every
    for start in range(0, columns, every):
        here = start, min(start + every, columns)
        catch_up(w, errors, upper, here)
        zeros: Tensor | None = None
        if look is not None:
            zeros = look(w[slice(*here)].T, upper.diagonal()[slice(*here)], order[slice(*here)])
        settle_columns(w, errors, upper, here, order, settle, None if zeros is None else zeros.T)
    added = used * diagonal.mean() * _sum_of_squares(before.sub_(w))
    square = max(0.0, float(_sum_of_squares(errors) - added))
    found = before.index_copy_(0, order, w)
    return Swept(found.T.contiguous(), errors.T, used, square)


def _sum_of_squares(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix).square()


def _has_kernel(w: Tensor, settle: Settle | None) -> bool:
    known = settle is None or isinstance(settle, Rounding)
    return known and w.dtype == torch.float32 and w.device.type == "cpu" and native.here()


def _natively(
    w: Tensor,
    errors: Tensor,
    upper: Tensor,
    columns: tuple[int, int],
    order: Tensor,
    settle: Settle | None,
    zeros: Tensor | None,
) -> None:
    grid = None
    if isinstance(settle, Rounding):
        group = order // settle.width if settle.width else torch.zeros_like(order)
        # A matrix with one scale for all has it once: (1, 1).
        scales, zeros_of = (
            None if part is None else part.expand(-1, w.shape[1]).contiguous()
            for part in (settle.scales, settle.zeros)
        )
        grid = (scales, zeros_of, group, settle.low, settle.high)
    zeros = None if zeros is None else zeros.contiguous()
    native.settle(w, errors, upper, columns, grid=grid, zeros=zeros)


def _catch_up(w: Tensor, errors: Tensor, upper: Tensor, columns: tuple[int, int]) -> None:
    """Take from some columns what the errors of all before ask of them; w, errors (columns, rows)."""
    start, stop = columns
    w[start:stop].addmm_(upper[:start, start:stop].T, errors[:start], alpha=-1)


def _column_by_column(
    w: Tensor,
    errors: Tensor,
    upper: Tensor,
    columns: tuple[int, int],
    order: Tensor,
    settle: Settle | None,
    zeros: Tensor | None,
) -> None:
    """Settle some columns that are up to date; zeros (columns, rows)."""
    start, stop = columns
    part, lost, factor = w[start:stop], errors[start:stop], upper[start:stop, start:stop]
    indices, divisors = order[start:stop].tolist(), factor.diagonal().tolist()
    for j, (index, column, loss) in enumerate(zip(indices, part.unbind(), lost.unbind(), strict=True)):
        new = column if zeros is None else column.masked_fill(zeros[j], 0)
        if settle is not None:
            new = settle(new, index)
        torch.sub(column, new, out=loss).div_(divisors[j])
        part[j + 1 :].addr_(factor[j, j + 1 :], loss, alpha=-1)
        column.copy_(new)


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
