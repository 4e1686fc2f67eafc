"""LPAQA: weights of templates, from formulas and from a planted one that knows."""

import cloze_models as toy
import pytest
import torch

from luthier import checks, method
from luthier.errors import CheckError, MethodError
from luthier.tuning.prompts import lpaqa

TEMPLATES = ["{text} colour {mask}", "{text} the {mask}", "{text} overall {mask}"]


def random_logp(rows=12, templates=4, objects=5, seed=0):
    dice = torch.Generator().manual_seed(seed)
    logp = torch.randn(rows, templates, objects, generator=dice, dtype=torch.float64).log_softmax(-1)
    return logp, torch.randint(objects, (rows,), generator=dice)


def planted(rows=60, templates=10, objects=6, seed=0):
    """Template 3 knows; the others say the same for every object."""
    dice = torch.Generator().manual_seed(seed)
    gold = torch.randint(objects, (rows,), generator=dice)
    logp = torch.full((rows, templates, objects), 1 / objects).log()
    logp[torch.arange(rows), 3, gold] += 1.0
    return logp, gold


def test_equal_weights_are_the_mean_of_log_probabilities():
    logp, gold = random_logp()
    found = lpaqa.ensemble(logp, torch.zeros(4, dtype=torch.float64).softmax(0))
    assert torch.allclose(found, logp.mean(1))
    expected = -logp.mean(1).log_softmax(-1)[torch.arange(12), gold].mean()
    assert torch.allclose(lpaqa.ensemble_loss(logp, gold, torch.zeros(4, dtype=torch.float64)), expected)


def test_all_weight_on_one_template_is_that_template():
    logp, gold = random_logp()
    one = torch.eye(4, dtype=torch.float64)[2]
    assert torch.equal(lpaqa.ensemble(logp, one), logp[:, 2])
    assert lpaqa.share_right(lpaqa.ensemble(logp, one), gold) == pytest.approx(
        float(lpaqa.template_accuracy(logp, gold)[2])
    )


def test_the_gradient_is_the_papers():
    logp, gold = random_logp()
    theta = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    lpaqa.ensemble_loss(logp, gold, theta).backward()
    w = theta.detach().softmax(0)
    p = torch.einsum("ntv,t->nv", logp, w).softmax(-1)
    rows = torch.arange(12)
    a = logp[rows, :, gold] - torch.einsum("nv,ntv->nt", p, logp)
    expected = (-w * (a - (a @ w)[:, None])).mean(0)
    assert torch.allclose(theta.grad, expected, atol=1e-12)


def test_a_constant_on_theta_or_on_a_template_changes_nothing():
    logp, gold = random_logp()
    theta = torch.arange(4, dtype=torch.float64)
    loss = lpaqa.ensemble_loss(logp, gold, theta)
    assert torch.allclose(lpaqa.ensemble_loss(logp, gold, theta + 5), loss)
    shifted = logp.clone()
    shifted[:, 1] += 3
    assert torch.allclose(lpaqa.ensemble_loss(shifted, gold, theta), loss)


def test_the_planted_template_gets_the_weight():
    logp, gold = planted()
    weights, history = lpaqa.fit_weights((logp, gold), (logp, gold), patience=500)
    assert float(weights.sum()) == pytest.approx(1)
    assert int(weights.argmax()) == 3
    assert float(weights[3]) > 0.9
    assert int(lpaqa.template_accuracy(logp, gold).argmax()) == 3
    assert history[0]["loss"] > history[-1]["loss"]


def test_what_is_kept_is_no_worse_than_equal_weights():
    train, held_out = random_logp(seed=0), random_logp(seed=1)
    train, held_out = [(logp.float(), gold) for logp, gold in (train, held_out)]
    weights, history = lpaqa.fit_weights(train, held_out)
    equal = lpaqa.ensemble_loss(*held_out, torch.zeros(4))
    kept = lpaqa.ensemble_loss(*held_out, weights.log())
    assert kept <= equal + 1e-6
    assert kept == pytest.approx(min([float(equal), *(h["eval_loss"] for h in history)]), abs=1e-6)
    assert len(history) < 500  # patience


def test_permuted_templates_permute_weights_and_a_copy_splits_them():
    logp, gold = (t.float() if t.is_floating_point() else t for t in random_logp(rows=40))
    data, order = (logp, gold), [2, 0, 3, 1]
    weights, _ = lpaqa.fit_weights(data, data, epochs=300, patience=300)
    permuted, _ = lpaqa.fit_weights((logp[:, order], gold), (logp[:, order], gold), epochs=300, patience=300)
    assert torch.allclose(permuted, weights[order], atol=1e-4)
    twice = torch.cat([logp, logp[:, :1]], 1)
    copied, _ = lpaqa.fit_weights((twice, gold), (twice, gold), epochs=300, patience=300)
    assert torch.allclose(copied[0], copied[4])
    assert torch.allclose(copied[0] + copied[4], weights[0], atol=0.02)


def test_macro_counts_each_object_once():
    scores = torch.eye(3)[[0, 0, 0, 0, 1]]  # predictions
    gold = torch.tensor([0, 0, 0, 1, 2])
    assert lpaqa.share_right(scores, gold) == pytest.approx(3 / 5)
    assert lpaqa.macro_accuracy(scores, gold) == pytest.approx((1 + 0 + 0) / 3)
    even = torch.tensor([0, 0, 1, 1])
    found = torch.eye(2)[[0, 1, 1, 1]]
    assert lpaqa.macro_accuracy(found, even) == pytest.approx(lpaqa.share_right(found, even))


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("ensemble", ["optimised", "rank", "top1"])
def test_it_finds_the_wording_that_asks(kind, ensemble):
    config = method("lpaqa")(templates=TEMPLATES, ensemble=ensemble, top_k=1)
    found = config.search(toy.trained(kind), toy.tokenizer(), toy.loaded(toy.facts(60)))
    assert max(found.templates, key=found.templates.get) == TEMPLATES[2]
    assert sum(found.templates.values()) == pytest.approx(1)
    assert found.scores["accuracy"] >= 0.9 > found.scores["first_template"]
    assert found.labels == {"bad": ["bad"], "good": ["good"]}
    if ensemble != "optimised":  # one template has all the weight: K = 1 is top-1
        assert found.templates == {TEMPLATES[2]: 1.0}


def test_objects_that_are_no_single_token_are_left_out_and_counted():
    data = toy.loaded(toy.facts(40))
    data.records[0]["label"] = "zebra crossing"
    with checks.collect() as lines:
        found = method("lpaqa")(templates=TEMPLATES[:1]).search(toy.untrained("bert"), toy.tokenizer(), data)
    said = {line.name: line for line in lines}
    assert "zebra crossing" in said["objects of one token"].detail
    assert said["train pairs"].value + said["held-out pairs"].value == 39
    assert "zebra crossing" not in found.labels


def test_templates_are_mined_from_a_corpus(tmp_path):
    """Only wordings that end in the gap serve a causal model."""
    (tmp_path / "text.txt").write_text("warm film is overall good. bad , says overall of stale plot.\n")
    rows = [{"text": "warm film", "label": "good"}, {"text": "stale plot", "label": "bad"}] * 10
    data = toy.loaded(rows)
    config = method("lpaqa")(corpus=str(tmp_path / "text.txt"), epochs=3)
    found = config.search(toy.untrained("llama"), toy.tokenizer(), data)
    assert list(found.templates) == ["{text} is overall {mask}"]
    with pytest.raises(CheckError, match="templates"):
        method("lpaqa")().search(toy.untrained("llama"), toy.tokenizer(), data)
    with pytest.raises(MethodError, match="cannot be read"):
        method("lpaqa")(corpus="none.txt").search(toy.untrained("llama"), toy.tokenizer(), data)


def test_only_a_causal_model_is_asked_for_paraphrases():
    config = method("lpaqa")(templates=TEMPLATES, paraphrases=2)
    with pytest.raises(MethodError, match="Only a causal model"):
        config.search(toy.untrained("bert"), toy.tokenizer(), toy.loaded(toy.facts(20)))
    found = config.search(toy.untrained("llama"), toy.tokenizer(), toy.loaded(toy.facts(20)))
    assert set(found.templates) <= set(TEMPLATES)  # what so small a model writes is no template
