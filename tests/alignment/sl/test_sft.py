"""SFT trains the tokens it says it trains, and lowers their loss."""

import json

import pytest
import tiny
import torch
from sft_problems import ARGUMENTS, lora, losses
from torch.nn import functional as F

import luthier.alignment.trainer
from luthier.alignment.sl import sft
from luthier.data.load import load
from luthier.data.tokenize import encode
from luthier.errors import DataError

CHAT = [
    [
        {"role": "user", "content": f"Count to {i}."}, {"role": "assistant", "content": "1 2 3"},
        {"role": "user", "content": "Again."}, {"role": "assistant", "content": "So be it."},
    ]
    for i in range(8)
]  # fmt: skip


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in CHAT))
    return path


def make(path, folder, config=None, method=None, **options):
    return luthier.alignment.trainer.trainer(
        config or sft.Config(), tiny.llama(), path, method=method, tokenizer=tiny.tokenizer(),
        args={**ARGUMENTS, "output_dir": str(folder), **options},
    )  # fmt: skip


@pytest.mark.parametrize("train_on", ["assistant_all", "assistant_last", "all"])
def test_the_first_loss_is_that_of_the_declared_tokens(path, tmp_path, train_on):
    config = sft.Config(train_on=train_on)
    trainer = make(path, tmp_path, config, per_device_train_batch_size=8, max_steps=1)
    trainer.train()
    data = encode(load(path), tiny.tokenizer(), max_length=1024, train_on=train_on).dataset
    model, total, count = tiny.llama(), 0.0, 0
    for row in data:
        logits = model(torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
        labels = torch.tensor(row["labels"])[1:]
        total += F.cross_entropy(logits, labels, reduction="sum").item()
        count += (labels != -100).sum().item()
    assert losses(trainer)[0] == pytest.approx(total / count, rel=1e-5)


def test_it_learns(path, tmp_path):
    trainer = make(path, tmp_path, max_steps=40)
    trainer.train()
    assert losses(trainer)[-1] < 0.3 * losses(trainer)[0]


def test_held_out_data_are_encoded_the_same_way(path, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"messages": [{"role": "user", "content": "Hm?"}, CHAT[0][1]]}) + "\n")
    trainer = luthier.alignment.trainer.trainer(
        sft.Config(), tiny.llama(), path, method=lora(), tokenizer=tiny.tokenizer(), eval_data=other,
        args={**ARGUMENTS, "output_dir": str(tmp_path), "eval_steps": 3},
    )  # fmt: skip
    trainer.train()
    assert [e["step"] for e in trainer.state.log_history if "eval_loss" in e] == [3, 6]


def test_examples_that_lose_all_trained_tokens_are_refused_or_left_out(path, tmp_path):
    with pytest.raises(DataError, match=r"chat\.jsonl"):
        make(path, tmp_path, sft.Config(max_length=8))
    long = tmp_path / "long.jsonl"
    lines = [{"prompt": "word " * 60, "completion": "no"}, {"prompt": "short", "completion": "yes"}]
    long.write_text("".join(json.dumps(line) + "\n" for line in lines))
    trainer = make(long, tmp_path, sft.Config(max_length=40, allow_empty=True))
    assert len(trainer.train_dataset) == 1
