"""RPTQ: the cluster grid by hand, reordering that changes nothing, inputs of unlike channels in few bits."""

import copy

import pytest
import small_blocks as blocks
import small_compression as small
import tiny
import torch
from torch import nn

import luthier
from luthier import method
from luthier.compression.calibration import calibrate
from luthier.compression.clustered import (
    ClusteredLinear,
    ClusterGrid,
    Ranges,
    affine,
    cluster,
    cluster_affine,
    fit_clusters,
    round_affine,
)
from luthier.compression.compress import compress
from luthier.compression.folding import find_orders
from luthier.compression.grid import Scheme, fit
from luthier.compression.linear import matrix, quantize_layer, quantized_layers
from luthier.compression.statistics import Hessian
from luthier.errors import MethodError, ModelError
from luthier.models.saving import save, verify_export


def rptq(**options):
    return method("rptq")(**options)


def after(model, config):
    """Squared error of the logits of a compressed copy, relative."""
    new = copy.deepcopy(model)
    compress(new, config, calibration=small.batches(length=20))
    return blocks.error(blocks.logits(new), blocks.logits(model))


def unlike(tokens=200, seed=0):
    """Inputs of 8 channels: four of range 1, four of 100, mixed."""
    x = torch.rand(tokens, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return x * torch.tensor([1.0, 100, 100, 1, 1, 100, 1, 100])


def step_of(x, labels, bits):
    return cluster_affine(x.amin(0), x.amax(0), labels, bits)


def lost(x, labels, bits=4):
    scale, zero = step_of(x, labels, bits)
    return float((round_affine(x, scale[labels], zero[labels], bits) - x).square().sum())


def test_steps_and_rounding_are_as_by_hand():
    x, labels = unlike(20), torch.tensor([0, 1, 1, 0, 0, 1, 2, 2])
    scale, zero = step_of(x, labels, 4)
    found = round_affine(x, scale[labels], zero[labels], 4)
    for k in range(8):
        mates = [j for j in range(8) if labels[j] == labels[k]]
        low, high = float(x[:, mates].min()), float(x[:, mates].max())
        s = (high - low) / 16
        z = round(-(high + low) / (2 * s))
        for t in range(20):
            expected = (max(-8, min(7, round(float(x[t, k]) / s) + z)) - z) * s
            assert float(found[t, k]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_steps_stay_within_their_bounds():
    """A channel that never changes, or is zero, or is huge: no division by zero, no infinite step."""
    low, high = torch.tensor([0.0, 3.0, -1e9]), torch.tensor([0.0, 3.0, 1e9])
    scale, zero = affine(low, high, 4)
    assert scale.tolist() == pytest.approx([1e-4, 1e-4, 1e4])
    assert zero.abs().max() <= 1e4
    assert torch.isfinite(round_affine(torch.tensor([[0.0, 3.0, 5.0]]), scale, zero, 4)).all()


def test_one_cluster_is_one_step_and_as_many_as_channels_one_each():
    x = unlike()
    scale, _ = step_of(x, torch.zeros(8, dtype=torch.long), 4)
    assert scale.tolist() == pytest.approx([float(x.max() - x.min()) / 16])
    scale, _ = step_of(x, torch.arange(8), 4)
    assert torch.allclose(scale, (x.amax(0) - x.amin(0)) / 16)


def test_the_error_falls_as_clusters_are_split():
    x = unlike() * torch.logspace(0, 0.7, 8)
    order = x.abs().amax(0).argsort().argsort()
    errors = [lost(x, order // (8 // count)) for count in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 2


def test_no_value_moves_by_more_than_its_step():
    """Half a step inside; at the upper end one more, as there is one code less above zero than below."""
    x, labels = unlike(), torch.tensor([0, 1, 1, 0, 0, 1, 0, 1])
    scale, zero = step_of(x, labels, 4)
    moved = (round_affine(x, scale[labels], zero[labels], 4) - x).abs()
    assert (moved <= scale[labels] * 1.501).all()  # the zero point is rounded too
    assert (moved <= scale[labels] / 2 * 1.001).float().mean() > 0.9


def test_channels_of_like_range_are_found_and_worth_it():
    x = unlike()
    labels = cluster(torch.stack([x.amax(0), x.amin(0)], 1), 2)
    assert labels.tolist() == [0, 1, 1, 0, 0, 1, 0, 1]
    small_ones = x[:, labels == 0]
    whole = round_affine(small_ones, *affine(x.min(), x.max(), 4), 4)
    scale, zero = step_of(x, labels, 4)
    own = round_affine(small_ones, scale[0], zero[0], 4)
    assert (own - small_ones).square().sum() < (whole - small_ones).square().sum() / 100


def test_clusters_have_numbers_without_gaps_and_do_not_change():
    points = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)) ** 3
    labels = cluster(points, 12)
    assert labels.unique().tolist() == list(range(12))
    assert torch.equal(labels, cluster(points, 12))
    sizes = [points[labels == i].norm(dim=1).mean() for i in range(12)]
    assert sizes == sorted(sizes)
    inner = sum(float((points[labels == i] - points[labels == i].mean(0)).square().sum()) for i in range(12))
    assert inner < 0.1 * float((points - points.mean(0)).square().sum())


def test_equal_points_and_few_points_are_no_trouble():
    assert cluster(torch.ones(5, 2), 3).tolist() == [0] * 5
    assert cluster(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), 8).tolist() == [0, 1]
    assert cluster(torch.randn(6, 2), 1).tolist() == [0] * 6


def test_ranges_are_the_extremes_or_a_moving_average():
    first, second = torch.tensor([[1.0, -2.0], [3.0, 0.0]]), torch.tensor([[5.0, 1.0]])
    extremes, moving = Ranges(), Ranges(0.9)
    for part in (first, second, torch.empty(0, 2)):
        extremes.add(part)
        moving.add(part)
    assert (extremes.low.tolist(), extremes.high.tolist()) == ([1.0, -2.0], [5.0, 1.0])
    assert moving.low.tolist() == pytest.approx([0.9 * 1 + 0.1 * 5, 0.9 * -2 + 0.1 * 1])
    assert moving.high.tolist() == pytest.approx([0.9 * 3 + 0.1 * 5, 0.1])


def test_the_grid_of_a_weight_covers_each_row_in_each_cluster():
    weight, labels = small.weight_of(5, 12), torch.tensor([0, 1, 2, 2, 1, 0, 1, 1, 0, 2, 2, 0])
    grid = fit_clusters(weight, Scheme(4), labels, torch.float32)
    for row in range(5):
        for index in range(3):
            part = weight[row : row + 1, labels == index]
            alone = fit(part, Scheme(4, None, False))
            assert torch.equal(grid.scale[row, index], alone.scale[0, 0])
            assert torch.equal(grid.round(weight)[row, labels == index], alone.round(part)[0])
            column = int((labels == index).nonzero()[0])
            rounded = grid.column(column).round(weight[:, column : column + 1])[:, 0]
            assert torch.equal(rounded, grid.round(weight)[:, column])


def clustered(weight, labels, x, bits=4):
    grid = fit_clusters(weight, Scheme(4, None, False, bits, "static"), labels, torch.float32)
    scale, zero = step_of(x, labels, bits)
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.bias.zero_()
    return quantize_layer(
        layer, grid.quantize(weight), grid, scale, kind=ClusteredLinear, labels=labels, input_zero=zero
    )


def test_labels_and_channels_that_lie_side_by_side_give_the_same_outputs():
    x, weight, labels = unlike(), small.weight_of(6, 8), torch.tensor([0, 1, 1, 0, 0, 1, 2, 2])
    order = labels.argsort(stable=True)
    apart = clustered(weight, labels, x)
    together = clustered(weight[:, order], labels[order], x[:, order])
    assert torch.allclose(apart(x), together(x[:, order]), rtol=1e-5, atol=1e-4)
    assert torch.allclose(apart.weight[:, order], together.weight)


def test_a_layer_computes_what_its_rounded_inputs_and_weights_say():
    x, weight, labels = unlike(), small.weight_of(6, 8), torch.tensor([0, 1, 1, 0, 0, 1, 2, 2])
    layer = clustered(weight, labels, x)
    scale, zero = step_of(x, labels, 4)
    rounded = round_affine(x, scale[labels], zero[labels], 4)
    grid = fit_clusters(weight, Scheme(4), labels, torch.float32)
    assert torch.allclose(layer(x), rounded @ grid.round(weight).T, rtol=1e-5, atol=1e-3)
    # Steps are fixed: a row's output does not depend on the others.
    assert torch.allclose(layer(x[:3]), layer(x)[:3], rtol=1e-6, atol=1e-4)
    assert "clusters=3" in str(layer)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "opt", "gemma2", "phi3", "experts"])
def test_reordering_alone_changes_nothing(kind):
    model = blocks.KINDS[kind]()
    for index in range(2):
        block = blocks.block_of(model, index)
        before = blocks.outputs(block)
        old = {name: p.detach().clone() for name, p in block.module.named_parameters()}
        rptq(clusters=5).prepare(block)
        assert any(not torch.equal(p, old[name]) for name, p in block.module.named_parameters())
        assert blocks.change(blocks.outputs(block), before) < 1e-5


def test_clusters_lie_side_by_side_where_that_is_possible():
    block = blocks.block_of(tiny.llama())
    config = rptq(clusters=6, head_clusters=3)
    orders = find_orders(block)
    config.prepare(block)
    found = {o.layers[0].rpartition(".")[2]: labels for o, labels in zip(orders, config._labels, strict=True)}
    down, heads = found["down_proj"], found["o_proj"].reshape(4, 8)
    assert torch.equal(down, down.sort().values)
    assert len(down.unique()) == 6
    for head in heads:
        assert torch.equal(head, head.sort().values)
        assert len(head.unique()) == 3
    assert torch.equal(heads[0] - heads[0].min(), heads[1] - heads[1].min())  # they share values
    assert len(found["o_proj"].unique()) == 12  # but each has its own steps
    assert len(found["q_proj"].unique()) == 6


def test_clusters_are_those_of_the_ranges_as_they_then_lie():
    """Of each cluster of down's inputs no channel is nearer to the range of another cluster."""
    block = blocks.block_of(tiny.llama())
    config = rptq(clusters=6)
    config.prepare(block)
    x, labels = blocks.inputs_of(block, "mlp.down_proj"), config._labels[3]
    points = torch.stack([x.amax(0), x.amin(0)], 1)
    centres = torch.stack([points[labels == i].mean(0) for i in range(6)])
    assert torch.equal(torch.cdist(points, centres).argmin(1), labels)


def test_without_reordering_the_weights_stay_where_they_are():
    model = tiny.llama()
    old = copy.deepcopy(model.state_dict())
    rptq(reorder=False).prepare(blocks.block_of(model))
    assert all(torch.equal(value, old[name]) for name, value in model.state_dict().items())


def test_inputs_of_norms_keep_more_bits():
    records = compress(tiny.llama(), rptq(), calibration=small.batches())
    bits = {r.name.rpartition(".")[2]: int(r.note.split(", ")[1].split()[0]) for r in records}
    assert bits == dict.fromkeys(["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], 8) | dict.fromkeys(
        ["o_proj", "down_proj"], 4
    )
    records = compress(tiny.bert(), rptq(norm_bits=6), calibration=small.batches())
    note = {r.name.split("layer.0.")[-1]: r.note for r in records}
    assert note["attention.self.query"].endswith("6 bits")
    assert note["attention.output.dense"].endswith("4 bits")


@pytest.mark.parametrize("size", [1.0, 50.0])
def test_clusters_beat_one_step_for_all_channels(size):
    model = blocks.with_outlier(size)
    one = after(model, rptq(clusters=1, head_clusters=1, norm_bits=4))
    many = after(model, rptq(norm_bits=4))
    assert many < one / 2
    assert after(model, rptq()) < many
    assert after(model, rptq(activation_bits=8)) < after(model, rptq()) / 10


def test_weights_make_up_for_each_other():
    """Settled column by column on the rounded inputs, they do better there than the nearest points."""
    block = blocks.block_of(tiny.llama())
    config = rptq(bits=3)
    config.prepare(block)
    weight, labels = matrix(block.module.mlp.down_proj), config._labels[3]
    list(config.change(block))
    layer = block.module.mlp.down_proj
    hessian = Hessian(64)
    hessian.add(layer.quantize_input(blocks.inputs_of(block, "mlp.down_proj")))
    nearest = fit_clusters(weight, config.scheme, labels, torch.float32).round(weight)

    def error(change):
        return float(((change @ hessian.value) * change).sum())

    assert error(layer.weight - weight) < 0.8 * error(nearest - weight)


def test_records_compare_with_one_step_and_rows():
    block = blocks.block_of(blocks.with_outlier(50.0))
    config = rptq(reorder=False)
    config.prepare(block)
    x, weight = blocks.inputs_of(block, "self_attn.q_proj"), matrix(block.module.self_attn.q_proj)
    record = next(r for r in config.change(block) if r.name.endswith("q_proj"))
    exact = x @ weight.T
    nearest = fit(weight, Scheme(4, None, False)).round(weight)
    plain = round_affine(x, *affine(x.min(), x.max(), 8), 8) @ nearest.T
    expected = float((plain - exact).square().sum() / exact.square().sum())
    assert record.before == pytest.approx(expected, rel=1e-3)
    new = block.module.self_attn.q_proj(x)
    assert record.after == pytest.approx(float((new - exact).square().sum() / exact.square().sum()), rel=1e-3)
    assert record.after < record.before / 10


def test_an_expert_that_is_not_used_is_named():
    model = tiny.llama()
    layer = model.model.layers[0]
    layer.mlp.add_module("idle", nn.Linear(32, 32))
    with pytest.raises(MethodError, match=r"layers\.0\.mlp\.idle is not used"):
        compress(model, rptq(), calibration=small.batches())


def test_a_pass_that_was_killed_goes_on(tmp_path):
    whole = tiny.llama()
    compress(whole, rptq(), calibration=small.batches())
    model, config = tiny.llama(), rptq()

    def killed(block):
        block.choose(set(block.all_layers()))
        if block.index == 1 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        config.prepare(block)
        return config.change(block)

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, small.batches(), killed, folder=tmp_path, identity="rptq")
    (tmp_path / "again").touch()
    model = tiny.llama()
    records = calibrate(model, small.batches(), killed, folder=tmp_path, identity="rptq")
    assert len(records) == 14
    assert all(type(layer) is ClusteredLinear for layer in quantized_layers(model).values())
    for new, old in zip(blocks.logits(model), blocks.logits(whole), strict=True):
        assert torch.equal(new, old)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_saved_model_computes_the_same_to_the_bit(kind, tmp_path, tiny_tokenizer):
    model = blocks.KINDS[kind]()
    compress(model, rptq(), calibration=small.batches())
    folder = save(model, tmp_path / "model", tiny_tokenizer)
    task = "classification" if kind == "bert" else "causal"
    again, _ = luthier.load(str(folder), task=task, dtype="float32")
    assert quantized_layers(again).keys() == quantized_layers(model).keys()
    for new, old in zip(blocks.logits(again), blocks.logits(model), strict=True):
        assert torch.equal(new, old)
    twice = save(again, tmp_path / "twice", tiny_tokenizer)
    assert (twice / "config.json").read_text() == (folder / "config.json").read_text()


def test_a_saved_model_reloads_in_a_fresh_process(tmp_path, tiny_tokenizer):
    model = tiny.llama()
    compress(model, rptq(), calibration=small.batches())
    verify_export(save(model, tmp_path / "model", tiny_tokenizer), model, tiny_tokenizer)


def test_layers_of_other_kinds_are_not_saved_beside_them(tmp_path):
    model = tiny.llama()
    compress(model, rptq(targets=["down_proj"]), calibration=small.batches())
    compress(model, method("rtn")(targets=["up_proj"], group_size=16))
    with pytest.raises(ModelError, match="no single format holds"):
        save(model, tmp_path / "model")


def test_gradients_reach_what_is_below():
    x = unlike(4).requires_grad_()
    layer = clustered(small.weight_of(6, 8), torch.tensor([0, 1, 1, 0, 0, 1, 2, 2]), x.detach())
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(4, -1), rtol=1e-4)


def test_the_grid_of_a_layer_is_that_it_was_made_with():
    x, labels = unlike(), torch.tensor([0, 1, 1, 0, 0, 1, 2, 2])
    layer = clustered(small.weight_of(6, 8), labels, x)
    assert isinstance(layer.grid, ClusterGrid)
    assert torch.equal(layer.grid.dequantize(layer.codes), layer.weight)
