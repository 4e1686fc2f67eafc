"""RPTQ: inputs of 4 bits, channels of like range clustered and laid side by side.

Paper: Yuan, Niu, Liu, Liu, Wang, Shang, Sun, Wu, Wu and Wu, 2023, "RPTQ: Reorder-based Post-training
    Quantization for Large Language Models", arXiv 2304.01089.
Pick it when the inputs of layers are to have less than 8 bits, with steps that are fixed beforehand.
Cost: k-means on K points for each group of layers, two runs of each group's inputs, and GPTQ of the weights.

Channels of an activation differ in range by far more than values within one. Each channel k has a point (max,
min) over the calibration data; k-means joins like ones into clusters (`luthier.compression.clustered`), each
with a step and a zero point of its own. Weights share a step in each row and cluster. Weights are settled by
GPTQ on the inputs as they are rounded.

So that a kernel can work cluster by cluster, channels of one cluster are put side by side where the layers
before can give them in another order: fc1 -> fc2, gate and up -> down in any order, v -> o within each head,
the same for query heads that share one (`luthier.compression.folding` proves each). The function stays.

The inputs that norms make keep `norm_bits`, 8 by default, as in the authors' code; so does a block's own
input where no norm comes before its layers (BERT). Other layers' inputs have `activation_bits`.

Different from the authors' code: a norm writes in the order of the residual stream, so its readers hold the
cluster of each channel in place of a permutation; the numbers are the same. The products of queries with keys
and of probabilities with values stay in floating point (their clusters of q and k, and the 4-bit cache, are
not built). Ranges are the extremes of all batches; the authors' moving average (`momentum: 0.99`) follows the
first batch where there are few. Columns are settled in the order of falling inputs, and a group's ranges are
seen when those before it are rounded already. No common file format holds such layers: a saved model loads
with `luthier.load`, or with transformers after `import luthier.compression.clustered_storage`.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from luthier.compression.block import Block
from luthier.compression.clustered import (
    ClusteredLinear,
    ClusterGrid,
    Ranges,
    affine,
    cluster,
    cluster_affine,
    fit_clusters,
    round_affine,
)
from luthier.compression.folding import Order, find_orders
from luthier.compression.grid import Scheme, fit
from luthier.compression.linear import matrix, quantize_layer
from luthier.compression.method import OneShot
from luthier.compression.records import Record
from luthier.compression.statistics import Hessian, Samples, Statistic
from luthier.compression.sweep import Settle, sweep
from luthier.errors import MethodError
from luthier.options import option

SAMPLED = 512  # tokens on which errors are measured


@dataclass
class Config(OneShot):
    bits: int = option(4, "bits of a weight", ge=2, le=8)
    activation_bits: int = option(4, "bits of a layer's inputs", ge=2, le=8)
    norm_bits: int = option(8, "least bits of inputs that a norm makes", ge=2, le=8)
    clusters: int = option(32, "most clusters of the inputs of a layer", ge=1)
    head_clusters: int = option(4, "most clusters of a head, where heads are put together", ge=1)
    reorder: bool = option(True, "put the channels of a cluster side by side where it costs nothing")
    momentum: float = option(0.0, "of a moving average of ranges over batches; 0: their extremes", ge=0, lt=1)
    damping: float = option(0.01, "share of the mean of H's diagonal that is added to it", ge=0, le=1)

    quantizes: ClassVar[bool] = True

    @property
    def scheme(self) -> Scheme:
        return Scheme(self.bits, None, False, self.activation_bits, "static")

    def prepare(self, block: Block) -> None:
        self._orders = find_orders(block)
        ranges = {order.layers[0]: Ranges() for order in self._orders}
        block.observe(ranges)
        self._labels = []
        for order in self._orders:
            seen = ranges[order.layers[0]]
            labels, moved = self.clusters_of(order, seen.low.cpu(), seen.high.cpu())
            if moved is not None:
                order.permute(block.module, moved)
            self._labels.append(labels.to(block.device))

    def clusters_of(self, order: Order, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """The cluster of each input as it then lies, (in,), and the order that puts clusters side by side.

        Args:
            low: least value of each input, (in,); `high` the greatest.
        """
        points = torch.stack([high, low], 1)  # (in, 2)
        if not order.makers or not self.reorder:
            return cluster(points, self.clusters), None
        if order.span == order.features:
            labels = cluster(points, self.clusters)
            moved = labels.argsort(stable=True)
            return labels[moved], moved
        blocks = order.blocks
        heads = points.reshape(len(blocks), order.span, 2)
        orders, by_head, first = [], [], 0
        for output in range(int(blocks.max()) + 1):
            shared = heads[blocks == output]
            range_of = torch.stack([shared[..., 0].amax(0), shared[..., 1].amin(0)], 1)
            labels = cluster(range_of, self.head_clusters)
            orders.append(labels.argsort(stable=True))
            by_head.append(labels[orders[-1]])
        found = []
        for output in blocks.tolist():  # query heads that share values share clusters, but not the steps
            found.append(by_head[output] + first)
            first += int(by_head[output].max()) + 1
        return torch.cat(found), order.spread(torch.stack(orders))

    def change(self, block: Block) -> Iterator[Record]:
        missing = set(block.layers()) - {name for order in self._orders for name in order.layers}
        if missing:
            raise MethodError(
                f"{min(missing)} is not used on the first calibration batch: nothing is known of its inputs.",
                fix="Give longer batches, or leave the layer out (exclude).",
            )
        for order, labels in zip(self._orders, self._labels, strict=True):
            inputs = self._look(block, order, labels)
            for name in order.layers:
                start = time.perf_counter()
                record = self._change_layer(block, name, inputs)
                record.seconds = time.perf_counter() - start
                yield record

    def _look(self, block: Block, order: Order, labels: Tensor) -> "Inputs":
        name, least = order.layers[0], self.norm_bits if order.from_stream else 0
        bits = max(least, self.activation_bits)
        ranges, sample = Ranges(self.momentum), Samples(SAMPLED, block.tokens)
        block.observe({name: Together(ranges, sample)})
        steps = cluster_affine(ranges.low, ranges.high, labels, bits)
        seen = Inputs(labels, *steps, bits, sample.value, Hessian(order.features, block.device))
        block.observe({name: seen})
        return seen

    def _change_layer(self, block: Block, name: str, inputs: "Inputs") -> Record:
        layer = block.layers()[name]
        weight, hessian = matrix(layer), inputs.hessian.value
        own: Any = layer.weight
        grid = fit_clusters(weight, self.scheme, inputs.labels, own.dtype)
        order = hessian.diagonal().argsort(descending=True, stable=True)
        swept = sweep(weight, hessian, settle=settling(grid), order=order, damping=self.damping)
        made = quantize_layer(
            layer,
            grid.quantize(swept.weight),
            replace(grid, scheme=replace(grid.scheme, activation_bits=inputs.bits)),
            inputs.scale.clone(),
            kind=ClusteredLinear,
            labels=inputs.labels,
            input_zero=inputs.zero,
        )
        block.replace(name, made)
        x = inputs.sample
        before = relative_error(inputs.of_whole(), fit(weight, self.scheme).round(weight), x, weight)
        after = relative_error(inputs.round(x), swept.weight, x, weight)
        note = f"{len(inputs.scale)} clusters of inputs, {inputs.bits} bits"
        return Record(name, before, after, bits=self.bits, note=note)


@dataclass
class Inputs:
    """What is known of a group's inputs; as a statistic it adds them to the Hessian as they are rounded."""

    labels: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    sample: Tensor
    hessian: Hessian

    def round(self, x: Tensor) -> Tensor:
        return round_affine(x, self.scale[self.labels], self.zero[self.labels], self.bits)

    def of_whole(self) -> Tensor:
        """The sample with one step for all channels."""
        x = self.sample
        return round_affine(x, *affine(x.amin(), x.amax(), self.bits), self.bits)

    def add(self, x: Tensor) -> None:
        self.hessian.add(self.round(x))


class Together:
    """Two statistics fed as one."""

    def __init__(self, *parts: Statistic):
        self.parts = parts

    def add(self, x: Tensor) -> None:
        for part in self.parts:
            part.add(x)


def settling(grid: ClusterGrid) -> Settle:
    """Moves a column of the matrix to its cluster's grid."""

    def settle(column: Tensor, index: int) -> Tensor:
        return grid.column(index).round(column[:, None])[:, 0]

    return settle


def relative_error(rounded_x: Tensor, rounded_weight: Tensor, x: Tensor, weight: Tensor) -> float:
    """Squared error of a layer's output on (tokens, in), relative to the output's own square."""
    exact = x @ weight.T
    lost = (rounded_x @ rounded_weight.T - exact).square().sum()
    return float(lost / exact.square().sum().clamp_min(torch.finfo().tiny))
