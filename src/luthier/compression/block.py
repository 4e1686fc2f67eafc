"""One block of a model while it is being compressed: its linear layers, what goes into them, what comes out.

Nothing is known of architectures. Which layers read the same input, and in which order, is seen in one run of
the block: layers that are handed the very same tensor are one *group* (q, k, v; gate, up), and groups come
one after the other.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

from luthier.acceleration.float32 import Float32
from luthier.compression.linear import held_weights
from luthier.compression.settled import SettledParts
from luthier.compression.statistics import Statistic
from luthier.errors import MethodError

START = 16  # tokens that show how a block works


class _Enough(Exception):
    """Ends the run of a block when all that was wanted of it has been seen."""


@dataclass
class Call:
    """What a block is called with beside the hidden states; the same for all blocks, or one a block."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Block:
    """A block with the inputs that the blocks before, as they now are, give it.

    Attributes:
        name: full name of the module, such as "model.layers.3".
        hidden: inputs, each (batch, seq, hidden), replaced by the block's outputs when it is left.
        masks: which tokens of each batch are no padding, bool (batch, seq).
        propagates: whether the blocks above see this one as it is left, else as it came. Then one run of it
            does: in the first `observe`, outputs take the place of the inputs, and there is no second.
        start: what the block is called with for the first `START` tokens of the first row.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        index: int,
        hidden: list[Tensor],
        calls: Sequence[Call],
        masks: Sequence[Tensor],
        *,
        propagates: bool = True,
        start: Call | None = None,
    ):
        self.model, self.name, self.index = model, name, index
        self.hidden, self.calls, self.masks = hidden, calls, masks
        self.propagates, self.start, self._left = propagates, start, False
        self._chosen: set[str] = set()
        self._settled = SettledParts(name)

    def choose(self, names: set[str]) -> None:
        """From now on `layers` are those of these full names, and none is settled."""
        self._chosen = names
        self._settled.begin(names)

    def settle(self, names: Iterable[str]) -> None:
        """Say that these layers, and all that work before them, will change no more.

        A part of the block with nothing but settled layers need not be run again until the block is left
        (`luthier.compression.settled`).
        """
        self._settled.add(set(names))

    @property
    def module(self) -> nn.Module:
        return self.model.get_submodule(self.name)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def tokens(self) -> int:
        """Tokens of all batches together, without padding."""
        return sum(int(mask.sum()) for mask in self.masks)

    def layers(self) -> dict[str, nn.Module]:
        """The linear layers that are to be compressed, as they now are, by full name."""
        return {n: m for n, m in self.all_layers().items() if n in self._chosen}

    def all_layers(self) -> dict[str, nn.Module]:
        """Every linear layer of the block by full name."""
        inside = self.module.named_modules()
        return {f"{self.name}.{n}": m for n, m in inside if isinstance(m, nn.Linear | Conv1D)}

    def replace(self, name: str, layer: nn.Module) -> None:
        """Put another layer in the place of one."""
        self.model.set_submodule(name, layer)

    @torch.no_grad()
    def run(self, index: int, module: Any = None) -> Tensor:
        """Output (batch, seq, hidden) of the block on one batch of its inputs."""
        if module is not None:
            return self.compute(index, module)
        with self._settled.standing_in(self.module, self.all_layers(), index, self.hidden[index].shape):
            return self.compute(index)

    def compute(self, index: int, module: Any = None) -> Tensor:
        """The same, with gradients where they are switched on.

        Args:
            module: what is called in the block's place.
        """
        return self._call(self.hidden[index], self.calls[index], module)

    def _call(self, hidden: Tensor, call: Call, module: Any = None) -> Tensor:
        with Float32():
            made = (module or self.module)(hidden, *call.arguments, **call.options)
        return made[0] if isinstance(made, tuple) else made

    def leave(self) -> None:
        """Replace each batch of inputs by the block's output as it now is: the next block's inputs."""
        if self._left:
            return
        self._left = True
        with held_weights(self.module):
            for index in range(len(self.hidden)):
                self.hidden[index] = self.run(index)
                self._settled.forget(index)

    def groups(self) -> list[list[str]]:
        """Names of the layers that read one and the same tensor, group by group as they work.

        Raises:
            MethodError: a layer is at work on none of the batches (an expert that no token goes to).
        """
        waiting = self.layers()
        found: dict[int, list[str]] = {}
        held: list[Tensor] = []  # alive, so that no id comes twice

        def seen(name: str) -> Any:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                held.append(inputs[0])
                if waiting.pop(name, None) is not None:
                    found.setdefault(id(inputs[0]), []).append(name)

            return hook

        # Few tokens show the layers of most blocks; experts wait for one that goes to them.
        runs = zip(self.hidden, self.calls, strict=True)
        start = [] if self.start is None else [(self.hidden[0][:1, :START], self.start)]
        for hidden, call in [*start, *runs]:
            if waiting:
                ends = self._settled.seeing_ends(self.module, self.all_layers())
                with torch.no_grad(), hooked(dict(waiting), seen), ends:
                    self._call(hidden, call)
        if waiting:
            raise MethodError(
                f"{min(waiting)} is not used on the calibration data: nothing is known of its inputs.",
                fix="Give more calibration data, or leave the layer out (exclude).",
            )
        return list(found.values())

    def observe(self, statistics: Mapping[str, Statistic]) -> None:
        """Run all batches through the block and show each layer's inputs to its statistic.

        Layers of a group may share one statistic: it is then fed once.

        Raises:
            MethodError: a layer's inputs are not finite, or the block was left.
        """
        layers = self.all_layers()
        fed: dict[int, str] = {}
        for name, statistic in statistics.items():
            fed.setdefault(id(statistic), name)
        readers = {name: layers[name] for name in fed.values()}
        if not readers and self.propagates:
            return
        if self._left:
            raise MethodError(
                f"{min(statistics)} is not used on the first calibration row: its inputs are not known.",
                fix="Give the batches in another order, or leave the layer out (exclude).",
            )
        self._left = not self.propagates
        with held_weights(self.module):
            for index, mask in enumerate(self.masks):
                for name, x in self._inputs(readers, index, leave=self._left):
                    tokens = real_tokens(x, mask)
                    if not tokens.sum(dtype=torch.float32).isfinite():
                        raise MethodError(
                            f"The inputs of {name} are not finite on calibration batch {index} ({x.dtype}).",
                            fix="Load the model in float32, or look at its weights and the data.",
                        )
                    statistics[name].add(tokens)
                    if not self._left:
                        self._settled.observed(name, index, x)

    def inputs(self, name: str, index: int) -> Tensor:
        """The inputs of one layer on one batch, (tokens, features) without padding."""
        found = self._inputs({name: self.all_layers()[name]}, index)
        return real_tokens(torch.cat([x.flatten(0, -2) for _, x in found]), self.masks[index])

    def _inputs(
        self, layers: Mapping[str, nn.Module], index: int, *, leave: bool = False
    ) -> list[tuple[str, Tensor]]:
        """What layers were handed on one batch. The run of the block ends when all have been at work.

        Args:
            leave: it ends with the block, whose output replaces the batch.
        """
        found: list[tuple[str, Tensor]] = []
        waiting = set(layers)

        def keep(name: str) -> Any:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                found.append((name, inputs[0]))
                waiting.discard(name)
                if not waiting and not leave:
                    raise _Enough

            return hook

        with hooked(layers, keep), suppress(_Enough):
            made = self.run(index)
            if leave:
                self.hidden[index] = made
        return found


def real_tokens(x: Tensor, mask: Tensor) -> Tensor:
    """Inputs (batch, seq, features), or flattened ones, without those of padding: (tokens, features)."""
    rows = x.flatten(0, -2)
    return rows[mask.flatten()] if len(rows) == mask.numel() and not mask.all() else rows


def first_rows(value: Any, batch: int, rows: int) -> Any:
    """Of what a block is called with for so many rows, what belongs to the first few of them.

    Tensors that the rows of a batch share are left as they are.
    """

    def cut(part: Any) -> Any:
        own = isinstance(part, Tensor) and part.dim() > 1 and len(part) == batch
        return part[:rows] if own else part

    return tree_map(cut, value)


@contextmanager
def hooked(modules: Mapping[str, nn.Module], make: Any) -> Iterator[None]:
    """Forward pre-hooks on modules inside the `with` block; `make(name)` gives each its hook."""
    handles = [module.register_forward_pre_hook(make(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
