"""GPTQ: the textbook recursion on a grid, better than rounding on correlated inputs, equal on others."""

import pytest
import small_compression as small
import tiny
import torch

from luthier import method
from luthier.compression.compress import compress
from luthier.compression.grid import fit
from luthier.compression.linear import matrix, quantized_layers
from luthier.compression.masks import share_of_zeros
from luthier.models import structure

W, X = small.weight_of(), small.correlated()
H = small.hessian_of(X)


def gptq(**options):
    return method("gptq")(**{"group_size": 16, "bits": 3} | options)


def rounded(**options):
    """The weight by plain rounding on the same grid."""
    return fit(W, gptq(**options).scheme).round(W)


def textbook(config, weight, hessian):
    """Obs with an inverse of what is left at each step; grids as the options say. In float64."""
    damped = (hessian + config.damping * hessian.diagonal().mean() * torch.eye(len(hessian))).double()
    w, found = weight.clone(), torch.zeros_like(weight)
    fixed = fit(weight, config.scheme)
    order = hessian.diagonal().argsort(descending=True, stable=True).tolist() if config.act_order else None
    left = list(order or range(weight.shape[1]))
    for j in list(left):
        if config.act_order or not config.group_size:
            grid = fixed.column(j)
        elif j % config.group_size == 0:
            grid = fit(w[:, j : j + config.group_size], config.scheme)  # on the columns as they now are
        inverse = torch.linalg.inv(damped[left][:, left])
        found[:, j] = grid.round(w[:, j : j + 1])[:, 0]
        w[:, left] -= ((w[:, j] - found[:, j]) / inverse[0, 0])[:, None] * inverse[0].float()
        left.remove(j)
    return found


KINDS = [
    {"act_order": a, "group_size": g, "symmetric": s}
    for a in (True, False)
    for g in (16, None)
    for s in (True, False)
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("block_size", [1, 128])
def test_is_the_textbook_recursion(kind, block_size):
    config = gptq(**kind, block_size=block_size, damping=0.1)
    found = small.changed(config, W, X)
    expected = textbook(config, W, H)
    same = (found - expected).abs() < 1e-4
    # In float32 a weight now and then lies on the other side of a boundary; from there its row differs.
    assert same.all(1).float().mean() > 0.8
    assert small.error(found, W, X) == pytest.approx(small.error(expected, W, X), rel=0.05)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_block_size_is_speed_alone(kind):
    found = [small.changed(gptq(**kind, block_size=size), W, X) for size in (1, 16, 48, 1000)]
    for other in found[1:]:
        assert ((other - found[0]).abs() < 1e-5).all(1).float().mean() > 0.9


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_with_uncorrelated_inputs_it_is_plain_rounding(kind):
    """A diagonal H: each token excites one input alone."""
    x = torch.diag(torch.linspace(1, 5, 64))[None]
    assert torch.equal(small.changed(gptq(**kind), W, x), rounded(**kind))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_on_correlated_inputs_it_beats_rounding_and_order_helps(bits):
    plain = small.error(rounded(bits=bits), W, X)
    swept, ordered = (
        small.error(small.changed(gptq(bits=bits, act_order=a), W, X), W, X) for a in (False, True)
    )
    assert swept < 0.6 * plain
    assert ordered < 0.6 * plain


def test_the_record_is_the_error_of_the_outputs():
    block = small.alone(W, X)
    (record,) = gptq().change(block)
    size = float((X @ W.T).square().sum())
    assert record.before == pytest.approx(small.error(rounded(), W, X) / size, rel=1e-3)
    assert record.after == pytest.approx(small.error(small.weight_in(block), W, X) / size, rel=1e-3)
    assert record.bits == 3
    assert not record.note


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_weight_is_on_the_grid_that_is_stored(kind, dtype):
    block = small.alone(W.to(dtype), X)
    for index in range(len(block.hidden)):
        block.hidden[index] = block.hidden[index].to(dtype)
    list(gptq(**kind).change(block))
    layer = quantized_layers(block.model)["0.layer"]
    exact = layer.grid.dequantize(layer.codes)
    assert layer.scale.dtype == dtype
    assert torch.equal(layer.grid.quantize(exact), layer.codes)
    # What was measured is what is stored: the error is small with the codes as well.
    assert small.error(exact, W, X) < 0.7 * small.error(rounded(), W, X)


def test_names_of_the_inputs_do_not_matter_with_act_order():
    """With one scale a row the same columns in another order give the same weights in that order."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    config = gptq(group_size=None, damping=0.1)
    found = small.changed(config, W, X)
    other = small.changed(config, W[:, order], X[..., order])
    assert ((other - found[:, order]).abs() < 1e-4).all(1).float().mean() > 0.8


def test_eight_bits_lose_next_to_nothing():
    found = small.changed(gptq(bits=8, group_size=None), W, X)
    assert (found - W).norm() < 0.02 * W.norm()


def test_dead_inputs_come_out_as_zero():
    x = X.clone()
    x[..., [3, 40]] = 0
    for kind in KINDS:
        found = small.changed(gptq(**kind), W, x)
        assert not found[:, [3, 40]].any()
        assert torch.isfinite(found).all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_zeros_of_a_pruned_layer_stay(kind):
    weight = W.clone()
    weight[:, ::2] = 0
    weight[:, 1::8] = 0.0
    found = small.changed(gptq(**kind), weight, X)
    assert not found[weight == 0].any()
    assert small.error(found, weight, X) < small.error(
        fit(weight, gptq(**kind).scheme).round(weight), weight, X
    )
    few = W.clone()
    few[0] = 0  # too few to count as pruned: they are weights like others, and stay zero all the same
    assert share_of_zeros(few) < 0.25
    assert torch.isfinite(small.changed(gptq(**kind), few, X)).all()


def test_few_tokens_raise_the_damping_and_the_record_says_so():
    block = small.alone(W, torch.ones(1, 4, 64))
    (record,) = gptq(damping=0).change(block)
    assert "damping raised to" in record.note
    assert torch.isfinite(small.weight_in(block)).all()


def test_how_the_data_is_cut_does_not_matter():
    whole = small.changed(gptq(damping=0.1), W, X)
    parts = small.changed(gptq(damping=0.1), W, *X.split([100, 12, 400], dim=1))
    assert ((whole - parts).abs() < 1e-5).all(1).float().mean() > 0.9


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "opt"])
def test_a_model_keeps_more_than_by_rounding(family):
    """Mean square of the change of its logits, on the data that was seen."""
    data, build = small.batches(24, 4, 16), small.MODELS[family]
    off = {}
    for name in ("rtn", "gptq"):
        model = build()
        compress(model, method(name)(bits=3, group_size=16), calibration=data)
        with torch.no_grad():
            off[name] = sum(
                float((model(**b).logits - build()(**b).logits).square().mean()) for b in data[:4]
            )
        assert len(quantized_layers(model)) == len([n for n in structure.linears(model) if "pooler" not in n])
    assert off["gptq"] < off["rtn"]


def test_later_groups_of_a_block_see_the_rounded_ones():
    """True-sequential: the last layer's inputs are those that the rounded layers before it give."""
    model, data = tiny.llama(num_hidden_layers=1), small.batches()
    seen = {}
    config = gptq()
    plain = type(config).change_layer

    def note(self, block, name, layer, hessian):
        seen[name] = hessian
        return plain(self, block, name, layer, hessian)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(config), "change_layer", note)
        compress(model, config, calibration=data)
    inputs = []
    name = "model.layers.0.mlp.down_proj"
    model.get_submodule(name).register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    rows = torch.cat([x[b["attention_mask"].bool()] for x, b in zip(inputs, data, strict=True)])
    assert torch.allclose(seen[name], 2 / len(rows) * rows.T @ rows, rtol=1e-3, atol=1e-5)
    assert matrix(model.get_submodule(name)).shape == (32, 64)
