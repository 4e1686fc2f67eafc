"""Magnitude pruning: the smallest weights become zero.

Paper: Han, Pool, Tran and Dally, 2015, "Learning both Weights and Connections for Efficient Neural Networks",
    arXiv 1506.02626.
Pick it when there is no calibration data, or as the baseline that every other method must beat.
Cost: a sort of the weights; no data.

Of |W| the lowest share `sparsity` becomes zero: over the whole layer or each row (`scope`); or so many of
each group of neighbours (`pattern: 2:4`). Exactly floor(s n) weights go, of equal ones the first; weights
that stay are not touched. The file does not become smaller: it holds the zeros.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from luthier.compression.block import Block
from luthier.compression.linear import matrix
from luthier.compression.method import Pruner, prune_layer
from luthier.compression.records import Record
from luthier.options import option


@dataclass
class Config(Pruner):
    scope: str = option("layer", "among which weights the smallest are looked for", choices=("layer", "row"))

    needs_data: ClassVar[bool] = False

    def change(self, block: Block) -> Iterator[Record]:
        for name, layer in block.layers().items():
            yield prune_layer(name, layer, self.mask(matrix(layer).abs(), self.scope))
