"""The column sweep of Optimal Brain Surgeon, which GPTQ, SparseGPT and both at once share.

A weight matrix W (rows, columns) is to be moved to W' whose entries are on a grid, or zero, such that the
output on the calibration inputs changes least: min tr((W - W') H (W - W')^T). The columns are settled one
after the other; what a column loses is made up for by the columns that are not settled yet (Frantar et al.,
2022, arXiv 2210.17323; Frantar and Alistarh, 2023, arXiv 2301.00774).

The papers do so with the factor of H^-1 = U^T U. We need no inverse: with H = V diag(r^2) V^T, V upper
triangular and 1 on its diagonal, U_jj = 1 / r_j, and when all columns before j are settled

    w_j = W_j + sum_k<j d_k V_kj,     e_j = r_j (w_j - w'_j),     tr(D H D^T) = sum |e_j|^2

where D = W - W'. The last is exact, with the damped H. Columns are worked on in blocks, which are brought up
to date with all columns before when their turn comes: this changes speed, not the result.
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
_FACTORS = WeakIdKeyDictionary()  # of each Hessian that is in use the last `Factor`


@dataclass
class Swept:
    """What a sweep left.

    Attributes:
        weight: W' (rows, columns), float32.
        damping: as a share of the mean of the diagonal: more than what was asked where that did not do.
        square: tr((W - W') H (W - W')^T), H without damping.
    """

    weight: Tensor
    damping: float
    square: float


Settle = Callable[[Tensor, int], Tensor]
"""Takes a column (rows,) as it now is and its index in W; returns what it becomes."""

Look = Callable[[Tensor, Tensor, Tensor], Tensor | None]
"""Takes the next columns (rows, n) as they now are, U_jj of each (n,) and their indices in W (n,). Returns
the mask of entries (rows, n) that become zero, or None where none does."""


@dataclass
class Factor:
    """H = V diag(r^2) V^T of a damped Hessian, its columns in the order in which they are settled.

    Attributes:
        order: indices of the columns in W and H.
        unit: V (columns, columns), upper triangular, 1 on the diagonal.
        roots: r (columns,).
        damping: as a share of the mean of the diagonal.
        added: what was added to the diagonal.
    """

    order: Tensor
    unit: Tensor
    roots: Tensor
    damping: float
    added: float


def factor(hessian: Tensor, damping: float, order: Tensor | None = None) -> Factor:
    """The factor of H with `damping` of the mean diagonal added.

    Where H is not positive definite even so, the damping is raised tenfold until it is, and this is said.

    Args:
        order: indices of the columns in the order in which they are settled; default: from left to right. An
            input that is always zero counts as if it had 1 on the diagonal.

    Raises:
        MethodError: no damping helps, or the inputs are not finite.
    """
    if not hessian.sum().isfinite():  # of any entry, without a copy
        raise MethodError(
            "The inputs of a layer are not finite on the calibration data.", fix="Use another dtype or data."
        )
    order = torch.arange(len(hessian), device=hessian.device) if order is None else order
    damped = hessian.index_select(0, order).index_select(1, order)
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    mean, used = float(diagonal.mean()), damping
    diagonal.add_(used * mean)
    while (found := _factor(damped)) is None:
        more = max(10 * used, 1e-4)
        if more > MOST_DAMPING:
            raise MethodError("The Hessian of a layer cannot be inverted.", fix="Use more calibration data.")
        diagonal.add_((more - used) * mean)
        used = more
    if used > damping:
        log.warning("a Hessian was not positive definite: damping raised from %g to %g", damping, used)
    return Factor(order, *found, used, used * mean)


def _factor(hessian: Tensor) -> tuple[Tensor, Tensor] | None:
    """V and r, or None where H is not positive definite."""
    if hessian.dtype == torch.float32 and hessian.device.type == "cpu" and native.here():
        return native.factor(hessian)
    # With its rows and columns in the opposite order V diag(r) is the usual, lower factor.
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    upper = lower.flip(0, 1)
    roots = upper.diagonal().clone()
    return None if failed or not roots.isfinite().all() else (upper / roots, roots)


def _known_factor(hessian: Tensor, order: Tensor | None, damping: float) -> Factor:
    """The factor; layers that share an H share it too."""
    version, asked, found = _FACTORS.get(hessian, (None, None, None))
    order = torch.arange(len(hessian), device=hessian.device) if order is None else order
    if version == hessian._version and asked == damping and torch.equal(found.order, order):
        return found
    found = factor(hessian, damping, order)
    _FACTORS[hessian] = (hessian._version, damping, found)
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
        block: columns that are brought up to date at once; made a multiple of `look_every`.
        damping: share of the mean of H's diagonal that is added to the diagonal.
    """
    factor = _known_factor(hessian, order, damping)
    # Columns as rows, (columns, rows): contiguous memory for what is touched each time.
    natively = _has_kernel(weight, factor, settle)
    take, put = (native.take_columns, native.put_columns) if natively else (_take_columns, _put_columns)
    before = take(weight.contiguous(), factor.order)
    dead = hessian.diagonal()[factor.order] == 0
    if dead.any():
        before[dead] = 0
    w, changes, square = before.clone(), torch.empty_like(before), 0.0
    columns = len(w)
    catch_up, settle_columns = _catch_up, _column_by_column
    if natively:
        catch_up, settle_columns = native.catch_up, _natively
        block = columns if look is None else block  # the kernel has blocks of its own
    every = block if look is None else look_every
    block = -(-block // every) * every
    for first in range(0, columns, block):
        end = min(first + block, columns)
        if first:
            catch_up(w, changes, factor.unit, (0, first, end))
        for start in range(first, end, every):
            here = start, min(start + every, end)
            if start > first:
                catch_up(w, changes, factor.unit, (first, *here))
            zeros = None if look is None else _seen(look, w, before, changes, factor, here, settle_columns)
            square += settle_columns(w, before, changes, factor, here, settle, zeros)
    square -= factor.added * float(torch.linalg.vector_norm(changes)) ** 2
    return Swept(put(w, factor.order), factor.damping, max(0.0, square))


def _seen(
    look: Look,
    w: Tensor,
    before: Tensor,
    changes: Tensor,
    factor: Factor,
    columns: tuple[int, int],
    settle_columns: Callable[..., float],
) -> Tensor | None:
    """What becomes zero (columns, rows), by `look` at some columns that are up to date.

    Each is shown as it is if none of those beside it changes any more.
    """
    part = slice(*columns)
    kept = w[part].clone()
    settle_columns(w, before, changes, factor, columns, None, None)
    zeros = look(w[part].T, 1 / factor.roots[part], factor.order[part])
    w[part] = kept
    return None if zeros is None else zeros.T


def _has_kernel(weight: Tensor, factor: Factor, settle: Settle | None) -> bool:
    known = settle is None or isinstance(settle, Rounding)
    single = weight.dtype == factor.unit.dtype == torch.float32
    return known and single and weight.device.type == "cpu" and native.here()


def _take_columns(matrix: Tensor, order: Tensor) -> Tensor:
    return matrix.T.contiguous().index_select(0, order)


def _put_columns(columns: Tensor, order: Tensor) -> Tensor:
    return torch.empty_like(columns).index_copy_(0, order, columns).T.contiguous()


def _natively(
    w: Tensor,
    before: Tensor,
    changes: Tensor,
    factor: Factor,
    columns: tuple[int, int],
    settle: Settle | None,
    zeros: Tensor | None,
) -> float:
    grid = None
    if isinstance(settle, Rounding):
        group = factor.order // settle.width if settle.width else torch.zeros_like(factor.order)
        # A matrix with one scale for all has it once: (1, 1).
        scales, zeros_of = (
            None if part is None else part.expand(-1, w.shape[1]).contiguous()
            for part in (settle.scales, settle.zeros)
        )
        grid = (scales, zeros_of, group, settle.low, settle.high)
    zeros = None if zeros is None else zeros.contiguous()
    return native.settle(w, before, changes, factor.unit, factor.roots, columns, grid=grid, zeros=zeros)


def _catch_up(w: Tensor, changes: Tensor, unit: Tensor, columns: tuple[int, int, int]) -> None:
    """Add to some columns what the changes of others ask of them; w, changes (columns, rows)."""
    first, start, stop = columns
    w[start:stop].addmm_(unit[first:start, start:stop].T, changes[first:start])


def _column_by_column(
    w: Tensor,
    before: Tensor,
    changes: Tensor,
    factor: Factor,
    columns: tuple[int, int],
    settle: Settle | None,
    zeros: Tensor | None,
) -> float:
    """Settle some columns that are up to date; all (columns, rows). Returns the sum of the squared errors."""
    part = slice(*columns)
    now, unit = w[part], factor.unit[part, part]
    lost = torch.empty_like(now)
    for j, index in enumerate(factor.order[part].tolist()):
        new = now[j] if zeros is None else now[j].masked_fill(zeros[j], 0)
        if settle is not None:
            new = settle(new, index)
        torch.sub(now[j], new, out=lost[j])
        torch.sub(before[part][j], new, out=changes[part][j])
        now[j + 1 :].addr_(unit[j, j + 1 :], changes[part][j])
        now[j].copy_(new)
    return float((lost.square().sum(1) * factor.roots[part].square()).sum())


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
