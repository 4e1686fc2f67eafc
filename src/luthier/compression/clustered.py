"""Rounding in clusters of channels: inputs of like range share a step, and so do a row's weights for them.

A channel's range over the calibration data is a point (max, min); points near each other are one cluster,
found by k-means. Which cluster a channel is in is held as a label, so clusters need not lie side by side.
Inputs of b bits, with lo and hi the range of a cluster:

    s = (hi - lo) / 2^b,    z = round(-(hi + lo) / 2s)
    Q(x) = (clamp(round(x / s) + z, -2^(b-1), 2^(b-1) - 1) - z) s

Steps are fixed at calibration, nothing is measured when the model runs.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from luthier.compression.grid import Grid, Scheme, stored, straight_through
from luthier.compression.linear import QuantizedLinear

STEP_RANGE = (1e-4, 1e4)
STARTS, ROUNDS = 10, 50  # of k-means


@dataclass
class ClusterGrid(Grid):
    """A grid whose groups are clusters of columns.

    Attributes:
        labels: the cluster of each column, (columns,); scale and zero are (rows, clusters).
    """

    labels: Tensor

    def column(self, index: int) -> Grid:
        group = int(self.labels[index])
        return Grid(self.scheme, self.scale[:, group : group + 1], self.zero[:, group : group + 1])

    def _steps(self) -> tuple[Tensor, Tensor]:
        return self.scale.float()[:, self.labels], self.zero.float()[:, self.labels]

    def _grouped(self, matrix: Tensor) -> Tensor:
        return matrix


class ClusteredLinear(QuantizedLinear):
    """A linear layer whose weights and inputs are rounded in the same clusters of channels.

    Attributes:
        labels: the cluster of each input, (in,).
        input_scale, input_zero: (clusters,), float32.
    """

    OWN: ClassVar[tuple[str, ...]] = ("labels", "input_zero")

    labels: Tensor
    input_zero: Tensor

    def __init__(
        self,
        codes: Tensor,
        grid: Grid,
        bias: Tensor | None = None,
        *,
        labels: Tensor,
        input_zero: Tensor,
        **options: Any,
    ):
        super().__init__(codes, grid, bias, **options)
        # Copies: layers of a group that shared memory could not be saved.
        self.register_buffer("labels", labels.clone())
        self.register_buffer("input_zero", input_zero.clone())

    @property
    def grid(self) -> ClusterGrid:
        assert self.zero is not None
        return ClusterGrid(self.scheme, self.scale, self.zero, self.labels)

    def quantize_input(self, x: Tensor) -> Tensor:
        bits = self.scheme.activation_bits
        assert self.input_scale is not None
        if bits is None:
            return x
        rounded = round_affine(x.detach(), self.input_scale[self.labels], self.input_zero[self.labels], bits)
        return straight_through(x, rounded)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, clusters={self.scale.shape[1]}"


class Ranges:
    """Least and greatest value of each channel, over all batches or as a moving average over them.

    Attributes:
        momentum: share of the average that stays with each batch; 0: the extremes of all batches.
    """

    def __init__(self, momentum: float = 0.0):
        self.momentum = momentum
        self.low = self.high = torch.empty(0)

    def add(self, x: Tensor) -> None:
        if not len(x):
            return
        low, high = x.float().amin(0), x.float().amax(0)
        if not self.low.numel():
            self.low, self.high = low, high
        elif self.momentum:
            share = 1 - self.momentum
            self.low, self.high = self.low.lerp(low, share), self.high.lerp(high, share)
        else:
            self.low, self.high = self.low.minimum(low), self.high.maximum(high)


def cluster(points: Tensor, count: int) -> Tensor:
    """k-means: the cluster of each of n points, (n,), numbered from 0 without gaps, large spreads last.

    Args:
        points: (n, dimensions); the same points always give the same clusters.
        count: at most so many.
    """
    points = points.double()
    generator = torch.Generator().manual_seed(0)
    best, labels = torch.inf, torch.zeros(len(points), dtype=torch.long)
    for _ in range(STARTS if count > 1 else 0):
        centres = _spread_out(points, count, generator)
        for _ in range(ROUNDS):
            distances, nearest = torch.cdist(points, centres).min(1)
            sums = torch.zeros_like(centres).index_add_(0, nearest, points)
            sizes = torch.bincount(nearest, minlength=len(centres))[:, None]
            moved = torch.where(sizes > 0, sums / sizes.clamp_min(1), centres)
            if torch.equal(moved, centres):
                break
            centres = moved
        lost = float(distances.square().sum())
        if lost < best:
            best, labels = lost, nearest
    return _numbered(labels, points.norm(dim=1))


def _spread_out(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Starting centres: points drawn by their squared distance to the nearest one before (k-means++)."""
    chosen = [int(torch.randint(len(points), (), generator=generator))]
    nearest = torch.cdist(points, points[chosen]).square()[:, 0]
    while len(chosen) < count and float(nearest.sum()) > 0:
        chosen.append(int(torch.multinomial(nearest.cpu(), 1, generator=generator)))
        nearest = nearest.minimum(torch.cdist(points, points[chosen[-1:]]).square()[:, 0])
    return points[chosen]


def _numbered(labels: Tensor, sizes: Tensor) -> Tensor:
    """The same clusters numbered from 0 by the mean size of their points."""
    _, dense = labels.unique(return_inverse=True)
    mean = torch.zeros(int(dense.max()) + 1, dtype=sizes.dtype, device=sizes.device)
    mean = mean.scatter_reduce(0, dense, sizes, "mean", include_self=False)
    return mean.argsort(stable=True).argsort()[dense]


def affine(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Step and zero point of inputs between `low` and `high`, float32."""
    scale = ((high - low) / 2**bits).clamp(*STEP_RANGE)
    return scale, torch.round(-(high + low) / (2 * scale)).clamp(-STEP_RANGE[1], STEP_RANGE[1])


def cluster_affine(low: Tensor, high: Tensor, labels: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Step and zero point of each cluster of channels, (clusters,), of the range of each channel."""
    made = low.new_zeros(int(labels.max()) + 1)
    least = made.scatter_reduce(0, labels, low, "amin", include_self=False)
    greatest = made.scatter_reduce(0, labels, high, "amax", include_self=False)
    return affine(least, greatest, bits)


def round_affine(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Inputs (..., in) moved to the grid; scale and zero (in,) or scalars. In the dtype of x."""
    codes = (torch.round(x.float() / scale) + zero).clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return codes.sub_(zero).mul_(scale).to(x.dtype)


def fit_clusters(weight: Tensor, scheme: Scheme, labels: Tensor, dtype: torch.dtype) -> ClusterGrid:
    """The grid that covers each row of a matrix (rows, columns) in each cluster of its columns."""
    rows = len(weight)
    made = weight.new_zeros(rows, int(labels.max()) + 1)  # zeros: zero itself is always on the grid
    places = labels.expand(rows, -1)
    low = made.scatter_reduce(1, places, weight, "amin")
    high = made.scatter_reduce(1, places, weight, "amax")
    scale = stored((high - low) / (2**scheme.bits - 1), dtype)
    zero = (scheme.low - torch.round(low / scale.float())).clamp(scheme.low, scheme.high)
    return ClusterGrid(replace(scheme, symmetric=False, group_size=None), scale, zero.to(torch.int8), labels)
