"""What SmoothQuant and AWQ share: a quantiser that first moves factors between layers and what feeds them.

`prepare` looks at the inputs of each group of layers, lets the method choose a factor for each input, and
folds it (`luthier.compression.folding`): the block computes what it did. `change` rounds. A group that nothing
can take a factor from is rounded as it is, and its records say so.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from luthier.compression.block import Block
from luthier.compression.folding import Row, find
from luthier.compression.linear import matrix
from luthier.compression.method import Quantizer
from luthier.compression.records import Record

log = logging.getLogger("luthier.compression")


@dataclass
class Scaling(Quantizer):
    """A quantiser that scales before it rounds. `seen` is the statistic that it gathers of a group's inputs."""

    def only_norms(self) -> bool:
        """Whether factors go into norms alone, not into earlier linear layers."""
        return False

    def gather(self, block: Block, features: int) -> Any:
        """An empty statistic for a group."""
        raise NotImplementedError

    def rounding_error(self, weight: Tensor, seen: Any) -> float:
        """Relative squared error of a layer's output if its weight (out, in), float32, is rounded."""
        raise NotImplementedError

    def factors(self, block: Block, row: Row, seen: Any) -> tuple[Tensor, str]:
        """A factor for each input of a group, (in,), the same for inputs that share an output; and a note."""
        raise NotImplementedError

    def divide(self, seen: Any, factors: Tensor) -> None:
        """Turn a statistic of inputs into that of the divided ones."""
        raise NotImplementedError

    def prepare(self, block: Block) -> None:
        rows = find(block, only_norms=self.only_norms())
        seen = [self.gather(block, row.features) for row in rows]
        block.observe({row.layers[0]: s for row, s in zip(rows, seen, strict=True)})
        layers = block.layers()
        self._seen = {name: s for row, s in zip(rows, seen, strict=True) for name in row.layers}
        self._before = {n: self.rounding_error(matrix(layers[n]), s) for n, s in self._seen.items()}
        self._notes: dict[str, str] = {}
        for row, statistic in zip(rows, seen, strict=True):
            note = f"not scaled: {row.why}"
            if row.maker:
                factors, note = self.factors(block, row, statistic)
                row.scale(block.module, factors)
                self.divide(statistic, factors)
            else:
                log.info("%s: %s", ", ".join(row.layers), note)
            self._notes |= dict.fromkeys(row.layers, note)

    def change(self, block: Block) -> Iterator[Record]:
        after = {n: self.rounding_error(matrix(m), self._seen[n]) for n, m in self._known(block).items()}
        for record in self.round_layers(block):
            if record.name in after:
                record.before, record.after = self._before[record.name], after[record.name]
                record.note = self._notes[record.name]
            yield record

    def _known(self, block: Block) -> dict[str, nn.Module]:
        """The layers whose inputs were seen: not an expert that no token of the first batch goes to."""
        return {name: layer for name, layer in block.layers().items() if name in self._seen}
