"""How quantised layers lie on disk: compressed-tensors, which transformers and vLLM load without us.

A layer is one of a few layouts that the library reads from 0.18 on:

    weights only     "pack-quantized": symmetric codes of 2 to 8 bits, packed densely into int32
    W8A8             "int-quantized": codes as int8, one scale a row; inputs rounded as they come, or with a
                     scale of the calibration

Others are put into these without changing a number. A zero point is subtracted from the codes, which asks for
a bit more: 4 bits with zero points are stored as 5, for asymmetric packed layouts fail to load with
compressed-tensors 0.18 to 0.20. vLLM has kernels for 4 and 8 bits only. GPT-2's transposed layers are unknown
to the library: they are stored as the plain weights that they stand for, and so are layers that compute more
than a product with codes; both only where no inputs are rounded.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luthier.compression import clustered_storage, outliers
from luthier.compression.cached import CachedLinear
from luthier.compression.clustered import ClusteredLinear
from luthier.compression.grid import Grid, Scheme
from luthier.compression.linear import QuantizedLinear, plain_layer, quantized_layers
from luthier.errors import ModelError

log = logging.getLogger("luthier.models")

VERSION = "0.18.0"  # the oldest that reads what is written here
TOKENWISE = {"type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def fits(layer: QuantizedLinear) -> bool:
    """Whether compressed-tensors has a layout for a layer."""
    wide = not layer.scheme.symmetric and layer.scheme.bits == 8
    return type(layer) in (QuantizedLinear, CachedLinear) and not layer.transposed and not wide


def rounds_inputs(model: nn.Module) -> bool:
    """Whether some layer rounds what it is given."""
    return any(layer.scheme.activation_bits is not None for layer in quantized_layers(model).values())


def container(scheme: Scheme) -> int:
    """Bits in which the codes are stored, after their zero point was subtracted."""
    if scheme.activation_bits is not None:
        return 8
    return scheme.bits + (not scheme.symmetric)


def save(model: nn.Module, folder: Path) -> None:
    """Write a model with quantised layers as `save_pretrained` writes one without.

    Raises:
        ModelError: a layer has no layout, and no plain weights that would do the same.
    """
    if outliers.found(model):
        outliers.save(model, folder)
        return
    if clustered_storage.found(model):
        clustered_storage.save(model, folder)
        return
    layers = quantized_layers(model)
    odd = {name: layer for name, layer in layers.items() if not fits(layer)}
    for name, layer in odd.items():
        if layer.scheme.activation_bits is not None:
            raise ModelError(
                f"{name} ({type(layer).__name__}, {layer.scheme}) cannot be stored: neither "
                "compressed-tensors nor plain weights hold what it does to its inputs.",
                fix="Evaluate it in the same run, or choose symmetric weights with inputs rounded a token.",
            )
    if odd:
        log.warning("%d quantised layers are stored as plain weights (%s ...)", len(odd), next(iter(odd)))
    model.save_pretrained(str(folder), state_dict=_state(model, layers))
    if len(odd) < len(layers):
        file = folder / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        config["quantization_config"] = _config(model, {n: m for n, m in layers.items() if n not in odd})
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@contextmanager
def as_saved(model: nn.Module) -> Iterator[None]:
    """Inside, layers of a kind of their own compute as those do that are loaded from the saved folder."""
    layers = {
        name: layer
        for name, layer in quantized_layers(model).items()
        if layer.OWN and not isinstance(layer, ClusteredLinear) and not fits(layer)
    }
    for name, layer in layers.items():
        outlying = isinstance(layer, outliers.OutlierLinear)
        model.set_submodule(name, outliers.of_bitsandbytes(layer) if outlying else plain_layer(layer))
    try:
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)


def _state(model: nn.Module, layers: dict[str, QuantizedLinear]) -> dict[str, Tensor]:
    """The tensors of the model under the names that the layouts have for them."""
    parts = ("codes", "scale", "zero", "input_scale")
    own = {f"{name}.{part}" for name in layers for part in parts}
    extra = {f"{n}.{key}" for n, m in layers.items() for key in m.state_dict()} - own
    extra -= {f"{name}.bias" for name in layers}  # what only a layer of its own kind knows
    state = {key: value for key, value in model.state_dict().items() if key not in own | extra}
    for name, layer in layers.items():
        if fits(layer):
            state |= {f"{name}.{key}": value for key, value in _tensors(layer).items()}
        else:
            weight = layer.weight
            state[f"{name}.weight"] = weight.T.contiguous() if layer.transposed else weight
    return state


def _tensors(layer: QuantizedLinear) -> dict[str, Tensor]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    rows = layer.out_features
    scale = layer.scale.expand(rows, -1) if layer.scale.shape[0] == 1 else layer.scale
    codes = _centred(layer)
    found = {"weight_scale": scale.contiguous()}
    if layer.scheme.activation_bits is None:
        found["weight_packed"] = pack_to_int32(codes, container(layer.scheme))
        found["weight_shape"] = torch.tensor(codes.shape)
    else:
        found["weight"] = codes
        if layer.input_scale is not None:
            found["input_scale"] = layer.input_scale.reshape(1)
    return found


def _centred(layer: QuantizedLinear) -> Tensor:
    """The codes (out, in) without their zero points, int8."""
    if layer.zero is None:
        return layer.codes
    return Grid(layer.scheme, torch.ones_like(layer.scale), layer.zero).dequantize(layer.codes).to(torch.int8)


def _config(model: nn.Module, layers: dict[str, QuantizedLinear]) -> dict[str, Any]:
    """What stands in config.json: a group of layers for each scheme, by their names."""
    by_scheme: dict[str, list[str]] = {}
    for name, layer in layers.items():
        by_scheme.setdefault(json.dumps(_arguments(layer), sort_keys=True), []).append(name)
    groups = {}
    for index, (arguments, names) in enumerate(by_scheme.items()):
        groups[f"group_{index}"] = {"targets": names} | json.loads(arguments)
    formats = {group["format"] for group in groups.values()}
    plain = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in layers]
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": plain,
        "config_groups": groups,
        "kv_cache_scheme": None,
        "version": VERSION,
    }


def _arguments(layer: QuantizedLinear) -> dict[str, Any]:
    scheme = layer.scheme
    weights = {
        "num_bits": container(scheme),
        "type": "int",
        "symmetric": True,
        "strategy": "group" if scheme.group_size else "channel",
        "group_size": scheme.group_size or None,
        "dynamic": False,
    }
    inputs = None
    if scheme.activation_bits is not None:
        static = scheme.activation_per == "static"
        inputs = {
            "num_bits": scheme.activation_bits,
            "type": "int",
            "symmetric": True,
            "strategy": "token" if scheme.activation_per == "token" else "tensor",
            "dynamic": not static,
        }
    layout = "pack-quantized" if inputs is None else "int-quantized"
    outputs = TOKENWISE | {"num_bits": layer.output_bits} if isinstance(layer, CachedLinear) else None
    return {"weights": weights, "input_activations": inputs, "output_activations": outputs, "format": layout}


def restore(model: nn.Module) -> nn.Module:
    """Make our quantised layers of those that transformers loaded from compressed-tensors, in place.

    Left to itself the library would decompress each at its first run, and save the plain weights as codes.
    Layers of another kind (floats of 8 bits, say) are left to it, and then nothing is changed.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if type(quantizer).__name__ == "Bnb8BitHfQuantizer":
        return outliers.restore(model)
    if isinstance(quantizer, clustered_storage.ClusteredQuantizer):
        return clustered_storage.restore(model)
    if type(quantizer).__name__ != "CompressedTensorsHfQuantizer":
        return model
    packed = {n: m for n, m in model.named_modules() if getattr(m, "quantization_scheme", None) is not None}
    schemes = {name: _scheme(module.quantization_scheme) for name, module in packed.items()}
    if any(scheme is None for scheme in schemes.values()):
        return model
    for name, module in packed.items():
        model.set_submodule(name, _layer(module, schemes[name], model.dtype))
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    return model


def _scheme(known: Any) -> Scheme | None:
    """Our scheme for one of the library's; None where we have none."""
    weights, inputs = known.weights, known.input_activations
    if weights is None or weights.type != "int" or weights.num_bits > 8:
        return None
    if weights.strategy not in ("group", "channel"):
        return None
    if (made := known.output_activations) is not None and any(
        getattr(made, key) != value for key, value in TOKENWISE.items()
    ):
        return None
    group = weights.group_size if weights.strategy == "group" else None
    if inputs is None:
        return Scheme(weights.num_bits, group, bool(weights.symmetric))
    if inputs.type != "int" or not inputs.symmetric or inputs.strategy not in ("token", "tensor"):
        return None
    per: Any = "token" if inputs.strategy == "token" else "tensor" if inputs.dynamic else "static"
    return Scheme(weights.num_bits, group, bool(weights.symmetric), inputs.num_bits, per)


def _layer(module: Any, scheme: Scheme | None, dtype: torch.dtype) -> QuantizedLinear:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    assert scheme is not None
    if hasattr(module, "weight_packed"):
        shape = torch.Size(module.weight_shape.tolist())
        codes = unpack_from_int32(module.weight_packed.data, scheme.bits, shape)
    else:
        codes = module.weight.data
    scale = module.weight_scale.data
    zero = getattr(module, "weight_zero_point", None)
    if zero is None:
        zero = torch.zeros_like(scale, dtype=torch.int8)
    elif zero.dtype == torch.int32:
        zero = unpack_from_int32(zero.data, scheme.bits, scale.shape, packed_dim=0)
    grid = Grid(scheme, scale, zero.data.to(torch.int8))
    step = getattr(module, "input_scale", None) if scheme.activation_per == "static" else None
    bias = getattr(module, "bias", None)
    options: dict[str, Any] = {"dtype": dtype}
    options["input_scale"] = None if step is None else step.data.float().reshape(())
    outputs = module.quantization_scheme.output_activations
    if outputs is None:
        return QuantizedLinear(codes.to(torch.int8), grid, bias, **options)
    return CachedLinear(codes.to(torch.int8), grid, bias, output_bits=outputs.num_bits, **options)
