"""What every tuning method keeps to, on four kinds of model. A new method joins by existing."""

import copy
import tempfile
from functools import cache
from pathlib import Path

import pytest
import small_training as training
import tiny
import torch
from peft import PeftModel

from luthier import checks, taxonomy
from luthier.errors import MethodError
from luthier.tuning.attach import attach, trainable
from luthier.tuning.hooks import save_adapter
from luthier.tuning.merge import merge

MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert, "t5": tiny.t5}
METHODS = [method.name for method in taxonomy.methods("tuning") if method.origin == "luthier"]
# Sizes that suit two blocks.
OPTIONS = {
    "top_layers": {"k": 1},
    "frozen_bottom": {"n": 1},
    "linear_probe": {"untie_head": True},
    "gradual_unfreezing": {"unit": "step", "groups_per_stage": 2},
}
# Pairs that are refused in words.
REFUSED = {("linear_probe", "t5"): "always ties its head"}
CASES = [(name, kind) for name in METHODS for kind in MODELS if (name, kind) not in REFUSED]
every_case = pytest.mark.parametrize(("name", "kind"), CASES, ids=["-".join(case) for case in CASES])


def config(name):
    return taxonomy.find(name)(**OPTIONS.get(name, {}))


def attached(name, kind):
    torch.manual_seed(0)
    return attach(MODELS[kind](), config(name))


def is_adapter(model):
    return isinstance(model, PeftModel)


def own_name(name):
    """The name in the base model of a parameter of the adapted one."""
    return (
        name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
    )


@pytest.mark.parametrize(("name", "kind"), REFUSED, ids=["-".join(case) for case in REFUSED])
def test_a_pair_that_cannot_work_is_refused_in_words(name, kind):
    with pytest.raises(MethodError, match=REFUSED[name, kind]):
        attached(name, kind)


@every_case
def test_starts_as_the_base_and_says_what_learns(name, kind):
    base = MODELS[kind]()
    before = training.logits(base)
    with checks.collect() as lines:
        model = attached(name, kind)
    assert torch.allclose(training.logits(model), before, rtol=0, atol=1e-6)
    found = {line.name: line for line in lines}
    assert found["trainable as declared"].value == trainable(model)[0] > 0
    assert found["identity at step 0"].passed


@every_case
def test_trains_what_learns_and_nothing_else(name, kind, tmp_path):
    model = attached(name, kind)
    before = training.weights(model)
    opened = {n for n, p in model.named_parameters() if p.requires_grad}
    data = training.rows(model)
    training.train(model, tmp_path, data, max_steps=6)
    after = training.weights(model)
    # Gradual methods open more; whatever is open at the end must have moved, the rest must be bit-identical.
    opened |= {n for n, p in model.named_parameters() if p.requires_grad}
    moved = {n for n in after if not torch.equal(before[n], after[n])}
    assert moved == opened
    assert all(torch.isfinite(tensor).all() for tensor in after.values())


@cache
def trained(name, kind):
    """Trained once for all tests that only look at it."""
    with tempfile.TemporaryDirectory() as folder:
        return training.train(attached(name, kind), Path(folder))


@every_case
def test_saved_and_loaded_again_gives_the_same_logits(name, kind, tmp_path):
    model = trained(name, kind)
    expected = training.logits(model)
    if is_adapter(model):
        save_adapter(model, tmp_path / "saved")
        loaded = PeftModel.from_pretrained(MODELS[kind](), tmp_path / "saved")
    else:
        model.save_pretrained(tmp_path / "saved")
        loaded = type(model).from_pretrained(tmp_path / "saved")
    assert torch.allclose(training.logits(loaded), expected, rtol=0, atol=1e-5)


@every_case
def test_merged_equals_unmerged(name, kind):
    model = copy.deepcopy(trained(name, kind))
    expected = training.logits(model)
    merged = merge(model)
    assert type(merged) is type(MODELS[kind]())
    assert torch.allclose(training.logits(merged), expected, rtol=0, atol=1e-4)


@every_case
def test_gradient_checkpointing_changes_nothing(name, kind):
    losses, gradients = [], []
    for checkpointing in (False, True):
        model = attached(name, kind)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = model(**training.batch(model)).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert torch.allclose(*losses, rtol=0, atol=1e-6)
    for n, gradient in gradients[0].items():
        assert gradient is not None
        assert torch.allclose(gradient, gradients[1][n], rtol=0, atol=1e-6)


# One decoder and one encoder suffice here: what is resumed is the method, not the model.
@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("name", METHODS)
def test_resumed_equals_straight(name, kind, tmp_path):
    straight = training.train(attached(name, kind), tmp_path / "straight", max_steps=6)
    saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    training.train(attached(name, kind), tmp_path / "halves", **saving)
    resumed = attached(name, kind)
    training.trainer(resumed, tmp_path / "halves", **saving).train(
        resume_from_checkpoint=str(tmp_path / "halves" / "checkpoint-3")
    )
    for n, tensor in training.weights(straight).items():
        assert torch.equal(tensor, resumed.get_parameter(n)), n


@every_case
def test_runs_in_bfloat16(name, kind, tmp_path):
    torch.manual_seed(0)
    model = attach(MODELS[kind]().to(torch.bfloat16), config(name))
    before = training.weights(model)
    training.train(model, tmp_path)
    assert any(not torch.equal(before[n], p) for n, p in model.named_parameters() if p.requires_grad)
    assert torch.isfinite(training.logits(model)).all()
