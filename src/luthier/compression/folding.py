"""Which norm or layer can take over a factor, or a new order, of the inputs of linear layers.

A linear layer y = W x computes the same when each column of W is multiplied by a factor and what made x
divides by it: (W diag(f)) (diag(f)^-1 x). Where a norm made x, its weight and bias take the factor; where x
is linear in the outputs of an earlier layer (v -> o, up -> down, fc1 -> ReLU -> fc2), that layer's rows do.
All that reads x must be multiplied: layers that are not to be compressed too, and the router of experts.

Nothing is looked up by name. In one run of a block it is seen which module gave the very tensor that a layer
reads. An earlier layer is a candidate if, with a factor of its own on each of its outputs, each input of the
reader is multiplied by exactly one of these factors. This also says by which (with fewer heads for values
than for queries several inputs share an output), and finds the values in a layer that makes q, k and v at
once. Then every candidate is *proven*: with random factors in [1/2, 2] written into a float32 copy, the block
must compute the same. A norm whose output goes into the residual stream too (BERT), a gate, a GELU do not
pass.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.acceleration.float32 import Float32
from luthier.compression.block import Block, first_rows, real_tokens
from luthier.compression.linear import QuantizedLinear, dimensions, set_values

TOLERANCE = 1e-4  # of a block's output, relative to what the block adds to its input, token by token
TOKENS = 1024  # on which a change is tried, at most, and at least one row
NEAREST = 8  # earlier layers that are tried as makers of a tensor, the last before it first
MOST_SHARED = 64  # query heads that may share one head of values

Outputs = tuple[str, Tensor]
"""A layer inside the block, and which of its outputs feeds each input of the readers: (K,)."""


@dataclass(frozen=True)
class Row:
    """Layers that read one tensor of K features, and who can take over a factor of it.

    Attributes:
        layers: full names of the layers that are to be compressed.
        readers: names inside the block of all modules that read the tensor.
        features: K.
        maker: name inside the block of the norm or layer that takes the factor; "" where there is none.
        outputs: (K,) which output of the maker is input k.
        by_norm: the maker is a norm.
        offset: of a norm that multiplies by (offset + weight).
        why: what stands against folding, where there is no maker.
    """

    layers: list[str]
    readers: tuple[str, ...]
    features: int
    maker: str
    outputs: Tensor
    by_norm: bool = False
    offset: float = 0.0
    why: str = ""

    def share(self, values: Tensor, reduce: str) -> Tensor:
        """Values of the K inputs, where several are one output their "amax", "amin" or "mean": (K,)."""
        outputs = self.outputs.to(values.device)
        made = values.new_zeros(int(outputs.max()) + 1)
        return made.scatter_reduce(0, outputs, values, reduce, include_self=False)[outputs]

    def scale(self, root: nn.Module, factors: Tensor) -> None:
        """Multiply what reads input k by factor k, and divide what makes it.

        Args:
            root: the block, or a copy of it.
            factors: (K,), positive; the same for inputs that share an output (`share`).
        """
        assert self.maker
        for name in self.readers:
            for weight in _reading(root.get_submodule(name), self.features):
                set_values(weight, weight.float() * _along(root.get_submodule(name), factors))
        maker: Any = root.get_submodule(self.maker)
        if self.by_norm:
            _divide_norm(maker, factors, self.offset)
            return
        divisor = torch.ones(dimensions(maker)[0], device=factors.device)
        divisor[self.outputs.to(factors.device)] = factors
        weight = maker.weight
        set_values(weight, weight.float() / (divisor if isinstance(maker, Conv1D) else divisor[:, None]))
        if maker.bias is not None:
            set_values(maker.bias, maker.bias.float() / divisor)


@dataclass(frozen=True)
class Order:
    """Layers that read one tensor of K features, and who can give these in another order.

    Attributes:
        makers: layers, each with the output that is input k; all take the same order. Empty: there are none.
        span: inputs stay within their block of so many neighbours (a head), and blocks that share outputs
            take the same order; K where all inputs may change places.
        from_stream: a norm makes the tensor, or it is the block's own input.
    """

    layers: list[str]
    readers: tuple[str, ...]
    features: int
    makers: tuple[Outputs, ...] = ()
    span: int = 0
    from_stream: bool = False

    @property
    def blocks(self) -> Tensor:
        """For each block of `span` inputs the number of the block of outputs that feeds it."""
        first = self.makers[0][1][:: self.span] - int(self.makers[0][1].min())
        return first // self.span

    def spread(self, orders: Tensor) -> Tensor:
        """The order of all inputs, (K,), of one for each block of outputs, (blocks, span)."""
        starts = torch.arange(0, self.features, self.span)
        return (orders[self.blocks] + starts[:, None]).flatten()

    def permute(self, root: nn.Module, order: Tensor) -> None:
        """Put the input that was at order[k] at place k.

        Args:
            root: the block, or a copy of it.
            order: (K,), of `spread`.
        """
        for name in self.readers:
            reader = root.get_submodule(name)
            for weight in _reading(reader, self.features):
                set_values(weight, weight[order] if isinstance(reader, Conv1D) else weight[..., order])
        for name, outputs in self.makers:
            maker: Any = root.get_submodule(name)
            rows = torch.arange(dimensions(maker)[0])
            rows[outputs] = outputs[order]
            weight = maker.weight
            set_values(weight, weight[:, rows] if isinstance(maker, Conv1D) else weight[rows])
            if maker.bias is not None:
                set_values(maker.bias, maker.bias[rows])


def find(block: Block, *, only_norms: bool = False) -> list[Row]:
    """The groups of a block's chosen layers, in the order in which they work, each with its proven maker."""
    probe = _Probe(block)
    return [_row(probe, key, only_norms) for key in probe.groups]


def find_orders(block: Block) -> list[Order]:
    """The same groups, each with the layers that are proven to be able to give its inputs in another order.

    A norm never is: it writes in the order of the residual stream.
    """
    probe = _Probe(block)
    return [_order(probe, key) for key in probe.groups]


def _row(probe: "_Probe", key: "_Key", only_norms: bool) -> Row:
    features = key[1]
    row = Row(probe.groups[key], probe.readers(key), features, "", torch.arange(features))
    blocked = probe.untouchable(row.readers)
    if blocked:
        return replace(row, why=f"{blocked} reads it too, and cannot be multiplied")
    found, tried = None, False
    if key in probe.made_by_norm:
        tried = True
        norm = replace(row, maker=probe.made_by_norm[key], by_norm=True)
        found = _first(probe, (replace(norm, offset=offset) for offset in (0.0, 1.0)))
    elif not only_norms:
        routes = probe.routes(key, row.readers)
        found = _first(probe, (replace(row, maker=maker, outputs=outputs) for maker, outputs in routes))
    if found is not None:
        return found
    if tried:
        shared = probe.untouchable([probe.made_by_norm[key]])
        return replace(row, why=f"{shared or 'the norm'} feeds something else too")
    return replace(row, why="no norm makes it" if only_norms else "nothing linear makes it")


def _first(probe: "_Probe", candidates: Iterator[Row]) -> Row | None:
    for row in candidates:
        if probe.untouchable([row.maker]):
            continue
        factors = row.share(probe.random(row.features), "mean")
        if probe.proves(partial(row.scale, factors=factors)):
            return row
    return None


def _order(probe: "_Probe", key: "_Key") -> Order:
    features, readers = key[1], probe.readers(key)
    from_stream = key in probe.made_by_norm or key == _key(probe.hidden)
    none = Order(probe.groups[key], readers, features, from_stream=from_stream)
    if from_stream or probe.untouchable(readers):
        return none
    for makers, span in _proposals(probe, key, readers):
        order = replace(none, makers=makers, span=span)
        if probe.untouchable([name for name, _ in makers]):
            continue
        orders = probe.shuffled(len(order.blocks.unique()), span)
        if probe.proves(partial(order.permute, order=order.spread(orders))):
            return order
    return none


def _proposals(
    probe: "_Probe", key: "_Key", readers: Sequence[str]
) -> Iterator[tuple[tuple[Outputs, ...], int]]:
    """Makers whose outputs could be reordered together, and within which span."""
    features, head = key[1], probe.head
    earlier = probe.before(key, readers)
    straight = [(n, torch.arange(features)) for n in earlier if probe.width(n) == features]
    for maker, outputs in [*probe.routes(key, readers), *straight[:1]]:
        if len(outputs.unique()) == features:
            yield ((maker, outputs),), features
        if head and features % head == 0 and len(outputs.unique()) % head == 0:
            yield ((maker, outputs),), head
        if int(outputs.min()) == features == probe.width(maker) - features:
            yield ((maker, outputs), (maker, outputs - features)), features  # gate and up in one layer
        for other in straight:
            if other[0] != maker:
                yield ((maker, outputs), other), features


_Key = tuple[int, int]
"""A tensor: the address of its storage (views are the same tensor) and its features."""


class _Enough(Exception):
    """Ends a run when what was wanted has been seen."""


class _Probe:
    """A float32 copy of a block that is run on a few rows of the first batch, to see and to try."""

    def __init__(self, block: Block):
        self.module = _copied(block.module).float()
        batch, length = block.masks[0].shape
        call = block.calls[0]
        given = (block.hidden[0], block.masks[0], call.arguments, call.options)
        part = first_rows(given, batch, -(-TOKENS // length))
        self.hidden, self.mask, self.arguments, self.options = map(_float, part)
        config: Any = getattr(block.model, "config", None)
        heads = getattr(config, "num_attention_heads", None)
        self.head: int | None = getattr(config, "head_dim", None) or (heads and config.hidden_size // heads)
        self.groups: dict[_Key, list[str]] = {}
        self.made_by_norm: dict[_Key, str] = {}
        self._inputs: dict[str, Tensor] = {}  # of each module, when it first ran
        self._held: list[Tensor] = []  # so that no address comes twice
        self._read: dict[_Key, list[str]] = {}
        self._ran: list[str] = []  # linear layers
        self._shared = _shared_outside(block)
        self._generator = torch.Generator().manual_seed(0)
        chosen = {name.removeprefix(f"{block.name}.") for name in block.layers()}
        self._watch(block.name, chosen)

    def _watch(self, prefix: str, chosen: set[str]) -> None:
        made: dict[_Key, str] = {}

        def before(name: str) -> Any:
            def hook(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
                for value in [*arguments, *options.values()]:
                    if isinstance(value, Tensor) and value.dim() > 1 and value.is_floating_point():
                        key = _key(value)
                        self._held.append(value)
                        self._inputs.setdefault(name, value)
                        self._read.setdefault(key, []).append(name)
                        if key in made:
                            self.made_by_norm[key] = made[key]
                        if name in chosen:
                            self.groups.setdefault(key, []).append(f"{prefix}.{name}")
                if _is_linear(module):
                    self._ran.append(name)

            return hook

        def after(name: str) -> Any:
            def hook(module: nn.Module, _: Any, output: Any) -> None:
                if isinstance(output, Tensor) and _is_norm(module, output.shape[-1]):
                    self._held.append(output)
                    made[_key(output)] = name

            return hook

        owners = {n: m for n, m in self.module.named_modules() if n and (_is_linear(m) or _own(m))}
        handles = [m.register_forward_pre_hook(before(n), with_kwargs=True) for n, m in owners.items()]
        handles += [m.register_forward_hook(after(n)) for n, m in owners.items()]
        try:
            self.output = self.run(self.module)
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def run(self, root: nn.Module) -> Tensor:
        with Float32():
            made = root(self.hidden, *self.arguments, **self.options)
        return real_tokens(made[0] if isinstance(made, tuple) else made, self.mask)

    def readers(self, key: _Key) -> tuple[str, ...]:
        """All modules that multiply the tensor by a weight."""
        names = dict.fromkeys(self._read[key])
        modules = {name: self.module.get_submodule(name) for name in names}
        return tuple(n for n, m in modules.items() if _is_linear(m) or _reading(m, key[1]))

    def untouchable(self, names: Sequence[str]) -> str:
        """The first module whose weights cannot be changed: quantised, or used outside the block. Or ""."""
        for name in names:
            module = self.module.get_submodule(name)
            if isinstance(module, QuantizedLinear) or name in self._shared:
                return name
        return ""

    def width(self, name: str) -> int:
        return dimensions(self.module.get_submodule(name))[0]

    def before(self, key: _Key, readers: Sequence[str]) -> list[str]:
        """The linear layers that ran before the readers of a tensor, the latest first."""
        first = next((i for i, name in enumerate(self._ran) if name in readers), 0)
        return list(dict.fromkeys(self._ran[:first][::-1]))[:NEAREST]

    def routes(self, key: _Key, readers: Sequence[str]) -> Iterator[Outputs]:
        """Earlier layers in whose outputs a tensor is linear, feature by feature."""
        features = key[1]
        for maker in self.before(key, readers):
            width = self.width(maker)
            if width <= features:
                counts = [width] if features % width == 0 else []
            else:
                counts = [features // n for n in range(1, MOST_SHARED + 1) if features % n == 0]
            for count in counts:
                outputs = self._route(key, maker, readers, count)
                if outputs is not None:
                    yield maker, outputs
                    break

    def _route(self, key: _Key, maker: str, readers: Sequence[str], count: int) -> Tensor | None:
        """Which of a layer's last `count` outputs each feature is a multiple of; None where it is of none."""
        width = self.width(maker)
        places = torch.randperm(count, generator=self._generator)
        step = math.log(4) / count
        factors = torch.ones(width)
        factors[width - count + places] = torch.exp(-step * (torch.arange(count) + 0.5))  # in (1/4, 1)
        reader = next(n for n in self._ran if n in readers)
        plain = self._inputs[reader].reshape(-1, key[1])
        scaled = self._input_with(maker, reader, factors.to(plain.device)).reshape(-1, key[1])
        square = plain.square().sum(0)
        live = square > 0
        ratio = (plain * scaled).sum(0) / square.clamp_min(torch.finfo().tiny)
        lost = (scaled - ratio * plain).square().sum(0)
        found = (-ratio.clamp_min(1e-3).log() / step - 0.5)[live].cpu()
        near = found.round().clamp(0, count - 1)
        unclear = (lost > TOLERANCE**2 * square)[live].any() or ((found - near).abs() > 0.25).any()
        if unclear or not live.any():
            return None
        outputs = torch.full((key[1],), -1)
        outputs[live.cpu()] = width - count + places[near.long()]
        if not live.all():  # the place of a neuron that never fires is known where the others stand in order
            straight = torch.arange(key[1]) + width - count
            if count != key[1] or (outputs != straight)[live.cpu()].any():
                return None
            outputs = straight
        return outputs

    @torch.no_grad()
    def _input_with(self, maker: str, reader: str, factors: Tensor) -> Tensor:
        """What a layer is handed when an earlier one's outputs are multiplied."""
        seen: list[Tensor] = []

        def keep(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen.append(arguments[0])
            raise _Enough

        handles = [
            self.module.get_submodule(maker).register_forward_hook(lambda _m, _i, output: output * factors),
            self.module.get_submodule(reader).register_forward_pre_hook(keep),
        ]
        try:
            with suppress(_Enough):
                self.run(self.module)
        finally:
            for handle in handles:
                handle.remove()
        return seen[0]

    def proves(self, change: Callable[[nn.Module], None]) -> bool:
        """Whether a changed copy of the block computes the same."""
        trial = _copied(self.module)
        change(trial)
        error = (self.run(trial) - self.output).norm(dim=-1)
        # Measured against what the block adds; a stream that is far larger would hide any error.
        added = (self.output - real_tokens(self.hidden, self.mask)).norm(dim=-1)
        return bool((error <= TOLERANCE * added.maximum(0.01 * self.output.norm(dim=-1))).all())

    def random(self, count: int) -> Tensor:
        """Factors between 1/2 and 2."""
        drawn = torch.rand(count, generator=self._generator) * 2 - 1
        return torch.exp2(drawn).to(self.hidden.device)

    def shuffled(self, count: int, span: int) -> Tensor:
        """So many orders of `span` neighbours."""
        return torch.stack([torch.randperm(span, generator=self._generator) for _ in range(count)])


def _copied(module: nn.Module) -> nn.Module:
    """A copy whose parameters share their values with the module's, until either gets others."""
    shared: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, shared)


def _key(tensor: Tensor) -> _Key:
    return tensor.untyped_storage().data_ptr(), tensor.shape[-1]


def _float(value: Any) -> Any:
    """The same with float32 for tensors of fewer bits, inside tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_float(v) for v in value)
    return {k: _float(v) for k, v in value.items()} if isinstance(value, dict) else value


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _own(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))


def _is_norm(module: nn.Module, features: int) -> bool:
    """Whether all its parameters are one number for each feature."""
    own = _own(module)
    return bool(own) and not _is_linear(module) and all(p.shape == (features,) for p in own)


def _reading(module: nn.Module, features: int) -> list[nn.Parameter]:
    """The parameters that multiply an input of so many features: a layer's weight, a router's, experts'."""
    if _is_linear(module):
        weight: Any = module.weight
        return [weight] if isinstance(weight, nn.Parameter) and dimensions(module)[1] == features else []
    return [p for p in _own(module) if p.dim() > 1 and p.shape[-1] == features]


def _along(module: nn.Module, factors: Tensor) -> Tensor:
    """Factors of inputs in the shape in which they multiply a weight."""
    return factors[:, None] if isinstance(module, Conv1D) else factors


def _divide_norm(norm: nn.Module, factors: Tensor, offset: float) -> None:
    for name, parameter in norm.named_parameters(recurse=False):
        shift = 0.0 if name == "bias" else offset
        set_values(parameter, (parameter.float() + shift) / factors - shift)


def _shared_outside(block: Block) -> set[str]:
    """Names of the block's modules that hold a parameter which the rest of the model uses too."""
    prefix = f"{block.name}."
    every = block.model.named_parameters(remove_duplicate=False)
    outside = {id(p) for name, p in every if not name.startswith(prefix)}
    return {
        name for name, module in block.module.named_modules() if any(id(p) in outside for p in _own(module))
    }
