"""The GPTQ layout: the weights of the model, bit by bit as the layout is described; nothing else fits in."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import luthier
from luthier.compression import gptq_layout
from luthier.compression.linear import quantized_layers
from luthier.errors import CheckError, ModelError


def rounded(bits=4, group_size=32, symmetric=True, **options):
    model = tiny.llama(num_key_value_heads=4)  # all matrices multiples of 32
    rtn = luthier.method("rtn")(bits=bits, group_size=group_size, symmetric=symmetric, **options)
    luthier.compress(model, rtn)
    return model


def described(found, name, bits, group):
    """W[n, k] = scale[k // g, n] (u[k, n] - zero[k // g, n]), number by number out of the words."""

    def number(words, index):
        whole = sum((int(w) & 0xFFFFFFFF) << (32 * i) for i, w in enumerate(words))
        return whole >> (bits * index) & (2**bits - 1)

    codes, zeros, scales = (found[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
    inputs, outputs = found[f"{name}.g_idx"].numel(), scales.shape[1]
    weight = torch.empty(outputs, inputs)
    for n in range(outputs):
        for k in range(inputs):
            zero = (number(zeros[k // group], n) + 1) % 2**bits
            weight[n, k] = float(scales[k // group, n]) * (number(codes[:, n], k) - zero)
    return weight


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True), (3, False), (2, True)])
def test_holds_the_weights_as_the_layout_is_described(tmp_path, bits, symmetric):
    model = rounded(bits, symmetric=symmetric)
    folder = gptq_layout.save(model, tmp_path / "gptq", tiny.tokenizer())
    found = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    layer = quantized_layers(model)[name]
    assert torch.allclose(described(found, name, bits, 32), layer.whole_weight(), rtol=2**-10, atol=0)
    gptq_layout.verify(folder, model)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["sym"]) == (bits, 32, symmetric)
    assert not any(key.endswith((".codes", ".scale", ".zero")) for key in found)


def test_a_row_may_share_one_scale(tmp_path):
    model = rounded(group_size=None)
    folder = gptq_layout.save(model, tmp_path / "gptq")
    gptq_layout.verify(folder, model)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["group_size"] == -1


@pytest.mark.parametrize("bits", [4, 8])
def test_a_code_that_is_another_is_noticed(tmp_path, bits):
    model = rounded(bits)
    folder = gptq_layout.save(model, tmp_path / "gptq")
    codes = quantized_layers(model)["model.layers.0.mlp.up_proj"].codes
    row = int(codes.abs().sum(1).argmin())  # where one step is least beside the largest weight
    codes[row, 5] += 1 if codes[row, 5] < 0 else -1
    with pytest.raises(CheckError, match="weights after reading"):
        gptq_layout.verify(folder, model)


def test_another_tensor_that_is_changed_or_missing_is_noticed(tmp_path):
    model = rounded()
    folder = gptq_layout.save(model, tmp_path / "gptq")
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    with pytest.raises(CheckError, match=r"other tensors.*model\.norm\.weight"):
        gptq_layout.verify(folder, model)
    model = rounded()
    found = load_file(folder / "model.safetensors")
    del found["model.layers.0.input_layernorm.weight"]
    save_file(found, folder / "model.safetensors")
    with pytest.raises(CheckError, match="input_layernorm"):
        gptq_layout.verify(folder, model)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (tiny.llama, "no quantised layers"),
        (lambda: rounded(exclude=["down_proj"]), "down_proj is not quantised"),
        (lambda: rounded(layer_bits={"up_proj": 8}), "others have"),
        (lambda: rounded(bits=5), "GPTQ layout cannot hold"),
        (lambda: rounded(activation_bits=8, bits=8), "rounds its inputs"),
        (lambda: rounded(group_size=0), "one scale for the whole matrix"),
    ],
)
def test_refuses_what_has_no_place(tmp_path, make, said):
    with pytest.raises(ModelError, match=said):
        gptq_layout.save(make(), tmp_path / "gptq")
    assert not (tmp_path / "gptq").exists()
