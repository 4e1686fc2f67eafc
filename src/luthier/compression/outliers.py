"""A layer in int8 that leaves outlying inputs in floating point: the layer of LLM.int8().

An input feature in which any token of a call reaches the threshold is multiplied as it is; the others are
rounded to int8, one scale a token. Which features these are is found anew in each call.

    O = { k : |x_tk| >= threshold for some t },     c_t = max |x_tk| over entries below the threshold
    y = sum_{k not in O} (c_t / 127) round(127 x_tk / c_t) w_nk  +  sum_{k in O} x_tk w_nk

The product is computed in floating point, in which sums of such integers are exact. bitsandbytes computes
the same in int8 (`to_bitsandbytes`): small entries of an outlying feature count in c_t, and the
weights of outlying features are those of the codes, for the weights before are gone.
"""

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from luthier.compression.grid import TINY, Grid, Scheme, stored, straight_through
from luthier.compression.linear import QuantizedLinear, quantized_layers
from luthier.errors import ModelError

SCHEME = Scheme(bits=8, group_size=None, activation_bits=8)
HIGH = 127


class OutlierLinear(QuantizedLinear):
    """A layer in int8, one scale a row and a token, whose outlying inputs stay in floating point.

    Attributes:
        threshold: size from which on an entry makes its feature an outlier; 0: none ever is.
    """

    OWN: ClassVar[tuple[str, ...]] = ("threshold",)

    def __init__(
        self, codes: Tensor, grid: Grid, bias: Tensor | None = None, *, threshold: float, **options: Any
    ):
        super().__init__(codes, grid, bias, **options)
        self.threshold = threshold

    def quantize_input(self, x: Tensor) -> Tensor:
        return round_inliers(x, self.threshold)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, threshold={self.threshold:g}"


def row_grid(weight: Tensor) -> Grid:
    """One scale a row, float32, such that the largest magnitude of the row has the code 127 or -127."""
    scale = stored(weight.float().abs().amax(1, keepdim=True) / HIGH, torch.float32)
    return Grid(SCHEME, scale, torch.zeros_like(scale, dtype=torch.int8))


def outliers(x: Tensor, threshold: float) -> Tensor:
    """Which features (features,) of the inputs (..., features) hold an outlier; with threshold 0 none."""
    reached = x.detach().abs().float() >= threshold
    return reached.flatten(0, -2).any(0) & (threshold > 0)


def round_inliers(x: Tensor, threshold: float) -> Tensor:
    """Inputs (..., features) in 8 bits, one scale a token, but for features with outliers.

    Gradients pass as if nothing had been rounded.
    """
    values = x.detach().float()
    apart = outliers(values, threshold)
    below = values.masked_fill(values.abs() >= threshold, 0) if threshold > 0 else values
    step = (below.abs().amax(-1, keepdim=True) / HIGH).clamp_min(TINY)
    rounded = torch.round(below / step).mul_(step)
    return straight_through(x, torch.where(apart, values, rounded).to(x.dtype))


def found(model: nn.Module) -> dict[str, OutlierLinear]:
    """The layers of this kind by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, OutlierLinear)}


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write a model as bitsandbytes has it, which transformers loads without us. Needs no bitsandbytes.

    Raises:
        ModelError: layers of another kind, or of another threshold, are among them.
    """
    layers, others = found(model), set(quantized_layers(model)) - set(found(model))
    if others:
        raise ModelError(
            f"{min(others)} and {min(layers)} are quantised in ways that no single format holds.",
            fix="Compress all layers with llm_int8, or none.",
        )
    config = _config(model)
    odd = {f"{name}.{part}" for name in layers for part in ("codes", "scale")}
    state = {key: value for key, value in model.state_dict().items() if key not in odd}
    for name, layer in layers.items():
        state[f"{name}.weight"] = layer.codes
        state[f"{name}.SCB"] = _largest(layer)
        state[f"{name}.weight_format"] = torch.tensor(0, dtype=torch.uint8)  # row after row
    model.save_pretrained(str(folder), state_dict=state)
    file = folder / "config.json"
    known = json.loads(file.read_text(encoding="utf-8")) | {"quantization_config": config}
    file.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Make our layers of those that transformers loaded for bitsandbytes in 8 bits, in place."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Linear8bitLt":
            model.set_submodule(name, _ours(module, model.dtype))
    model.hf_quantizer, model.is_quantized, model.is_loaded_in_8bit = None, False, False
    conversions = getattr(model, "_weight_conversions", None) or []  # undone at saving, but for the layers'
    model._weight_conversions = [c for c in conversions if not _reads_layers(c)]
    del model.config.quantization_config
    return model


def _reads_layers(conversion: Any) -> bool:
    operations = getattr(conversion, "operations", [])
    return any(type(operation).__name__ == "Bnb8bitDeserialize" for operation in operations)


def to_bitsandbytes(model: PreTrainedModel) -> PreTrainedModel:
    """Let bitsandbytes compute the layers of a model, in place: the same codes, scales and threshold.

    Raises:
        ModelError: bitsandbytes is not installed, or the layers differ in their threshold.
    """
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    config = BitsAndBytesConfig(**_config(model))
    for name, layer in found(model).items():
        model.set_submodule(name, of_bitsandbytes(layer))
    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    model.is_quantized, model.is_loaded_in_8bit = True, True
    model.quantization_method = config.quant_method
    return model


def _config(model: nn.Module) -> dict[str, Any]:
    """What config.json says of the layers."""
    thresholds = sorted({layer.threshold for layer in found(model).values()})
    if len(thresholds) != 1:
        raise ModelError(
            f"bitsandbytes has one threshold a model, and here are {len(thresholds)}: {thresholds}.",
            fix="Compress the model with llm_int8 once.",
        )
    plain = [n for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D)]
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "llm_int8_threshold": thresholds[0],
        "llm_int8_skip_modules": plain,
    }


def _largest(layer: OutlierLinear) -> Tensor:
    """Of each row the weight that the code 127 stands for: how bitsandbytes holds the scale."""
    return layer.scale.float().flatten() * HIGH


def of_bitsandbytes(layer: OutlierLinear) -> nn.Module:
    """The layer as bitsandbytes has it, on the same codes. It rounds inputs to float16 first.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("bitsandbytes is not installed.", fix="Install it: pip install 'luthier[bnb]'.")
    import bitsandbytes

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of inputs in float32 at each call
    with torch.device("meta"):
        made = bitsandbytes.nn.Linear8bitLt(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            has_fp16_weights=False,
            threshold=layer.threshold,
        )
    codes = {"CB": layer.codes, "SCB": _largest(layer)}
    made.weight = bitsandbytes.nn.Int8Params(
        layer.codes, requires_grad=False, has_fp16_weights=False, **codes
    )
    made.bias = layer.bias
    made.source_cls = Conv1D if layer.transposed else nn.Linear
    return made.train(layer.training)


def _ours(layer: Any, dtype: torch.dtype) -> OutlierLinear:
    scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    step = (scale.float() / HIGH).reshape(-1, 1)
    return OutlierLinear(
        layer.weight.data,
        Grid(SCHEME, step, torch.zeros_like(step, dtype=torch.int8)),
        layer.bias,
        dtype=dtype,
        transposed=getattr(layer, "source_cls", None) is Conv1D,
        threshold=layer.state.threshold,
    )
