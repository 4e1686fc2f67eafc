"""SmoothQuant: the formula by hand, the same function before rounding, outliers that no longer hurt."""

import copy

import pytest
import small_blocks as blocks
import small_compression as small
import tiny
import torch

from luthier import method
from luthier.acceleration.float32 import norms
from luthier.compression.compress import compress
from luthier.compression.grid import Scheme
from luthier.compression.linear import matrix, quantized_layers
from luthier.compression.quantization.smoothquant import scheme_error, smoothing


def smoothquant(**options):
    return method("smoothquant")(**options)


def prepared(model, index=0, **options):
    """A block, scaled and not rounded."""
    block = blocks.block_of(model, index)
    smoothquant(**options).prepare(block)
    return block


def after(model, config):
    """Squared error of the logits of a compressed copy, relative."""
    new = copy.deepcopy(model)
    compress(new, config, calibration=small.batches(length=20))
    return blocks.error(blocks.logits(new), blocks.logits(model))


def plain(per):
    return method("rtn")(bits=8, group_size=None, activation_bits=8, activation_per=per)


def test_defaults_are_those_of_the_paper():
    assert str(smoothquant().scheme) == "W8 row A8 token"
    assert smoothquant().alpha == 0.5


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "opt", "gemma", "experts"])
@pytest.mark.parametrize("options", [{}, {"all_rows": True}, {"alpha": None, "all_rows": True}], ids=str)
def test_scaling_alone_changes_nothing(kind, options):
    model = blocks.KINDS[kind]()
    for index in range(2):
        block = blocks.block_of(model, index)
        before = blocks.outputs(block)
        smoothquant(**options).prepare(block)
        assert blocks.change(blocks.outputs(block), before) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_factors_and_folding_are_as_by_hand(alpha):
    model = tiny.llama()
    old = copy.deepcopy(model.model.layers[0])
    inputs = blocks.inputs_of(blocks.block_of(model), "self_attn.q_proj")
    prepared(model, alpha=alpha)
    new = model.model.layers[0]
    readers = [(getattr(old.self_attn, n), getattr(new.self_attn, n)) for n in ("q_proj", "k_proj", "v_proj")]
    for k in range(32):
        size = max(abs(float(x)) for x in inputs[:, k])
        weight = max(abs(float(w)) for reader, _ in readers for w in reader.weight[:, k])
        s = size**alpha / weight ** (1 - alpha)
        assert float(new.input_layernorm.weight[k]) == pytest.approx(float(old.input_layernorm.weight[k]) / s)
        for before, now in readers:
            assert torch.allclose(now.weight[:, k], before.weight[:, k] * s)
    assert torch.equal(new.self_attn.o_proj.weight, old.self_attn.o_proj.weight)
    assert torch.equal(new.mlp.down_proj.weight, old.mlp.down_proj.weight)


def test_half_and_half_gives_both_sides_the_same_peaks():
    block = prepared(small.opt(), alpha=0.5)
    inputs = blocks.inputs_of(block, "fc1")
    assert torch.allclose(inputs.abs().amax(0), block.module.fc1.weight.abs().amax(0), rtol=1e-4)


def test_alpha_one_brings_every_input_to_one():
    block = prepared(tiny.llama(), alpha=1.0)
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        assert torch.allclose(blocks.inputs_of(block, name).abs().amax(0), torch.tensor(1.0), rtol=1e-4)


def test_a_second_smoothing_finds_nothing_to_do():
    model = tiny.llama()
    prepared(model, alpha=0.5)
    once = {n: p.detach().clone() for n, p in model.model.layers[0].named_parameters()}
    prepared(model, alpha=0.5)
    for name, parameter in model.model.layers[0].named_parameters():
        assert torch.allclose(parameter, once[name], rtol=1e-4)


def test_heads_that_share_values_share_the_largest_factor_sources():
    model = tiny.llama()
    inputs = blocks.inputs_of(blocks.block_of(model), "self_attn.o_proj").abs().amax(0).reshape(2, 2, 8)
    layer = copy.deepcopy(model.model.layers[0].self_attn)
    columns = layer.o_proj.weight.detach().abs().amax(0).reshape(2, 2, 8)
    prepared(model, alpha=0.5, all_rows=True)
    s = (inputs.amax(1) / columns.amax(1)).sqrt()  # (heads of values, width)
    new = model.model.layers[0].self_attn
    repeated = s[:, None].expand(2, 2, 8).reshape(32)
    # v_proj is scaled along its inputs as well, with q and k: the ratio of its rows is what counts.
    inward = layer.q_proj.weight.detach()[0] / new.q_proj.weight.detach()[0]
    assert torch.allclose(new.v_proj.weight * inward, layer.v_proj.weight / s.reshape(16, 1), rtol=1e-3)
    assert torch.allclose(new.o_proj.weight, layer.o_proj.weight * repeated, rtol=1e-3)


def test_an_input_that_is_always_zero_keeps_its_weights():
    factors = smoothing(torch.tensor([0.0, 4.0]), torch.tensor([3.0, 1.0]), 0.5)
    assert factors.tolist() == [1.0, 2.0]


def test_weights_that_are_zero_do_not_give_an_infinite_factor():
    assert torch.isfinite(smoothing(torch.tensor([2.0]), torch.tensor([0.0]), 0.0)).all()


@pytest.mark.parametrize("per", ["tensor", "token", "static"])
def test_an_outlier_ruins_plain_rounding_and_not_this(per):
    model = blocks.with_outlier(100.0)
    assert after(model, smoothquant(activation_per=per)) < after(model, plain(per)) / 100


def test_without_outliers_it_is_no_worse_than_a_bit():
    model = tiny.llama()
    assert after(model, smoothquant()) < 2 * after(model, plain("token"))


def rows_of_codes(model, *configs):
    compress(model, list(configs), calibration=small.batches())
    return {name: layer.codes for name, layer in quantized_layers(model).items()}


def test_blocks_are_smoothed_by_what_the_model_gives_as_it_came():
    """However coarse the blocks below became, unless a later method looks at rounded blocks."""
    coarse = {"bits": 2, "activation_bits": 2}
    second = [f"layers.1.self_attn.{n}_proj" for n in "qkvo"]
    second += [f"layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")]
    whole = rows_of_codes(tiny.llama(), smoothquant(**coarse))
    alone = rows_of_codes(tiny.llama(), smoothquant(**coarse, targets=second))
    assert len(alone) == 7
    assert all(torch.equal(whole[name], codes) for name, codes in alone.items())
    gptq = method("gptq")(bits=2, group_size=None, targets=["layers.0.mlp.down_proj"])
    seen = rows_of_codes(tiny.llama(), smoothquant(**coarse, targets=second), gptq)
    assert not all(torch.equal(seen[name], codes) for name, codes in alone.items())


def test_where_nothing_folds_it_is_plain_rounding_and_says_so():
    model = tiny.bert()
    layer = matrix(model.bert.encoder.layer[0].attention.self.query)
    records = compress(model, smoothquant(), calibration=small.batches())
    found = {r.name.removeprefix("bert.encoder.layer.0."): r for r in records if ".layer.0." in r.name}
    query = quantized_layers(model)["bert.encoder.layer.0.attention.self.query"]
    config = smoothquant()
    assert torch.equal(query.codes, config.fit(torch.nn.Linear(1, 1), layer).quantize(layer))
    assert found["attention.self.query"].note == "not scaled: no norm makes it"
    assert found["intermediate.dense"].note == "not scaled: the norm feeds something else too"
    assert all(record.before == record.after for record in found.values())


def test_the_error_of_a_scheme_is_as_by_hand():
    lot = torch.Generator().manual_seed(0)
    x, w = torch.randn(6, 4, generator=lot), torch.randn(3, 4, generator=lot)
    s = torch.tensor([1.0, 2.0, 0.5, 3.0])

    def rounded(row):  # the peak lies between two points: which is nearer is a matter of the last bit
        step = row.abs().max() / 7.5
        return torch.round(row / step).clamp(-8, 7) * step

    xq, wq = torch.stack([rounded(row) for row in x / s]), torch.stack([rounded(row) for row in w * s])
    expected = (xq @ wq.T - x @ w.T).square().sum() / (x @ w.T).square().sum()
    found = scheme_error(x, [w], s, Scheme(4, None, True, 4, "token"))
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_the_search_takes_the_best_of_the_grid():
    model = blocks.with_outlier(30.0)
    options = {"activation_bits": 4, "bits": 4}
    records = compress(copy.deepcopy(model), smoothquant(alpha=None, **options), calibration=small.batches())
    note = next(r for r in records if r.name.endswith("0.self_attn.q_proj")).note
    block = blocks.block_of(model, batches=small.batches())
    with norms(block.module):  # as in the pass: with 4 bits the last bit of an input decides its code
        x = blocks.inputs_of(block, "self_attn.q_proj")
    layers = model.model.layers[0].self_attn
    weights = [matrix(m) for m in (layers.q_proj, layers.k_proj, layers.v_proj)]
    columns = torch.cat(weights).abs().amax(0)
    scheme, losses = smoothquant(**options).scheme, {}
    for step in range(21):
        s = smoothing(x.abs().amax(0), columns, step / 20)
        losses[step / 20] = scheme_error(x, weights, s, scheme)
    best = min(losses, key=losses.get)
    assert note == f"alpha {best:g}"
    assert losses[best] < losses[0.0]


def test_records_tell_what_was_won():
    records = compress(blocks.with_outlier(100.0), smoothquant(), calibration=small.batches())
    scaled = [r for r in records if r.name.endswith(("q_proj", "up_proj"))]
    assert all(r.after < r.before / 10 for r in scaled)
    assert all(r.bits == 8 for r in records)


def test_before_another_method_it_only_scales():
    model = blocks.with_outlier(100.0)
    norm = model.model.layers[0].input_layernorm.weight.detach().clone()
    gptq = method("gptq")(bits=8, group_size=None)
    compress(model, [smoothquant(), gptq], calibration=small.batches())
    assert not torch.allclose(model.model.layers[0].input_layernorm.weight, norm)
    assert all(layer.scheme == gptq.scheme for layer in quantized_layers(model).values())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "opt"])
def test_smooth_models_stay_near_the_original(kind):
    model = blocks.KINDS[kind]()
    assert after(model, smoothquant()) < 1e-2
