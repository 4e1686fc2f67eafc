"""Full fine-tuning: the fused backward pass is the ordinary step; layer-wise rates; half precision."""

import pytest
import small_training as training
import tiny
import torch
from transformers import TrainerCallback

from luthier import method
from luthier.errors import CheckError, MethodError
from luthier.tuning.attach import attach
from luthier.tuning.groups import lost_share

WHOLE = {"max_grad_norm": 0, "max_steps": 6}  # what fused_backward can be compared with: no clipping


def full(model, **options):
    return attach(model, method("full")(**options))


class NoGradientLeft(TrainerCallback):
    """Between backward and the trainer's own step, no gradient lives any more."""

    calls = 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.calls += 1
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("make", [tiny.llama, tiny.bert])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_fused_backward_is_the_ordinary_step_to_the_last_bit(make, optim, tmp_path):
    plain = training.train(full(make()), tmp_path, optim=optim, **WHOLE)
    model = full(make(), fused_backward=True)
    trainer = training.trainer(model, tmp_path, optim=optim, **WHOLE)
    watch = NoGradientLeft()
    trainer.add_callback(watch)
    trainer.train()
    assert watch.calls == 6
    for name, tensor in training.weights(plain).items():
        assert torch.equal(tensor, model.get_parameter(name)), name


def test_fused_backward_steps_a_tied_weight_once(tmp_path):
    model = full(tiny.llama(), fused_backward=True)
    trainer = training.trainer(model, tmp_path, **WHOLE)
    trainer.train()
    tied = model.get_input_embeddings().weight
    assert tied is model.get_output_embeddings().weight
    assert trainer.optimizer.optimizer.state[tied]["step"] == 6


def test_fused_backward_resumes(tmp_path):
    straight = training.train(full(tiny.llama(), fused_backward=True), tmp_path / "a", **WHOLE)
    saving = {**WHOLE, "save_strategy": "steps", "save_steps": 3}
    training.train(full(tiny.llama(), fused_backward=True), tmp_path / "b", **saving)
    resumed = full(tiny.llama(), fused_backward=True)
    training.trainer(resumed, tmp_path / "b", **saving).train(
        resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3")
    )
    for name, tensor in training.weights(straight).items():
        assert torch.equal(tensor, resumed.get_parameter(name)), name


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ({"gradient_accumulation_steps": 2, "max_grad_norm": 0}, "gradient_accumulation_steps"),
        ({"max_grad_norm": 1.0}, "max_grad_norm"),
    ],
)
def test_fused_backward_refuses_what_needs_all_gradients(setting, name, tmp_path):
    with pytest.raises(MethodError, match=name):
        training.train(full(tiny.llama(), fused_backward=True), tmp_path, **setting)


def test_layer_rates_fall_by_the_decay_and_hold_every_weight_once():
    model = full(tiny.gpt2(), layer_lr_decay=0.5)
    args = training.arguments("unused", learning_rate=1.0)
    groups = method("full")(layer_lr_decay=0.5).parameter_groups(model, args)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    rates = {group["layer"]: group["lr"] for group in groups}
    assert rates == {"head": 1.0, "block 1": 0.5, "block 0": 0.25, "embeddings": 0.125}
    names = {id(p): n for n, p in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            plain = name.endswith("bias") or ".ln_" in name
            assert group["weight_decay"] == (0.0 if plain else args.weight_decay), name


def test_a_rate_of_zero_changes_nothing(tmp_path):
    model = full(tiny.llama())
    before = training.weights(model)
    training.train(model, tmp_path, learning_rate=0.0)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_tied_embeddings_stay_tied_after_saving_and_loading(tmp_path):
    model = training.train(full(tiny.llama()), tmp_path / "run")
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight


def test_the_share_of_updates_that_bfloat16_loses_is_what_rounding_gives():
    weights = torch.randn(4000, generator=torch.Generator().manual_seed(0)).abs().bfloat16()
    for lr in (1e-4, 1e-3, 1e-2):
        unmoved = (weights.float() + lr).bfloat16() == weights
        assert lost_share([weights], lr) == pytest.approx(unmoved.float().mean().item(), abs=0.01)


def test_a_rate_that_bfloat16_swallows_is_refused(tmp_path):
    model = full(tiny.llama().bfloat16())
    with pytest.raises(CheckError, match="rounding to bfloat16"):
        training.train(model, tmp_path, learning_rate=1e-6)
