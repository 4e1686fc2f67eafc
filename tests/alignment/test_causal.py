"""What is not computed changes nothing: packed = padded, k micro-batches = one batch, label-only = dense."""

import peft
import pytest
import tiny
import torch
from sft_problems import lora, losses, rows, sft, weights
from torch.nn import functional as F

from luthier import checks
from luthier.alignment import causal
from luthier.errors import CheckError


def assert_close(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * value.norm(), name


def trained(folder, *, kind="llama", method=None, **options):
    trainer = sft(getattr(tiny, kind)(), folder, method=method, max_grad_norm=0.0, optim="sgd", **options)
    trainer.train()
    return losses(trainer), weights(trainer.model)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_micro_batches_accumulate_to_one_batch_whatever_their_lengths(tmp_path, kind):
    whole = trained(tmp_path, kind=kind, per_device_train_batch_size=6)
    parts = trained(tmp_path, kind=kind, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    assert_close(parts[1], whole[1])


@pytest.mark.parametrize("method", [None, lora()], ids=["full", "lora"])
def test_examples_that_share_a_row_give_the_padded_batchs_updates(tmp_path, method):
    padded = trained(tmp_path, method=method, packing=False)
    packed = trained(tmp_path, method=method, packing=True)
    assert packed[0] == pytest.approx(padded[0], rel=1e-5)
    assert_close(packed[1], padded[1])


def test_the_loss_is_the_mean_over_the_labelled_tokens_of_the_whole_batch(tmp_path):
    data = rows(6)
    trainer = sft(tiny.llama(), tmp_path, data=data, per_device_train_batch_size=3, max_steps=1,
                  gradient_accumulation_steps=2)  # fmt: skip
    trainer.train()
    model, total, count = tiny.llama(), 0.0, 0
    for row in data:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        logits = model(ids, use_cache=False).logits[0]
        total += F.cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100).item()
        count += (labels[1:] != -100).sum().item()
    assert losses(trainer) == pytest.approx([total / count], rel=1e-5)


def test_rows_packed_to_the_brim_hold_every_example_once_and_count_no_filling(tmp_path):
    data = rows(9)
    trainer = sft(tiny.llama(), tmp_path, data=data, packing="rows", num_train_epochs=1, max_steps=-1)
    with checks.collect() as lines:
        trainer.train()
    assert trainer.state.num_input_tokens_seen == sum(map(len, data["input_ids"]))
    assert any(line.name == "packed documents isolated" and line.passed for line in lines)


def test_tokens_of_content_are_counted_without_padding(tmp_path):
    data = rows(8)
    for packing in (False, True):
        trainer = sft(tiny.llama(), tmp_path, data=data, packing=packing, num_train_epochs=1, max_steps=-1)
        trainer.train()
        assert trainer.state.num_input_tokens_seen == sum(map(len, data["input_ids"]))
        assert trainer.state.log_history[-2]["num_tokens"] == trainer.state.num_input_tokens_seen


@pytest.mark.parametrize("reason", ["label smoothing", "own loss"])
def test_where_labels_alone_do_not_do_the_dense_loss_is_taken_and_said(tmp_path, monkeypatch, reason):
    fast = trained(tmp_path)
    if reason == "own loss":
        monkeypatch.setattr(causal.label_only, "why_not", lambda model: "own loss")
        with checks.collect() as lines:
            slow = trained(tmp_path)
        assert slow[0] == pytest.approx(fast[0], rel=1e-5)
        assert_close(slow[1], fast[1])
    else:
        with checks.collect() as lines:
            assert trained(tmp_path, label_smoothing_factor=0.1)[0][0] > fast[0][0] * 0.9
    assert any(line.value == "off" and reason in line.detail for line in lines)


def test_evaluation_loss_is_the_mean_over_tokens_and_not_over_batches(tmp_path):
    data = rows(7, seed=5)
    trainer = sft(tiny.llama(), tmp_path, eval_data=data, per_device_eval_batch_size=2, eval_strategy="no")
    model, total, count = trainer.model, 0.0, 0
    for row in data:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0]
        total += F.cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100).item()
        count += (labels[1:] != -100).sum().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, rel=1e-5)


def test_evaluation_makes_no_logits_and_prediction_does(tmp_path, monkeypatch):
    data = rows(4)
    trainer = sft(tiny.llama(), tmp_path, eval_data=data, packing=False, eval_strategy="no")
    dense = []
    original = trainer._dense_loss
    monkeypatch.setattr(trainer, "_dense_loss", lambda *a: dense.append(1) or original(*a))
    trainer.evaluate()
    assert not dense
    assert trainer.predict(data).predictions.shape[-1] == tiny.VOCAB


def test_the_model_is_as_before_after_training(tmp_path):
    trainer = sft(tiny.llama(), tmp_path, method=lora(), max_steps=1)
    trainer.train()
    assert all("forward" not in vars(m) for m in trainer.model.modules())
    assert trainer.model.config._attn_implementation == "sdpa"


def test_savings_are_said(tmp_path):
    with checks.collect() as lines:
        sft(tiny.llama(), tmp_path, method=lora(), max_steps=1).train()
    found = {line.name: line for line in lines}
    assert found["logits only where there is a label"].value == "on"
    assert found["attention document by document"].value == "on"
    assert found["LoRA layers fused"].value == 14


def test_a_soft_prompt_is_not_packed(tmp_path):
    method = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with checks.collect() as lines:
        trainer = sft(tiny.llama(), tmp_path, method=method, max_steps=2)
        trainer.train()
    assert any(line.name == "packing" and line.value == "off" for line in lines)
    with pytest.raises(CheckError, match="soft prompt"):
        sft(tiny.llama(), tmp_path, method=method, packing=True)


def test_a_model_that_mixes_documents_is_not_packed(tmp_path):
    class Mixing(type(tiny.llama())):
        def forward(self, *args, position_ids=None, **kwargs):
            return super().forward(*args, **kwargs)

    model = tiny.llama()
    model.__class__ = Mixing
    with checks.collect() as lines:
        trainer = sft(model, tmp_path)
    assert not trainer._packed
    assert any(line.name == "packing" and "mixes" in line.detail for line in lines)
    with pytest.raises(CheckError, match="mixes"):
        sft(model, tmp_path, packing="rows")


def test_own_weights_in_float32_may_be_multiplied_in_bfloat16(tmp_path):
    exact = trained(tmp_path)
    mixed = trained(tmp_path, bf16=True)
    assert all(w.dtype == torch.float32 for w in mixed[1].values())
    assert mixed[0] == pytest.approx(exact[0], rel=1e-2)
    assert mixed[0] != exact[0]
