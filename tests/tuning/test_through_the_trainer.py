"""Every tuning method under the trainer that users get, with its proofs, packing and label-only loss."""

import pytest
import small_training as training
import tiny
import torch
from datasets import Dataset
from peft import PeftConfig
from trl import SFTConfig, SFTTrainer
from tuning_methods import METHODS, base, config

import luthier
from luthier import checks
from luthier.errors import TrainingError
from luthier.tuning import hooks


def rows(count=8):
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in range(6, 6 + count):
        ids = torch.randint(5, 300, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return Dataset.from_list(made)


def trainer(name, folder, options=None, make=tiny.llama, **args):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "logging_strategy": "steps",
        "save_strategy": "no",
    }
    return luthier.trainer(
        "sft",
        base(name, make),
        rows(),
        method=config(name, make, **(options or {})),
        args=settings | args,
        tokenizer=tiny.tokenizer(),
    )


def losses(found):
    found.train()
    return [entry["loss"] for entry in found.state.log_history if "loss" in entry]


# CoDA chooses tokens among a whole text, and refuses to learn to write.
WRITERS = [name for name in METHODS if name != "coda"]
ADAPTERS = [name for name in WRITERS if isinstance(config(name, tiny.llama), PeftConfig)]


@pytest.mark.parametrize("name", WRITERS)
def test_learns_with_every_proof_passed(name, tmp_path):
    with checks.collect() as lines:
        values = losses(trainer(name, tmp_path, max_steps=16))
    assert len(values) == 16
    assert values[-1] < values[0]
    assert all(line.passed for line in lines)


@pytest.mark.parametrize("name", ADAPTERS)
def test_trl_trains_it_as_a_peft_config(name, tmp_path):
    args = SFTConfig(
        output_dir=str(tmp_path), max_steps=3, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
        learning_rate=1e-2, save_strategy="no", per_device_train_batch_size=2,
    )  # fmt: skip
    found = SFTTrainer(
        base(name, tiny.llama), args, train_dataset=rows().remove_columns("labels"),
        processing_class=tiny.tokenizer(), peft_config=config(name, tiny.llama),
    )  # fmt: skip
    for callback in hooks.callbacks(found.model):  # schedules, of those that have one
        found.add_callback(callback)
    before = training.weights(found.model)
    learns = {n for n, p in found.model.named_parameters() if p.requires_grad}
    found.train()
    after = training.weights(found.model)
    moved = {n for n in after if not torch.equal(before[n], after[n])}
    # A schedule may let a part rest for three steps; Delta-LoRA moves the weights below its factors too.
    assert moved
    assert moved <= learns or name == "delta_lora", sorted(moved - learns)[:5]


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_the_trunks_cache_changes_no_loss(make, tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_TRUNK_CACHE", str(tmp_path / "cache"))
    plain = losses(trainer("top_layers", tmp_path / "a", make=make, max_steps=12))
    cached = trainer("top_layers", tmp_path / "b", {"cache_trunk": True}, make=make, max_steps=12)
    trunk = next(iter(cached.model.get_submodule("model.layers" if make is tiny.llama else "transformer.h")))
    calls = []
    trunk.register_forward_hook(lambda *_: calls.append(1))
    attention = next(m for n, m in trunk.named_children() if "attn" in n)
    attention.register_forward_hook(lambda *_: calls.append("attention"))
    assert losses(cached) == pytest.approx(plain, abs=1e-6)
    # Four steps fill the cache, eight read it; probes before training run the block too.
    assert calls.count(1) - calls.count("attention") == 8


def test_fused_backward_is_the_ordinary_training(tmp_path):
    args = {"max_grad_norm": 0.0, "gradient_accumulation_steps": 1}
    plain = losses(trainer("full", tmp_path / "a", **args))
    with checks.collect() as lines:
        fused = losses(trainer("full", tmp_path / "b", {"fused_backward": True}, **args))
    assert fused == plain
    assert {"gradients finite", "gradients where declared"} <= {line.name for line in lines if line.passed}


def test_fused_backward_keeps_a_gradient_that_is_not_finite_out(tmp_path):
    found = trainer("full", tmp_path, {"fused_backward": True}, max_grad_norm=0.0)
    weight = found.model.model.norm.weight
    weight.register_hook(lambda gradient: gradient * float("nan"))
    before = weight.detach().clone()
    with pytest.raises(TrainingError, match="not finite"):
        found.train()
    assert torch.equal(weight, before)


def test_lora_plus_reaches_the_optimiser(tmp_path):
    found = trainer("lora", tmp_path, {"loraplus_lr_ratio": 8.0}, max_steps=1)
    found.train()
    rates = {round(group["initial_lr"], 6) for group in found.optimizer.param_groups}
    assert rates == {1e-2, 8e-2}
