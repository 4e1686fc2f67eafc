"""`luthier.accelerate` changes the layers of a model, not what it computes, and can be taken back."""

import logging

import pytest
import tiny
import torch

import luthier
from luthier.acceleration import native
from luthier.acceleration.accelerate import undo
from luthier.acceleration.fast_linear import FastLinear
from luthier.compression.grid import Scheme, fit
from luthier.compression.linear import QuantizedLinear, matrix, quantize_layer, quantized_layers
from luthier.models import structure

SHAPE = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1}
IDS = torch.tensor([[11, 42, 99, 7, 300]])


def quantise(model, scheme, names=None):
    """Round to nearest every linear layer, or those whose name ends with one of `names`."""
    for name, layer in structure.linears(model).items():
        if names is None or name.endswith(tuple(names)):
            weight = matrix(layer)
            grid = fit(weight, scheme, layer.weight.dtype)
            model.set_submodule(name, quantize_layer(layer, grid.quantize(weight), grid))
    return model


@torch.no_grad()
def logits(model):
    return model(IDS).logits.float()


@pytest.mark.parametrize(
    ("scheme", "tolerance"),
    [
        (Scheme(4, 32), 2e-2),
        (Scheme(4, 64, symmetric=False), 2e-2),
        (Scheme(8, None), 2e-2),
        (Scheme(8, None, activation_bits=8), 1e-4),
    ],
    ids=str,
)
@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("ours", [True, False])
def test_outputs_stay(build, scheme, tolerance, ours, monkeypatch):
    if not ours:
        monkeypatch.setattr(native, "_library", lambda: "it is not here")
    elif not native.here():
        pytest.skip("our kernels need a CPU of their own and a C++ compiler")
    changes = SHAPE if build is tiny.llama else {"n_embd": 128}
    model = quantise(build(**changes), scheme)
    expected, state = logits(model), model.state_dict()
    assert luthier.accelerate(model) is model
    assert all(isinstance(layer, FastLinear) for layer in quantized_layers(model).values())
    assert (logits(model) - expected).norm() < tolerance * expected.norm()
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in state.items()}
    undo(model)
    assert all(type(layer) is QuantizedLinear for layer in quantized_layers(model).values())
    assert torch.equal(logits(model), expected)


def test_siblings_are_joined_and_share_memory():
    model = luthier.accelerate(quantise(tiny.llama(**SHAPE), Scheme(4, 32)))
    block = structure.blocks(model)[0]
    attention, mlp = block.self_attn, block.mlp
    assert attention.q_proj.joint is attention.k_proj.joint is attention.v_proj.joint is not None
    assert mlp.gate_proj.joint is mlp.up_proj.joint is not None
    assert mlp.down_proj.joint is None
    assert attention.o_proj.joint is None


def test_it_may_be_called_twice():
    model = luthier.accelerate(quantise(tiny.llama(**SHAPE), Scheme(4, 32), ["q_proj"]))
    first = model.model.layers[0].self_attn.q_proj
    quantise(model, Scheme(4, 32), ["k_proj"])
    luthier.accelerate(model)
    assert model.model.layers[0].self_attn.q_proj is first
    assert isinstance(model.model.layers[0].self_attn.k_proj, FastLinear)


def test_the_log_tells_what_stays_plain_and_why(caplog):
    model = quantise(tiny.llama(**SHAPE), Scheme(4, 32), ["q_proj"])
    quantise(model, Scheme(8, 2), ["o_proj"])
    with caplog.at_level(logging.INFO, "luthier.acceleration"):
        luthier.accelerate(model)
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "2 int4" in said
    assert "2 quantised layers stay plain" in said
    assert "groups of 2, not a multiple of 4" in said or "8 bits in groups" in said
    assert "model.layers.0.self_attn.o_proj" in said
    assert type(model.model.layers[0].self_attn.o_proj) is QuantizedLinear


def test_a_model_without_quantised_layers_is_left_alone(caplog, tiny_llama):
    expected = logits(tiny_llama)
    with caplog.at_level(logging.INFO, "luthier.acceleration"):
        luthier.accelerate(tiny_llama)
    assert "none is quantised" in caplog.text
    assert torch.equal(logits(tiny_llama), expected)


def test_an_adapter_on_fast_layers_learns():
    """A LoRA gets the gradient that it gets on plain layers: what needs one takes the plain path."""
    grads = []
    for change in (lambda model: model, luthier.accelerate):
        model = change(quantise(tiny.llama(**SHAPE), Scheme(4, 32)))
        torch.manual_seed(0)
        model = luthier.attach(model, luthier.method("lora")(r=2, target_modules=["q_proj"]))
        model.train()
        model(IDS, labels=IDS).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert grads[0].norm() > 0
    assert (grads[1] - grads[0]).norm() < 5e-2 * grads[0].norm()
