"""LoRA layers with formulas of our methods: fused exactly, refused where they cannot be, never saved as what
they are not."""

import peft
import pytest
import small_training as training
import tiny
import torch
from transformers import Trainer

from luthier import method
from luthier.acceleration import fused_lora, fused_mlp
from luthier.errors import MethodError
from luthier.tuning import hooks
from luthier.tuning.attach import attach
from luthier.tuning.lora_factors import FactorLayer

METHODS = ["delta_lora", "dylora", "laplace_lora"]
every_method = pytest.mark.parametrize("name", METHODS)


def adapted(name, make=tiny.llama, **options):
    torch.manual_seed(0)
    return training.disturb(attach(make(), method(name)(r=4, **options)))


def in_training(model):
    """As in the middle of a step."""
    for callback in hooks.callbacks(model):
        args, state = training.arguments("unused"), type("State", (), {"global_step": 7, "max_steps": 9})()
        callback.on_train_begin(args, type("State", (), {"global_step": 0, "max_steps": 9})(), None)
        callback.on_step_begin(args, state, None)
    return training.disturb(model.train(), seed=2)


def step(model):
    model.zero_grad()
    loss = model(**training.batch(model)).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@every_method
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_fused_it_computes_and_learns_the_same(name, make):
    model = in_training(adapted(name, make))
    expected, gradients = step(model)
    with fused_lora.fused(model) as report, fused_mlp.fused(model) as mlps:
        assert report.fused == sum(isinstance(m, FactorLayer) for m in model.modules()) > 0
        assert mlps == (2 if make is tiny.llama else 0)
        loss, found = step(model)
    assert torch.allclose(loss, expected, rtol=1e-6)
    assert found.keys() == gradients.keys()
    for n, gradient in gradients.items():
        assert torch.allclose(found[n], gradient, rtol=1e-4, atol=1e-7), n


@every_method
def test_plain_peft_and_a_plain_trainer_are_refused_a_checkpoint(name, tmp_path):
    model = peft.get_peft_model(tiny.llama(), method(name)(r=4))
    args = training.arguments(tmp_path, save_strategy="steps", save_steps=2)
    plain = Trainer(model=model, args=args, train_dataset=training.rows(model))
    with pytest.raises(MethodError, match=rf"without the callback of {name}.*hooks\.callbacks"):
        plain.train()
    with pytest.raises(MethodError, match="without the callback"):
        model.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.rglob("*.safetensors"))
    hooked = Trainer(
        model=model, args=args, train_dataset=training.rows(model), callbacks=hooks.callbacks(model)
    )
    hooked.train()
    model.save_pretrained(tmp_path / "saved")


# PEFT keeps adapters of different types apart, and Delta-LoRA has a type of its own.
@pytest.mark.parametrize("name", ["dylora", "laplace_lora"])
def test_it_does_not_stand_on_layers_of_plain_lora(name, tmp_path):
    model = peft.get_peft_model(
        tiny.llama(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    model.add_adapter("other", method(name)(r=4, target_modules=["q_proj"]))
    model.set_adapter("other")
    with pytest.raises(MethodError, match="plain LoRA that came before"):
        training.train(model, tmp_path)


@pytest.mark.parametrize("name", ["dylora", "laplace_lora"])
def test_plain_lora_may_join_it(name):
    model = adapted(name, target_modules=["q_proj"])
    ours = training.logits(model)
    model.add_adapter("plain", peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", r=2))
    model.set_adapter("plain")
    training.disturb(model, seed=3)
    layer = next(m for m in model.modules() if isinstance(m, FactorLayer))
    a, b = layer.lora_A["plain"].weight, layer.lora_B["plain"].weight
    assert torch.allclose(layer.get_delta_weight("plain"), 4 * b @ a, atol=1e-6)
    model.set_adapter("default")
    assert torch.equal(training.logits(model), ours)


@every_method
@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"target_modules": ["embed_tokens"]}, "Embedding"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_what_has_another_formula_is_refused(name, options, found):
    with pytest.raises(MethodError, match=found):
        attach(tiny.llama(), method(name)(r=4, **options))
