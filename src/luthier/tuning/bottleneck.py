"""Adapters on hidden states: small networks at places of every block, which no weight could hold.

    A(x) = s ( W_up f(W_down x + b_down) + b_up ),    W_down (m, d), W_up (d, m)

A config says at which places of a block (`places.py`) its adapters stand, and what each of them is; the layer
at a place says what the adapter reads and where its output goes:

    OutputLayer        y + A(y)               y the output of a sub-layer, read after its dropout
    StreamLayer        y + A(h + y)           h the stream that the sub-layer starts from
    FeedForwardLayer   y + A(h)               (`tuner.py`) h what another module of the block reads
    HeadsLayer         W_o (x + A(h)) + b_o   x the outputs of the attention's heads
    NormLayer          N(t + A(N(t)))         t the sum in a post-norm block; N is applied twice
    OutputNormLayer    y + A(y)               y = N(x) the output of a norm, which may learn

A config's `change` may be any `Delta`, so what stands at a place can itself mix several adapters.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from luthier.errors import MethodError
from luthier.models import structure
from luthier.tuning import places
from luthier.tuning.feed_forward import features
from luthier.tuning.places import SubLayer
from luthier.tuning.tuner import Delta, DeltaConfig, DeltaLayer, DeltaTuner, FeedForwardLayer, in_precision_of

ACTIVATIONS: dict[str, Any] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


@dataclass(frozen=True)
class Place:
    """Where and how an adapter stands: the class of the layer, what it reads, and why it is there.

    Attributes:
        role: "attention", "cross", "ffn", or "norm" for a norm that learns.
        width: of what the adapter writes; `reads` of what it reads.
        heard: name of the module whose input it reads, for the layers that read another's.
        norm: the norm at this place learns too.
    """

    role: str
    layer: type[DeltaLayer]
    width: int
    reads: int
    heard: str | None = None
    norm: bool = False


@dataclass(frozen=True)
class Anatomy:
    """What a config chooses places from: sub-layers, norms, and the (out, in) of linear layers by name."""

    sub_layers: list[SubLayer]
    norms: list[str]
    features: dict[str, tuple[int, int]]


@dataclass
class PlacedConfig(DeltaConfig):
    """Config of adapters that stand at places of the blocks; `layers_to_transform` chooses the blocks."""

    @property
    def beside_ffn(self) -> bool:
        return True

    def chosen(self, anatomy: Anatomy) -> list[SubLayer]:
        """The sub-layers of the blocks that are adapted.

        Raises:
            MethodError: `layers_to_transform` names none.
        """
        wanted = self.layers_to_transform
        wanted = [wanted] if isinstance(wanted, int) else wanted
        found = [s for s in anatomy.sub_layers if wanted is None or s.index in wanted]
        if not found:
            last = max(s.index for s in anatomy.sub_layers)
            raise MethodError(
                f"layers_to_transform {wanted} names no block.", fix=f"Write some of 0 to {last}."
            )
        return found

    def places(self, anatomy: Anatomy) -> dict[str, Place]:
        """Names of the modules at which adapters stand."""
        raise NotImplementedError

    def change(self, place: Place) -> Delta:
        """The adapter at a place."""
        raise NotImplementedError

    def why_not_alone(self) -> str:
        """What else belongs to the adapter than its changes of hidden states, or ''."""
        return ""


class Bottleneck(Delta):
    """A(x) (..., out) for x (..., in); dropout acts on the m activations between the two layers.

    Starts as zero: W_down uniform, all else 0. With `std` above 0 both matrices are normal instead, cut off
    at two standard deviations, and A is small but not zero.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        dim: int,
        *,
        activation: str,
        scale: float = 1.0,
        dropout: float = 0.0,
        std: float = 0.0,
    ):
        super().__init__(None, out_features, in_features, "")
        self.down = nn.Linear(in_features, dim)
        self.up = nn.Linear(dim, out_features)
        self.activation = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        self.scale = scale
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)
        nn.init.zeros_(self.up.weight)
        for layer in (self.down, self.up) if std else ():
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        made: Tensor = self.scale * self.up(self.dropout(self.activation(self.down(x))))
        return made


class NormChange(Delta):
    """What is learnt at a norm: changes of its gain and bias (`norm`), and an adapter, each where wanted."""

    def __init__(self, norm: nn.Module | None, adapter: Delta | None):
        super().__init__(None, 0, 0, "")
        self.norm = nn.ParameterDict()
        # Differences: without the adapter, or decayed, the norm is the base's.
        for name, value in norm.named_parameters(recurse=False) if norm is not None else ():
            self.norm[name] = nn.Parameter(torch.zeros(value.shape))
        self.adapter = adapter

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        assert self.adapter is not None
        made: Tensor = self.adapter(x, y)
        return made


class OutputLayer(DeltaLayer):
    """y + A(y), for y the output of the module."""

    def changed(self, x: Tensor, y: Tensor) -> Tensor:
        return super().changed(y, y)

    def why_unmergeable(self, adapter: str) -> str:
        return NOT_LINEAR


class StreamLayer(FeedForwardLayer):
    """y + A(h + y), for h what the module heard reads."""

    def changed(self, x: Tensor, y: Tensor) -> Tensor:
        return super().changed(x + y, y)

    def why_unmergeable(self, adapter: str) -> str:
        return NOT_LINEAR


class HeadsLayer(FeedForwardLayer):
    """base(x + A(h)): what is added stands before the module, an attention's output projection."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        read, self.read = self.read, None
        made: Tensor = self.base_layer(x if read is None else self.changed(read, x), *args, **kwargs)
        return made

    def why_unmergeable(self, adapter: str) -> str:
        return NOT_LINEAR


class NormLayer(DeltaLayer):
    """N(t + A(N(t))) or, without an adapter, N(t), for N a norm whose gain and bias may have changes."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [] if self.disable_adapters else [n for n in self.active_adapters if n in self.deltas]
        weights = self._weights(active)
        y: Tensor = functional_call(self.base_layer, weights, (x,))
        adding = [self.deltas[n] for n in active if self.deltas[n].adapter is not None]
        if not adding:
            return y
        return self.joined(x, y, sum(in_precision_of(y, delta, y) for delta in adding), weights)

    def joined(self, x: Tensor, y: Tensor, change: Tensor | int, weights: dict[str, Tensor]) -> Tensor:
        """The output with what the adapters made of y = N(x)."""
        again: Tensor = functional_call(self.base_layer, weights, (x + change,))
        return again

    def _weights(self, active: list[str]) -> dict[str, Tensor]:
        """Gain and bias with the changes of the active adapters, those that have some."""
        own = dict(self.base_layer.named_parameters())
        found: dict[str, Tensor] = {}
        for adapter in active:
            for name, change in self.deltas[adapter].norm.items():
                before = found[name] if name in found else own[name].detach()
                found[name] = (before.to(change.dtype) + change).to(own[name].dtype)
        return found

    def why_unmergeable(self, adapter: str) -> str:
        return NOT_LINEAR


class OutputNormLayer(NormLayer):
    """y + A(y), for y the output of a norm that may have changes."""

    def joined(self, x: Tensor, y: Tensor, change: Tensor | int, weights: dict[str, Tensor]) -> Tensor:
        return y + change


NOT_LINEAR = "its change passes by a non-linearity, which no weight could hold"


class PlacedTuner(DeltaTuner):
    """Puts the adapters of a `PlacedConfig` at their places."""

    _anatomy: Anatomy | None = None

    def anatomy(self) -> Anatomy:
        """Of the model as it was before its first adapter."""
        if self._anatomy is None:
            found = places.sub_layers(self.model)
            linears = structure.linears(self.model, with_head=True)
            sizes = {name: features(layer, name) for name, layer in linears.items()}
            self._anatomy = Anatomy(found, places.norms(self.model), sizes)
        return self._anatomy

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        self._places: dict[str, Place] = peft_config.places(self.anatomy())
        peft_config.target_modules = set(self._places)
        return peft_config

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:
        # PEFT's own would read the ends of names, and the number of a sub-layer (T5) as that of a block.
        return key in self._places

    def fits(self, config: Any, layer: DeltaLayer, name: str) -> bool:
        wanted = self._places[name]
        return (layer.place.layer, layer.place.heard) == (wanted.layer, wanted.heard)

    def make_layer(self, config: Any, base_layer: nn.Module, name: str) -> DeltaLayer:
        place, slot = self._places[name], f"{self.prefix}delta"
        if issubclass(place.layer, FeedForwardLayer):
            assert place.heard is not None
            layer: Any = place.layer(base_layer, slot, place.width, self._inner(place.heard))
        else:
            layer = place.layer(base_layer, slot, place.width, place.reads)
        layer.place = place
        return layer

    def _inner(self, name: str) -> nn.Module:
        """The module of the base called `name`, below what may stand there already."""
        module = self.model.get_submodule(name)
        return module.get_base_layer() if isinstance(module, DeltaLayer) else module

    def make_delta(self, config: Any, layer: DeltaLayer, name: str, adapter: str) -> Delta:
        place = self._places[name]
        inside = None if place.role == "norm" else self.change(config, name, place)
        if not issubclass(place.layer, NormLayer):
            assert inside is not None
            return inside
        return NormChange(layer.get_base_layer() if place.norm else None, inside)

    def change(self, config: Any, name: str, place: Place) -> Delta:
        """The adapter at the module called `name`."""
        made: Delta = config.change(place)
        return made
