"""The GPTQ layout: what AutoGPTQ began, and gptqmodel, vLLM, ExLlama and transformers (with gptqmodel) load.

Of a layer with codes u = 0 ... 2^b - 1 for weights (N, K), and groups of g inputs:

    qweight  int32 (K b / 32, N)     codes of a column of the weight's transpose, the lowest bits first
    qzeros   int32 (K / g, N b / 32) the code that stands for 0, less one
    scales   float16 (K / g, N)
    g_idx    int32 (K,)              the group of each input

    W[n, k] = scales[g_idx[k], n] (u[k, n] - zero[g_idx[k], n])

Zero points have a place of their own here, so that weights with `symmetric: false` keep their bits. Scales
are rounded to half precision, which moves a weight by 2^-11 of itself at most.
"""

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from luthier import checks
from luthier.compression.linear import QuantizedLinear, quantized_layers
from luthier.errors import ModelError
from luthier.models import saving, structure
from luthier.terminal import no_bars

BITS = (2, 3, 4, 8)
MULTIPLE = 32  # features, both in and out
PARTS = ("qweight", "qzeros", "scales", "g_idx")  # of a layer in the layout
OWN = ("codes", "scale", "zero")  # of a layer in memory
SMALLEST = 2.0**-14  # a scale below it loses bits in half precision


def require(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantised layers of a model that the layout can hold.

    Raises:
        ModelError: there are none, some linear layers of the blocks are not quantised, or one is of a kind
            that the layout has no place for.
    """
    layers = quantized_layers(model)
    if isinstance(model, PeftModel) or not layers:
        what = "carries an adapter" if isinstance(model, PeftModel) else "has no quantised layers"
        raise ModelError(f"The model {what}.", fix="Put a compress stage with gptq, awq or rtn before it.")
    stack, _ = structure.stacks(model)[0]
    plain = [
        name
        for name, m in structure.linears(model).items()
        if name.startswith(f"{stack}.") and not isinstance(m, QuantizedLinear)
    ]
    if plain:
        raise ModelError(
            f"{plain[0]} is not quantised, and the GPTQ layout has all linear layers of the blocks or none.",
            fix="Compress without targets and exclude, or write format: safetensors.",
        )
    first = next(iter(layers.values())).scheme
    for name, layer in layers.items():
        if fault := _fault(layer, first):
            raise ModelError(
                f"{name} {fault}, which the GPTQ layout cannot hold.", fix="Write format: safetensors."
            )
    return layers


def _fault(layer: QuantizedLinear, first: Any) -> str:
    scheme = layer.scheme
    if type(layer) is not QuantizedLinear or layer.transposed:
        return f"is a {type(layer).__name__}{' of a Conv1D' if layer.transposed else ''}"
    if scheme.activation_bits is not None:
        return "rounds its inputs"
    if scheme.bits not in BITS or scheme != first:
        return f"has {scheme}" + ("" if scheme == first else f", and others have {first}")
    if scheme.group_size == 0:
        return "has one scale for the whole matrix"
    if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
        return f"is {layer.out_features} x {layer.in_features}, no multiples of {MULTIPLE}"
    if float(layer.scale.abs().min()) < SMALLEST or float(layer.scale.abs().max()) > 65504:
        return "has scales outside of half precision"
    return ""


def save(model: Any, folder: Path | str, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
    """Write a model with quantised layers in the GPTQ layout, with its tokenizer.

    Raises:
        ModelError: see `require`; or the folder holds other files.
    """
    layers = require(model)

    def write(place: Path) -> None:
        parts = {f"{name}.{part}" for name in layers for part in OWN}
        state = {key: value for key, value in model.state_dict().items() if key not in parts}
        for name, layer in layers.items():
            state |= {f"{name}.{key}": value for key, value in tensors(layer).items()}
        with no_bars():
            model.save_pretrained(str(place), state_dict=state)
        file = place / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        config["quantization_config"] = _config(next(iter(layers.values())))
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    return saving.write_whole(Path(folder).absolute(), model, tokenizer, write)


def tensors(layer: QuantizedLinear) -> dict[str, Tensor]:
    """What the layout holds of a layer, without its bias."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    bits, inputs = layer.scheme.bits, layer.in_features
    groups = layer.scale.shape[1]
    zero = torch.zeros_like(layer.scale, dtype=torch.int8) if layer.zero is None else layer.zero
    # Packing counts from the lowest code, -2^(b-1), and so does the layout; "less one" wraps around.
    low, count = -(2 ** (bits - 1)), 2**bits
    less = ((zero.to(torch.int16) - 1 - low) % count + low).to(torch.int8)  # (N, groups)
    return {
        "qweight": pack_to_int32(layer.codes, bits).T.contiguous(),
        "qzeros": pack_to_int32(less.T.contiguous(), bits).contiguous(),
        "scales": layer.scale.T.to(torch.float16).contiguous(),
        "g_idx": (torch.arange(inputs) // (inputs // groups)).to(torch.int32),
    }


def _config(layer: QuantizedLinear) -> dict[str, Any]:
    scheme = layer.scheme
    return {
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size or -1,
        "desc_act": False,  # the order of the sweep is not the order on disk
        "sym": scheme.symmetric,
        "lm_head": False,
        "checkpoint_format": "gptq",
    }


def verify(folder: Path, model: Any) -> None:
    """Prove that a folder holds the model: its codes, unpacked again, are the weights; the rest is equal.

    transformers needs gptqmodel to run such a folder; here the files are read.

    Raises:
        CheckError: a weight differs by more than the rounding of its scale, or another tensor differs.
    """
    files = {key: t for file in folder.glob("*.safetensors") for key, t in load_file(file).items()}
    layers, state = quantized_layers(model), model.state_dict()
    worst, where = 0.0, ""
    for name, layer in layers.items():
        found = {part: files.pop(f"{name}.{part}") for part in PARTS}
        expected = layer.whole_weight().cpu()  # (N, K)
        error = (unpack(found, layer.scheme.bits) - expected).abs() / expected.abs().clamp_min(1e-30)
        worst, where = max((worst, where), (float(error.max()), name))
    checks.record("export", "weights after reading", worst <= 2**-10, worst, 2**-10, where)
    held = {state[key].data_ptr() for key in files.keys() & state.keys()}  # what is tied is written once
    rest = state.keys() - {f"{name}.{part}" for name in layers for part in OWN}
    wrong = [key for key in rest if key not in files and state[key].data_ptr() not in held]
    wrong += [key for key, t in files.items() if key not in rest or not torch.equal(t, state[key].cpu())]
    checks.record("export", "other tensors after reading", not wrong, detail=", ".join(wrong))


def unpack(found: dict[str, Tensor], bits: int) -> Tensor:
    """The weight (N, K), float32, that tensors of the layout stand for."""
    codes = _bits(found["qweight"].T, bits).T  # (K, N)
    zeros = (_bits(found["qzeros"], bits) + 1) % 2**bits  # (groups, N)
    group = found["g_idx"].long()
    return (found["scales"].float()[group] * (codes - zeros[group])).T


def _bits(packed: Tensor, bits: int) -> Tensor:
    """Numbers of so many bits (rows, n), of a stream of them in int32 (rows, n bits / 32), lowest first."""
    stream = (packed[..., None] >> torch.arange(32, dtype=torch.int32)) & 1  # (rows, words, 32)
    numbers = stream.reshape(len(packed), -1, bits)
    return (numbers << torch.arange(bits, dtype=torch.int32)).sum(-1)
