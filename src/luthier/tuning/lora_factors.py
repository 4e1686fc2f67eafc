"""LoRA layers of PEFT's that compute with factors of ours: the engine of methods that use A and B in a way
of their own.

    y = W x + b + s B* A* D(x),      A* (k, in), B* (out, k), s  =  formula(layer, adapter)

A method file has a `Config(FactorConfig)` whose `variant()` makes a `FactorVariant`, with the formula in it:

    class Nested(FactorVariant):
        def formula(self, layer, name):
            return layer.lora_A[name].weight[:2], layer.lora_B[name].weight[:, :2], layer.scaling[name]

Everything else is PEFT's LoRA: its layers (plain and bitsandbytes ones), parameters, switching, merging, and
the files. `acceleration/fused_lora.py` fuses such layers too, with the factors from the formula.

Such methods have a training procedure of their own, in a callback. The callback says when it takes part
(`config.watch`). An adapter that was trained without it has no state dict: it would be saved as what it is
not. That is refused, for `get_peft_model` and a plain `Trainer` never ask for the callback.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import LoraVariant
from peft.utils.other import transpose
from safetensors.torch import save_file
from torch import Tensor, nn

from luthier.errors import MethodError
from luthier.tuning.peft_options import Where

Factors = tuple[Tensor, Tensor, float]

KINDS = ("Linear", "Linear4bit", "Linear8bitLt")  # PEFT's layers that leave their formula to a variant


class Watch:
    """Whether a method's callback takes part in the training of one adapter.

    Attributes:
        on: it does, now.
        missed: it did not, while the adapter was trained.
    """

    def __init__(self) -> None:
        self.on = self.missed = False

    def begin(self) -> None:
        self.on, self.missed = True, False

    def end(self) -> None:
        self.on = False

    def note(self, layer: LoraLayer, name: str) -> None:
        """Called in each forward of the layer."""
        if self.on or self.missed or not (layer.training and torch.is_grad_enabled()):
            return
        if layer.lora_A[name].weight.requires_grad:
            self.missed = True


@dataclass
class FactorConfig(Where, peft.LoraConfig):
    """What the configs of these methods have; a method declares what it offers as options anew."""

    def __post_init__(self) -> None:
        self.require_where(self.target_modules)
        super().__post_init__()
        # PEFT annotates the mapping with classes but only calls what it holds.
        self._register_custom_module({nn.Module: factor_layer})
        self.watch = Watch()

    def variant(self) -> "FactorVariant":
        """The formula of one adapter on one layer; by default LoRA's own."""
        return FactorVariant(self)

    def to_dict(self) -> dict[str, Any]:
        """The fields of an ordinary `adapter_config.json`: without ours, which only training needs."""
        ours = self.__dataclass_fields__.keys() - peft.LoraConfig.__dataclass_fields__.keys()
        return {name: value for name, value in super().to_dict().items() if name not in ours}

    def require_watched(self) -> None:
        """Raise MethodError where the adapter was trained without the method's callback."""
        if self.watch.missed:
            name = type(self).__module__.rpartition(".")[2]
            raise MethodError(
                f"The adapter was trained without the callback of {name}, as plain LoRA: it is not saved as "
                f"what it is not.",
                fix="Give the trainer callbacks=luthier.tuning.hooks.callbacks(model), as luthier.trainer "
                "does, and train again.",
            )


class FactorVariant(LoraVariant):
    """What one adapter adds to one layer: s B* A* D(x)."""

    def __init__(self, config: Any):
        self.config = config

    def formula(self, layer: Any, name: str) -> Factors:
        """A* (k, in), B* (out, k) and s of adapter `name` now, made of its parameters with autograd."""
        return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]

    def factors(self, layer: Any, name: str) -> Factors:
        """The same for a forward."""
        self.config.watch.note(layer, name)
        return self.formula(layer, name)

    def init(self, module: Any, adapter_name: str, **options: Any) -> None:
        """Make what the layer holds for the adapter besides A and B."""

    def remove(self, layer: Any, name: str) -> None:
        """Take it away."""

    def load(self, layer: Any, name: str, state: dict[str, Tensor], prefix: str) -> None:
        """Make room for what `state` holds of it, before that is loaded; names in it start with `prefix`."""

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        a, b, scale = self.factors(module, active_adapter)
        return result + F.linear(F.linear(module.lora_dropout[active_adapter](x), a), b) * scale

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        delta = module.get_delta_weight(active_adapter)
        return (orig_weight.to(delta.dtype) + delta).to(orig_weight.dtype)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data = self.merge_safe(module, active_adapter, orig_weight.data)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        delta = module.get_delta_weight(active_adapter)
        return (orig_weight.to(delta.dtype) - delta).to(orig_weight.dtype)


class FactorLayer:
    """Goes before one of PEFT's LoRA layers in the bases: adapters of our methods bring their formula."""

    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_variant: dict[str, Any]

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> Any:
        if isinstance(config, FactorConfig):
            return config.variant()
        return super().resolve_lora_variant(config=config, **kwargs)  # type: ignore[misc]

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """s B* A* in the layout of the layer's weight; in fp32 at least."""
        variant = self.lora_variant.get(adapter)
        if not isinstance(variant, FactorVariant):
            delta: Tensor = super().get_delta_weight(adapter)  # type: ignore[misc]
            return delta
        a, b, scale = variant.formula(self, adapter)
        dtype = torch.promote_types(b.dtype, torch.float32)
        return transpose(b.to(dtype) @ a.to(dtype), getattr(self, "fan_in_fan_out", False)) * scale

    def delete_adapter(self, adapter_name: str) -> None:
        variant = self.lora_variant.get(adapter_name)
        if isinstance(variant, FactorVariant):
            variant.remove(self, adapter_name)
        super().delete_adapter(adapter_name)  # type: ignore[misc]

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name, variant in self.lora_variant.items():
            if isinstance(variant, FactorVariant) and f"{prefix}lora_A.{name}.weight" in state_dict:
                variant.load(self, name, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for variant in self.lora_variant.values():
            if isinstance(variant, FactorVariant):
                variant.config.require_watched()
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]


@cache
def _with_formula(kind: Any) -> Any:
    return type(f"Factor{kind.__name__}", (FactorLayer, kind), {"__module__": __name__})


def factor_layer(
    target: nn.Module,
    adapter_name: str,
    config: FactorConfig,
    parameter_name: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """PEFT's layer around `target`, whatever its kind, with the formula of `config`.

    Raises:
        MethodError: a layer that is not linear, or options that change PEFT's formula too.
    """
    title = type(config).__module__.rpartition(".")[2]
    own, config._custom_modules = config._custom_modules, None  # what is asked for here is PEFT's own layer
    try:
        layer = LoraModel._create_new_module(
            config, adapter_name, target, parameter_name=parameter_name, **kwargs
        )
    finally:
        config._custom_modules = own
    if type(layer).__name__ not in KINDS:
        where = kwargs.get("target_name") or parameter_name
        raise MethodError(
            f"{title} adapts linear layers; '{where}' is a {type(target).__name__}.",
            fix="Leave it out of target_modules, or write method: lora.",
        )
    if layer.lora_variant or config.lora_bias:
        raise MethodError(
            f"{title} has a formula of its own for A and B, which does not go with another variant of LoRA "
            "(use_dora, lora_bias and the like).",
            fix="Leave that option out.",
        )
    kind: Any = type(layer)
    layer.__class__ = _with_formula(kind)
    layer.lora_variant[adapter_name] = config.variant()
    layer.lora_variant[adapter_name].init(layer, adapter_name, config=config)
    return layer


def factor_layers(model: nn.Module, name: str) -> list[Any]:
    """The layers that compute adapter `name` by our formula.

    Raises:
        MethodError: the adapter stands on layers of plain LoRA, which another adapter had made before.
    """
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and name in m.lora_A]
    plain = [m for m in layers if not isinstance(m.lora_variant.get(name), FactorVariant)]
    if plain or not layers:
        raise MethodError(
            f"Adapter '{name}' shares its layers with an adapter of plain LoRA that came before it, and "
            "would be plain LoRA too.",
            fix="Put it on the model first, or on one without other adapters.",
        )
    return layers


def write_lora(
    model: PeftModel,
    state: dict[str, Tensor],
    folder: Path | str,
    *,
    rank: Callable[[int], int],
    grow: float = 1,
) -> None:
    """Write an adapter folder of plain LoRA, which any PEFT loads.

    Args:
        state: the tensors under their names in the file.
        rank: rank of the new adapter for the rank that the config states.
        grow: factor on every alpha.
    """
    old = model.peft_config[model.active_adapter]
    fields = {name: getattr(old, name) for name, f in peft.LoraConfig.__dataclass_fields__.items() if f.init}
    config = peft.LoraConfig(**copy.deepcopy(fields))
    config.r = rank(old.r)
    config.rank_pattern = {key: rank(value) for key, value in old.rank_pattern.items()}
    config.lora_alpha = old.lora_alpha * grow
    config.alpha_pattern = {key: value * grow for key, value in old.alpha_pattern.items()}
    config.init_lora_weights = True  # of the adapter that was trained; this one is read from the file
    config.inference_mode = True
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(model.get_base_model(), "name_or_path", None)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config.save_pretrained(str(folder))


def unit_config(ranks: dict[str, int], old: Any, *, fan_in_fan_out: bool) -> peft.LoraConfig:
    """Of a plain LoRA whose factors hold all of its scale.

    Args:
        ranks: rank of each layer, by its name in the base model.
        old: config of the adapter that it stands for.
    """
    most = max(ranks.values())
    other = {name: rank for name, rank in ranks.items() if rank != most}
    taken = ("task_type", "base_model_name_or_path", "revision", "modules_to_save")
    return peft.LoraConfig(
        r=most,
        lora_alpha=most,
        rank_pattern=other,
        alpha_pattern=dict(other),
        target_modules=sorted(ranks),
        fan_in_fan_out=fan_in_fan_out,
        **{field: getattr(old, field, None) for field in taken},
    )


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """The active adapter's tensors under their names in an adapter file."""
    found: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=model.active_adapter)
    return found
