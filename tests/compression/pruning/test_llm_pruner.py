"""LLM-Pruner: importance as in the paper's code, on units that go together; a smaller dense model is left."""

import copy

import pruned_models
import pytest
import tiny
import torch

import luthier
from luthier.compression import gradients, units
from luthier.compression.pruning import llm_pruner
from luthier.errors import DataError, MethodError

PREFIX = "model.layers.1"


def config(**options):
    return luthier.method("llm_pruner")(**options)


def mlp_scores(model, batches, **options):
    own = config(units=["mlp"], **options)
    return list(own.scores(model, units.find(model, ["mlp"]), batches).values())


def by_hand(model, batches, reduce, second=False):
    """Sum over the three matrices of a neuron, from gradients of plain autograd, of block 1."""
    names = [f"{PREFIX}.mlp.{n}_proj.weight" for n in ("gate", "up", "down")]
    weights = [model.get_parameter(n) for n in names]
    rows = gradients.sequences(model, batches)
    count = sum(row["labels"].shape[1] - 1 for row in rows)
    loss = sum(model(**row).loss * (row["labels"].shape[1] - 1) for row in rows) / count
    grads = torch.autograd.grad(loss, weights)
    fisher = [torch.zeros_like(w) for w in weights]
    for row in rows if second else ():
        for f, g in zip(fisher, torch.autograd.grad(model(**row).loss, weights), strict=True):
            f += g.square() / len(rows)
    scores = torch.zeros(weights[0].shape[0])
    for name, w, g, f in zip(names, weights, grads, fisher, strict=True):
        s = reduce(w.detach(), g, f)  # (out, in), whose sign is kept until the unit's own rule
        scores += s.sum(0) if "down" in name else s.sum(1)
    return scores


@pytest.mark.parametrize(
    ("options", "element"),
    [
        ({}, lambda w, g, f: (w * g).abs()),
        ({"taylor": "second"}, lambda w, g, f: w**2 * f),
        ({"taylor": "mix"}, lambda w, g, f: (w * g - 0.5 * w**2 * f).abs()),
        ({"importance": "l1"}, lambda w, g, f: w.abs()),
        ({"importance": "l2"}, lambda w, g, f: w**2),
    ],
    ids=["first", "second", "mix", "l1", "l2"],
)
def test_importance_is_the_formula(tiny_llama, options, element):
    batches = pruned_models.batches(count=2, rows=3)
    found = mlp_scores(tiny_llama, batches, **options)
    expected = by_hand(tiny_llama, batches, element, second=True)
    torch.testing.assert_close(found[1], expected, atol=1e-6, rtol=1e-3)


def test_a_vectors_importance_adds_before_it_takes_the_absolute_value(tiny_llama):
    batches = pruned_models.batches(count=1, rows=3)
    attention = config(units=["attention"], importance="vector")
    place = units.find(tiny_llama, ["attention"])[0]
    found = attention.scores(tiny_llama, [place], batches)[place]
    names = {n: f"model.layers.0.self_attn.{n}_proj.weight" for n in "qkvo"}
    joint, _ = gradients.gradients(tiny_llama, batches, set(names.values()))
    expected = torch.zeros(2)
    for letter, name in names.items():
        s = tiny_llama.get_parameter(name).detach() * joint[name]
        channels = s.sum(0 if letter == "o" else 1).abs()
        expected += channels.reshape(2, -1).sum(1)  # two key-value heads, each with its queries
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-4)


def test_vector_is_never_above_element(tiny_llama):
    batches = pruned_models.batches(count=1)
    element, vector = mlp_scores(tiny_llama, batches), mlp_scores(tiny_llama, batches, importance="vector")
    for small, large in zip(vector, element, strict=True):
        assert (small <= large + 1e-9).all()
        assert (small < large).any()


def test_second_order_of_one_sequence_is_the_square_of_the_first(tiny_llama):
    batches = [{"input_ids": pruned_models.chains(1, 20, 3)}]
    found = mlp_scores(tiny_llama, batches, taylor="second")
    expected = by_hand(tiny_llama, batches, lambda w, g, f: (w * g) ** 2)
    torch.testing.assert_close(found[1], expected, atol=1e-10, rtol=1e-3)


@pytest.mark.parametrize("grouping", ["sum", "mean", "max", "prod", "first", "last"])
def test_groupings(grouping):
    parts = [torch.tensor([1.0, 4.0]), torch.tensor([2.0, 3.0]), torch.tensor([6.0, 0.5])]
    expected = {
        "sum": [9, 7.5], "mean": [3, 2.5], "max": [6, 4], "prod": [12, 6], "first": [1, 4], "last": [6, 0.5],
    }[grouping]  # fmt: skip
    assert llm_pruner.grouped(parts, grouping).tolist() == pytest.approx(expected)


def test_a_neuron_of_zeros_goes_first(tiny_llama):
    mlp = tiny_llama.model.layers[0].mlp
    with torch.no_grad():
        mlp.gate_proj.weight[17] = mlp.up_proj.weight[17] = 0
        mlp.down_proj.weight[:, 17] = 0
    kept = mlp.up_proj.weight.detach()[torch.arange(64) != 17]
    scores = mlp_scores(tiny_llama, pruned_models.batches(count=1))[0]
    assert scores[17] == 0
    assert scores.argmin() == 17
    config(ratio=1 / 64, units=["mlp"]).compress(tiny_llama, pruned_models.batches(count=1))
    assert torch.equal(tiny_llama.model.layers[0].mlp.up_proj.weight, kept)


def test_importance_follows_a_permutation_of_neurons(tiny_llama):
    batches = pruned_models.batches(count=1)
    before = mlp_scores(tiny_llama, batches)[0]
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    mlp = tiny_llama.model.layers[0].mlp
    for layer in (mlp.gate_proj, mlp.up_proj):
        layer.weight.data = layer.weight.data[order]
    mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, order]
    after = mlp_scores(tiny_llama, batches)[0]
    torch.testing.assert_close(after, before[order], atol=1e-7, rtol=1e-4)


def test_first_order_importance_ignores_a_scale_that_up_gives_to_down(tiny_llama):
    batches = pruned_models.batches(count=1)
    before = mlp_scores(tiny_llama, batches)[0]
    magnitude = mlp_scores(tiny_llama, batches, importance="l2")[0]
    mlp = tiny_llama.model.layers[0].mlp
    with torch.no_grad():
        mlp.up_proj.weight[5] *= 8
        mlp.down_proj.weight[:, 5] /= 8
    torch.testing.assert_close(mlp_scores(tiny_llama, batches)[0], before, atol=1e-7, rtol=1e-4)
    assert mlp_scores(tiny_llama, batches, importance="l2")[0][5] > 2 * magnitude[5]


def test_ratio_0_changes_nothing(tiny_llama):
    before = {n: p.clone() for n, p in tiny_llama.named_parameters()}
    records = config(ratio=0.0).compress(tiny_llama, pruned_models.batches(count=1))
    assert all(torch.equal(p, before[n]) for n, p in tiny_llama.named_parameters())
    assert {r.sparsity for r in records} == {0}


@pytest.mark.parametrize(("ratio", "heads", "neurons"), [(0.25, 2, 48), (0.5, 1, 32), (0.9, 1, 6)])
def test_number_of_parameters_is_the_closed_form(ratio, heads, neurons):
    model = tiny.llama()
    records = config(ratio=ratio).compress(model, pruned_models.batches(count=1))
    hidden, head = 32, 8
    block = hidden * head * heads * (2 * 2 + 2) + 3 * hidden * neurons + 2 * hidden
    assert sum(p.numel() for p in model.parameters()) == 2 * block + tiny.VOCAB * hidden + hidden
    assert model.config.intermediate_size == neurons
    assert len(records) == 4
    assert all(0 < r.after < 1 for r in records if r.sparsity)


def test_blocks_outside_the_range_are_the_same_to_the_bit():
    model = tiny.llama(num_hidden_layers=4)
    before = copy.deepcopy(model.state_dict())
    config(ratio=0.5, blocks=[1, 3], widths="per_layer").compress(model, pruned_models.batches(count=1))
    for name, tensor in model.state_dict().items():
        inside = any(f"layers.{i}." in name and "norm" not in name for i in (1, 2))
        assert (tensor.shape == before[name].shape) != inside, name
        assert inside or torch.equal(tensor, before[name])


def test_a_global_scope_takes_as_many_in_all_and_not_the_same_in_each():
    model = pruned_models.trained()
    records = config(ratio=0.5, units=["mlp"], scope="global", widths="per_layer").compress(
        model, pruned_models.batches()
    )
    left = [block.mlp.down_proj.in_features for block in model.model.layers]
    assert sum(left) == 3 * 32
    assert len(set(left)) > 1
    assert [r.sparsity for r in records] == [1 - n / 64 for n in left]


def test_rounds_end_at_the_same_size_and_score_anew():
    batches = pruned_models.batches(count=1)
    once, thrice = tiny.llama(), tiny.llama()
    config(ratio=0.5).compress(once, batches)
    records = config(ratio=0.5, steps=3).compress(thrice, batches)
    shapes = {n: p.shape for n, p in once.named_parameters()}
    assert shapes == {n: p.shape for n, p in thrice.named_parameters()}
    assert [r.note for r in records if r.name.endswith("0.mlp")] == [
        "54 of 64 neurons kept",
        "43 of 54 neurons kept",
        "32 of 43 neurons kept",
    ]
    assert not torch.equal(once.model.layers[0].mlp.up_proj.weight, thrice.model.layers[0].mlp.up_proj.weight)


def test_taylor_keeps_more_of_a_trained_model_than_random_and_magnitude():
    """The paper's order: Taylor before the baselines; and one threshold for all blocks is better."""
    batches = pruned_models.batches()

    def loss(**options):
        model = pruned_models.trained()
        config(ratio=0.5, **options).compress(model, batches)
        return pruned_models.loss(model)

    dense = pruned_models.loss(pruned_models.trained())
    taylor = loss()
    drawn = [loss(importance="random", seed=seed) for seed in range(4)]
    assert dense < taylor < min(drawn)
    assert taylor < loss(importance="l2")
    assert loss(scope="global", widths="per_layer") < taylor


def test_random_depends_on_the_seed_alone():
    def kept(seed):
        model = tiny.llama()
        own = config(ratio=0.5, importance="random", seed=seed)
        assert not own.wants_data
        own.compress(model, [])
        return model.model.layers[0].mlp.up_proj.weight

    assert torch.equal(kept(1), kept(1))
    assert not torch.equal(kept(1), kept(2))


def test_a_classifier_is_pruned_with_labels_or_by_magnitude(tiny_bert):
    batch = {"input_ids": pruned_models.chains(4, 10, 0), "labels": torch.tensor([0, 1, 2, 0])}
    luthier.compress(tiny_bert, config(units=["mlp"], ratio=0.5), calibration=[batch])
    assert tiny_bert.config.intermediate_size == 32
    with pytest.raises(MethodError, match="labels"):
        config(units=["mlp"], ratio=0.5).compress(tiny_bert, pruned_models.batches(count=1))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"ratio": 1.5}, "ratio must be >= 0 and < 1"),
        ({"units": ["head"]}, "units"),
        ({"units": ["mlp", "channel"]}, "units"),
        ({"units": []}, "units"),
        ({"importance": "vector", "taylor": "mix"}, "taylor: first"),
        ({"scope": "global"}, "widths: per_layer"),
        ({"blocks": [1, 2]}, "widths: per_layer"),
        ({"units": ["channel"], "widths": "per_layer"}, "one width"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, match):
    with pytest.raises(MethodError, match=match):
        config(**options)


@pytest.mark.parametrize("blocks", [[0], [1, 1], [0, 3], [-1, 1]])
def test_ranges_of_blocks_that_are_none_are_refused(tiny_llama, blocks):
    with pytest.raises(MethodError, match=r"start < end <= 2"):
        config(blocks=blocks, widths="per_layer").compress(tiny_llama, pruned_models.batches(count=1))


def test_data_and_an_effect_are_asked_for(tiny_llama):
    with pytest.raises(DataError, match="no calibration data"):
        config().compress(tiny_llama, [])
    with pytest.raises(MethodError, match="takes nothing out of the 2 heads"):
        config(units=["attention"], ratio=0.3).compress(tiny_llama, pruned_models.batches(count=1))
    with pytest.raises(MethodError, match="adapter"):
        config().compress(luthier.attach(tiny_llama, luthier.method("lora")(r=2)), [])
