"""Random pruning: weights become zero by lot.

Paper: a baseline, as in Frankle and Carbin, 2019, "The Lottery Ticket Hypothesis", arXiv 1803.03635.
Pick it when you want to know what a pruning criterion is worth: it must beat this one.
Cost: nothing but drawing.

The mask is drawn from `seed` and the layer's name: it depends on no other layer.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from luthier.compression.block import Block
from luthier.compression.linear import dimensions
from luthier.compression.method import Pruner, prune_layer
from luthier.compression.records import Record
from luthier.options import option


@dataclass
class Config(Pruner):
    seed: int = option(0, "of the lot", ge=0)

    needs_data: ClassVar[bool] = False

    def change(self, block: Block) -> Iterator[Record]:
        for name, layer in block.layers().items():
            lot = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
            scores = torch.rand(dimensions(layer), generator=lot).to(block.device)
            yield prune_layer(name, layer, self.mask(scores, "layer"))
