"""From a formula to a PEFT tuner: the engine of the methods that add a change to what a layer computes.

    y = layer(x) + change(x)        the layer frozen, the change learnt

A method file states its options, its change, and a prefix for its parameters' names:

    @dataclass
    class Config(DeltaConfig):
        r: int = option(8, "rank", ge=1)

    class Change(Delta):
        def __init__(self, config, out_features, in_features, name):
            super().__init__(config, out_features, in_features, name)
            self.A = nn.Parameter(...)    # and its start
        def forward(self, x, y):          # what is added to the layer's output y, from the layer's input x
            return (x @ self.A.T) @ self.B.T
        def weight(self):                 # the same as a matrix (out, in), where there is one: for merging
            return self.B @ self.A

    class Tuner(DeltaTuner):
        prefix = "mine_"
        delta = Change

    register("mine", Config, Tuner)

The engine does the rest: it finds the layers, holds several adapters on each, switches, disables, deletes,
merges, saves and loads them, on `nn.Linear`, on GPT-2's `Conv1D`, and, as a change reads activations only,
on quantised linear layers of any kind.

Precision: a change learns in float32 (or in the base's float64). On a half-precision base, or under autocast,
its small factors are cast to the precision of the activations, as `torch.autocast` does it, and not the
activations to that of the factors; gradients arrive in float32. Formulas of a `Delta` need no casts.

What a method may override: `DeltaTuner.make_delta` to hand its changes what they share (held by the tuner,
under a name with the prefix), `DeltaTuner.make_layer` to wrap modules of another kind, and PEFT's
`_enable_peft_forward_hooks` for inputs that travel with the batch.
"""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.errors import MethodError
from luthier.models.quantized import is_4bit
from luthier.tuning.feed_forward import features, feed_forwards
from luthier.tuning.peft_options import Where
from luthier.tuning.registration import registered_type

HALF = (torch.float16, torch.bfloat16)


@dataclass
class DeltaConfig(Where, PeftConfig):
    """What the configs of all these methods have; a method declares what it offers as options anew."""

    target_modules: list[str] | str | None = field(default=None, metadata={"help": "the layers to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of their list"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = registered_type(type(self))
        if self.target_modules is None and not self.beside_ffn:
            self.target_modules = "all-linear"
        self.require_where(self.target_modules)

    @property
    def beside_ffn(self) -> bool:
        """Whether the change stands at places of each block (beside its FFN), and not on the layers named."""
        return False

    @property
    def starts_as_base(self) -> bool:
        """Whether the change is zero at the start, which is proven before training."""
        return True

    def to_dict(self) -> dict[str, Any]:
        """The fields of `adapter_config.json`; sets are sorted, so that equal adapters are equal files."""
        return {k: sorted(v) if isinstance(v, set) else v for k, v in super().to_dict().items()}


class Delta(nn.Module):
    """The change of one adapter on one layer: its parameters and its formula.

    Args:
        config: the method's.
        out_features, in_features: of the layer; beside an FFN both are the width of the model.
        name: the layer's, for messages.
    """

    def __init__(self, config: Any, out_features: int, in_features: int, name: str):
        super().__init__()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """What is added to `y` (..., out), the output of the layer on `x` (..., in).

        `x` comes in the precision of the products; an operation that autocast does not know casts to that.
        """
        raise NotImplementedError

    def weight(self) -> Tensor:
        """The change as a matrix (out, in). A method that does not define it cannot be merged."""
        raise NotImplementedError

    def bias(self) -> Tensor | None:
        """What `forward` adds to the product with that matrix (out), for the layer's bias, if anything."""
        return None


class DeltaLayer(nn.Module, BaseTunerLayer):
    """A frozen layer and the changes of the adapters on it. The state dict has them as `<prefix>delta`."""

    def __init__(self, base_layer: nn.Module, slot: str, out_features: int, in_features: int):
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features = out_features, in_features
        self.slot = slot
        setattr(self, slot, nn.ModuleDict())
        self.adapter_layer_names = (slot,)
        self.merged_adapters: list[str] = []
        self.training = base_layer.training

    @property
    def deltas(self) -> nn.ModuleDict:
        """The changes by the name of their adapter."""
        return getattr(self, self.slot)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        return self.changed(x, self.base_layer(x, *args, **kwargs))

    def changed(self, x: Tensor, y: Tensor) -> Tensor:
        """`y` plus the changes of all active adapters."""
        total = y
        for name in self.active_adapters:
            if name in self.deltas:
                total = total + in_precision_of(x, self.deltas[name], y)
        return total

    def why_unmergeable(self, adapter: str) -> str:
        """Why an adapter's change cannot be added to a weight, or ''."""
        return "its change is not a matrix"

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise MethodError; what can be merged is a `DeltaLinear`."""
        for name in adapter_names or self.active_adapters:
            if name in self.deltas and (reason := self.why_unmergeable(name)):
                raise MethodError(f"The adapter '{name}' cannot be merged: {reason}.")

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT would cast to the base's dtype too, and round a float32 adapter that it loads.
        if adapter_name in self.deltas:
            self.deltas[adapter_name].to(device or _place(self.get_base_layer(), self)[0])


class DeltaLinear(DeltaLayer):
    """A linear layer. Where the changes are matrices and its weight a plain one, they can be merged into it.

    PEFT knows by the name of this class that it is one when `all-linear` is asked for again.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(self._as_autocast_would(x), *args, **kwargs)

    def _as_autocast_would(self, x: Tensor) -> Tensor:
        """Cast once what the layer and every product of the change would cast each for itself."""
        kind = x.device.type
        casts = torch.is_autocast_enabled(kind) and type(self.get_base_layer()) in (nn.Linear, Conv1D)
        return x.to(torch.get_autocast_dtype(kind)) if casts and x.dtype == torch.float32 else x

    def why_unmergeable(self, adapter: str) -> str:
        if type(self.deltas[adapter]).weight is Delta.weight:
            return super().why_unmergeable(adapter)
        base = self.get_base_layer()
        plain = isinstance(base, nn.Linear | Conv1D) and type(base.weight) is nn.Parameter
        plain = plain and base.weight.dtype in (*HALF, torch.float32, torch.float64)
        if not plain and not is_4bit(base):
            return f"the weight of {type(base).__name__} is quantised or sharded, not a plain matrix"
        if self.deltas[adapter].bias() is not None and base.bias is None:
            return f"it learns a bias, which the {type(base).__name__} has no place for"
        return ""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """An adapter's change in the layout of the layer's weight."""
        weight = self.deltas[adapter].weight()
        return weight.T if isinstance(self.get_base_layer(), Conv1D) else weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the changes of the adapters, default the active ones, to the weight: in fp32, rounded once.

        Raises:
            MethodError: they are not changes of a plain weight.
            ValueError: `safe_merge`, and the result is not finite.
        """
        super().merge(safe_merge, adapter_names)
        if is_4bit(self.get_base_layer()):
            raise MethodError(
                "The weights of the base are held in 4 bits: the change would be rounded away.",
                fix="Merge with luthier.tuning.merge.merge, which makes them plain first.",
            )
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.deltas]
        self._add(names, 1, safe_merge)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Take off again what was merged; what rounding lost then stays lost."""
        self._add(self.merged_adapters, -1, False)
        self.merged_adapters.clear()

    @torch.no_grad()
    def _add(self, names: list[str], sign: int, safe: bool) -> None:
        if not names:
            return
        weight = self.get_base_layer().weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        merged = weight.data.to(dtype) + sign * sum(self.get_delta_weight(name).to(dtype) for name in names)
        if safe and not torch.isfinite(merged).all():
            raise ValueError(f"the weights merged with {', '.join(names)} are not finite")
        weight.data = merged.to(weight.dtype)
        biases = [b for b in (self.deltas[name].bias() for name in names) if b is not None]
        if biases:
            bias = self.get_base_layer().bias
            bias.data = (bias.data.to(dtype) + sign * sum(b.to(dtype) for b in biases)).to(bias.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return adapter_name in self.deltas and not self.why_unmergeable(adapter_name)


class FeedForwardLayer(DeltaLayer):
    """The last linear layer of an FFN, with changes that read what the FFN's first layer reads.

    y = FFN(h) + change(h)
    """

    def __init__(self, base_layer: nn.Module, slot: str, width: int, first: nn.Module):
        super().__init__(base_layer, slot, width, width)
        self.read: Tensor | None = None
        self._listening = first.register_forward_pre_hook(self._listen)

    def _listen(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not self.disable_adapters and any(name in self.deltas for name in self.active_adapters):
            self.read = args[0]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        read, self.read = self.read, None
        y = self.base_layer(x, *args, **kwargs)
        return y if read is None else self.changed(read, y)

    def why_unmergeable(self, adapter: str) -> str:
        return "its change runs beside a feed-forward network, which no weight could hold"

    def unload_and_optionally_merge_module(self, merge: bool, **options: Any) -> nn.Module:
        """What PEFT calls to take the layer out again."""
        if merge:
            self.merge(**options)
        self._listening.remove()
        return self.base_layer


class DeltaTuner(BaseTuner):
    """Puts the changes of a method on a model and keeps them; `prefix` and `delta` are the method's."""

    prefix: str
    delta: type[Delta]
    tuner_layer_cls = DeltaLayer

    def make_delta(self, config: Any, layer: DeltaLayer, name: str, adapter: str) -> Delta:
        """The change of `adapter` on the layer called `name`."""
        return self.delta(config, layer.out_features, layer.in_features, name)

    def make_layer(self, config: Any, base_layer: nn.Module, name: str) -> DeltaLayer:
        """The layer around `base_layer` that will hold the changes."""
        slot = f"{self.prefix}delta"
        out_features, in_features = features(base_layer, name)
        if not config.beside_ffn:
            return DeltaLinear(base_layer, slot, out_features, in_features)
        if name not in self._firsts:
            raise MethodError(
                f"'{name}' does not end the feed-forward part of a block.",
                fix="Leave target_modules out; choose blocks with layers_to_transform.",
            )
        first = self.model.get_submodule(self._firsts[name])
        return FeedForwardLayer(base_layer, slot, out_features, first)

    def fits(self, config: Any, layer: DeltaLayer, name: str) -> bool:
        """Whether a layer that holds adapters already can hold one of `config` too."""
        return isinstance(layer, FeedForwardLayer) == bool(config.beside_ffn)

    def layers(self) -> Iterator[tuple[str, DeltaLayer]]:
        """The layers with changes, by name."""
        return ((n, m) for n, m in self.model.named_modules() if isinstance(m, DeltaLayer))

    def require_mergeable(self) -> None:
        """Raise MethodError, with the reason, where an active adapter cannot be merged."""
        for name, layer in self.layers():
            for adapter in self.active_adapters:
                reason = layer.why_unmergeable(adapter) if adapter in layer.deltas else ""
                if reason:
                    raise MethodError(
                        f"The adapter on '{name}' cannot be merged: {reason}.",
                        fix="Export the adapter (export: {format: adapter}).",
                    )

    def _check_merge_allowed(self) -> None:
        self.require_mergeable()
        holders = Counter(id(p) for m in self.model.modules() for p in m._parameters.values())
        for name, layer in self.layers():
            active = any(adapter in layer.deltas for adapter in self.active_adapters)
            if active and holders[id(layer.get_base_layer().weight)] > 1:
                raise MethodError(
                    f"The weight of '{name}' is tied to another layer's, which would change with it.",
                    fix="Merge with luthier.tuning.merge.merge, which unties them.",
                )

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        if peft_config.beside_ffn:
            chosen = peft_config.layers_to_transform
            self._firsts = feed_forwards(self.model, [chosen] if isinstance(chosen, int) else chosen)
            if peft_config.target_modules is None:
                peft_config.target_modules = set(self._firsts)
        return peft_config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target
        if not isinstance(layer, DeltaLayer):
            layer = self.make_layer(peft_config, target, current_key)
        if not self.fits(peft_config, layer, current_key):
            raise MethodError(
                f"'{current_key}' carries an adapter of another variant, which reads other hidden states.",
                fix="Put the two on models of their own.",
            )
        device, dtype = _place(layer.get_base_layer(), self.model)
        with torch.device(device):
            delta = self.make_delta(peft_config, layer, current_key, adapter_name)
        delta.to(torch.float64 if dtype == torch.float64 else torch.float32)
        layer.deltas[adapter_name] = delta.train(layer.training)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT's own looks for a weight to take the device from, which not every module has.
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        if autocast_adapter_dtype:
            return
        for _, layer in self.layers():
            dtype = _place(layer.get_base_layer(), self.model)[1]
            if adapter_name in layer.deltas and dtype.is_floating_point:
                layer.deltas[adapter_name].to(dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT would drop it in silence and run the active adapter on every row.
        if kwargs.get("adapter_names") is not None:
            raise MethodError(
                f"{type(self).__module__} has no batches with an adapter for each row (adapter_names).",
                fix="Run one batch for each adapter, after set_adapter.",
            )
        yield

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT's own expects the adapter's name last or next to last; a change may hold modules of its own.
        return re.sub(rf"(\.{cls.prefix}\w+)\.{re.escape(adapter_name)}(?=\.|$)", r"\1", key, count=1)


def _place(*modules: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the first tensor in the first of the modules that has one."""
    for module in modules:
        for tensor in chain(module.parameters(), module.buffers()):
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.float32


def in_precision_of(x: Tensor, delta: Delta, y: Tensor) -> Tensor:
    """`delta(x, y)` in the dtype of `y`, with the factors cast to that of `x` and not `x` to theirs."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind)) if x.dtype == torch.float32 else x
        return delta(x, y).to(y.dtype)
    own = next((p.dtype for p in delta.parameters()), x.dtype)
    if own == x.dtype:
        return delta(x, y).to(y.dtype)
    with torch.autocast(kind, dtype=x.dtype if x.dtype in HALF else own):
        return delta(x, y).to(y.dtype)
