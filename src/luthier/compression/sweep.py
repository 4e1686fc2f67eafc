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
    if not torch.isfinite(hessian).all():
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
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper = _inverse(factor.flip(0, 1))
            if torch.isfinite(upper).all():
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
    w = weight.clone()
    w[:, hessian.diagonal() == 0] = 0
    w = w[:, order].contiguous()
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
    # Columns as rows: contiguous memory for what is touched each time, (end - start, rows).
    part, factor = w[:, start:end].T.contiguous(), upper[start:end, start:end]
    lost = torch.zeros_like(part)
    diagonal = factor.diagonal()
    mask: Tensor | None = None
    indices, divisors = order[start:end].tolist(), diagonal.tolist()
    for j, (index, column, loss) in enumerate(zip(indices, part.unbind(), lost.unbind(), strict=True)):
        if look is not None and j % look_every == 0:
            ahead = slice(j, min(j + look_every, end - start))
            chosen = look(part[ahead].T, diagonal[ahead], order[start:end][ahead])
            mask = None if chosen is None else chosen.T
        new = column if mask is None else column.masked_fill(mask[j % look_every], 0)
        if settle is not None:
            new = settle(new, index)
        torch.sub(column, new, out=loss).div_(divisors[j])
        part[j + 1 :].addr_(factor[j, j + 1 :], loss, alpha=-1)
        column.copy_(new)
    w[:, start:end], errors[:, start:end] = part.T, lost.T


def rounding(grid: Grid) -> Settle:
    """Moves a column of the matrix to its grid."""
    scales, zeros = grid.scale.float().T.contiguous(), grid.zero.float().T.contiguous()  # (groups, out)
    low, high, width = grid.scheme.low, grid.scheme.high, grid.scheme.group_size
    shifted = bool(zeros.any())

    def settle(column: Tensor, index: int) -> Tensor:
        group = index // width if width else 0
        scale = scales[group]
        codes = torch.div(column, scale).round_()
        if shifted:
            zero = zeros[group]
            return codes.add_(zero).clamp_(low, high).sub_(zero).mul_(scale)
        return codes.clamp_(low, high).mul_(scale)

    return settle
