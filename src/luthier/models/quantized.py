"""A base that is held in 4 bits (bitsandbytes): how it is loaded, and how its weights come back.

Every linear layer below the head becomes a `Linear4bit` (but for those that transformers holds in float32:
T5's `wo`): two weights a byte, and one constant c for each block of 64. The weight is q_i c, with q_i one of
16 numbers: quantiles of a normal distribution (nf4) or floats of 4 bits (fp4). Double quantisation (-dq)
holds the constants themselves in 8 bits:

    nf4, fp4          4 + 32/64                  = 4.5   bits a weight
    nf4-dq, fp4-dq    4 + 8/64 + 32/(64 * 256)   = 4.127

Each product makes the weights anew in the dtype of the activations. On a CPU of its choice bitsandbytes
would rewrite them at the first evaluation, for another product that rounds otherwise. That is turned off:
frozen weights stay what they are, bit by bit, and a model answers as it was trained.
"""

import copy
import importlib.util
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.compression.linear import quantized_layers
from luthier.errors import ModelError, did_you_mean
from luthier.models import structure
from luthier.resources import release_memory

# (type, double quantisation) and bits a weight.
KINDS: dict[str, tuple[tuple[str, bool], float]] = {
    "nf4": (("nf4", False), 4 + 32 / 64),
    "nf4-dq": (("nf4", True), 4 + 8 / 64 + 32 / (64 * 256)),
    "fp4": (("fp4", False), 4 + 32 / 64),
    "fp4-dq": (("fp4", True), 4 + 8 / 64 + 32 / (64 * 256)),
}


# A classifier's head learns; transformers keeps only language models' heads out by itself.
HEADS = ["classifier", "score", "lm_head"]


def config(quantization: str, task: str, dtype: torch.dtype) -> Any:
    """What transformers' `from_pretrained` takes as `quantization_config`.

    Args:
        task: of the model, such as "causal".
        dtype: of the products.

    Raises:
        ModelError: an unknown kind, or bitsandbytes is not installed.
    """
    if quantization not in KINDS:
        raise ModelError(
            f"'{quantization}' is not a quantisation of a base.", fix=did_you_mean(quantization, KINDS)
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"A base in 4 bits ({quantization}) needs bitsandbytes, which is not installed.",
            fix="Install it: pip install 'luthier[bnb]'.",
        )
    from transformers import BitsAndBytesConfig

    kind, double = KINDS[quantization][0]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=HEADS if task == "classification" else None,
    )


def settle(model: nn.Module) -> None:
    """Let a model that was just loaded keep its bits (see above), and let go of the weights before them."""
    found = layers(model)
    for layer in found.values():
        layer.support_avx512bf16_for_cpu = False
    if found:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.clone()  # one view of the file would keep all of it in memory
        release_memory()


def of(model: nn.Module) -> str | None:
    """The kind of quantisation of a model, or of a tuned one's base; None where it is not one of ours."""
    found: Any = getattr(structure.base(model).config, "quantization_config", None)
    if not getattr(found, "load_in_4bit", False):
        return None
    return f"{found.bnb_4bit_quant_type}{'-dq' if found.bnb_4bit_use_double_quant else ''}"


def layers(model: nn.Module) -> dict[str, Any]:
    """The layers in 4 bits, by name. Needs no bitsandbytes where there are none."""
    return {name: m for name, m in model.named_modules() if is_4bit(m)}


def is_4bit(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Linear4bit" and type(layer).__module__.startswith("bitsandbytes.")


def count(parameter: nn.Parameter) -> int:
    """Number of weights in a parameter, also of those that share a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def held(model: nn.Module) -> dict[int, int]:
    """Number of weights in each tensor that holds some, by its id: parameters, and codes of our layers."""
    codes = {id(layer.codes): layer.codes.numel() for layer in quantized_layers(model).values()}
    return codes | {id(parameter): count(parameter) for parameter in model.parameters()}


def saved(model: nn.Module, quantization: str) -> int:
    """Bytes by which the linear layers of `model`, which is not quantised, would shrink."""
    weights = [layer.weight for layer in structure.linears(model).values()]
    bits = KINDS[quantization][1]
    return sum(int(w.numel() * (w.element_size() - bits / 8)) for w in weights)


@torch.no_grad()
def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Give a model in 4 bits plain weights again, in place.

    transformers' own `dequantize` makes `nn.Linear` of GPT-2's transposed layers, which then cannot be saved.

    Args:
        dtype: of the weights; default: that of its products. In float32 they are exact.
    """
    from bitsandbytes.functional import dequantize_4bit

    for name, layer in layers(model).items():
        state = copy.copy(layer.weight.quant_state)
        state.dtype = dtype or state.dtype
        weight = dequantize_4bit(layer.weight.data, state)  # (out, in)
        with torch.device("meta"):
            if layer.source_cls is Conv1D:
                plain: Any = Conv1D(layer.out_features, layer.in_features)
                weight = weight.T.contiguous()
            else:
                plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), layer.bias
        model.set_submodule(name, plain.train(layer.training))
    model.hf_quantizer.remove_quantization_config(model)
    model.is_loaded_in_4bit = False
    return model
