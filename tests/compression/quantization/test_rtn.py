"""RTN: nearest points of the grid, and nothing else."""

import itertools

import pytest
import small_compression as small
import tiny
import torch

from luthier import method
from luthier.compression.compress import compress
from luthier.compression.linear import matrix, quantized_layers
from luthier.models import structure

W = small.weight_of()


def rtn(**options):
    return method("rtn")(**{"group_size": 16} | options)


def by_hand(row, bits, symmetric):
    """One group, number by number."""
    values = [float(w) for w in row]
    levels = 2**bits - 1
    if symmetric:
        scale, low = 2 * max(map(abs, values)) / levels, -(2 ** (bits - 1))
        return [max(low, min(low + levels, round(w / scale))) * scale for w in values]
    least, most = min(0, *values), max(0, *values)
    scale = (most - least) / levels
    zero = round(-least / scale)
    return [(max(0, min(levels, round(w / scale) + zero)) - zero) * scale for w in values]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_each_group_is_rounded_as_by_hand(bits, symmetric):
    found = small.changed(rtn(bits=bits, symmetric=symmetric), W)
    for row, start in itertools.product(range(0, 24, 5), range(0, 64, 16)):
        expected = torch.tensor(by_hand(W[row, start : start + 16], bits, symmetric))
        part, weight = found[row, start : start + 16], W[row, start : start + 16]
        # The largest magnitude of a symmetric grid lies half way between two points: either is nearest.
        tied = (weight.abs() == weight.abs().max()) & symmetric
        assert torch.allclose((part - weight).abs(), (expected - weight).abs(), atol=1e-6)
        assert torch.allclose(part[~tied], expected[~tied], atol=1e-6)


def test_a_transposed_layer_is_rounded_along_its_inputs():
    assert torch.equal(small.changed(rtn(), W, transposed=True), small.changed(rtn(), W))


def test_errors_fall_with_bits_and_rise_with_the_group():
    errors = [float((small.changed(rtn(bits=b), W) - W).norm()) for b in (2, 3, 4, 5, 6, 7, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 * W.norm()
    wider = [float((small.changed(rtn(group_size=g), W) - W).norm()) for g in (8, 16, 32, None, 0)]
    assert wider == sorted(wider)


def test_rounding_what_is_rounded_changes_nothing():
    """Of a grid with zero points: its ends are points, so that the next grid is the same."""
    config = rtn(bits=3, symmetric=False)
    once = small.changed(config, W)
    assert torch.allclose(small.changed(config, once), once, atol=1e-6)


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, tiny.bert])
def test_the_record_is_the_error_of_the_weight(build):
    model, before = build(), build()
    for record in compress(model, rtn(bits=4)):
        old, new = (matrix(m.get_submodule(record.name)) for m in (before, model))
        expected = float(((new - old) ** 2).sum() / (old**2).sum())
        assert record.before == record.after == pytest.approx(expected, rel=1e-4)
        assert record.bits == 4
    assert set(quantized_layers(model)) == {n for n in structure.linears(model) if "pooler" not in n}


def test_no_data_no_calibration_and_inputs_rounded_while_it_runs():
    model, ids = tiny.llama(), small.batches(1)[0]["input_ids"]
    expected = model(ids).logits
    compress(model, rtn(bits=8, activation_bits=8))
    found = model(ids).logits
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("per", ["token", "tensor", "static"])
def test_eight_bits_for_weights_and_inputs_are_a_product_of_integers(per):
    """y = (x_q W_q^T) s_x s_w, with one scale a row."""
    x = small.correlated()
    block = small.alone(W, x)
    config = rtn(bits=8, group_size=None, activation_bits=8, activation_per=per)
    list(config.change(block))
    layer = quantized_layers(block.model)["0.layer"]
    step = layer.input_scale if per == "static" else x.abs().amax(-1, keepdim=True) / 127.5
    step = x.abs().max() / 127.5 if per != "token" else step
    codes = torch.round(x / step).clamp(-128, 127)
    whole = codes.to(torch.int32) @ layer.codes.to(torch.int32).T
    assert torch.allclose(layer(x), whole * step * layer.scale.T, rtol=1e-4, atol=1e-3)
    if per == "static":
        assert layer.input_scale.item() == pytest.approx(float(x.abs().max()) / 127.5)


def test_a_static_step_is_that_of_tokens_without_padding():
    x = small.correlated(20)
    x[0, 15] = 1000.0
    mask = torch.arange(20)[None] < 15
    block = small.alone(W, x, mask=mask)
    list(rtn(activation_bits=8, activation_per="static").change(block))
    assert quantized_layers(block.model)["0.layer"].input_scale < 1


def test_layers_above_find_their_steps_on_what_the_rounded_ones_below_give():
    """The model's own run, with inputs clipped nowhere: the largest input has the last code."""
    model, data = tiny.llama(), small.batches()
    compress(model, rtn(activation_bits=8, activation_per="static"), calibration=data)
    peaks = {}
    for name, layer in quantized_layers(model).items():
        layer.register_forward_pre_hook(
            lambda _, inputs, name=name: peaks.setdefault(name, []).append(inputs[0][keep[0]].abs().max())
        )
    keep = [None]
    with torch.no_grad():
        for batch in data:
            keep[0] = batch["attention_mask"].bool()
            model(**batch)
    for name, layer in quantized_layers(model).items():
        assert layer.input_scale.item() == pytest.approx(float(max(peaks[name])) / 127.5, rel=1e-3), name
