"""Modules that learn whole beside an adapter keep small steps, whatever the precision of the base."""

import copy

import pytest
import small_training as training
import tiny
import torch
from peft import PeftModel

import luthier
from luthier.tuning.attach import attach
from luthier.tuning.hooks import save_adapter
from luthier.tuning.merge import merge

CASES = [
    (tiny.llama, "layers.1"),
    (tiny.llama, "embed_tokens"),
    (tiny.gpt2, "h.1"),
    (tiny.bert, "classifier"),
]
cases = pytest.mark.parametrize(("make", "name"), CASES, ids=["block", "embedding", "gpt2", "head"])


def adapted(make, name, dtype=torch.bfloat16):
    model = make().to(dtype)
    target = {"llama": ["q_proj"], "gpt2": ["c_attn"], "bert": ["query"]}[make.__name__]
    below = rf".*(layers|h|layer)\.0\..*({target[0]})"
    return attach(model, luthier.method("lora")(r=2, target_modules=below, modules_to_save=[name]))


@cases
def test_they_are_float32_and_return_the_precision_of_the_base(make, name):
    model = adapted(make, name)
    learns = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in learns.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert model(**training.batch(model)).logits.dtype == torch.bfloat16
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if ".second." in n)


@cases
def test_a_step_too_small_for_bfloat16_is_kept(make, name, tmp_path):
    model = adapted(make, name)
    copies = {n: p for n, p in model.named_parameters() if ".modules_to_save." in n}
    assert copies
    before = {n: p.detach().clone() for n, p in copies.items()}
    training.train(model, tmp_path, learning_rate=1e-6, max_steps=2, weight_decay=0.0)
    size = sum(p.numel() for p in copies.values())
    moved = sum((p != before[n]).sum().item() for n, p in copies.items()) / size
    seen = sum((p.bfloat16() != before[n].bfloat16()).sum().item() for n, p in copies.items()) / size
    assert moved > 0.1  # only the rows of tokens that occur, in an embedding
    assert seen < moved / 5


@cases
def test_saved_loaded_and_merged_they_compute_the_same(make, name, tmp_path):
    model = adapted(make, name)
    training.train(model, tmp_path / "out", max_steps=4)
    expected = training.logits(model).float()
    scale = expected.abs().max()
    save_adapter(model, tmp_path / "saved")
    loaded = PeftModel.from_pretrained(make().bfloat16(), tmp_path / "saved")
    assert (training.logits(loaded).float() - expected).abs().max() < 0.02 * scale
    merged = merge(model, dtype=torch.float32) if name != "embed_tokens" else model.merge_and_unload()
    assert (training.logits(merged).float() - expected).abs().max() < 0.02 * scale


def test_in_float32_nothing_is_wrapped():
    model = adapted(tiny.llama, "layers.1", torch.float32)
    assert not any(type(m).__name__ == "WholeModule" for m in model.modules())
