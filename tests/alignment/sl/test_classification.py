"""Classification weighs every example the same, whatever the micro-batches, and learns."""

import json

import pytest
import tiny
import torch
from sft_problems import ARGUMENTS, losses, weights
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForSequenceClassification

import luthier.alignment.trainer
from luthier.alignment.sl import classification
from luthier.errors import ModelError

TEXTS = [("the printer is broken", "defect"), ("send my money back", "refund"), ("hello there", "other")] * 4


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "texts.jsonl"
    lines = [
        {"text": " ".join([text] * (1 + i % 3)), "label": label} for i, (text, label) in enumerate(TEXTS)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def make(path, folder, model=None, config=None, **options):
    return luthier.alignment.trainer.trainer(
        config or classification.Config(), model or tiny.bert(), path,
        tokenizer=tiny.tokenizer(template=None), args={**ARGUMENTS, "output_dir": str(folder), **options},
    )  # fmt: skip


def test_micro_batches_accumulate_to_one_batch(path, tmp_path):
    plain = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1, "max_steps": 4}
    whole = make(path, tmp_path, per_device_train_batch_size=6, **plain)
    parts = make(path, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3, **plain)
    for trainer in (whole, parts):
        trainer.train()
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    for name, value in weights(whole.model).items():
        assert (weights(parts.model)[name] - value).norm() <= 1e-5 * value.norm() + 1e-9


def test_the_loss_is_the_mean_over_examples_one_by_one(path, tmp_path):
    trainer = make(path, tmp_path, per_device_train_batch_size=12, max_steps=1)
    model, data = tiny.bert(), trainer.train_dataset
    trainer.train()
    singles = [
        F.cross_entropy(model(torch.tensor([row["input_ids"]])).logits, torch.tensor([row["labels"]])).item()
        for row in data
    ]
    assert losses(trainer) == pytest.approx([sum(singles) / len(singles)], rel=1e-5)


def test_it_learns_and_tells_the_names(path, tmp_path):
    trainer = make(path, tmp_path, max_steps=40)
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_accuracy"] == 1.0
    assert trainer.model.config.id2label == {0: "defect", 1: "other", 2: "refund"}


def test_a_decoder_classifies_by_its_last_real_token(path, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tiny.VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_labels=3, pad_token_id=tiny.PAD,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    trainer = make(path, tmp_path, model, per_device_train_batch_size=12, max_steps=1)
    singles = [
        F.cross_entropy(model(torch.tensor([row["input_ids"]])).logits, torch.tensor([row["labels"]])).item()
        for row in trainer.train_dataset
    ]
    trainer.train()
    assert losses(trainer) == pytest.approx([sum(singles) / len(singles)], rel=1e-5)


def test_class_weights_weigh(path, tmp_path):
    weighted = classification.Config(class_weights=[2.0, 0.0, 0.0])
    trainer = make(path, tmp_path, config=weighted, per_device_train_batch_size=12, max_steps=1)
    model, data = tiny.bert(), trainer.train_dataset
    trainer.train()
    total = sum(
        2 * F.cross_entropy(model(torch.tensor([row["input_ids"]])).logits, torch.tensor([0])).item()
        for row in data
        if row["labels"] == 0
    )
    assert losses(trainer) == pytest.approx([total / len(data)], rel=1e-5)
    with pytest.raises(ModelError, match="2 entries for 3 classes"):
        make(path, tmp_path, config=classification.Config(class_weights=[1.0, 2.0]))


def test_another_number_of_classes_is_refused(path, tmp_path):
    with pytest.raises(ModelError, match=r"3 classes.*has 5.*num_labels: 3"):
        make(path, tmp_path, tiny.bert(num_labels=5))
