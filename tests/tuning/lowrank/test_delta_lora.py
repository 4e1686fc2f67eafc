"""Delta-LoRA: the form that moves the weight, written out, as oracle for the one that does not."""

import json
import math

import peft
import pytest
import small_training as training
import tiny
import torch
from peft.tuners.lora import LoraLayer
from transformers import TrainerCallback

import luthier
from luthier import checks, method
from luthier.errors import MethodError, TrainingError
from luthier.tuning import hooks
from luthier.tuning.attach import attach
from luthier.tuning.lowrank.delta_lora import moved, plain_state
from luthier.tuning.merge import merge


def delta(model, seed=0, **options):
    torch.manual_seed(seed)
    return attach(model, method("delta_lora")(**{"r": 4, "lora_alpha": 8, "start_steps": 2} | options))


def lora(model, **options):
    torch.manual_seed(0)
    return attach(model, method("lora")(**{"r": 4, "lora_alpha": 8} | options))


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def factors(layer):
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


class InPlace(TrainerCallback):
    """The paper's algorithm on a plain LoRA: after each step the weight moves by the product's change."""

    def __init__(self, model, ratio, first):
        self.layers, self.ratio, self.first = list(layers(model).values()), ratio, first

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.before = [b @ a for a, b in map(factors, self.layers)]

    def on_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step < self.first:
            return
        for layer, before in zip(self.layers, self.before, strict=True):
            a, b = factors(layer)
            change = self.ratio * layer.scaling["default"] * (b @ a - before)
            layer.get_base_layer().weight.data += change.T if layer.fan_in_fan_out else change


def train(model, folder, callbacks=(), **changes):
    trainer = training.trainer(model, folder, **{"max_steps": 6} | changes)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train()
    return model


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_it_is_the_form_that_moves_the_weight(make, first, accumulation, tmp_path):
    options = {"gradient_accumulation_steps": accumulation}
    ours = train(delta(make().double(), start_steps=first).double(), tmp_path, **options)
    plain = lora(make().double()).double()
    train(plain, tmp_path, [InPlace(plain, 0.5, first)], **options)
    for (name, layer), other in zip(layers(ours).items(), layers(plain).values(), strict=True):
        for found, expected in zip(factors(layer), factors(other), strict=True):
            assert torch.allclose(found, expected, rtol=0, atol=1e-10), name
    assert torch.allclose(training.logits(ours), training.logits(plain), rtol=0, atol=1e-5)
    assert not torch.allclose(training.logits(ours), training.logits(lora(make())), atol=1e-3)


def test_without_a_ratio_or_before_the_start_it_is_lora(tmp_path):
    plain = train(lora(tiny.llama()), tmp_path)
    for options in ({"update_ratio": 0.0}, {"start_steps": 6}):
        ours = train(delta(tiny.llama(), **options), tmp_path)
        for layer, other in zip(layers(ours).values(), layers(plain).values(), strict=True):
            for found, expected in zip(factors(layer), factors(other), strict=True):
                assert torch.allclose(found, expected, rtol=0, atol=1e-6)
        assert torch.allclose(training.logits(ours), training.logits(plain), rtol=0, atol=1e-5)


def test_the_forward_is_larger_and_the_gradient_is_not():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    a, b, a_k, b_k, x, g = draw(3, 5), draw(4, 3), draw(3, 5), draw(4, 3), draw(7, 5), draw(7, 4)
    for part in (a, b, x):
        part.requires_grad_()
    left, right = moved(a, b, a_k, b_k, 0.7)
    expected = 1.7 * b @ a - 0.7 * b_k @ a_k
    assert torch.allclose(right @ left, expected)
    da, db, dx = torch.autograd.grad(x @ left.T @ right.T, (a, b, x), g)
    assert torch.allclose(da, (g @ b).T @ x)
    assert torch.allclose(db, g.T @ (x @ a.T))
    assert torch.allclose(dx, g @ expected)


@pytest.mark.parametrize(("first", "rank"), [(0, 4), (2, 8)])
def test_the_whole_change_has_at_most_twice_the_rank(first, rank, tmp_path):
    model = train(delta(tiny.llama(), start_steps=first), tmp_path)
    for layer in layers(model).values():
        singular = torch.linalg.svdvals(layer.get_delta_weight("default").double())
        assert int((singular > 1e-6).sum()) == rank


def test_the_base_stays_as_it_was_and_learns_nothing(tmp_path):
    model = train(delta(tiny.llama()), tmp_path)
    base = dict(tiny.llama().named_parameters())
    for name, layer in layers(model).items():
        weight = layer.get_base_layer().weight
        assert torch.equal(weight, base[name.removeprefix("base_model.model.") + ".weight"])
        assert not weight.requires_grad


# Files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"(o|c)_proj": 2}}])
def test_it_is_saved_as_an_ordinary_lora_of_the_original_base(make, first, options, tmp_path):
    model = train(delta(make(), start_steps=first, **options), tmp_path / "run")
    expected = training.logits(model)
    hooks.save_adapter(model, tmp_path / "saved")
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path / "saved")
    assert type(loaded.peft_config["default"]) is peft.LoraConfig
    assert loaded.peft_config["default"].r == (8 if first else 4)
    assert torch.allclose(training.logits(loaded), expected, rtol=0, atol=1e-5)
    assert torch.allclose(training.logits(merge(model)), expected, rtol=0, atol=1e-4)


def test_pefts_own_save_keeps_all_parts_under_a_type_of_its_own(tmp_path):
    model = train(delta(tiny.llama()), tmp_path / "run")
    model.save_pretrained(tmp_path / "saved")
    fields = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert fields["peft_type"] == "DELTA_LORA"
    assert fields["update_ratio"] == 0.5
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "saved")
    assert torch.allclose(training.logits(loaded), training.logits(model), rtol=0, atol=1e-6)
    hooks.save_adapter(loaded, tmp_path / "plain")
    plain = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "plain")
    assert torch.allclose(training.logits(plain), training.logits(model), rtol=0, atol=1e-5)


def test_luthier_saves_and_loads_it(tmp_path):
    model = train(delta(tiny.llama()), tmp_path / "run")
    luthier.save(model, tmp_path / "saved")
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "saved")
    assert torch.allclose(training.logits(loaded), training.logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("save", [1, 2, 4])
def test_a_resumed_run_is_the_straight_one_before_at_and_after_the_start(save, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": save}
    straight = train(delta(tiny.llama()), tmp_path, **saving)
    resumed = delta(tiny.llama())
    training.trainer(resumed, tmp_path, max_steps=6, **saving).train(
        resume_from_checkpoint=str(tmp_path / f"checkpoint-{save}")
    )
    state, found = straight.state_dict(), resumed.state_dict()
    assert state.keys() == found.keys()
    assert any(".lora_start." in name for name in state)
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name


def test_an_earlier_checkpoint_loaded_again_takes_the_movement_back(tmp_path):
    model = delta(tiny.llama())
    training.disturb(model)
    model.save_pretrained(tmp_path / "before")
    expected = training.logits(model)
    train(model, tmp_path / "run")
    model.load_adapter(tmp_path / "before", "default", is_trainable=True)
    assert torch.equal(training.logits(model), expected)


def test_a_checkpoint_without_the_start_is_not_resumed(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4}
    train(lora(tiny.llama()), tmp_path, **saving)
    with pytest.raises(TrainingError, match="factors of step 2"):
        training.trainer(delta(tiny.llama()), tmp_path, max_steps=6, **saving).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-4")
        )


def test_trained_further_it_goes_on_from_where_it_is(tmp_path):
    model = train(delta(tiny.llama()), tmp_path)
    before = {n: t.clone() for n, t in model.state_dict().items() if ".lora_start." in n}
    expected = training.logits(model)
    trainer = training.trainer(model, tmp_path, max_steps=2, learning_rate=0.0)
    trainer.train()
    assert torch.equal(training.logits(model), expected)
    after = model.state_dict()
    assert before
    assert all(torch.equal(after[n], t) for n, t in before.items())


def test_a_removed_adapter_leaves_nothing():
    model = delta(tiny.llama())
    model.add_adapter("other", method("delta_lora")(r=2))
    for layer in layers(model).values():
        layer.lora_start["other"].set(*(torch.zeros(2, 2) for _ in "AB"))
    assert any("other" in name for name in model.state_dict())
    model.delete_adapter("other")
    assert not any("other" in name for name in model.state_dict())


def test_plain_state_is_the_sum_of_both_products():
    generator = torch.Generator().manual_seed(0)
    a, b, a_k, b_k = (torch.randn(*s, generator=generator) for s in ((2, 5), (4, 2), (2, 5), (4, 2)))
    state = {"x.lora_A.weight": a, "x.lora_B.weight": b, "head.weight": a}
    assert plain_state(state, 0.5) == (state, False)
    starts = {"x.lora_start.weight_A": a_k, "x.lora_start.weight_B": b_k}
    found, doubled = plain_state(state | starts, 0.5)
    assert doubled
    assert set(found) == set(state)
    product = found["x.lora_B.weight"] @ found["x.lora_A.weight"]
    assert torch.allclose(product, 1.5 * b @ a - 0.5 * b_k @ a_k, atol=1e-6)


# Use -----------------------------------------------------------------------------------------------------


def test_in_half_precision_the_weight_moves_where_a_step_would_round_away(tmp_path):
    rate = {"learning_rate": 1e-4, "max_steps": 8}
    model = train(delta(training.half(tiny.llama()), start_steps=0), tmp_path, **rate)
    layer = next(iter(layers(model).values()))
    a, b = factors(layer)
    assert a.dtype == torch.float32
    ours = layer.get_delta_weight("default")
    assert torch.allclose(ours, 1.5 * 2 * b @ a, rtol=1e-5, atol=1e-9)
    weight = layer.get_base_layer().weight
    literal = (weight.float() + 0.5 * 2 * (b @ a)).bfloat16()
    kept = (literal - weight).abs() > 0
    assert kept.float().mean() < 0.5  # written into bfloat16 most of it would be lost


def loss(model):
    model.eval()
    with torch.no_grad():
        return model(**training.batch(model, 8, seed=0)).loss.item()


def test_it_learns_and_faster_than_lora_at_the_same_rate(tmp_path):
    settings = {"max_steps": 100, "per_device_train_batch_size": 4, "learning_rate": 3e-3}
    before = loss(tiny.llama())
    ours = loss(train(delta(tiny.llama(), update_ratio=1.0, start_steps=0.1), tmp_path, **settings))
    plain = loss(train(lora(tiny.llama()), tmp_path, **settings))
    assert ours < plain < before
    assert ours < 0.75 * before


@pytest.mark.parametrize(("start", "first"), [(0.1, 10), (0.0, 0), (1, 1), (500, 500), (0.301, 31)])
def test_the_start_is_a_step_or_a_share_of_the_run(start, first):
    assert method("delta_lora")(start_steps=start).first_step(100) == first


def test_a_run_too_short_for_the_weight_to_move_says_so(tmp_path):
    with checks.collect() as lines:
        train(delta(tiny.llama(), start_steps=500), tmp_path)
    line = next(line for line in lines if line.name == "the weights will move")
    assert (line.passed, line.value, line.tolerance) == (False, 500, 6)


@pytest.mark.parametrize(
    "options", [{"lora_dropout": 0.1}, {"init_lora_weights": "pissa"}, {"update_ratio": -1.0}, {"r": 0}]
)
def test_options_that_do_not_go_with_it_are_refused(options):
    with pytest.raises(MethodError):
        method("delta_lora")(**options)


def test_the_rank_stabilised_scale_is_kept():
    model = training.disturb(delta(tiny.llama(), use_rslora=True))
    layer = next(iter(layers(model).values()))
    a, b = factors(layer)
    assert torch.allclose(layer.get_delta_weight("default"), 8 / math.sqrt(4) * b @ a, atol=1e-6)
