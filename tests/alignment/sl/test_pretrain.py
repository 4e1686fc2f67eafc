"""Pre-training trains every token of every document once, and no document sees another."""

import pytest
import tiny
import torch
from sft_problems import ARGUMENTS, losses
from torch.nn import functional as F

import luthier.alignment.trainer
from luthier.alignment.sl import pretrain
from luthier.data.load import load
from luthier.data.tokenize import encode_pretrain
from luthier.errors import DataError


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(f'{{"text": "{" ".join(tiny.SENTENCES[:4][: i + 1])}"}}\n' for i in range(4)))
    return path


def make(path, folder, config=None, **options):
    return luthier.alignment.trainer.trainer(
        config or pretrain.Config(max_length=32), tiny.llama(), path, tokenizer=tiny.tokenizer(),
        args={**ARGUMENTS, "output_dir": str(folder), **options},
    )  # fmt: skip


@pytest.mark.parametrize("packing", ["rows", True, False])
def test_the_loss_of_one_batch_of_everything_is_the_mean_over_all_tokens(path, tmp_path, packing):
    config = pretrain.Config(max_length=32, packing=packing)
    trainer = make(path, tmp_path, config, per_device_train_batch_size=64, max_steps=1)
    trainer.train()
    blocks = encode_pretrain(load(path), tiny.tokenizer(), max_length=32).dataset["input_ids"]
    assert len(blocks) > 4
    model, total, count = tiny.llama(), 0.0, 0
    for block in blocks:
        ids = torch.tensor([block])
        logits = model(ids, use_cache=False).logits[0, :-1]
        total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += len(block) - 1
    assert losses(trainer) == pytest.approx([total / count], rel=1e-5)
    assert trainer.state.num_input_tokens_seen == sum(map(len, blocks))


def test_it_learns(path, tmp_path):
    trainer = make(path, tmp_path, max_steps=40)
    trainer.train()
    assert losses(trainer)[-1] < 0.5 * losses(trainer)[0]


def test_conversations_are_refused(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataError, match="takes text"):
        make(path, tmp_path)
