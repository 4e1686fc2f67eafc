"""RTN: round each weight to the nearest point of its grid.

Paper: the baseline of every quantisation method since Jacob et al., 2018, "Quantization and Training of
    Neural Networks for Efficient Integer-Arithmetic-Only Inference", arXiv 1712.05877.
Pick it when 8 bits are enough or there is no calibration data; below that every other method is better.
Cost: one pass over the weights, no data (static scales of inputs ask for some).

Each group of `group_size` weights of a row gets the scale that covers its largest magnitude, and each weight
the nearest multiple. With `activation_bits` the inputs are rounded too, while the model runs: for each token,
for the whole tensor, or with a scale found on calibration data. W8A8 with one scale a row and a token is

    y = (x_q W_q^T) s_x s_w,    x_q, W_q int8, the product in integers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from luthier.compression.block import Block
from luthier.compression.method import Quantizer
from luthier.compression.records import Record


@dataclass
class Config(Quantizer):
    needs_data: ClassVar[bool] = False

    def change(self, block: Block) -> Iterator[Record]:
        return self.round_layers(block)
