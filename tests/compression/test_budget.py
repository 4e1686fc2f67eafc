"""Bits within a budget: the estimate is the second-order term, the hand-out the best; nothing changes."""

import itertools

import pytest
import tiny
import torch

from luthier.compression.budget import Choice, assign, choices, layer_bits, within_loss
from luthier.compression.compress import compress
from luthier.compression.grid import Scheme, fit
from luthier.compression.linear import matrix
from luthier.errors import MethodError
from luthier.taxonomy import find


def batches(count: int = 2) -> list[dict]:
    lot = torch.Generator().manual_seed(0)
    ids = torch.randint(5, tiny.VOCAB, (count, 2, 24), generator=lot)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids]


@pytest.fixture(scope="module")
def table():
    return choices(tiny.llama(), batches(), group_size=16)


def test_costs_fall_and_sizes_rise_with_bits(table):
    assert len(table) == 14
    for found in table.values():
        assert all(a.cost > b.cost and a.size < b.size for a, b in itertools.pairwise(found))


def test_the_cost_is_the_formula_of_inputs_and_gradients(table):
    """Gradients by autograd on the output of one layer, inputs by a hook."""
    model, name = tiny.llama(), "model.layers.1.mlp.down_proj"
    layer, seen = model.get_submodule(name), {}
    layer.register_forward_hook(
        lambda _, x, y: (seen.update(x=x[0].detach(), y=y), y.retain_grad())[0] and None
    )
    squares = second = 0
    for batch in batches():
        loss = model(**batch, labels=batch["input_ids"]).loss * (2 * 23)
        loss.backward()
        squares = squares + seen["y"].grad.flatten(0, 1).square().sum(0) / (2 * 2 * 23)
        x = seen["x"].flatten(0, 1)
        second = second + x.T @ x / (2 * 2 * 24)
    weight = matrix(layer)
    lost = fit(weight, Scheme(3, 16)).round(weight) - weight
    expected = sum(squares[i] * lost[i] @ second @ lost[i] for i in range(len(lost))) / 2
    found = next(c for c in table[name] if c.bits == 3)
    assert found.cost == pytest.approx(float(expected), rel=1e-3)


def test_the_hand_out_equals_trying_all_where_costs_are_convex():
    lot = torch.Generator().manual_seed(1)
    made = {}
    for name in "abcd":
        factor = float(torch.rand((), generator=lot)) + 0.1
        made[name] = [Choice(bits, factor * 4.0**-bits, bits * 10) for bits in (2, 3, 4, 5)]
    for budget in (80, 110, 150, 200):
        bits = assign(made, budget)
        cost = {name: {c.bits: c.cost for c in found} for name, found in made.items()}
        best = min(
            sum(cost[n][b] for n, b in zip(made, tried, strict=True))
            for tried in itertools.product((2, 3, 4, 5), repeat=4)
            if 10 * sum(tried) <= budget
        )
        assert sum(cost[n][b] for n, b in bits.items()) == pytest.approx(best)
        assert 10 * sum(bits.values()) <= budget


def test_a_budget_below_the_least_says_by_how_much(table):
    least = sum(found[0].size for found in table.values())
    with pytest.raises(MethodError, match="falls short by 10"):
        assign(table, least - 10)


def test_more_bytes_never_cost_more(table):
    least, most = (sum(found[end].size for found in table.values()) for end in (0, -1))
    costs = []
    for budget in torch.linspace(least, most, 8).long().tolist():
        bits = assign(table, budget)
        costs.append(sum(next(c.cost for c in table[n] if c.bits == b) for n, b in bits.items()))
    assert costs == sorted(costs, reverse=True)


def test_the_model_is_not_changed():
    model = tiny.llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layer_bits(model, batches(), 120_000, group_size=16)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_bits_by_cost_beat_the_same_bytes_everywhere():
    """Against 3 bits a layer, measured on the batches themselves."""
    model = tiny.llama()
    table = choices(model, batches(), group_size=16)
    bits = assign(table, sum(next(c.size for c in found if c.bits == 3) for found in table.values()))
    ids = batches()[0]["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits.log_softmax(-1)
    found = []
    for options in ({"layer_bits": bits}, {"bits": 3}):
        trial = tiny.llama()
        compress(trial, find("rtn")(group_size=16, **options))
        with torch.no_grad():
            logits = trial(ids).logits.log_softmax(-1)
        found.append(float((expected.exp() * (expected - logits)).sum(-1).mean()))
    assert found[0] < found[1]


def test_the_search_by_perplexity_keeps_what_was_allowed():
    """On a random model text is not learnt: the rise may be below zero, never above what is allowed."""
    bits, rise = within_loss(
        tiny.llama(), batches(), batches(3)[2:], 0.01, find("rtn")(group_size=16), trials=3
    )
    assert rise <= 0.01
    assert set(bits.values()) <= {2, 3, 4, 5, 6, 8}
