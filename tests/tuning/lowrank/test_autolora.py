"""AutoLoRA: weighted components, the hypergradient against an exact one, ranks, the LoRA that comes out."""

import json
import math

import peft
import pytest
import small_training as training
import tiny
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import Trainer

import luthier
from luthier import checks, method
from luthier.errors import MethodError
from luthier.tuning import hooks
from luthier.tuning.attach import attach
from luthier.tuning.lowrank.autolora import hypergradient, kept, search, search_step
from luthier.tuning.merge import merge

KINDS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert, "t5": tiny.t5}
FAST = {"search_steps": 3, "search_lr": 1e-2, "logit_lr": 0.1}


def autolora(model, **options):
    torch.manual_seed(0)
    return attach(model, method("autolora")(**{"r": 4, "lora_alpha": 8} | options))


def layers(model):
    base = model.get_base_model()
    return {n: m for n, m in base.named_modules() if isinstance(m, LoraLayer)}


def config(model):
    return model.peft_config[model.active_adapter]


def weigh(model, logits):
    """As in the search, with the same logits on every layer."""
    config(model).logits = {layer: torch.tensor(logits) for layer in layers(model).values()}


# The components --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_search_each_component_has_its_weight(kind):
    model = training.disturb(autolora(KINDS[kind]()), 0.3)
    weigh(model, [0.0, 1.0, 2.0, -1.0])
    pi = torch.tensor([0.0, 1.0, 2.0, -1.0]).exp()
    pi = pi / pi.sum()
    layer = next(iter(layers(model).values()))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(2, 3, a.shape[1], generator=torch.Generator().manual_seed(0))
    expected = layer.base_layer(x) + 2 * sum(pi[j] * (x @ a[j])[..., None] * b[:, j] for j in range(4))
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_with_equal_logits_it_is_a_lora_scaled_by_one_in_r():
    model = training.disturb(autolora(tiny.llama()), 0.3)
    for layer in layers(model).values():
        layer.scaling["default"] /= 4
    expected = training.logits(model)
    for layer in layers(model).values():
        layer.scaling["default"] *= 4
    weigh(model, [1.0] * 4)
    assert torch.allclose(training.logits(model), expected, atol=1e-5)
    weigh(model, [7.0] * 4)
    assert torch.allclose(training.logits(model), expected, atol=1e-5)


def test_fresh_it_is_the_base_in_the_search_too():
    model = autolora(tiny.llama())
    weigh(model, [0.0, 1.0, 2.0, 3.0])
    assert torch.equal(training.logits(model), training.logits(tiny.llama()))


# Mathematics -----------------------------------------------------------------------------------------------


def leaves(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, generator=generator, dtype=torch.float64, requires_grad=True) for n in sizes]


def test_the_hypergradient_of_a_quadratic_is_the_exact_one():
    theta, a = leaves(5, 3)
    mixing = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target = torch.randn(5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def train():
        return a @ mixing @ theta + (theta**2).sum()

    def held_out():
        return ((theta - target) ** 2).sum() + (a**2).sum()

    before = theta.detach().clone()
    (found,) = hypergradient(train, held_out, [theta], [a], eta=0.1, radius=0.01)
    v = 2 * (before - target)
    exact = 2 * a.detach() - 0.1 * mixing @ v  # d2L_t / da dtheta is the mixing
    assert torch.allclose(found, exact, rtol=1e-6)
    assert torch.equal(theta, before)
    (direct,) = hypergradient(train, held_out, [theta], [a], eta=0.0, radius=0.01)
    assert torch.allclose(direct, 2 * a.detach())


def test_with_a_held_out_loss_without_theta_only_the_direct_part_is_left():
    theta, a = leaves(5, 3)
    (found,) = hypergradient(
        lambda: (theta.sum() * a).sum(), lambda: (a**2).sum(), [theta], [a], eta=1.0, radius=0.01
    )
    assert torch.allclose(found, 2 * a.detach())


def test_a_step_looks_ahead_and_goes_from_where_it_stood():
    """Written out for stochastic-gradient steps: theta learns once, under the new logits."""
    theta, a = leaves(1, 1)
    start, weight = theta.detach().clone(), a.detach().clone()
    lower, upper = torch.optim.SGD([theta], lr=0.1), torch.optim.SGD([a], lr=0.5)
    options = method("autolora")(hypergrad_lr=0.1)
    search_step(
        lambda: (a * theta**2).sum(), lambda: ((theta - 1) ** 2).sum(), [theta], [a], lower, upper, options
    )
    ahead = start - 0.1 * 2 * weight * start
    v = 2 * (ahead - 1)
    moved = weight + 0.5 * 0.1 * 2 * ahead * v
    assert torch.allclose(a, moved, rtol=1e-3)
    assert torch.allclose(theta, start - 0.1 * 2 * moved * start, rtol=1e-3)


@pytest.mark.parametrize(
    ("logits", "by_logits", "by_softmax"),
    [([1.0] * 8, 8, 8), ([0.1] * 3, 3, 3), ([0.0, 0.0, 3.0, 1.5], 2, 1), ([0.0, 1.0], 1, 1), ([5.0], 1, 1)],
)
def test_a_component_counts_where_it_is_at_least_the_mean(logits, by_logits, by_softmax):
    values = torch.tensor(logits)
    for shift in (0.0, 2.0):
        assert kept(values + shift, "logits") == by_logits
        assert kept(values + shift, "softmax") == by_softmax


# The search ------------------------------------------------------------------------------------------------


def test_the_search_leaves_the_model_as_it_was():
    model = autolora(tiny.llama())
    before = training.weights(model)
    model.train()
    row = training.batch(model)
    state = torch.random.get_rng_state()
    found = search(
        model, layers(model), method("autolora")(r=4, **FAST), (iter([row] * 3), iter([row] * 3)),
        lambda batch: model(**batch).loss,
    )  # fmt: skip
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert set(found) == set(layers(model))


def test_where_a_layer_needs_more_components_more_are_found(tmp_path):
    """A teacher changes two layers, one by a matrix of rank 1 and the other by one of full rank."""
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    teacher = tiny.llama()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        narrow, wide = (teacher.get_submodule(n).weight for n in names)
        narrow += 0.3 * torch.outer(
            torch.randn(32, generator=generator), torch.randn(32, generator=generator)
        )
        wide += 0.3 * torch.randn(wide.shape, generator=generator)
    options = {"r": 8, "search_steps": 60, "search_lr": 2e-2, "logit_lr": 2e-2}
    model = autolora(tiny.llama(), target_modules=names, **options)

    def batches(seed):
        while True:
            yield training.batch(model, 8, seed=seed)
            seed += 2

    def loss(batch):
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        with torch.no_grad():
            wanted = teacher(**inputs).logits
        return (model(**inputs).logits - wanted).square().mean()

    found = search(model, layers(model), config(model), (batches(0), batches(1)), loss)
    assert found[names[1]] > found[names[0]]


@pytest.mark.parametrize("kind", KINDS)
def test_training_begins_anew_with_the_found_ranks(kind, tmp_path):
    model = autolora(KINDS[kind](), **FAST)
    before = training.weights(model)
    seen = {}

    class Look(training.HookedTrainer):
        def training_step(self, model, *args, **kwargs):
            seen.setdefault("start", training.weights(model))
            return super().training_step(model, *args, **kwargs)

    with checks.collect() as lines:
        Look(
            model=model, args=training.arguments(tmp_path), train_dataset=training.rows(model),
            callbacks=hooks.callbacks(model),
        ).train()  # fmt: skip
    ranks = {}
    for path, layer in layers(model).items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        ranks[path] = len(a)
        assert b.shape[1] == layer.r["default"] == len(a) <= 4
        assert layer.scaling["default"] == 8 / len(a)
        name = f"base_model.model.{path}.lora_A.default.weight"
        assert torch.equal(seen["start"][name], before[name][: len(a)])
        assert not seen["start"][name.replace("lora_A", "lora_B")].any()
        assert not torch.equal(a, before[name][: len(a)])
    assert 1 <= min(ranks.values()) < max(ranks.values())
    line = next(line for line in lines if line.name == "ranks found")
    assert line.value == pytest.approx(sum(ranks.values()) / len(ranks))


def test_the_same_seed_finds_the_same_ranks(tmp_path):
    found = [config(training.train(autolora(tiny.llama(), **FAST), tmp_path)).rank_pattern for _ in range(2)]
    assert found[0] == found[1] != {}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_scale_can_stay_that_of_the_search(use_rslora, tmp_path):
    model = autolora(tiny.llama(), keep_scaling=True, use_rslora=use_rslora, **FAST)
    training.train(model, tmp_path / "run")
    assert len({layer.r["default"] for layer in layers(model).values()}) > 1
    expected = 8 / (math.sqrt(4) if use_rslora else 4)
    assert {round(layer.scaling["default"], 6) for layer in layers(model).values()} == {expected}
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "saved")
    assert torch.allclose(training.logits(loaded), training.logits(model), atol=1e-6)


def test_what_is_saved_is_a_lora_that_peft_loads_alone(tmp_path):
    model = training.train(autolora(tiny.llama(), **FAST), tmp_path / "run")
    luthier.save(model, tmp_path / "saved")
    fields = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert fields["peft_type"] == "LORA"
    assert fields["rank_pattern"] == config(model).rank_pattern != {}
    assert set(fields) <= set(peft.LoraConfig.__dataclass_fields__) | {"peft_version"}
    plain = peft.get_peft_model(tiny.llama(), peft.LoraConfig.from_pretrained(tmp_path / "saved"))
    plain.load_adapter(tmp_path / "saved", "default")
    assert torch.allclose(training.logits(plain), training.logits(model), atol=1e-6)
    assert torch.allclose(training.logits(merge(model)), training.logits(plain), atol=1e-5)


@pytest.mark.parametrize(
    ("objective", "make", "rows"),
    [
        ("sft", tiny.llama, [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(8)]),
        ("classification", tiny.bert, [{"text": f"Order {i} arrived.", "label": i % 3} for i in range(9)]),
    ],
)
def test_the_search_has_the_loss_of_the_objective(objective, make, rows, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = {"output_dir": str(tmp_path / "out"), "max_steps": 2, "per_device_train_batch_size": 2}
    trainer = luthier.trainer(
        objective, make(), tmp_path / "rows.jsonl", method=method("autolora")(r=4, **FAST), args=args,
        tokenizer=tiny.tokenizer(),
    )  # fmt: skip
    losses = []
    inner = trainer.batch_loss
    for callback in trainer.callback_handler.callbacks:
        if hasattr(callback, "loss_of"):
            callback.loss_of = lambda batch: losses.append(inner(batch)) or losses[-1]
    with checks.collect() as lines:
        trainer.train()
    assert len(losses) == 3 * 5
    assert [line for line in lines if not line.passed] == []
    assert config(trainer.model).rank_pattern


# Wrong use -------------------------------------------------------------------------------------------------


def test_trained_without_the_search_it_is_not_saved(tmp_path):
    model = peft.get_peft_model(tiny.llama(), method("autolora")(r=4))
    Trainer(model=model, args=training.arguments(tmp_path), train_dataset=training.rows(model)).train()
    with pytest.raises(MethodError, match="without the callback of autolora"):
        model.save_pretrained(tmp_path / "saved")


def test_rows_that_cannot_be_split_are_refused(tmp_path):
    model = autolora(tiny.llama(), **FAST)
    with pytest.raises(MethodError, match="fewer than two"):
        training.train(model, tmp_path, training.rows(model, 1))


def test_initialisations_that_change_the_base_are_refused():
    with pytest.raises(MethodError, match="pissa"):
        method("autolora")(init_lora_weights="pissa")
