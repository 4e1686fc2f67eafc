"""AdaLoRA: the schedule, the scores and the regulariser derived anew, PEFT's own class as oracle where it is
right and as counterexample where it is not."""

import json

import peft
import pytest
import small_training as training
import tiny
import torch
from datasets import Dataset
from peft.tuners.adalora.layer import RankAllocator
from transformers import Trainer, TrainerCallback, set_seed

import luthier
from luthier import checks, method
from luthier.errors import MethodError
from luthier.tuning import hooks
from luthier.tuning.attach import attach, trainable
from luthier.tuning.lowrank.adalora import budget_at, highest
from luthier.tuning.merge import merge

OPTIONS = {"init_r": 6, "target_r": 2, "lora_alpha": 12}


def adalora(model, **options):
    torch.manual_seed(0)
    return attach(model, method("adalora")(**OPTIONS | options))


def plain_peft(model, total=10, **options):
    """PEFT's own AdaLoRA from the same start."""
    torch.manual_seed(0)
    settings = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "orth_reg_weight": 0.1}
    return peft.get_peft_model(model, peft.AdaLoraConfig(total_step=total, **settings | OPTIONS | options))


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.adalora.SVDLinear)}


def factors(layer):
    return [getattr(layer, part)["default"] for part in ("lora_B", "lora_E", "lora_A")]


def learnt(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def kept(model):
    return [int((layer.lora_E["default"] != 0).sum()) for layer in layers(model).values()]


def orthogonality(model):
    """Of the regulariser, from its formula."""
    norms = []
    for layer in layers(model).values():
        p, value, q = factors(layer)
        norms += [torch.norm(p.T @ p - torch.eye(len(value))), torch.norm(q @ q.T - torch.eye(len(value)))]
    return sum(norms) / len(norms)


class Each(TrainerCallback):
    """What the ranks are after each step of the optimiser."""

    def __init__(self, model):
        self.model, self.kept = model, []

    def on_step_end(self, args, state, control, **kwargs):
        self.kept.append(kept(self.model))


def loop(model, steps, rate=0.02):
    """A training by hand as PEFT documents it."""
    learns = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learns, lr=rate)
    model.train()
    for step in range(steps):
        model(**training.batch(model, seed=step)).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model


# The method ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.t5])
def test_trains_r_times_in_plus_out_plus_one_a_layer(make):
    model = adalora(make())
    sizes = [(layer.in_features, layer.out_features) for layer in layers(model).values()]
    assert trainable(model)[0] == sum(6 * (i + o + 1) for i, o in sizes) > 0


def test_the_budget_falls_by_the_cube():
    # 4 matrices, rank 6 to 2, 2 steps of warm-up and 4 at the end of 20.
    start, finish = method("adalora")(tinit=2, tfinal=4).phases(20)
    found = [budget_at(t, start, finish, 24, 8) for t in range(20)]
    assert [found[t] for t in (0, 2, 3, 8, 9, 15, 16, 19)] == [24, 24, 20, 10, 10, 8, 8, 8]
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize(
    ("options", "total", "expected"),
    [({}, 100, (10, 50)), ({"tinit": 0, "tfinal": 0}, 10, (0, 9)), ({"tinit": 3, "tfinal": 1}, 5, (3, 4))],
)
def test_phases_are_steps_or_shares_of_the_run(options, total, expected):
    assert method("adalora")(**options).phases(total) == expected


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_forty_steps_are_those_of_peft(make):
    # PEFT's allocator was held against the authors' code: the same to the last bit.
    schedule = {"tinit": 5, "tfinal": 10, "deltaT": 3, "total_step": 40}
    ours = loop(adalora(make(), **schedule), 40)
    total = schedule.pop("total_step")
    theirs = loop(plain_peft(make(), total, **schedule), 40)
    assert sum(kept(theirs)) == 2 * len(layers(ours))
    assert kept(ours) == kept(theirs)
    expected = learnt(theirs)
    for name, tensor in learnt(ours).items():
        assert torch.allclose(tensor, expected[name], rtol=1e-4, atol=1e-5), name


def test_each_allocation_keeps_exactly_the_budget(tmp_path):
    model = adalora(tiny.llama(), tinit=2, tfinal=5, deltaT=3)
    trainer = training.trainer(model, tmp_path, max_steps=20)
    each = Each(model)
    trainer.add_callback(each)
    with checks.collect() as lines:
        trainer.train()
    n = len(layers(model))
    totals = [sum(now) for now in each.kept]
    for t in range(20):
        if 2 < t < 15 and t % 3 == 0:
            assert totals[t] == int(2 * n + 4 * n * (1 - (t - 2) / 13) ** 3)
        elif t >= 15:
            assert each.kept[t] == each.kept[15]
    assert totals[:3] == [6 * n] * 3
    assert totals[-1] == 2 * n
    assert len(set(each.kept[-1])) > 1  # not the same rank for all
    # What was left out grows back until the next allocation.
    assert totals[7] > totals[6]
    line = next(line for line in lines if line.name == "rank budget met")
    assert (line.passed, line.value, line.tolerance) == (True, 2 * n, 2 * n)


def test_what_is_kept_has_the_highest_score():
    """M, U and S from their formulas, over three steps by hand."""
    model = adalora(tiny.llama(), total_step=4, tinit=0, tfinal=2, beta1=0.7, beta2=0.6)
    learns = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(learns.values(), lr=0.02)
    mean, spread = ({n: torch.zeros_like(p) for n, p in learns.items()} for _ in range(2))
    for step in range(3):
        model.train()
        model(**training.batch(model, seed=step)).loss.backward()
        optimizer.step()
        for n, p in learns.items() if step < 2 else ():
            now = (p * p.grad).abs().detach()
            mean[n] = 0.7 * mean[n] + 0.3 * now
            spread[n] = 0.6 * spread[n] + 0.4 * (now - mean[n]).abs()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    scores, found = [], []
    for name, layer in layers(model).items():
        p, value, q = (mean[key] * spread[key] for key in (f"{name}.lora_{x}.default" for x in "BEA"))
        scores.append(value[:, 0] + p.mean(0) + q.mean(1))
        found.append(layer.lora_E["default"][:, 0] != 0)
    scores, found = torch.cat(scores), torch.cat(found)
    assert found.sum() == 2 * len(layers(model))
    assert scores[found].min() > scores[~found].max()


def gradients(model, folder, accumulation, callbacks):
    """Those of the first step of a trainer, and the batch that it has seen."""
    rows = training.rows(model, 2 * accumulation)
    found = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})

    Trainer(
        model=model,
        args=training.arguments(
            folder,
            max_steps=1,
            max_grad_norm=0.0,
            gradient_accumulation_steps=accumulation,
            learning_rate=0.0,
        ),
        train_dataset=rows,
        callbacks=[*callbacks, Look()],
    ).train()
    model.zero_grad()
    return found, {k: torch.tensor([row[k] for row in rows]) for k in rows[0]}


def close(found, model, loss):
    loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return all(torch.allclose(found[n], g, rtol=1e-4, atol=1e-6) for n, g in expected.items())


@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_gradient_is_that_of_the_loss_with_the_regulariser_in_it_once(weight, accumulation, tmp_path):
    model = training.disturb(adalora(tiny.llama(), orth_reg_weight=weight, target_r=6))
    found, batch = gradients(model, tmp_path, accumulation, hooks.callbacks(model))
    assert close(found, model, model.eval()(**batch).loss + weight * orthogonality(model))


def test_peft_adds_the_regulariser_once_for_each_accumulated_batch(tmp_path):
    model = training.disturb(plain_peft(tiny.llama(), orth_reg_weight=0.3))
    found, batch = gradients(model, tmp_path, 2, [])
    # Its loss in evaluation has the regulariser in it already.
    assert close(found, model, model.eval()(**batch).loss + 0.3 * orthogonality(model))


def test_a_loss_that_the_trainer_makes_is_regularised_too(tmp_path):
    class FromLogits(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            logits = model(**inputs).logits
            return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def after(model):
        FromLogits(
            model=model,
            args=training.arguments(tmp_path, max_steps=20, learning_rate=0.05),
            train_dataset=training.rows(model),
            callbacks=hooks.callbacks(model),
        ).train()
        return orthogonality(model).item()

    options = {"target_r": 6, "orth_reg_weight": 50.0}
    assert after(adalora(tiny.llama(), **options)) < 0.5 < after(plain_peft(tiny.llama(), **options))


def test_a_heavy_regulariser_makes_p_and_q_orthonormal(tmp_path):
    model = adalora(tiny.llama(), target_r=6, orth_reg_weight=100.0)
    training.train(model, tmp_path, max_steps=150, learning_rate=0.01)
    for layer in layers(model).values():
        p, value, q = factors(layer)
        for gram in (p.T @ p, q @ q.T):
            assert torch.allclose(gram, torch.eye(len(value)), atol=0.05)


def test_peft_adds_the_regulariser_to_the_loss_of_an_evaluation_and_ours_does_not():
    base = tiny.llama()
    batch = training.batch(base)
    with torch.no_grad():
        expected = base(**batch).loss
        theirs = plain_peft(tiny.llama(), orth_reg_weight=1.0).eval()(**batch).loss
        ours = adalora(tiny.llama(), orth_reg_weight=1.0).eval()(**batch).loss
    assert ours == expected
    assert theirs > expected + 1


# Trainers --------------------------------------------------------------------------------------------------


def plain_trainer(model, folder, callbacks=(), **changes):
    return Trainer(
        model=model,
        args=training.arguments(folder, **changes),
        train_dataset=training.rows(model),
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])  # without one PEFT goes past the tuner's forward
def test_a_plain_trainer_never_allocates_with_peft_and_is_stopped_with_ours(task, tmp_path):
    theirs = plain_peft(tiny.llama(), 4)
    plain_trainer(theirs, tmp_path).train()
    assert theirs.peft_config["default"].rank_pattern is None
    assert set(kept(theirs)) == {6}
    ours = peft.get_peft_model(tiny.llama(), method("adalora")(**OPTIONS, task_type=task))
    with pytest.raises(MethodError, match=r"without its schedule.*callbacks="):
        plain_trainer(ours, tmp_path).train()


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
def test_an_adapter_without_its_schedule_is_not_saved_or_merged(optim, tmp_path):
    model = adalora(tiny.llama())
    plain_trainer(model, tmp_path / "run", max_steps=1, optim=optim).train()
    for save in (
        model.save_pretrained,
        lambda folder: hooks.save_adapter(model, folder),
        lambda _: merge(model),
    ):
        with pytest.raises((MethodError, luthier.errors.CheckError), match="without its schedule"):
            save(str(tmp_path / "saved"))
    assert not list(tmp_path.rglob("adapter_model.safetensors"))


def test_a_plain_trainer_with_the_callback_meets_the_budget(tmp_path):
    config = method("adalora")(**OPTIONS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny.llama(), config)
    plain_trainer(model, tmp_path, config.callbacks(), max_steps=8).train()
    assert sum(kept(model)) == 2 * len(layers(model))
    model.save_pretrained(tmp_path / "saved")


def test_trls_trainer_meets_the_budget(tmp_path):
    from trl import SFTConfig, SFTTrainer

    config = method("adalora")(**OPTIONS, task_type="CAUSAL_LM")
    settings = {"max_steps": 8, "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no"}
    trainer = SFTTrainer(
        model=tiny.llama(),
        args=SFTConfig(output_dir=str(tmp_path), max_length=32, learning_rate=1e-2, **settings),
        train_dataset=Dataset.from_list([{"text": text} for text in tiny.SENTENCES]),
        processing_class=tiny.tokenizer(),
        peft_config=config,
        callbacks=config.callbacks(),
    )
    trainer.train()
    assert sum(kept(trainer.model)) == 2 * len(layers(trainer.model))


def test_logs_say_the_mean_rank_and_how_far_from_orthonormal(tmp_path):
    model = adalora(tiny.llama())
    trainer = training.trainer(model, tmp_path, max_steps=8, logging_strategy="steps", logging_steps=1)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    ranks = [entry["rank"] for entry in entries]
    assert ranks[0] == 6
    assert ranks[-1] == 2
    assert entries[-1]["orthogonality"] == pytest.approx(float(orthogonality(model)), rel=1e-4)


def test_the_best_checkpoint_is_one_within_the_budget(tmp_path):
    class Worse(training.HookedTrainer):
        def evaluate(self, *args, **kwargs):
            return super().evaluate(*args, **kwargs) | {"eval_loss": self.state.global_step}

    model = adalora(tiny.llama(), tfinal=4)
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = Worse(
        model=model,
        args=training.arguments(tmp_path, max_steps=10, load_best_model_at_end=True, **every),
        train_dataset=training.rows(model),
        eval_dataset=training.rows(model),
        callbacks=hooks.callbacks(model),
    )
    trainer.train()
    assert trainer.state.best_global_step == 7  # the first after the last allocation, that of t = 6
    assert sum(kept(model)) == 2 * len(layers(model))


@pytest.mark.parametrize("step", [3, 5, 8])
def test_resuming_is_the_straight_run(step, tmp_path):
    """Within the allocation, between two allocations, and after the last."""
    options = {"tinit": 1, "tfinal": 3, "deltaT": 2}
    saving = {"max_steps": 10, "save_strategy": "steps", "save_steps": step}
    straight = training.train(adalora(tiny.llama(), **options), tmp_path, **saving)
    resumed = adalora(tiny.llama(), **options)
    trainer = training.trainer(resumed, tmp_path, **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    expected = straight.state_dict()
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_pefts_checkpoint_cannot_be_gone_on_from():
    model = loop(plain_peft(tiny.llama(), 10, tfinal=2), 6)
    state = peft.get_peft_model_state_dict(model)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.set_peft_model_state_dict(plain_peft(tiny.llama(), 10, tfinal=2), state)


def test_a_step_that_overflowed_in_half_precision_is_no_step(tmp_path):
    model = adalora(tiny.llama())
    (callback,) = hooks.callbacks(model)
    trainer = training.trainer(model, tmp_path)
    trainer.state.max_steps = 4
    callback.on_train_begin(trainer.args, trainer.state, None, model=model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    class Skipped:
        step_was_skipped = True

    callback.on_optimizer_step(trainer.args, trainer.state, None, optimizer=Skipped())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_gradient_scaler_scales_the_regulariser_too():
    class Scaled:
        class scaler:
            get_scale = staticmethod(lambda: 8.0)

    found = []
    for optimizer in (None, Scaled()):
        model = adalora(tiny.llama())
        (callback,) = hooks.callbacks(model)
        callback.tuner = model.base_model
        callback.on_step_begin(None, None, None, optimizer=optimizer)
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == 2 * len(layers(model))
    assert all(torch.allclose(8 * a, b) for a, b in zip(*found, strict=True))


# Where PEFT fails ------------------------------------------------------------------------------------------


def test_a_target_that_is_the_start_prunes_nothing_and_peft_raises(tmp_path):
    with pytest.raises(RuntimeError, match="out of range"):
        loop(plain_peft(tiny.llama(), 6, target_r=6), 6)
    model = training.train(adalora(tiny.llama(), target_r=6), tmp_path, max_steps=6)
    assert set(kept(model)) == {6}


def test_without_final_steps_the_last_one_allocates_and_pefts_does_not(tmp_path):
    options = {"tinit": 0, "tfinal": 0, "deltaT": 4}
    theirs = loop(plain_peft(tiny.llama(), 6, **options), 6)
    assert sum(kept(theirs)) > 2 * len(layers(theirs))
    ours = training.train(adalora(tiny.llama(), **options), tmp_path, max_steps=6)
    assert sum(kept(ours)) == 2 * len(layers(ours))


def test_of_equal_scores_the_budget_is_kept_and_peft_keeps_none():
    assert highest(torch.zeros(6), 2).tolist() == [True, True, False, False, False, False]
    assert highest(torch.tensor([1.0, 3.0, 2.0, 3.0]), 3).tolist() == [False, True, True, True]
    model = training.disturb(plain_peft(tiny.llama()))
    allocator = RankAllocator(model.base_model.model, model.peft_config["default"], "default")
    for n, p in model.base_model.model.named_parameters():
        allocator.exp_avg_ipt[n] = allocator.exp_avg_unc[n] = torch.zeros_like(p)
    allocator.mask_to_budget(model.base_model.model, 2 * len(layers(model)))
    assert sum(kept(model)) == 0


def test_layers_that_the_loss_does_not_reach_are_left_without_rank_and_peft_raises():
    def one_step(model):
        model.train()
        learns = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(learns, lr=0.01)
        for step in range(3):
            inputs = {"input_ids": training.batch(model, seed=step)["input_ids"]}
            model(**inputs, output_hidden_states=True).hidden_states[1].square().sum().backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()

    with pytest.raises(TypeError):
        one_step(plain_peft(tiny.llama(), 4))
    model = adalora(tiny.llama(), total_step=3, tinit=0, tfinal=1)
    one_step(model)
    ranks = model.base_model.ranks()
    assert sum(rank for name, rank in ranks.items() if "layers.1" in name) == 0
    assert sum(ranks.values()) > 0


def test_on_a_bfloat16_base_pefts_constant_learns_and_ours_does_not(tmp_path):
    constants = [p for n, p in plain_peft(tiny.llama().bfloat16()).named_parameters() if "ranknum" in n]
    assert all(p.requires_grad for p in constants)
    model = training.train(adalora(tiny.llama().bfloat16()), tmp_path)
    assert all(layer.ranknum["default"].item() == 6 for layer in layers(model).values())
    assert all(p.dtype == torch.float32 for p in learnt(model).values())


def test_a_loaded_adapter_takes_labels_and_pefts_raises(tmp_path):
    theirs, ours = plain_peft(tiny.llama()), adalora(tiny.llama())
    for name, model in (("theirs", theirs), ("ours", ours)):
        model.save_pretrained(tmp_path / name)
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "theirs")
    with pytest.raises(AttributeError, match="trainable_adapter_name"):
        loaded(**training.batch(loaded))
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "ours")
    assert loaded(**training.batch(loaded)).loss == tiny.llama()(**training.batch(loaded)).loss


# Files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.bert])
def test_saved_as_an_ordinary_lora_of_the_kept_triplets(make, tmp_path):
    model = training.train(adalora(make(), target_r=1), tmp_path / "run", max_steps=12, learning_rate=0.05)
    expected, ranks = training.logits(model), model.base_model.ranks()
    assert not torch.allclose(expected, training.logits(make()), atol=0.05)
    assert 0 in ranks.values() or make is not tiny.llama
    hooks.save_adapter(model, tmp_path / "saved")
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path / "saved")
    assert type(loaded.peft_config["default"]) is peft.LoraConfig
    assert torch.allclose(training.logits(loaded), expected, rtol=0, atol=1e-5)
    found = {n: m for n, m in loaded.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert {n.removeprefix("base_model.model."): m.r["default"] for n, m in found.items()} == {
        name: rank for name, rank in ranks.items() if rank
    }
    # One scale for all: loaders that know no alpha_pattern are right too.
    assert {m.scaling["default"] for m in found.values()} == {1.0}
    saved = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert saved["lora_alpha"] == saved["r"] == max(ranks.values())


def test_merging_is_the_adapter(tmp_path):
    model = training.train(adalora(tiny.gpt2()), tmp_path, max_steps=12, learning_rate=0.05)
    expected = training.logits(model)
    assert torch.allclose(training.logits(merge(model)), expected, rtol=0, atol=1e-5)


def test_a_checkpoint_is_loaded_as_what_it_is_and_goes_on_learning(tmp_path):
    model = training.train(adalora(tiny.llama()), tmp_path / "run", max_steps=8)
    model.save_pretrained(tmp_path / "saved")
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "saved", is_trainable=True)
    assert torch.equal(training.logits(loaded), training.logits(model))
    training.train(loaded, tmp_path / "more", max_steps=8)
    assert sum(kept(loaded)) == 2 * len(layers(loaded))


def test_transformers_own_add_adapter_is_refused_when_saved(tmp_path):
    model = tiny.llama()
    model.add_adapter(method("adalora")(**OPTIONS, task_type="CAUSAL_LM"))
    with pytest.raises(MethodError, match=r"add_adapter.*get_peft_model"):
        model.save_pretrained(tmp_path)


# Learning --------------------------------------------------------------------------------------------------


def test_ranks_go_to_the_layers_that_the_task_needs(tmp_path):
    """A teacher that differs from the base in two layers, by changes of rank 4: the ranks go there."""
    torch.manual_seed(3)
    needed = ("layers.0.mlp.up_proj", "layers.1.self_attn.o_proj")
    teacher = tiny.llama()
    for name in needed:
        weight = teacher.get_submodule(f"model.{name}").weight
        a, b = torch.randn(4, weight.shape[1]), torch.randn(weight.shape[0], 4)
        weight.data += 0.05 * b @ a

    class Distil(training.HookedTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            with torch.no_grad():
                expected = teacher(input_ids=inputs["input_ids"]).logits
            return (model(input_ids=inputs["input_ids"]).logits - expected).square().mean()

    model = adalora(tiny.llama(), init_r=6, target_r=1, tinit=20, tfinal=60)

    def distance():
        return float((training.logits(model) - training.logits(teacher)).square().mean())

    before = distance()
    set_seed(0)
    Distil(
        model=model,
        args=training.arguments(tmp_path, max_steps=150, learning_rate=0.02, per_device_train_batch_size=8),
        train_dataset=training.rows(model, 64),
        callbacks=hooks.callbacks(model),
    ).train()
    ranks = model.base_model.ranks()
    assert distance() < 0.1 * before
    there = [rank for name, rank in ranks.items() if name.endswith(needed)]
    elsewhere = [rank for name, rank in ranks.items() if not name.endswith(needed)]
    assert min(there) >= 3 > 1 > sum(elsewhere) / len(elsewhere)


# Refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 16}, "init_r"),
        ({"target_r": 13}, "ranks only fall"),
        ({"beta1": 1.0}, "beta1"),
        ({"use_dora": True}, "DoRA"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        method("adalora")(**options)


def test_a_run_that_leaves_no_step_to_allocate_in_is_refused(tmp_path):
    with pytest.raises(MethodError, match=r"tinit: 5.*no step of 8"):
        training.train(adalora(tiny.llama(), tinit=5, tfinal=4), tmp_path, max_steps=8)


def test_a_length_other_than_the_trainers_is_refused(tmp_path):
    with pytest.raises(MethodError, match=r"total_step: 100.*8 steps"):
        training.train(adalora(tiny.llama(), total_step=100), tmp_path, max_steps=8)


def test_a_loop_without_a_length_is_refused():
    with pytest.raises(MethodError, match="total_step"):
        loop(adalora(tiny.llama()), 1)


def test_the_callback_without_the_adapter_is_refused(tmp_path):
    with pytest.raises(MethodError, match="without it"):
        plain_trainer(tiny.llama(), tmp_path, method("adalora")().callbacks()).train()
