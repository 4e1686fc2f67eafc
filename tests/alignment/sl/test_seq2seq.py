"""Sequence to sequence: every target token weighs the same, whatever the micro-batches; it learns to copy."""

import json

import pytest
import tiny
import torch
from sft_problems import ARGUMENTS, losses, weights

import luthier.alignment.trainer
from luthier.alignment.sl import seq2seq

ROWS = [
    {"prompt": f"say {word}", "completion": " ".join([word] * n)}
    for word in ("red", "blue")
    for n in (1, 2, 5)
]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def make(path, folder, **options):
    return luthier.alignment.trainer.trainer(
        seq2seq.Config(), tiny.t5(), path, tokenizer=tiny.tokenizer(template=None),
        args={**ARGUMENTS, "output_dir": str(folder), **options},
    )  # fmt: skip


def test_micro_batches_accumulate_to_one_batch(path, tmp_path):
    plain = {"optim": "sgd", "max_grad_norm": 0.0, "max_steps": 4}
    whole = make(path, tmp_path, per_device_train_batch_size=6, **plain)
    parts = make(path, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3, **plain)
    for trainer in (whole, parts):
        trainer.train()
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    for name, value in weights(whole.model).items():
        assert (weights(parts.model)[name] - value).norm() <= 1e-5 * value.norm() + 1e-9


def test_the_loss_is_the_mean_over_target_tokens_one_by_one(path, tmp_path):
    trainer = make(path, tmp_path, per_device_train_batch_size=6, max_steps=1)
    model, total, count = tiny.t5(), 0.0, 0
    for row in trainer.train_dataset:
        labels = torch.tensor([row["labels"]])
        total += model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss.item() * labels.numel()
        count += labels.numel()
    trainer.train()
    assert losses(trainer) == pytest.approx([total / count], rel=1e-5)


def test_it_learns(path, tmp_path):
    trainer = make(path, tmp_path, max_steps=40, per_device_train_batch_size=6)
    trainer.train()
    assert losses(trainer)[-1] < 0.3 * losses(trainer)[0]


def test_evaluation_can_generate(path, tmp_path):
    trainer = luthier.alignment.trainer.trainer(
        seq2seq.Config(), tiny.t5(), path, tokenizer=tiny.tokenizer(template=None),
        args={**ARGUMENTS, "output_dir": str(tmp_path), "predict_with_generate": True,
              "generation_max_length": 6},
    )  # fmt: skip
    tokens = trainer.predict(trainer.train_dataset).predictions
    assert ((tokens != tiny.PAD).sum(1) < 6).all()
