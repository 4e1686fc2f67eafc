"""What every tuning method keeps to, on several kinds of model. A new method joins by existing."""

import copy
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import prompt_models
import pytest
import small_training as training
import tiny
import torch
import tuning_methods
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from tuning_methods import METHODS, base

from luthier import checks, taxonomy
from luthier.errors import MethodError
from luthier.tuning.attach import attach, is_prompt, trainable
from luthier.tuning.hooks import save_adapter
from luthier.tuning.merge import merge

MODELS = {
    "llama": tiny.llama,
    "gpt2": tiny.gpt2,
    "bert": tiny.bert,
    "t5": tiny.t5,
    "bart": prompt_models.bart,
}
# Pairs that are refused in words.
REFUSED = {
    ("linear_probe", "t5"): "always ties its head",
    ("linear_probe", "bart"): "always ties its head",
    ("coda", "llama"): "writes token by token",
    ("coda", "gpt2"): "writes token by token",
}
EVERY = [(name, kind) for name in METHODS for kind in MODELS if (name, kind) not in REFUSED]
CASES = [case for case in EVERY if case[1] != "bart"]  # a second encoder-decoder adds little where T5 was


def config(name, kind=None):
    return tuning_methods.config(name, MODELS.get(kind))


def build(name, kind):
    return base(name, MODELS[kind])


# Methods that put something on the model; the others choose among its own weights.
ADAPTERS = {name for name in METHODS if isinstance(config(name), PeftConfig)}
# Families whose methods are no change of a weight.
UNMERGEABLE = ("tuning/prompts", "tuning/adapters")


def over(cases):
    cases = list(cases)
    return pytest.mark.parametrize(("name", "kind"), cases, ids=["-".join(case) for case in cases])


every_case = over(CASES)
every_case_and_bart = over(EVERY)
every_adapter = over(case for case in CASES if case[0] in ADAPTERS)
every_generator = over(case for case in CASES if case[0] in ADAPTERS and case[1] != "bert")


def starts_as_base(name):
    found = config(name)
    prompt = isinstance(found, PeftConfig) and is_prompt(found)
    return not prompt and getattr(found, "starts_as_base", True)


def attached(name, kind):
    model, method = build(name, kind), config(name, kind)
    torch.manual_seed(0)
    return attach(model, method)


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


@every_case_and_bart
def test_starts_as_the_base_and_says_what_learns(name, kind):
    base = build(name, kind)
    before = training.logits(base)
    config(name, kind)  # what it is made of leaves lines of its own
    with checks.collect() as lines:
        model = attached(name, kind)
    found = {line.name: line for line in lines}
    assert found["trainable as declared"].value == trainable(model)[0] > 0
    assert torch.allclose(training.logits(model), before, rtol=0, atol=1e-6) == starts_as_base(name)
    assert ("identity at step 0" in found) == starts_as_base(name)
    assert all(line.passed for line in lines)
    if name in ADAPTERS:
        with model.disable_adapter():
            assert torch.equal(training.logits(model), before)


class Run(NamedTuple):
    model: torch.nn.Module
    before: dict[str, torch.Tensor]  # weights
    opened: set[str]  # names of what learns, at the start or at the end: gradual methods open more


@cache
def run(name, kind):
    """Trained once for all tests that only look at it."""
    model = attached(name, kind)
    before = training.weights(model)
    opened = {n for n, p in model.named_parameters() if p.requires_grad}
    with tempfile.TemporaryDirectory() as folder:
        training.train(model, Path(folder), max_steps=6)
    return Run(model, before, opened | {n for n, p in model.named_parameters() if p.requires_grad})


def trained(name, kind):
    return run(name, kind).model


@every_case_and_bart
def test_trains_what_learns_and_nothing_else(name, kind):
    model, before, opened = run(name, kind)
    after = training.weights(model)
    assert {n for n in after if not torch.equal(before[n], after[n])} == opened
    assert all(torch.isfinite(tensor).all() for tensor in after.values())


@every_case_and_bart
def test_saved_and_loaded_again_gives_the_same_logits(name, kind, tmp_path):
    model = trained(name, kind)
    expected = training.logits(model)
    if is_adapter(model):
        save_adapter(model, tmp_path / "saved")
        own = load_file(tmp_path / "saved" / "adapter_model.safetensors")
        of_base = {n.removeprefix("base_model.model.") for n in own} & set(build(name, kind).state_dict())
        assert all(n.startswith("classifier.") for n in of_base)  # a new head learns whole
        loaded = PeftModel.from_pretrained(build(name, kind), tmp_path / "saved")
    else:
        model.save_pretrained(tmp_path / "saved")
        loaded = type(model).from_pretrained(tmp_path / "saved")
    found = training.logits(loaded)[:, -expected.shape[1] :]  # PEFT's own prompts have logits too
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)


@every_case
def test_merged_equals_unmerged(name, kind):
    model = copy.deepcopy(trained(name, kind))
    expected = training.logits(model)
    if taxonomy.find(name).path.startswith(UNMERGEABLE):
        with pytest.raises(MethodError, match="cannot be merged"):
            merge(model)
        assert torch.equal(training.logits(model), expected)
        return
    merged = merge(model)
    assert type(merged) is type(MODELS[kind]())
    assert torch.allclose(training.logits(merged), expected, rtol=0, atol=1e-5)


@every_adapter
def test_two_adapters_live_side_by_side(name, kind):
    model = copy.deepcopy(trained(name, kind))
    first = training.logits(model)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    assert torch.equal(training.logits(model), first)
    model.set_adapter("second")
    learns = [n for n, p in model.named_parameters() if p.requires_grad]
    assert learns
    assert all(".second" in n for n in learns)
    if starts_as_base(name):
        assert torch.allclose(training.logits(model), training.logits(build(name, kind)), rtol=0, atol=1e-6)
    training.disturb(model, 0.2)
    second = training.logits(model)
    assert not torch.allclose(second, first, atol=1e-3)
    base = training.logits(build(name, kind))
    # Both at once, where both do something: a fusion made from a config alone has no adapters to mix.
    if kind == "llama" and not torch.equal(second, base):
        model.base_model.set_adapter(["default", "second"])
        with suppress(MethodError):
            both = training.logits(model)
            assert not any(torch.allclose(both, one, atol=1e-3) for one in (first, second))
    model.set_adapter("default")
    assert torch.equal(training.logits(model), first)
    model.delete_adapter("second")
    assert torch.equal(training.logits(model), first)
    assert not any(".second" in n for n in model.state_dict())


@every_generator
def test_a_batch_padded_on_the_left_generates_what_its_rows_do_alone(name, kind):
    model = trained(name, kind).eval()
    lengths, new = (3, 8, 5), 4
    rows = [torch.tensor(training.rows(model, 1, n, seed=n)[0]["input_ids"]) for n in lengths]
    ids = torch.stack([torch.nn.functional.pad(row, (max(lengths) - len(row), 0)) for row in rows])
    mask = (ids != tiny.PAD).long()
    length = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new}
    together = model.generate(input_ids=ids, attention_mask=mask, **length)
    for row, found in zip(rows, together, strict=True):
        alone = model.generate(input_ids=row[None], attention_mask=torch.ones_like(row[None]), **length)
        assert torch.equal(found[-new:], alone[0, -new:])


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_compiled_it_computes_the_same(name):
    model = trained(name, next(kind for kind in MODELS if (name, kind) in CASES))
    expected = training.logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")  # what is traced, not what a compiler makes of it
    assert torch.allclose(training.logits(compiled), expected, rtol=0, atol=1e-5)


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
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert torch.allclose(*losses, rtol=1e-5, atol=1e-6)
    for n, gradient in gradients[0].items():
        assert gradient is not None
        assert torch.allclose(gradient, gradients[1][n], rtol=0, atol=1e-6)


# What is resumed is the method, not the model: one decoder, and for what stands beside it a classifier.
@over((name, kind) for name, kind in CASES if kind == "llama" or (kind == "bert" and name in ADAPTERS))
def test_resumed_equals_straight(name, kind, tmp_path):
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = training.train(attached(name, kind), tmp_path, **saving)
    resumed = attached(name, kind)
    training.trainer(resumed, tmp_path, **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for n, tensor in training.weights(straight).items():
        assert torch.equal(tensor, resumed.get_parameter(n)), n


@over((name, kind) for name, kind in CASES if kind in ("llama", "t5"))
def test_runs_in_bfloat16(name, kind, tmp_path):
    torch.manual_seed(0)
    half = base(name, MODELS[kind], dtype="bfloat16")
    model = attach(half, config(name, kind))
    before = training.weights(model)
    training.train(model, tmp_path)
    assert any(not torch.equal(before[n], p) for n, p in model.named_parameters() if p.requires_grad)
    assert torch.isfinite(training.logits(model)).all()
