"""What SmoothQuant and AWQ share: a quantiser that first moves factors between layers and what feeds them.

`prepare` looks at the inputs of each group of layers, lets the method choose a factor for each input, and
folds it (`luthier.compression.folding`): the block computes what it did. `change` rounds. A group whose
factors nothing can take over is rounded as it is, and its records say so.
"""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from luthier.compression.block import Block
from luthier.compression.folding import Row, find
from luthier.compression.linear import matrix, set_matrix
from luthier.compression.method import Quantizer
from luthier.compression.records import Record

log = logging.getLogger("luthier.compression")


@dataclass
class Scaling(Quantizer):
    """A quantiser that scales before it rounds.

    `seen` is what it gathers of a group's inputs; `seen.peak` (in,) is the largest magnitude of each.
    """

    def only_norms(self) -> bool:
        """Whether factors go into norms alone, not into earlier linear layers."""
        return False

    def gather(self, block: Block, features: int) -> Any:
        """An empty statistic for a group."""
        raise NotImplementedError

    def watching(self, block: Block, rows: list[Row]) -> AbstractContextManager[None]:
        """Around the runs of the block in which inputs are gathered: to see more of them."""
        return nullcontext()

    def error(self, weight: Tensor, final: Tensor, seen: Any) -> float:
        """Squared error of a layer's output, relative to the output's own.

        Args:
            weight: (out, in), float32, as it is.
            final: what is moved to the grid in its place.
        """
        raise NotImplementedError

    def factors(self, block: Block, row: Row, seen: Any) -> tuple[Tensor, str]:
        """A factor for each input of a group, (in,), the same for inputs that share an output; and a note."""
        raise NotImplementedError

    def divide(self, seen: Any, factors: Tensor) -> None:
        """Turn a statistic of inputs into that of the divided ones."""
        raise NotImplementedError

    def finish(self, name: str, weight: Tensor, seen: Any) -> Tensor:
        """What is moved to the grid in place of a weight (out, in): by default the weight."""
        return weight

    def prepare(self, block: Block) -> None:
        self._rows = rows = find(block, only_norms=self.only_norms())
        seen = [self.gather(block, row.features) for row in rows]
        with self.watching(block, rows):
            block.observe({row.layers[0]: s for row, s in zip(rows, seen, strict=True)})
        layers = block.layers()
        self._seen = {name: s for row, s in zip(rows, seen, strict=True) for name in row.layers}
        weights = {name: matrix(layers[name]) for name in self._seen}
        self._before = {n: self.error(w, w, self._seen[n]) for n, w in weights.items()}
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
        after = {}
        for name, layer in block.layers().items():
            if name in self._seen:  # no expert that no token of the first batch goes to
                weight, seen = matrix(layer), self._seen[name]
                final = self.finish(name, weight, seen)
                after[name] = self.error(weight, final, seen)
                set_matrix(layer, final)
        peaks = {name: seen.peak for name, seen in self._seen.items()}
        for record in self.round_layers(block, peaks):
            if record.name in after:
                record.before, record.after = self._before[record.name], after[record.name]
                record.note = self._notes[record.name]
            yield record
