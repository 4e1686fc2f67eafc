"""Laplace-LoRA: every formula against a dense computation, and calibration on held-out data."""

import json
import math
import random

import peft
import pytest
import small_training as training
import tiny
import torch
from torch.func import functional_call, jacrev

import luthier
from luthier import checks, method
from luthier.errors import MethodError, ModelError
from luthier.evaluation.calibration import calibration_error, negative_log_likelihood
from luthier.tuning import curvature, hooks
from luthier.tuning.attach import attach
from luthier.tuning.curvature import Block
from luthier.tuning.lowrank.laplace_lora import (
    Posterior,
    best_log_variance,
    evidence,
    fit,
    logit_variance,
    probabilities,
)
from luthier.tuning.merge import merge


def laplace(model, **options):
    torch.manual_seed(0)
    return attach(model, method("laplace_lora")(**{"r": 2, "lora_alpha": 4} | options))


def double(model):
    return training.disturb(laplace(model.double(), kfac_rank=64)).double()


def batches(model, count=8, size=4, seed=0, length=6):
    rows = training.rows(model, count, length, seed)
    return [
        {key: torch.tensor([row[key] for row in rows[i : i + size]]) for key in rows[0]}
        for i in range(0, count, size)
    ]


def dense(block, variance):
    """The covariance (d r, d r) of one matrix, by inverting its precision."""
    f = torch.kron(
        block.u @ torch.diag(block.p) @ block.u.T, block.q_vectors @ torch.diag(block.q) @ block.q_vectors.T
    )
    return torch.linalg.inv(f + torch.eye(len(f), dtype=f.dtype) / variance)


def made(d=6, r=3, k=4, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    u, q = torch.linalg.qr(draw(d, k))[0], torch.linalg.qr(draw(r, r))[0]
    return Block(u, draw(k).abs() + 0.1, q, draw(r).abs()), draw(2, 3, d, r)


# The formulas ------------------------------------------------------------------------------------------


def test_the_variance_of_the_logits_is_that_of_the_dense_covariance():
    block, jacobian = made()
    flat = jacobian.flatten(2)  # (n, classes, d r)
    expected = flat @ dense(block, 0.3) @ flat.mT
    found = logit_variance(jacobian, block, 0.3)
    assert torch.allclose(found, expected, rtol=1e-9)
    assert torch.linalg.eigvalsh(found).min() > 0


def test_without_curvature_the_variance_is_the_priors_and_without_a_prior_there_is_none():
    block, jacobian = made()
    assert torch.allclose(logit_variance(jacobian, block, 1e-12), torch.zeros(2, 3, 3).double(), atol=1e-9)
    block.p = torch.zeros_like(block.p)
    flat = jacobian.flatten(2)
    assert torch.allclose(logit_variance(jacobian, block, 0.3), 0.3 * flat @ flat.mT)


def test_the_determinant_in_the_evidence_is_the_dense_one():
    block, _ = made()
    for s2 in (0.01, 1.0, 50.0):
        precision = torch.linalg.inv(dense(block, s2))
        expected = -0.5 * (torch.logdet(precision) + len(precision) * math.log(s2)) - 7.0 / (2 * s2)
        assert evidence(math.log(s2), 7.0, block.eigenvalues()) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("norm", [1e-3, 1.0, 1e3])
def test_the_prior_has_the_highest_evidence(norm):
    eigenvalues = made()[0].eigenvalues()
    best = best_log_variance(norm, eigenvalues)
    at = [evidence(best + step, norm, eigenvalues) for step in (-1e-2, 0, 1e-2)]
    assert at[1] > max(at[0], at[2])
    grid = [evidence(best + step / 4, norm, eigenvalues) for step in range(-40, 41)]
    assert max(grid) <= at[1]
    assert abs(at[2] - at[0]) / 2e-2 < 1e-3 * max(1, norm)  # its slope is zero there


def test_no_curvature_has_no_best_prior():
    with pytest.raises(MethodError, match="curvature is zero"):
        best_log_variance(1.0, torch.zeros(3))


def test_sampling_averages_probabilities_and_not_logits():
    logits = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64)
    none = probabilities(logits, torch.zeros(1, 3, 3, dtype=torch.float64))
    assert torch.allclose(none, logits.softmax(-1))
    wide = probabilities(logits, 4 * torch.eye(3, dtype=torch.float64)[None], samples=20000)
    probit = probabilities(logits, 4 * torch.eye(3, dtype=torch.float64)[None], link="probit")
    assert wide.max() < none.max() - 0.05
    assert wide.argmax() == none.argmax() == probit.argmax()
    # For two classes the mean of a sigmoid is an integral that can be done numerically.
    two = probabilities(torch.tensor([[1.0, 0.0]]), torch.tensor([[[2.0, 0.5], [0.5, 1.0]]]), samples=40000)
    grid = torch.linspace(-12, 12, 4001)
    spread = 2.0 + 1.0 - 2 * 0.5  # variance of the difference of the two logits
    density = torch.exp(-((grid - 1.0) ** 2) / (2 * spread)) / math.sqrt(2 * math.pi * spread)
    assert float(two[0, 0]) == pytest.approx(float(torch.trapezoid(density * grid.sigmoid(), grid)), abs=4e-3)


# Curvature of a model ----------------------------------------------------------------------------------


def parameters(model):
    return {n: p for n, p in model.named_parameters() if ".lora_" in n}


def exact_jacobian(model, batch):
    """d logits / d weight of every matrix: (n, classes, *shape), by torch.func."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}

    def logits(weights):
        return functional_call(model, weights, kwargs=inputs).logits

    return jacrev(logits)({n: p.detach() for n, p in parameters(model).items()})


def padded(batch):
    """The batch with two of its rows cut short."""
    mask = batch["attention_mask"].clone()
    mask[0, 3:], mask[2, 2:] = 0, 0
    return batch | {"attention_mask": mask, "input_ids": batch["input_ids"] * mask}


def test_the_jacobian_is_that_of_the_model():
    model = double(tiny.bert())
    batch = padded(batches(model)[0])
    expected = exact_jacobian(model, batch)
    found = dict(curvature.jacobians(model, batch)[1])
    assert len(found) == len(expected)
    for name, jacobian in found.items():
        exact = expected[f"{name}.default.weight"]  # (n, classes, rows, columns)
        exact = exact.mT if name.endswith("lora_A") else exact  # the long side first
        assert torch.allclose(jacobian, exact, rtol=1e-6, atol=1e-9), name


def test_the_factors_of_one_position_are_the_exact_fisher():
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"])
    model = training.disturb(peft.get_peft_model(base, config)).double()
    x, label = torch.randn(1, 5, dtype=torch.float64), torch.tensor([1])

    def rows(m, batch):
        return m(batch["x"]), batch["labels"]

    sums, log_likelihood = curvature.kronecker(model, [{"x": x, "labels": label}], 8, rows)
    weights = {n: p.detach() for n, p in parameters(model).items()}
    p = model(x).detach().softmax(-1)[0]
    assert log_likelihood == pytest.approx(math.log(p[1]), rel=1e-6)
    jacobian = jacrev(lambda w: functional_call(model, w, args=(x,))[0])(weights)
    hessian = torch.diag(p) - torch.outer(p, p)
    for name, factors in sums.items():
        block = factors.block()
        j = jacobian[f"{name}.default.weight"]
        j = (j.mT if name.endswith("lora_A") else j).flatten(1)  # (classes, d r)
        exact = j.T @ hessian @ j
        found = torch.kron(
            block.u @ torch.diag(block.p) @ block.u.T,
            block.q_vectors @ torch.diag(block.q) @ block.q_vectors.T,
        )
        assert torch.allclose(found, exact, rtol=1e-8, atol=1e-12), name


def test_drawn_labels_have_the_fisher_as_their_mean():
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)).double()
    p = logits.softmax(-1)[0]
    exact = torch.diag(p) - torch.outer(p, p)
    generator = torch.Generator().manual_seed(1)
    seeds = curvature.fisher_seeds(logits.expand(100_000, -1), generator, separate=True)[0]
    assert seeds.shape == (100_000, 40)
    assert torch.allclose(seeds.T @ seeds / 100_000, exact, atol=5e-3)
    summed = curvature.fisher_seeds(logits[:, :5], generator, separate=True)[:, 0]
    q = logits[0, :5].softmax(-1)
    assert torch.allclose(summed.T @ summed, torch.diag(q) - torch.outer(q, q))


def blocks(model, **options):
    sums, _ = curvature.kronecker(model, batches(model, **options), 64)
    return {
        n: torch.kron(b.u @ torch.diag(b.p) @ b.u.T, b.q_vectors @ torch.diag(b.q) @ b.q_vectors.T)
        for n, b in ((n, s.block()) for n, s in sums.items())
    }


def test_the_factors_depend_on_neither_the_size_nor_the_order_of_the_batches():
    model = double(tiny.bert())
    once, twice = blocks(model, size=8), blocks(model, size=2)
    for name, factor in once.items():
        assert torch.allclose(factor, twice[name], rtol=1e-8, atol=1e-12), name
    sums, _ = curvature.kronecker(model, reversed(batches(model, size=2)), 64)
    assert sums.keys() == once.keys()


def test_padding_does_not_count():
    model = double(tiny.bert())
    batch = padded(batches(model)[0])
    longer = {
        name: torch.nn.functional.pad(value, (0, 5)) if value.ndim == 2 else value
        for name, value in batch.items()
    }
    (short, _), (long, _) = (curvature.kronecker(model, [b], 64) for b in (batch, longer))
    for name, factors in short.items():
        assert factors.count == long[name].count
        assert torch.allclose(factors.small, long[name].small, rtol=1e-8, atol=1e-12), name


def test_leading_directions_are_exact_where_they_suffice_and_better_the_more_there_are(monkeypatch):
    monkeypatch.setattr(curvature, "FULL", 0)
    generator = torch.Generator().manual_seed(0)
    low = (
        torch.randn(90, 12, generator=generator).double() @ torch.randn(12, 60, generator=generator).double()
    )
    gram = curvature.Gram(60, 12)
    for part in low.split(30):
        gram.add(part)
    u, p = gram.leading()
    assert torch.allclose(u @ torch.diag(p) @ u.T, low.T @ low, rtol=1e-8, atol=1e-8)
    full = torch.randn(90, 60, generator=generator).double()
    errors = []
    for rank in (2, 8, 30, 60):
        gram = curvature.Gram(60, rank)
        for part in full.split(30):
            gram.add(part)
        u, p = gram.leading()
        errors.append(float((u @ torch.diag(p) @ u.T - full.T @ full).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-8


def test_more_data_make_the_logits_surer():
    model = double(tiny.bert())
    probe = batches(model, seed=9)[0]
    few, more = (fit(model, batches(model, count)) for count in (8, 24))
    more.variances = few.variances
    gap = few.logits(model, probe)[1] - more.logits(model, probe)[1]
    assert torch.linalg.eigvalsh(gap).min() > -1e-9 * gap.abs().max()
    assert gap.diagonal(dim1=1, dim2=2).min() > 0


@pytest.mark.parametrize(("prior", "groups"), [("one", 1), ("sides", 2), ("each", None)])
def test_each_group_of_weights_has_its_own_prior(prior, groups):
    model = double(tiny.bert())
    posterior = fit(model, batches(model), config=method("laplace_lora")(kfac_rank=64, prior=prior))
    assert len(set(posterior.variances.values())) == (groups or len(posterior.blocks))
    best = posterior.tune_prior(prior)
    one = fit(model, batches(model), config=method("laplace_lora")(kfac_rank=64))
    assert best >= one.tune_prior("one")


# In training -------------------------------------------------------------------------------------------


def noisy(count, seed, noise=0.25):
    """Rows whose class is the range that most of their tokens come from; some labels are wrong."""
    dice = random.Random(seed)
    rows = []
    for _ in range(count):
        label = dice.randrange(3)
        ids = [dice.randrange(10 + 30 * label, 40 + 30 * label) for _ in range(6)]
        ids += [dice.randrange(10, 100) for _ in range(2)]
        dice.shuffle(ids)
        shown = dice.randrange(3) if dice.random() < noise else label
        rows.append({"input_ids": ids, "attention_mask": [1] * 8, "labels": shown})
    return rows


def collate(rows):
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory):
    """An adapter that has learnt its noisy rows by heart, with its posterior."""
    model = laplace(tiny.bert(), r=4, lora_alpha=8)
    settings = {"max_steps": 200, "per_device_train_batch_size": 10, "weight_decay": 0.0}
    return training.train(model, tmp_path_factory.mktemp("run"), noisy(120, 0), **settings)


def test_the_posterior_is_better_calibrated_on_held_out_data_than_the_adapter(overfitted):
    posterior = hooks.tuning_of(overfitted).posterior
    test = collate(noisy(400, 1))
    labels = test["labels"]
    logits, _ = posterior.logits(overfitted, test)
    plain, averaged = logits.softmax(-1), posterior.predict(overfitted, test)
    right, right_plain = ((p.argmax(-1) == labels).double().mean() for p in (averaged, plain))
    assert right_plain > 0.6  # with chance at a third, and a sixth of the labels wrong
    assert abs(float(right - right_plain)) < 0.05
    assert negative_log_likelihood(averaged, labels) < 0.8 * negative_log_likelihood(plain, labels)
    assert calibration_error(averaged, labels) < 0.7 * calibration_error(plain, labels)
    # Better than making all answers alike.
    assert negative_log_likelihood(averaged, labels) < math.log(3)


def test_saved_and_loaded_it_predicts_the_same(overfitted, tmp_path):
    test = collate(noisy(20, 2))
    expected = hooks.tuning_of(overfitted).posterior.predict(overfitted, test)
    hooks.save_adapter(overfitted, tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny.bert(), tmp_path)
    assert type(loaded.peft_config["default"]) is peft.LoraConfig
    assert torch.allclose(Posterior.load(tmp_path).predict(loaded, test), expected, atol=1e-6)
    merged = merge(loaded)
    with pytest.raises(MethodError, match="merged"):
        Posterior.load(tmp_path).predict(merged, test)
    with pytest.raises(ModelError, match="no posterior"):
        Posterior.load(tmp_path / "elsewhere")


def test_a_posterior_of_other_weights_is_neither_used_nor_saved(tmp_path):
    model = training.train(laplace(tiny.bert()), tmp_path / "run")
    posterior = hooks.tuning_of(model).posterior
    training.disturb(model)
    with pytest.raises(MethodError, match="weights are others"):
        posterior.predict(model, batches(model)[0])
    with pytest.raises(MethodError, match="weights are others"):
        hooks.save_adapter(model, tmp_path / "saved")


def test_fitted_by_hand_after_a_plain_training_it_can_be_saved(tmp_path):
    model = peft.get_peft_model(tiny.bert(), method("laplace_lora")(r=2, task_type="SEQ_CLS"))
    model.train()
    model(**batches(model)[0]).loss.backward()
    with pytest.raises(MethodError, match="without the callback"):
        hooks.save_adapter(training.disturb(model), tmp_path / "no")
    fit(model, batches(model))
    hooks.save_adapter(model, tmp_path / "yes")
    assert (tmp_path / "yes" / "laplace.safetensors").is_file()


def test_training_says_what_the_posterior_does_on_held_out_data(tmp_path):
    words = ["printer", "order", "money"]
    for name, first in (("train", 100), ("test", 200)):
        numbers = range(first, first + 24)
        rows = [{"text": f"The {words[n % 3]} number {n}", "label": n % 3} for n in numbers]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    trainer = luthier.trainer(
        "classification",
        tiny.bert(),
        tmp_path / "train.jsonl",
        method=method("laplace_lora")(r=2),
        args={"output_dir": str(tmp_path / "run"), "max_steps": 12, "save_strategy": "no", "eval_steps": 6},
        tokenizer=tiny.tokenizer(),
        eval_data=tmp_path / "test.jsonl",
    )
    with checks.collect() as lines:
        trainer.train()
    found = {line.name: line for line in lines}
    assert found["posterior fitted"].passed
    assert found["held-out NLL"].value != found["held-out NLL"].tolerance
    error = found["held-out ECE"]
    assert 0 < error.value < 1
    assert error.tolerance is None
    assert "mean confidence" in error.detail
    luthier.save(trainer.model, tmp_path / "saved")
    adapter = peft.PeftModel.from_pretrained(tiny.bert(), tmp_path / "saved")
    batch = next(iter(trainer.get_eval_dataloader()))
    expected = hooks.tuning_of(trainer.model).posterior.predict(trainer.model, batch)
    again = Posterior.load(tmp_path / "saved").predict(adapter, batch)
    assert torch.allclose(again, expected, atol=1e-5)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.t5])
def test_a_language_model_is_fitted_on_its_labelled_tokens(make, tmp_path):
    model = training.train(laplace(make()), tmp_path)
    posterior = hooks.tuning_of(model).posterior
    count = 12 if make is tiny.t5 else 11  # nothing predicts a decoder's first token
    mean = posterior.log_likelihood / (8 * count)
    assert math.log(1 / tiny.VOCAB) * 2 < mean < 0
    assert all(variance > 0 for variance in posterior.variances.values())
    again = fit(model, batches(model, 8, 2, length=12), seed=0)
    assert again.variances == pytest.approx(posterior.variances)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_language_model_chooses_among_answers(side, tmp_path):
    model = training.train(laplace(tiny.llama()), tmp_path)
    posterior = hooks.tuning_of(model).posterior
    batch = batches(model)[0]
    with pytest.raises(MethodError, match=r"answers\(ids\)"):
        posterior.predict(model, batch)
    ids = [40, 50, 60]
    found = posterior.predict(model, batch, curvature.answers(ids))
    gap = (2, 0) if side == "left" else (0, 2)
    shifted = {name: torch.nn.functional.pad(value, gap) for name, value in batch.items()}
    again = posterior.predict(model, shifted, curvature.answers(ids))
    assert torch.allclose(found, again, atol=1e-4)
    with torch.no_grad():
        plain = model(batch["input_ids"]).logits[:, -1, ids].softmax(-1)
    assert torch.allclose(
        posterior.logits(model, batch, curvature.answers(ids))[0].softmax(-1).float(), plain
    )
    assert (found.max(-1).values < plain.max(-1).values).all()


def test_a_fused_model_gives_the_same_posterior(tmp_path):
    from luthier.acceleration import fused_lora, fused_mlp

    model = training.disturb(laplace(tiny.llama()))
    plain = fit(model, batches(model))
    with fused_lora.fused(model), fused_mlp.fused(model):
        fused = fit(model, batches(model))
    assert fused.blocks.keys() == plain.blocks.keys()
    assert fused.variances == pytest.approx(plain.variances, rel=1e-4)


def test_batches_without_labels_leave_a_plain_adapter_and_say_so(tmp_path):
    model = laplace(tiny.llama())
    trainer = training.trainer(model, tmp_path)
    trainer.train_dataset = [{"input_ids": row["input_ids"]} for row in trainer.train_dataset]
    trainer.compute_loss = lambda m, inputs, **_: m(**inputs).logits.square().mean()
    with checks.collect() as lines:
        trainer.train()
    line = next(line for line in lines if line.name == "posterior fitted")
    assert not line.passed
    assert "no labels" in line.detail
    hooks.save_adapter(model, tmp_path / "saved")
    assert not (tmp_path / "saved" / "laplace.safetensors").exists()
