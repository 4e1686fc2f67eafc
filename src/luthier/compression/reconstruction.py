"""A block that learns to give, with rounded weights, what it gave before: the training of one block alone.

The block is called with other parameters than its own: rounded ones, whose gradients go to float32 masters as
if nothing had been rounded. The masters are the weights of the layers that will be quantised, their biases,
and the norms of the block; nothing else learns, and nothing outside the block is needed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from luthier.compression.block import Block, Call, hooked
from luthier.compression.grid import straight_through
from luthier.compression.linear import matrix
from luthier.tuning.places import is_norm

Rounding = Callable[[str, Tensor], Tensor]
"""Takes the full name of a layer and its weight (out, in), or its input, and returns that rounded."""


def in_rows(block: Block, rows: int) -> Block:
    """The block with the same inputs in batches of at most so many rows; views of what it holds."""
    hidden, calls, masks = [], [], []
    for whole, call, mask in zip(block.hidden, block.calls, block.masks, strict=True):
        for start in range(0, len(whole), rows):
            part = slice(start, start + rows)
            hidden.append(whole[part])
            masks.append(mask[part])
            options = {key: _cut(value, len(whole), part) for key, value in call.options.items()}
            calls.append(Call(_cut(call.arguments, len(whole), part), options))
    cut = Block(block.model, block.name, block.index, hidden, calls, masks)
    cut.choose(set(block.layers()))
    return cut


def _cut(value: Any, batch: int, part: slice) -> Any:
    """The rows of what a block is called with; what all rows share (positions, say) stays whole."""
    if isinstance(value, tuple):
        return tuple(_cut(item, batch, part) for item in value)
    if isinstance(value, Tensor) and value.dim() > 1 and len(value) == batch > 1:
        return value[part]
    return value


class Student:
    """A block that computes with rounded weights and inputs.

    Attributes:
        masters: what learns, float32, by its name in the block; weights of layers as (out, in).
    """

    def __init__(self, block: Block, round_weight: Rounding, round_input: Rounding):
        self.block, self.round_weight, self.round_input = block, round_weight, round_input
        self.layers = {name.removeprefix(f"{block.name}."): m for name, m in block.layers().items()}
        self.masters = {f"{name}.weight": matrix(layer) for name, layer in self.layers.items()}
        norms = {name: m for name, m in block.module.named_modules() if name and is_norm(m)}
        for name, module in (self.layers | norms).items():
            for part, own in module.named_parameters(recurse=False):
                if f"{name}.{part}" not in self.masters:
                    self.masters[f"{name}.{part}"] = own.detach().to(torch.float32, copy=True)

    def weights(self) -> dict[str, Tensor]:
        """The masters of the layers' weights (out, in) by full name."""
        return {f"{self.block.name}.{name}": self.masters[f"{name}.weight"] for name in self.layers}

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """What the block computes with the masters, rounded."""

        def rounded(name: str) -> Any:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                return (self.round_input(f"{self.block.name}.{name}", inputs[0]), *inputs[1:])

            return hook

        with hooked(self.layers, rounded):
            return functional_call(self.block.module, self._parameters(), arguments, options)

    def _parameters(self) -> dict[str, Tensor]:
        """What stands in for the block's parameters, in their dtype and layout."""
        found = {}
        for name, master in self.masters.items():
            own = self.block.module.get_parameter(name)
            path, _, part = name.rpartition(".")
            value = master
            if path in self.layers and part == "weight":
                full = f"{self.block.name}.{path}"
                value = straight_through(master, self.round_weight(full, master.detach()))
                value = value.T if isinstance(self.layers[path], Conv1D) else value
            found[name] = value.to(own.dtype)
        return found

    def loss(self, index: int, target: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of squared differences to a batch of targets without padding, and the targets' own square."""
        mask = self.block.masks[index]
        wanted = target[mask].float()
        return (self.block.compute(index, self)[mask].float() - wanted).square().sum(), wanted.square().sum()

    @torch.no_grad()
    def error(self, targets: list[Tensor]) -> float:
        """Squared error over all batches relative to the square of the targets."""
        pairs = [self.loss(index, target) for index, target in enumerate(targets)]
        return float(sum(lost for lost, _ in pairs) / sum(whole for _, whole in pairs))

    def learn(self, targets: list[Tensor], steps: int, learning_rate: float) -> None:
        """Steps of Adam on the mean squared error, one batch a step: in turn, or spread over all."""
        parameters = [master.requires_grad_() for master in self.masters.values()]
        optimizer = torch.optim.Adam(parameters, lr=learning_rate)
        count = len(targets)
        with torch.enable_grad():
            for step in range(steps):
                index = step % count if steps >= count else step * count // steps
                lost, _ = self.loss(index, targets[index])
                optimizer.zero_grad()
                (lost / self.block.masks[index].sum() / targets[index].shape[-1]).backward()
                optimizer.step()
        for master in parameters:
            master.requires_grad_(False)

    def hand_over(self) -> None:
        """Write what was learnt into the block, all but the layers' weights, which will be codes."""
        for name, master in self.masters.items():
            path, _, part = name.rpartition(".")
            if path not in self.layers or part != "weight":
                self.block.module.get_parameter(name).data.copy_(master)
