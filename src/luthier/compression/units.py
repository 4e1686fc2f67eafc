"""What can be taken out of a model whole: neurons, heads, channels; and which slices of weights they are.

A *unit* is a set of slices that are of no use without each other:

    mlp         neuron of a feed-forward network: its row of the layers that make the hidden (gate, up), its
                column of the layer that reads it (down)
    attention   a key-value head with the query heads that share it: rows of q, k, v, columns of o
    channel     a channel of the residual stream: embeddings, norms, and every layer that reads or writes the
                stream, in all blocks at once

Units that compete with each other, those of one sub-layer, are a `Units`. They are found by structure: which
linear layer ends a sub-layer is seen in a run of the model (`luthier.tuning.places`), and what the widths
say. That they are the right ones is proven when they are cut (`luthier.compression.slicing`): a model
without them computes what it computed with their outputs at zero.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from luthier.compression.linear import dimensions, quantized_layers, require_plain
from luthier.errors import MethodError
from luthier.models import structure
from luthier.tuning.places import SubLayer, is_norm, sub_layers

MLP, ATTENTION, CHANNEL = "mlp", "attention", "channel"
TITLES = {MLP: "neurons", ATTENTION: "heads", CHANNEL: "channels"}


@dataclass(frozen=True)
class Part:
    """A parameter that every unit owns `size` neighbours of along `dim`."""

    name: str
    dim: int
    size: int = 1


@dataclass(frozen=True)
class Units:
    """The units of one sub-layer, or of the stream.

    Attributes:
        kind: MLP, ATTENTION or CHANNEL.
        name: of the layer that reads them, "model.layers.3.mlp.down_proj"; of the embedding for channels.
        block: index of the block, -1 for channels.
        count: how many there are.
        parts: their slices; of a sub-layer the last weight is that of the layer which reads them.
    """

    kind: str
    name: str
    block: int
    count: int
    parts: tuple[Part, ...]

    @property
    def weights(self) -> tuple[Part, ...]:
        """The parts that a score looks at: all but biases."""
        return tuple(part for part in self.parts if part.name.endswith(".weight"))

    @property
    def makers(self) -> list[str]:
        """Names of the layers whose rows the units are."""
        return [part.name.removesuffix(".weight") for part in self.weights[:-1]]

    @property
    def reads(self) -> int:
        """How many neighbouring inputs of the reading layer a unit feeds."""
        return self.parts[-1].size


def find(model: nn.Module, kinds: list[str]) -> list[Units]:
    """The units of a model, block by block; `kinds` holds MLP and ATTENTION, or CHANNEL alone.

    Raises:
        MethodError: there are none of that kind, or the model's weights are not plain finite numbers.
    """
    trunk = require_prunable(model)
    places = _places(trunk)
    found = []
    for place in places:
        if place.kind == "ffn" and MLP in kinds:
            found.append(_neurons(trunk, place))
        elif place.kind == "attention" and ATTENTION in kinds:
            found.append(_heads(trunk, place))
    if CHANNEL in kinds:
        found.append(_channels(trunk, places))
    _require_own_weights(trunk, found)
    return found


def require_prunable(model: nn.Module) -> PreTrainedModel:
    """The model itself, where structure can be cut out of it.

    Raises:
        MethodError: it carries an adapter, is an encoder-decoder, is quantised, or holds NaN.
    """
    if structure.base(model) is not model or hasattr(model, "peft_config"):
        raise MethodError(
            "The model carries an adapter, which is of the widths before.",
            fix="Merge it first (luthier.tuning.merge.merge), then prune.",
        )
    if not isinstance(model, PreTrainedModel):
        raise MethodError(
            f"{type(model).__name__} is no model of transformers.", fix="Load one with luthier.load."
        )
    if model.config.is_encoder_decoder:
        raise MethodError(
            f"{type(model).__name__} is an encoder-decoder: its decoder's attention reads two streams.",
            fix="Prune a decoder-only or an encoder-only model.",
        )
    if quantized_layers(model) or getattr(model, "is_quantized", False):
        raise MethodError(
            f"The weights of this {type(model).__name__} are quantised: there are no plain rows to take out.",
            fix="Prune the model in its original precision, then quantise it.",
        )
    for name, layer in structure.linears(model, with_head=True).items():
        require_plain(name, layer)
    return model


def by_unit(values: Tensor, part: Part, *, vector: bool = False) -> Tensor:
    """Sum of `values`, of the parameter's shape, over each unit's slice: (count,), float32.

    Args:
        vector: take the absolute value of each channel's sum, before the channels of a unit are added.
    """
    channels = values.float().movedim(part.dim, 0).flatten(1 if values.dim() > 1 else 0)
    sums = channels.sum(1) if channels.dim() > 1 else channels
    return (sums.abs() if vector else sums).reshape(-1, part.size).sum(1)


def removed(units: Units, ratio: float) -> int:
    """How many units go at a ratio: of C channels C - floor(C (1 - ratio)), rounded down to whole units.

    One unit always stays: a sub-layer without any could not be computed.
    """
    size = units.weights[0].size
    channels = units.count * size
    gone = channels - math.floor(channels * (1 - ratio) + 1e-9)
    return min(gone // size, units.count - 1)


def best(scores: Tensor, count: int) -> Tensor:
    """Indices, ascending, of the `count` highest scores; of equal ones the first.

    Raises:
        MethodError: a score is not a number.
    """
    if not torch.isfinite(scores).all():
        raise MethodError(
            "The importance of a unit is not finite.", fix="Load the model in float32, or look at the data."
        )
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:count].sort().values


def best_of_all(scores: dict[Units, Tensor], count: int) -> dict[Units, Tensor]:
    """Indices of the `count` highest scores over several places, at least one of each."""
    every = torch.cat([s.cpu() for s in scores.values()])
    if not torch.isfinite(every).all():
        best(every, 0)
    place = torch.cat([torch.full((len(s),), i) for i, s in enumerate(scores.values())])
    own = torch.cat([torch.arange(len(s)) for s in scores.values()])
    first = torch.zeros(len(every), dtype=torch.bool)
    offset = 0
    for s in scores.values():
        first[offset + int(s.argmax())] = True
        offset += len(s)
    order = torch.sort(every, descending=True, stable=True).indices
    order = torch.cat([order[first[order]], order[~first[order]]])[: max(count, len(scores))]
    return {u: own[order[place[order] == i]].sort().values for i, u in enumerate(scores)}


def spread(kept: Tensor, size: int) -> Tensor:
    """Indices of the rows (or columns) of the units `kept`, each of `size` neighbours."""
    return (kept[:, None] * size + torch.arange(size, device=kept.device)).flatten()


def _places(model: PreTrainedModel) -> list[SubLayer]:
    try:
        return sub_layers(model)
    except MethodError as error:
        raise MethodError(
            f"The units of {type(model).__name__} are not found. {error.message}",
            fix="Use a model of the Llama, Qwen, Mistral, GPT-2, OPT or BERT kind.",
        ) from error


def _inside(model: nn.Module, place: SubLayer) -> list[str]:
    """Names of the linear layers of a block, in the order in which it defines them."""
    linears = structure.linears(model, with_head=True)
    return [name for name in linears if name.startswith(f"{place.block}.")]


def _attention_of(model: nn.Module, place: SubLayer) -> list[str]:
    """Names of the linear layers in the attention of a block: all that stand in a module of that name."""
    block = model.get_submodule(place.block)
    holders = [n for n, m in block.named_modules() if n and "attention" in type(m).__name__.lower()]
    return [
        name
        for name in _inside(model, place)
        if any(name.startswith(f"{place.block}.{holder}.") for holder in holders)
    ]


def _rows(model: nn.Module, name: str, size: int = 1) -> list[Part]:
    """Weight and bias of a layer whose outputs the units are."""
    layer: Any = model.get_submodule(name)
    parts = [Part(f"{name}.weight", 1 if isinstance(layer, Conv1D) else 0, size)]
    return parts if layer.bias is None else [*parts, Part(f"{name}.bias", 0, size)]


def _columns(model: nn.Module, name: str, size: int = 1) -> Part:
    """Weight of a layer whose inputs the units are."""
    return Part(f"{name}.weight", 0 if isinstance(model.get_submodule(name), Conv1D) else 1, size)


def _neurons(model: nn.Module, place: SubLayer) -> Units:
    attention = set(_attention_of(model, place))
    makers = [n for n in _inside(model, place) if n not in attention and n != place.last]
    width = dimensions(model.get_submodule(place.last))[1]
    for name in makers:
        if dimensions(model.get_submodule(name))[0] != width:
            raise MethodError(
                f"'{name}' makes {dimensions(model.get_submodule(name))[0]} numbers and '{place.last}' reads "
                f"{width}: gate and up in one layer cannot be told apart.",
                fix="Prune only attention (units: [attention]), or a model with a layer for each.",
            )
    parts = [part for name in makers for part in _rows(model, name)]
    return Units(MLP, place.last, place.index, width, (*parts, _columns(model, place.last)))


def _heads(model: nn.Module, place: SubLayer) -> Units:
    config: Any = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    makers = [name for name in _attention_of(model, place) if name != place.last]
    rows = {name: dimensions(model.get_submodule(name))[0] for name in makers}
    width = dimensions(model.get_submodule(place.last))[1]
    shared = min(rows.values(), default=0)
    whole = len(makers) == 3 and shared and not (shared % head or width % shared)
    if not whole or not set(rows.values()) <= {shared, width}:
        raise MethodError(
            f"The attention of '{place.block}' has no layers q, k, v of its own for heads of {head} "
            f"({', '.join(f'{n}: {r}' for n, r in rows.items())}): its heads cannot be told apart.",
            fix="Prune only the feed-forward part (units: [mlp]).",
        )
    count = shared // head
    parts = [part for name in makers for part in _rows(model, name, rows[name] // count)]
    return Units(
        ATTENTION, place.last, place.index, count, (*parts, _columns(model, place.last, width // count))
    )


def _channels(model: PreTrainedModel, places: list[SubLayer]) -> Units:
    table = structure.embeddings(model)
    names = {module: name for name, module in model.named_modules()}
    width = table.weight.shape[1]
    parts = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.embedding_dim == width:
            parts.append(Part(f"{name}.weight", 1))
        elif is_norm(module) and module.weight.shape == (width,):
            parts += [Part(f"{name}.{part}", 0) for part, _ in module.named_parameters(recurse=False)]
    for place in places:
        attention = _attention_of(model, place)
        inside = (
            attention
            if place.kind == "attention"
            else [n for n in _inside(model, place) if n not in attention]
        )
        readers = [name for name in inside if name != place.last]
        parts += [_columns(model, name) for name in readers]
        parts += _rows(model, place.last)
    top = structure.head(model)
    tied = top is not None and getattr(top, "weight", None) is table.weight
    if isinstance(top, nn.Linear) and not tied:
        parts.append(_columns(model, names[top]))
    return Units(CHANNEL, names[table], -1, width, tuple(parts))


def _require_own_weights(model: nn.Module, found: list[Units]) -> None:
    """Raise MethodError where blocks share the weights that are to be cut: what one loses all would lose."""
    parameters = dict(model.named_parameters())  # each once, under its first name
    for units in found:
        for part in units.parts:
            if part.name not in parameters:
                raise MethodError(
                    f"'{part.name}' is the weight of another layer too: it cannot be cut for one alone.",
                    fix="Choose a model whose blocks have weights of their own.",
                )
