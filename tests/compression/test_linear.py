"""The quantised layer computes with the weight that its codes stand for, in place of either kind of layer."""

import copy

import pytest
import small_compression as small
import tiny
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier import method
from luthier.compression.compress import compress
from luthier.compression.grid import Scheme, fit
from luthier.compression.linear import (
    QuantizedLinear,
    dequantize,
    dimensions,
    held_weights,
    matrix,
    quantize_layer,
    quantized_layers,
    require_plain,
    set_matrix,
)
from luthier.errors import MethodError


def plain(transposed: bool, dtype=torch.float32):
    """A linear layer (24, 64) with a bias, or the same as GPT-2 stores it."""
    torch.manual_seed(0)
    layer = Conv1D(24, 64) if transposed else nn.Linear(64, 24)
    nn.init.normal_(layer.bias)
    return layer.to(dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_computes_with_the_rounded_weight(transposed, symmetric):
    layer, x = plain(transposed), small.correlated()
    grid = fit(matrix(layer), Scheme(group_size=16, symmetric=symmetric))
    made = quantize_layer(layer, grid.quantize(matrix(layer)), grid)
    rounded = copy.deepcopy(layer)
    set_matrix(rounded, grid.round(matrix(layer)))
    assert dimensions(made) == dimensions(layer) == (24, 64)
    assert torch.equal(made.weight, matrix(rounded))
    assert torch.allclose(made(x), rounded(x), atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_matrix_is_a_copy_and_is_put_back_as_it_was(transposed):
    layer = plain(transposed, torch.bfloat16)
    before = layer.weight.detach().clone()
    weight = matrix(layer)
    assert weight.shape == (24, 64)
    assert weight.dtype == torch.float32
    weight.mul_(0)
    assert torch.equal(layer.weight, before)
    set_matrix(layer, matrix(layer))
    assert torch.equal(layer.weight, before)


def test_inputs_are_rounded_where_the_scheme_says_so():
    layer, x = plain(False), small.correlated()
    for per, scale in (("token", None), ("tensor", None), ("static", torch.tensor(0.2))):
        scheme = Scheme(8, None, activation_bits=8, activation_per=per)
        grid = fit(matrix(layer), scheme)
        made = quantize_layer(layer, grid.quantize(matrix(layer)), grid, scale)
        rounded = made.quantize_input(x)
        assert 0 < (rounded - x).norm() < 0.2 * x.norm()
        assert torch.allclose(made(x), nn.functional.linear(rounded, made.weight, layer.bias))


def test_a_whole_model_goes_back_to_plain_layers():
    for build in (tiny.llama, tiny.gpt2):
        model, ids = build(), small.batches(1)[0]["input_ids"]
        compress(model, method("rtn")(bits=3, group_size=16))
        names = set(quantized_layers(model))
        expected = model(ids).logits
        dequantize(model)
        assert names
        assert not quantized_layers(model)
        kinds = {name: type(module) for name, module in build().named_modules()}
        assert all(isinstance(model.get_submodule(name), kinds[name]) for name in names)
        assert torch.allclose(model(ids).logits, expected, atol=1e-5)


def test_its_state_is_codes_scales_and_bias():
    layer = plain(False)
    grid = fit(matrix(layer), Scheme(group_size=16, symmetric=False))
    made = quantize_layer(layer, grid.quantize(matrix(layer)), grid)
    assert set(made.state_dict()) == {"codes", "scale", "zero", "bias"}
    assert not any(p.requires_grad for p in made.parameters())
    other = quantize_layer(layer, torch.zeros_like(made.codes), grid)
    other.load_state_dict(made.state_dict())
    assert torch.equal(other.weight, made.weight)
    assert isinstance(made, nn.Linear)  # whoever asks, PEFT say


def test_what_is_no_plain_layer_is_refused():
    layer = plain(False)
    grid = fit(matrix(layer), Scheme())
    made = quantize_layer(layer, grid.quantize(matrix(layer)), grid)
    assert isinstance(made, QuantizedLinear)
    with pytest.raises(MethodError, match=r"up is quantised already.*original precision"):
        require_plain("up", made)
    for bad in (float("nan"), float("inf")):
        layer.weight.data[3, 5] = bad
        with pytest.raises(MethodError, match=r"weight of up has values that are not finite"):
            require_plain("up", layer)


def test_a_weight_is_made_once_while_it_is_held_and_anew_after_it():
    weight = small.weight_of(24, 64)
    grid = fit(weight, Scheme(4, 16))
    layer = quantize_layer(plain(False), grid.quantize(weight), grid)
    assert layer.weight is not layer.weight
    with held_weights(layer):
        held = layer.weight
        assert layer.weight is held
    layer.codes.zero_()
    assert not layer.weight.any()
    assert torch.equal(held, grid.round(weight))
