"""How models with clustered layers lie on disk: as they are. No common format knows clusters of channels.

Importing this file makes transformers know them; whoever loads such a folder without `luthier.load` writes

    import luthier.compression.clustered_storage
    AutoModelForCausalLM.from_pretrained(folder)
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from luthier.compression.clustered import ClusteredLinear, ClusterGrid
from luthier.compression.grid import Scheme
from luthier.compression.linear import dimensions, quantize_layer, quantized_layers
from luthier.errors import ModelError

METHOD = "luthier_clustered"


@register_quantization_config(METHOD)
class ClusteredConfig(QuantizationConfigMixin):
    """What stands in config.json.

    Attributes:
        layers: scheme and number of clusters of each clustered layer, by its full name.
    """

    def __init__(self, layers: dict[str, dict[str, Any]], **_: Any):
        self.quant_method: Any = METHOD
        self.layers = layers


@register_quantizer(METHOD)
class ClusteredQuantizer(HfQuantizer):
    """Puts empty clustered layers into a model before transformers fills it."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        for name, known in self.quantization_config.layers.items():
            model.set_submodule(name, _shell(model.get_submodule(name), known))

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def found(model: nn.Module) -> dict[str, ClusteredLinear]:
    """The layers of this kind by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, ClusteredLinear)}


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write a model, whose quantised layers are all clustered, with all their tensors.

    Raises:
        ModelError: layers of another kind are among them.
    """
    layers = found(model)
    others = set(quantized_layers(model)) - set(layers)
    if others:
        raise ModelError(
            f"{min(others)} and {min(layers)} are quantised in ways that no single format holds.",
            fix="Compress all layers with rptq, or none.",
        )
    known = {
        name: {"scheme": layer.scheme.as_dict(), "clusters": layer.scale.shape[1]}
        for name, layer in layers.items()
    }
    model.save_pretrained(str(folder))
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": METHOD, "layers": known}
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Let a loaded model forget that transformers knows its layers as quantised: saving is ours."""
    unbound: Any = model
    unbound.hf_quantizer, unbound.is_quantized = None, False
    del model.config.quantization_config
    return model


def _shell(layer: nn.Module, known: dict[str, Any]) -> nn.Module:
    """A clustered layer of the right shapes, where the plain one is, to be filled."""
    weight: Any = layer.weight
    rows, columns = dimensions(layer)
    clusters = known["clusters"]

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=weight.device)

    labels = empty(columns, dtype=torch.long)
    scale = empty(rows, clusters, dtype=weight.dtype)
    zero = empty(rows, clusters, dtype=torch.int8)
    steps = empty(clusters, dtype=torch.float32)
    return quantize_layer(
        layer,
        empty(rows, columns, dtype=torch.int8),
        ClusterGrid(Scheme(**known["scheme"]), scale, zero, labels),
        steps,
        kind=ClusteredLinear,
        labels=labels,
        input_zero=steps.clone(),
    )
