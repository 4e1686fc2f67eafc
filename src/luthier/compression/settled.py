"""What is known of a block's parts whose layers will change no more, so that they need not be run again.

A part is a module of the block that holds linear layers (attention, the feed-forward network). Once all of
them are settled, its output on a batch is always the same. It is had in one of two ways:

- The part gives what its last layer gives, as most do; then that layer alone is run, on its inputs, which
  were at hand when they were observed. This is seen in one run of the block (`seeing_ends`).
- Else the part is run once more, and its output is kept.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from luthier.acceleration.float32 import Float32
from luthier.acceleration.replaced import stood_in


class SettledParts:
    """The parts of one block.

    Attributes:
        layers: full names of the linear layers that are settled.
        waiting: of those that may still change.
    """

    def __init__(self, block: str):
        self.prefix = f"{block}."
        self._ends: dict[str, tuple[str, Any]] = {}  # by part, see `seeing_ends`
        self.begin(set())

    def begin(self, chosen: set[str]) -> None:
        """These layers are to change; none is settled."""
        self.layers: set[str] = set()
        self.waiting = set(chosen)
        self._outputs: dict[tuple[str, int], Any] = {}  # by part and batch
        self._inputs: dict[tuple[str, int], Tensor] = {}  # of the part's last layer, by part and batch

    def add(self, layers: set[str]) -> None:
        self.layers |= layers
        self.waiting -= layers

    def _of(self, part: str, layers: set[str]) -> set[str]:
        return {name for name in layers if name.startswith(f"{self.prefix}{part}.")}

    def _parts(self, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """Modules of the block, no single layers, that hold settled layers and none that may still change."""
        parts = module.named_children()
        return [(n, m) for n, m in parts if self._of(n, self.layers) and not self._of(n, self.waiting)]

    @contextmanager
    def seeing_ends(self, module: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """See in a run of the block which parts give what a linear layer gives.

        Of such a part are kept the layer's name and what else the part gives: a tuple of None, or None where
        it gives a tensor alone.

        Args:
            layers: the linear layers of the block by full name.
        """
        made: dict[int, tuple[str, Tensor]] = {}  # the tensors too, so that no id comes twice
        ran: list[str] = []

        def of_layer(name: str) -> Any:
            def hook(_: nn.Module, inputs: Any, output: Any) -> None:
                made[id(output)] = name, output
                ran.append(name)

            return hook

        def of_part(name: str) -> Any:
            def hook(_: nn.Module, inputs: Any, output: Any) -> None:
                first, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
                layer = made.get(id(first), ("", None))[0]
                ran.append(name)
                alone = not any(other is not None for other in rest or ())
                if alone and self._of(name, {layer}) and ran.count(name) == ran.count(layer) == 1:
                    self._ends[name] = layer, rest
                else:  # one of them works twice, or the part gives something else
                    self._ends.pop(name, None)

            return hook

        with ExitStack() as stack:
            for name, layer in layers.items():
                stack.callback(layer.register_forward_hook(of_layer(name)).remove)
            for name, part in module.named_children():
                stack.callback(part.register_forward_hook(of_part(name)).remove)
            yield

    def observed(self, layer: str, index: int, x: Tensor) -> None:
        """Keep what a layer was handed on a batch where it is all that its part's output will need."""
        for part, (last, _) in self._ends.items():
            if last == layer and not self._of(part, self.waiting - {layer}):
                self._inputs[part, index] = x

    @contextmanager
    def standing_in(
        self, module: nn.Module, layers: Mapping[str, nn.Module], index: int, shape: torch.Size
    ) -> Iterator[None]:
        """Inside, settled parts of the block give what they give on this batch, or it is kept when they run.

        Args:
            layers: as they now are, by full name.
            shape: of the hidden states: nothing wider is worth its memory.
        """
        ran: set[tuple[str, int]] = set()

        def known(key: tuple[str, int]) -> Any:
            return lambda *_, **__: self._outputs[key]

        def keep(key: tuple[str, int]) -> Any:
            def hook(_: nn.Module, inputs: Any, output: Any) -> None:
                made = output[0] if isinstance(output, tuple) else output
                if key in ran:  # a part that works twice has two outputs
                    self._outputs.pop(key, None)
                elif isinstance(made, Tensor) and made.shape == shape:
                    self._outputs[key] = output
                ran.add(key)

            return hook

        with ExitStack() as stack:
            for name, part in self._parts(module):
                key = (name, index)
                if key in self._inputs:
                    last, rest = self._ends[name]
                    with Float32():
                        made = layers[last](self._inputs.pop(key))
                    self._outputs[key] = made if rest is None else (made, *rest)
                if key in self._outputs:
                    stack.enter_context(stood_in(part, known(key)))
                else:
                    stack.callback(part.register_forward_hook(keep(key)).remove)
            yield

    def forget(self, index: int) -> None:
        """Let go of what is kept of a batch."""
        for kept in (self._outputs, self._inputs):
            for key in [key for key in kept if key[1] == index]:
                del kept[key]
