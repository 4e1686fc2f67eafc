"""Wanda: prune by weight times the norm of its input, row by row.

Paper: Sun, Liu, Bair and Kolter, 2023, "A Simple and Effective Pruning Approach for Large Language Models",
    arXiv 2306.11695.
Pick it when a good mask is wanted in seconds, or as the start of a recovery training.
Cost: two runs of each block over the calibration data and a sort; one number an input feature.

The score of weight (i, j) is |W_ij| |X_j|, with |X_j| the norm of input feature j over all calibration
tokens. Of each row the lowest floor(s in) become zero, or so many of each group (`pattern: 2:4`); the others
are not touched. It is SparseGPT's criterion where H is taken for diagonal, and nothing is made up for.

All layers of a block are scored on the block as it came, as in the authors' code; blocks above see it pruned.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from luthier.compression.block import Block
from luthier.compression.linear import dimensions, matrix
from luthier.compression.method import Pruner, prune_layer
from luthier.compression.records import Record
from luthier.compression.statistics import Moments


@dataclass
class Config(Pruner):
    def change(self, block: Block) -> Iterator[Record]:
        layers = block.layers()
        moments: dict[str, Moments] = {}
        for names in block.groups():
            shared = Moments(dimensions(layers[names[0]])[1], block.device)
            moments |= dict.fromkeys(names, shared)
        block.observe(moments)
        for name, layer in layers.items():
            norm = moments[name].norm  # (in,)
            record = prune_layer(name, layer, self.mask(matrix(layer).abs() * norm, "row"), norm**2)
            record.note = "error as if inputs were uncorrelated"
            yield record
