"""ZeroQuant: the paper's groups and steps; blocks that learn, alone, to give what they gave."""

import copy

import pytest
import small_compression as small
import tiny
import torch
from torch import nn

from luthier import method
from luthier.compression.block import Block
from luthier.compression.calibration import catch
from luthier.compression.compress import compress
from luthier.compression.grid import Scheme, round_activations, straight_through
from luthier.compression.linear import matrix, quantized_layers
from luthier.compression.quantization.zeroquant import fit_groups
from luthier.compression.reconstruction import Student, in_rows
from luthier.errors import DataError, MethodError
from luthier.models import structure

KINDS = {"llama": lambda: tiny.llama(num_hidden_layers=3), "gpt2": tiny.gpt2, "bert": tiny.bert}
W = small.weight_of(24, 64)


def zeroquant(**options):
    return method("zeroquant")(**{"group_size": 16, "steps": 20, "learning_rate": 1e-3} | options)


def paper(weight, bits, groups):
    """Q of the paper: equal groups in row-major order, steps of 2 max / 2^b."""
    flat = weight.reshape(groups, -1)
    step = 2 * flat.abs().amax(1, keepdim=True) / 2**bits
    return ((flat / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step).reshape(weight.shape)


def first_block(model, given=None):
    """The first block of a model with its inputs."""
    name, stack = structure.stacks(model)[0]
    hidden, calls, masks, starts = catch(model, stack, given or small.batches())
    block = Block(model, f"{name}.0", 0, hidden, calls[0], masks, start=starts[0])
    block.choose(set(block.all_layers()))
    return block


def block_error(block, targets):
    """Relative squared error of a block's outputs, padding left out."""
    lost = whole = 0.0
    for index, (target, mask) in enumerate(zip(targets, block.masks, strict=True)):
        lost += float((block.run(index) - target)[mask].square().sum())
        whole += float(target[mask].square().sum())
    return lost / whole


# The grid --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("groups", [1, 4, 24, 96])
def test_groups_are_equal_parts_of_the_matrix_in_row_major_order(bits, groups):
    found = fit_groups(W, Scheme(bits, None), groups, torch.float32)
    assert torch.equal(found.round(W), paper(W, bits, groups))
    assert found.scheme.group_size == (None if groups <= 24 else 16)


def test_as_many_groups_as_rows_are_one_a_row_and_fewer_are_bands_of_rows():
    rows = fit_groups(W, Scheme(4, None), 24, torch.float32)
    assert torch.equal(rows.scale, fit_groups(W, Scheme(4, None), None, torch.float32).scale)
    assert torch.equal(rows.scale[:, 0], 2 * W.abs().amax(1) / 16)
    bands = fit_groups(W, Scheme(4, None), 8, torch.float32).scale
    assert bands.shape == (24, 1)
    assert torch.equal(bands, bands[::3].repeat_interleave(3, 0))
    assert len(bands.unique()) == 8


def test_group_size_counts_along_the_input_and_null_and_nought_are_row_and_tensor():
    assert torch.equal(fit_groups(W, Scheme(4, 16), None, torch.float32).round(W), paper(W, 4, 96))
    assert torch.equal(fit_groups(W, Scheme(4, None), None, torch.float32).round(W), paper(W, 4, 24))
    assert torch.equal(fit_groups(W, Scheme(4, 0), None, torch.float32).round(W), paper(W, 4, 1))


def test_asymmetric_steps_divide_the_range_by_two_to_the_bits():
    weight = W.abs() + 0.1 * W
    grid = fit_groups(weight, Scheme(4, None, symmetric=False), None, torch.float32)
    low, high = weight.amin(1).clamp(max=0), weight.amax(1)
    assert torch.allclose(grid.scale[:, 0], (high - low) / 16)
    assert (grid.round(weight) - weight).abs().max() <= grid.scale.max()
    assert torch.equal(grid.round(torch.zeros_like(weight)), torch.zeros_like(weight))


def test_quantising_twice_is_not_quantising_once():
    # The largest weight of a group moves to 7/8 of itself, so that a second pass sees a smaller range.
    weight = W.abs()
    grid = fit_groups(weight, Scheme(4, None), None, torch.float32)
    once = grid.round(weight)
    assert torch.allclose(once.amax(1), weight.amax(1) * 7 / 8)
    assert not torch.equal(fit_groups(once, Scheme(4, None), None, torch.float32).round(once), once)


def test_groups_that_cut_rows_unevenly_are_refused_with_the_nearest_that_do_not():
    block = small.alone(W)
    with pytest.raises(MethodError, match="Write 8"):
        zeroquant(groups=9).check("0.layer", block.layers()["0.layer"])
    zeroquant(groups=48).check("0.layer", block.layers()["0.layer"])


def test_tokens_are_rounded_each_by_itself():
    x = small.correlated(tokens=8)[0]
    rounded = round_activations(x, 8, "token")
    order = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    assert torch.equal(round_activations(x[order], 8, "token"), rounded[order])
    x[2] *= 4
    assert torch.equal(round_activations(x, 8, "token")[2], 4 * rounded[2])


# The training ----------------------------------------------------------------------------------------------


def test_the_gradient_passes_the_rounding_as_it_comes():
    x = W.clone().requires_grad_()
    upstream = small.weight_of(24, 64, seed=5)
    rounded = paper(W, 4, 24)
    made = straight_through(x, rounded)
    assert torch.equal(made, rounded)
    (made * upstream).sum().backward()
    assert torch.equal(x.grad, upstream)  # clipped values too


@pytest.mark.parametrize("kind", small.MODELS)
def test_a_block_on_rows_of_its_inputs_gives_those_rows(kind):
    block = first_block(small.MODELS[kind](), small.batches(rows=3))
    cut = in_rows(block, 2)
    assert [len(part) for part in cut.hidden] == [2, 1] * 3
    whole = torch.cat([block.run(index) for index in range(3)])
    parts = torch.cat([cut.run(index) for index in range(6)])
    assert torch.allclose(parts, whole, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_learning_lowers_the_error_of_every_block_below_plain_rounding(kind):
    model, plain = KINDS[kind](), KINDS[kind]()
    records = compress(model, zeroquant(), calibration=small.batches())
    assert all(r.after < 0.9 * r.before for r in records)
    assert len(records) == len(quantized_layers(model))
    # The first block has the same inputs in both: what it loses is what the records say.
    block = first_block(plain)
    targets = [block.run(index) for index in range(3)]
    list(zeroquant(steps=0).change(block))
    assert block_error(block, targets) == pytest.approx(records[0].before, rel=1e-4)
    trained = first_block(model)
    assert block_error(trained, targets) == pytest.approx(records[0].after, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_computes_what_its_student_computed_to_the_bit(kind):
    block = first_block(KINDS[kind]())
    config = zeroquant()
    grids = {
        name: fit_groups(matrix(m), config.scheme, None, torch.float32) for name, m in block.layers().items()
    }
    student = Student(
        block, lambda name, w: grids[name].round(w), lambda _, x: round_activations(x, 8, "token")
    )
    wanted = [block.compute(index, student) for index in range(3)]
    list(zeroquant(steps=0).change(block))
    assert all(torch.equal(block.run(index), wanted[index]) for index in range(3))


def test_what_was_learnt_is_what_is_kept_in_half_precision_too():
    model = tiny.llama().to(torch.bfloat16)
    records = compress(model, zeroquant(steps=40), calibration=small.batches())
    plain = tiny.llama().to(torch.bfloat16)
    block = first_block(plain)
    targets = [block.run(index) for index in range(3)]
    assert records[0].after < records[0].before
    assert block_error(first_block(model), targets) == pytest.approx(records[0].after, rel=0.02)


def test_norms_and_biases_learn_and_nothing_outside_the_block_changes():
    model = tiny.gpt2()
    before = copy.deepcopy(model.state_dict())
    list(zeroquant().change(first_block(model)))
    after = model.state_dict()
    moved = {key for key in before if key in after and not torch.equal(before[key], after[key])}
    assert moved
    assert all(key.startswith("transformer.h.0.") for key in moved)
    assert "transformer.h.0.ln_1.weight" in moved
    assert "transformer.h.0.mlp.c_fc.bias" in moved


def test_layers_that_are_left_out_stay_as_they_are():
    model, before = tiny.gpt2(), tiny.gpt2().state_dict()
    compress(model, zeroquant(exclude=["c_proj"]), calibration=small.batches())
    layer = model.transformer.h[0].mlp.c_proj
    assert type(layer).__name__ == "Conv1D"
    assert torch.equal(layer.weight, before["transformer.h.0.mlp.c_proj.weight"])
    assert torch.equal(layer.bias, before["transformer.h.0.mlp.c_proj.bias"])


def test_eight_bits_leave_next_to_nothing_to_learn():
    model = tiny.llama()
    records = compress(model, zeroquant(bits=8, activation_bits=None), calibration=small.batches())
    assert all(record.before < 2e-4 for record in records)


def test_a_block_that_learnt_nothing_keeps_the_plain_rounding():
    model, plain = tiny.llama(), tiny.llama()
    records = compress(model, zeroquant(learning_rate=10.0), calibration=small.batches())
    compress(plain, zeroquant(steps=0))
    assert all("nothing learnt" in record.note and record.after == record.before for record in records)
    ids = small.batches()[0]["input_ids"]
    assert torch.equal(model(ids).logits, plain(ids).logits)


def test_padding_is_not_learnt_from():
    given = small.batches()
    other = copy.deepcopy(given)
    other[1]["input_ids"][0, -4:] = 7  # behind the mask
    first, second = tiny.bert(), tiny.bert()
    compress(first, zeroquant(), calibration=given)
    compress(second, zeroquant(), calibration=other)
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=1e-4)


def test_bits_of_single_layers_are_theirs_while_the_block_learns():
    model = tiny.llama()
    attention = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 8)
    records = compress(model, zeroquant(layer_bits=attention), calibration=small.batches())
    assert {r.name.rpartition(".")[2]: r.bits for r in records}["q_proj"] == 8
    assert {r.name.rpartition(".")[2]: r.bits for r in records}["up_proj"] == 4
    assert quantized_layers(model)["model.layers.0.self_attn.q_proj"].scheme.bits == 8
    alike = compress(tiny.llama(), zeroquant(), calibration=small.batches())
    assert records[0].before < alike[0].before


def test_static_inputs_have_the_step_that_was_learnt_with():
    model = tiny.llama()
    records = compress(model, zeroquant(activation_per="static"), calibration=small.batches())
    block = first_block(tiny.llama())
    targets = [block.run(index) for index in range(3)]
    assert block_error(first_block(model), targets) == pytest.approx(records[0].after, rel=1e-4)
    assert all(layer.input_scale is not None for layer in quantized_layers(model).values())


def test_no_data_are_needed_without_steps_and_asked_for_with_them():
    model = tiny.llama()
    records = compress(model, zeroquant(steps=0, bits=8))
    assert len(records) == 14
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
    with pytest.raises(DataError, match="calibration"):
        compress(tiny.llama(), zeroquant())


def test_a_pass_that_was_killed_goes_on_to_the_same_model(tmp_path, monkeypatch):
    whole, broken = (tiny.llama(num_hidden_layers=3) for _ in range(2))
    compress(whole, zeroquant(), calibration=small.batches())
    change = type(zeroquant()).change

    def die(self, block):
        if block.index == 2:
            raise KeyboardInterrupt
        return change(self, block)

    monkeypatch.setattr(type(zeroquant()), "change", die)
    with pytest.raises(KeyboardInterrupt):
        compress(broken, zeroquant(), calibration=small.batches(), folder=tmp_path)
    monkeypatch.undo()
    again = tiny.llama(num_hidden_layers=3)
    compress(again, zeroquant(), calibration=small.batches(), folder=tmp_path)
    for key, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor)
