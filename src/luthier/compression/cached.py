"""A quantised layer that makes keys or values, and rounds them too, for a cache that holds them in few bits.

    y = round(x_q W^T + b),    one step for each token, over all heads

They are rounded before positions are turned into keys. A token's numbers depend on no other token, so that
what is read from a cache is what a run over the whole text computes.
"""

from typing import Any, ClassVar

from torch import Tensor

from luthier.compression.grid import Grid, round_activations
from luthier.compression.linear import QuantizedLinear


class CachedLinear(QuantizedLinear):
    """A quantised layer whose outputs are rounded.

    Attributes:
        output_bits: of an output.
    """

    OWN: ClassVar[tuple[str, ...]] = ("output_bits",)

    def __init__(
        self, codes: Tensor, grid: Grid, bias: Tensor | None = None, *, output_bits: int, **options: Any
    ):
        super().__init__(codes, grid, bias, **options)
        self.output_bits = output_bits

    def forward(self, input: Tensor) -> Tensor:
        return round_activations(super().forward(input), self.output_bits, "token")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, output_bits={self.output_bits}"
