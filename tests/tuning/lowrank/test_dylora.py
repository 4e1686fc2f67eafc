"""DyLoRA: every leading part is a LoRA of its own, in training, in evaluation, merged and in files."""

import copy
import json
from collections import Counter

import peft
import pytest
import small_training as training
import tiny
import torch
from transformers import Trainer, TrainerCallback

from luthier import method
from luthier.errors import MethodError
from luthier.tuning import hooks
from luthier.tuning.attach import attach
from luthier.tuning.lowrank.dylora import at_rank, cut, evaluate_ranks, leading, sample_rank, set_rank
from luthier.tuning.merge import merge


def dylora(model, seed=0, **options):
    torch.manual_seed(seed)
    return attach(model, method("dylora")(**{"r": 8, "lora_alpha": 16} | options))


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}


def sliced(model, make, rank, rslora=False):
    """A plain LoRA of PEFT's of rank `rank`, with the leading factors copied into it."""
    options = {"r": rank, "lora_alpha": 16, "target_modules": "all-linear", "use_rslora": rslora}
    plain = peft.get_peft_model(make(), peft.LoraConfig(**options, fan_in_fan_out=make is tiny.gpt2))
    ours = layers(model)
    for name, layer in layers(plain).items():
        layer.lora_A["default"].weight.data = ours[name].lora_A["default"].weight.data[:rank].clone()
        layer.lora_B["default"].weight.data = ours[name].lora_B["default"].weight.data[:, :rank].clone()
    return plain


def draw(model, rank):
    """As in a step of training whose rank is `rank`."""
    config = hooks.tuning_of(model)
    config.watch.begin()
    config.sampled = rank
    return model.train()


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_at_each_rank_it_is_the_sliced_lora(make, rank):
    model = training.disturb(dylora(make()))
    expected = training.logits(sliced(model, make, rank))
    with at_rank(model, rank):
        assert torch.allclose(training.logits(model), expected, rtol=0, atol=1e-6)
    found = draw(model, rank)(**training.batch(model)).logits
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)


def test_the_rank_stabilised_scale_is_that_of_the_rank_in_use():
    model = training.disturb(dylora(tiny.llama(), use_rslora=True))
    expected = training.logits(sliced(model, tiny.llama, 3, rslora=True))
    with at_rank(model, 3):
        assert torch.allclose(training.logits(model), expected, rtol=0, atol=1e-6)


def test_a_fresh_adapter_is_the_base_at_every_rank():
    base = training.logits(tiny.llama())
    for logits in evaluate_ranks(dylora(tiny.llama()), training.logits).values():
        assert torch.equal(logits, base)


def gradients(model, rank):
    draw(model, rank)(**training.batch(model)).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("prefix", [False, True])
def test_gradients_reach_the_component_drawn_alone_or_all_up_to_it(prefix):
    model = training.disturb(dylora(tiny.llama(), train_prefix=prefix))
    learns = torch.arange(8) < 3 if prefix else torch.arange(8) == 2
    for name, gradient in gradients(model, 3).items():
        reached = gradient.abs().amax(dim=0 if "lora_B" in name else 1) > 0
        assert torch.equal(reached, learns), name


def test_gradients_of_the_prefix_are_those_of_the_sliced_lora():
    model = training.disturb(dylora(tiny.llama(), train_prefix=True))
    plain = sliced(model, tiny.llama, 3).train()
    plain(**training.batch(plain)).loss.backward()
    found = gradients(model, 3)
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            gradient = found[name][:, :3] if "lora_B" in name else found[name][:3]
            assert torch.allclose(gradient, parameter.grad, rtol=1e-5, atol=1e-7), name


def test_at_one_rank_alone_it_trains_as_lora(tmp_path):
    ours = training.train(dylora(tiny.llama(), r=4, r_min=4, train_prefix=True), tmp_path)
    torch.manual_seed(0)
    plain = training.train(attach(tiny.llama(), method("lora")(r=4, lora_alpha=16)), tmp_path)
    for name, tensor in training.weights(plain).items():
        assert torch.equal(tensor, ours.get_parameter(name)), name


# Drawing -------------------------------------------------------------------------------------------------


def test_ranks_are_drawn_evenly_and_from_seed_and_step_alone():
    drawn = [sample_rank(0, step, range(2, 6)) for step in range(2000)]
    counts = Counter(drawn)
    assert sorted(counts) == [2, 3, 4, 5]
    assert all(abs(count / 2000 - 0.25) < 0.03 for count in counts.values())
    torch.manual_seed(5)
    assert [sample_rank(0, step, range(2, 6)) for step in range(2000)] == drawn
    assert [sample_rank(1, step, range(2, 6)) for step in range(2000)] != drawn


def test_geometric_weights_fall_by_one_minus_p():
    counts = Counter(sample_rank(0, step, range(1, 4), "geometric", 0.5) for step in range(3000))
    assert [counts[rank] / 3000 for rank in (1, 2, 3)] == pytest.approx([4 / 7, 2 / 7, 1 / 7], abs=0.03)


class Watch(TrainerCallback):
    """The number of components in each forward, and what moved in each step."""

    def __init__(self, model):
        self.layer = next(iter(layers(model).values()))
        self.ranks, self.moved = [], []
        self.layer.register_forward_hook(self.see)

    def see(self, layer, *_):
        self.ranks.append((layer.training, len(layer.lora_variant["default"].formula(layer, "default")[0])))

    def on_step_begin(self, *args, **kwargs):
        self.before = self.layer.lora_B["default"].weight.detach().clone()

    def on_step_end(self, *args, **kwargs):
        change = self.layer.lora_B["default"].weight.detach() - self.before
        self.moved.append(change.abs().amax(0) > 0)


def watched(model, folder, **changes):
    trainer = training.trainer(model, folder, **changes)
    watch = Watch(model)
    trainer.add_callback(watch)
    trainer.train()
    return watch


def test_a_step_keeps_its_rank_over_all_its_batches_and_evaluation_uses_all(tmp_path):
    model = dylora(tiny.llama())
    data = training.rows(model)
    evaluating = {"eval_strategy": "steps", "eval_steps": 3}
    args = training.arguments(tmp_path, max_steps=6, gradient_accumulation_steps=2, **evaluating)
    watch = Watch(model)
    callbacks = [*hooks.callbacks(model), watch]
    Trainer(model=model, args=args, train_dataset=data, eval_dataset=data, callbacks=callbacks).train()
    expected = [sample_rank(0, step, range(1, 9)) for step in range(6) for _ in range(2)]
    assert [rank for training_, rank in watch.ranks if training_] == expected
    assert {rank for training_, rank in watch.ranks if not training_} == {8}


def test_a_resumed_run_draws_what_the_straight_one_drew(tmp_path):
    saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    straight = watched(dylora(tiny.llama()), tmp_path, **saving)
    resumed = dylora(tiny.llama())
    trainer = training.trainer(resumed, tmp_path, **saving)
    watch = Watch(resumed)
    trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert watch.ranks == straight.ranks[3:]
    assert torch.equal(watch.layer.lora_B["default"].weight, straight.layer.lora_B["default"].weight)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
def test_strict_freeze_moves_nothing_but_what_is_drawn(strict, prefix, tmp_path):
    watch = watched(
        dylora(tiny.llama(), strict_freeze=strict, train_prefix=prefix),
        tmp_path,
        max_steps=8,
        learning_rate=1e-3,
    )
    extra = 0
    for (_, rank), moved in zip(watch.ranks, watch.moved, strict=True):
        learns = torch.arange(8) < rank if prefix else torch.arange(8) == rank - 1
        assert moved[learns].all()
        extra += int(moved[~learns].sum())
    assert (extra == 0) == strict  # AdamW's momentum moves the others


# Files and merging ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"(o|c)_proj": 2}}])
def test_a_rank_that_is_cut_out_loads_as_an_ordinary_lora(make, options, tmp_path):
    model = training.disturb(dylora(make(), **options))
    cut(model, 3, tmp_path)
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert type(loaded.peft_config["default"]) is peft.LoraConfig
    assert set(fields) <= set(peft.LoraConfig.__dataclass_fields__)
    assert (fields["r"], fields["lora_alpha"]) == (3, 16)
    with at_rank(model, 3):
        assert torch.allclose(training.logits(loaded), training.logits(model), rtol=0, atol=1e-6)


def test_a_checkpoint_of_all_ranks_is_an_ordinary_lora_and_can_be_cut_later(tmp_path):
    model = training.disturb(dylora(tiny.llama()))
    model.save_pretrained(tmp_path / "all")
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "all")
    assert type(loaded.peft_config["default"]) is peft.LoraConfig
    assert torch.allclose(training.logits(loaded), training.logits(model), rtol=0, atol=1e-6)
    cut(loaded, 2, tmp_path / "two")
    two = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "two")
    with at_rank(model, 2):
        assert torch.allclose(training.logits(two), training.logits(model), rtol=0, atol=1e-6)


def test_export_rank_is_what_the_trained_model_computes_with_and_is_saved_with(tmp_path):
    model = training.train(dylora(tiny.llama(), export_rank=2), tmp_path / "run")
    expected = training.logits(model)
    hooks.save_adapter(model, tmp_path / "saved")
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "saved")
    assert loaded.peft_config["default"].r == 2
    assert torch.allclose(training.logits(loaded), expected, rtol=0, atol=1e-6)
    assert torch.allclose(training.logits(merge(model)), expected, rtol=0, atol=1e-5)


def test_merging_and_unmerging_at_one_rank_after_another():
    model = training.disturb(dylora(tiny.llama()))
    before = training.weights(model)
    for rank in (2, 5):
        set_rank(model, rank)
        expected = training.logits(model)
        model.merge_adapter()
        assert torch.allclose(training.logits(model), expected, rtol=0, atol=1e-5)
        with pytest.raises(MethodError, match="unmerge"):
            set_rank(model, 1)
        model.unmerge_adapter()
    for name, tensor in before.items():
        assert torch.allclose(model.get_parameter(name), tensor, rtol=0, atol=1e-6)


def test_merged_at_a_rank_the_update_has_that_rank():
    model = training.disturb(dylora(tiny.llama()))
    set_rank(model, 3)
    for layer in layers(model).values():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        delta = layer.get_delta_weight("default")
        assert torch.allclose(delta, 16 / 3 * b[:, :3] @ a[:3], atol=1e-6)
        assert int((torch.linalg.svdvals(delta.double()) > 1e-5).sum()) == 3


# What it is for ------------------------------------------------------------------------------------------


class Regression(torch.nn.Module):
    def __init__(self, target):
        super().__init__()
        self.target = target
        self.linear = torch.nn.Linear(*reversed(target.shape), bias=False)
        torch.nn.init.zeros_(self.linear.weight)

    def forward(self, x):
        return self.linear(x)


def regress(name, options, target, steps=1500):
    """Fit `target` with an adapter on a zero base, by the method's own callback; error at each rank."""
    torch.manual_seed(0)
    config = method(name)(r=8, lora_alpha=16, target_modules=["linear"], **options)
    model = peft.get_peft_model(Regression(target), config)
    callbacks = config.callbacks(model) if hasattr(config, "callbacks") else []
    args, state = training.arguments("unused"), type("State", (), {"global_step": 0})()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for callback in callbacks:
        callback.on_train_begin(args, state, None)
    model.train()
    generator = torch.Generator().manual_seed(0)
    for state.global_step in range(steps):
        for callback in callbacks:
            callback.on_step_begin(args, state, None)
        x = torch.randn(64, target.shape[1], generator=generator)
        optimizer.zero_grad()
        (model(x) - x @ target.T).square().mean().backward()
        optimizer.step()
    layer = next(iter(layers(model).values()))
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    # Rank k of the plain LoRA is cut out with the scale that it was trained with.
    scale = [16 / k if callbacks else 2.0 for k in range(1, 9)]
    return [float((scale[k - 1] * b[:, :k] @ a[:k] - target).square().sum()) for k in range(1, 9)]


@pytest.mark.parametrize("prefix", [False, True])
def test_every_low_rank_is_better_than_a_truncated_lora(prefix):
    generator = torch.Generator().manual_seed(3)
    u, v = (torch.linalg.qr(torch.randn(16, 16, generator=generator))[0][:, :8] for _ in range(2))
    target = u @ torch.diag(4 * 0.5 ** torch.arange(8.0)) @ v.T
    nested = regress("dylora", {"train_prefix": prefix}, target)
    truncated = regress("lora", {}, target)
    whole = float(target.square().sum())
    assert all(ours < 0.7 * theirs for ours, theirs in zip(nested[:4], truncated[:4], strict=True))
    assert nested[0] < 0.6 * whole
    assert nested[-1] < 0.1 * whole


def loss(model):
    model.eval()
    with torch.no_grad():
        return model(**training.batch(model, 8, seed=0)).loss.item()


@pytest.mark.parametrize(("prefix", "lowest", "highest"), [(False, 0.93, 0.75), (True, 0.87, 0.6)])
def test_it_learns_at_every_rank(prefix, lowest, highest, tmp_path):
    model = dylora(tiny.llama(), train_prefix=prefix)
    before = loss(model)
    training.train(model, tmp_path, max_steps=250, per_device_train_batch_size=4)
    after = evaluate_ranks(model, loss)
    assert list(after) == list(range(1, 9))
    assert all(value < lowest * before for value in after.values())
    assert after[8] < highest * before


# Wrong use -----------------------------------------------------------------------------------------------


def test_a_rank_that_does_not_exist_is_refused(tmp_path):
    model = dylora(tiny.llama(), r=4)
    for rank in (0, 5):
        with pytest.raises(MethodError, match="1 to 4"):
            set_rank(model, rank)
        with pytest.raises(MethodError, match="1 to 4"):
            cut(model, rank, tmp_path)
    with pytest.raises(MethodError, match="no DyLoRA"):
        evaluate_ranks(attach(tiny.llama(), method("lora")()), loss, [1])


@pytest.mark.parametrize(
    "options",
    [{"r_min": 9}, {"export_rank": 9}, {"init_lora_weights": "pissa"}, {"distribution": "even"}, {"r": 0}],
)
def test_options_that_do_not_go_together_are_refused(options):
    with pytest.raises(MethodError):
        method("dylora")(**options)


def test_a_copy_of_the_model_has_a_rank_of_its_own():
    model = training.disturb(dylora(tiny.llama()))
    twin = copy.deepcopy(model)
    set_rank(twin, 1)
    assert hooks.tuning_of(model).chosen == 8
    assert not torch.allclose(training.logits(model), training.logits(twin), atol=1e-4)


def test_leading_parts_of_the_factors():
    a, b = torch.randn(4, 6, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    for last_alone in (False, True):
        left, right = leading(a, b, 2, last_alone)
        assert torch.equal(right @ left, b[:, :2] @ a[:2])
        assert left.shape == (2, 6)
        assert right.shape == (5, 2)
