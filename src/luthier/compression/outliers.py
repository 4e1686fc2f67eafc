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
import logging
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from luthier.compression.grid import TINY, Grid, Scheme, stored, straight_through
from luthier.compression.linear import QuantizedLinear
from luthier.errors import MethodError, ModelError

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


def to_bitsandbytes(model: PreTrainedModel) -> PreTrainedModel:
    """Let bitsandbytes compute the layers of a model, in place: the same codes, scales and threshold.

    `save_pretrained` then writes a checkpoint in 8 bits that transformers loads without us.

    Raises:
        ModelError: bitsandbytes is not installed.
        MethodError: no layer is of this kind, or they differ in their threshold.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, OutlierLinear)}
    thresholds = sorted({layer.threshold for layer in layers.values()})
    if len(thresholds) != 1:
        raise MethodError(
            f"bitsandbytes holds one threshold a model, and this one has {len(thresholds)}: {thresholds}.",
            fix="Compress its layers with llm_int8 once, with one threshold.",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("bitsandbytes is not installed.", fix="Install it: pip install 'luthier[bnb]'.")
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    for name, layer in layers.items():
        model.set_submodule(name, _of_bitsandbytes(layer))
    plain = [n for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D)]
    config = BitsAndBytesConfig(
        load_in_8bit=True, llm_int8_threshold=thresholds[0], llm_int8_skip_modules=plain
    )
    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    model.is_quantized, model.is_loaded_in_8bit = True, True
    model.quantization_method = config.quant_method
    return model


def _of_bitsandbytes(layer: OutlierLinear) -> nn.Module:
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
    scales = layer.scale.float().flatten() * HIGH
    made.weight = bitsandbytes.nn.Int8Params(
        layer.codes, requires_grad=False, has_fp16_weights=False, CB=layer.codes, SCB=scales
    )
    made.bias = layer.bias
    made.source_cls = Conv1D if layer.transposed else nn.Linear
    return made.train(layer.training)
