"""Models whose blocks differ in width: the config and model classes that hold and reload them.

transformers has a field for it (`per_layer_config`: {block: {field: value}}), but no model of its own that
builds its blocks from that. Importing this file makes the Auto classes know the model type
`luthier_per_layer`: the architecture named in `base_model_type`, whose blocks are each made from the config
of their own.

    import luthier.models.per_layer
    AutoModelForCausalLM.from_pretrained(folder)

Head counts can differ only where the architecture holds the size of a head by itself (`head_dim`).
"""

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from luthier.models import structure

MODEL_TYPE = "luthier_per_layer"
AUTO: tuple[Any, ...] = (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForMaskedLM,
)


class PerLayerConfig(PreTrainedConfig):
    """What `AutoConfig` finds under the model type; it gives the config class of the base architecture."""

    model_type = MODEL_TYPE

    def __new__(cls, base_model_type: str, **fields: Any) -> Any:
        return config_class(base_model_type)(base_model_type=base_model_type, **fields)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return config_class(config_dict["base_model_type"]).from_dict(config_dict, **kwargs)


@cache
def config_class(base_model_type: str) -> type[PreTrainedConfig]:
    """The config class for an architecture, with the model classes that belong to it registered."""
    base = CONFIG_MAPPING[base_model_type]
    # Head counts need not divide the hidden size here. Only `strict` has transformers see the replaced check.
    made = strict(_new_type(base, {"model_type": MODEL_TYPE, "validate_architecture": lambda self: None}))
    for auto in AUTO:
        if base in auto._model_mapping:
            auto.register(made, _model_class(auto._model_mapping[base], made))
    return made


def _model_class(base: Any, config: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        differences = config.__dict__.pop("_heterogeneity_spec", None)
        try:  # the whole first, in the widths that the config states for all
            base.__init__(self, config, *args, **kwargs)
        finally:
            if differences is not None:
                config._heterogeneity_spec = differences
        _rebuild_blocks(self, config)

    return _new_type(base, {"config_class": config, "__init__": init})


def _rebuild_blocks(model: Any, config: Any) -> None:
    stack = structure.stacks(model)[0][1]
    for index, block in enumerate(stack):
        own = config.per_layer_config[index]
        made = type(block)(own, index)
        for module in made.modules():
            if getattr(module, "config", None) is own:
                module.config = config  # what is set later, such as the kind of attention, is set there
        stack[index] = made.to(next(block.parameters()).dtype)
    model.post_init()


def _new_type(base: type, members: dict[str, Any]) -> Any:
    """A subclass that lives in this module, where pickle finds it."""
    name = f"PerLayer{base.__name__}"
    globals()[name] = type(name, (base,), {"__module__": __name__, **members})
    return globals()[name]


def is_per_layer(model: nn.Module) -> bool:
    """Whether a model is of one of these classes."""
    return structure.base(model).config.model_type == MODEL_TYPE


def config_with(config: Any, differences: Mapping[int, Mapping[str, Any]]) -> Any:
    """A config of this kind: `config` with fields that differ from block to block."""
    fields = config.to_dict()
    own = fields.pop("model_type")
    base = fields.pop("base_model_type", own)
    # Asked for one width, the config says that of the whole model: what plans memory then asks for enough.
    fields["allow_global_per_layer_attribute_access"] = True
    fields["per_layer_config"] = {index: dict(values) for index, values in differences.items()}
    made = PerLayerConfig(base, **copy.deepcopy(fields))
    made._name_or_path = config._name_or_path
    made._attn_implementation = config._attn_implementation
    return made


def class_of(model: PreTrainedModel) -> Any:
    """The class of this kind that stands for a model's; its own where it is one already."""
    kind = type(model)
    if is_per_layer(model):
        return kind
    made = config_class(model.config.model_type)
    for auto in AUTO:
        if made in auto._model_mapping and issubclass(auto._model_mapping[made], kind):
            return auto._model_mapping[made]
    return None


AutoConfig.register(MODEL_TYPE, PerLayerConfig, exist_ok=True)
