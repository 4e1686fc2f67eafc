"""Rows of a data set become windows of tokens that follow one another, or padded rows of a classifier."""

import json

import pytest
import torch

from luthier.compression import calibration_data
from luthier.compression.calibration_data import batches
from luthier.data.load import load
from luthier.data.masking import plain_ids
from luthier.errors import DataError


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("\n".join(f"{i} is {i * i}, and twice that is {2 * i * i}." for i in range(40)))
    return load(str(file))


def test_windows_are_pieces_of_the_text_in_order_and_whole(text, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(calibration_data, "TOKENS", 64)
    found = batches(text, tiny_tokenizer, samples=6, max_length=16)
    assert [batch["input_ids"].shape for batch in found] == [(4, 16), (2, 16)]  # 64 tokens a batch
    assert all(batch["attention_mask"].all() for batch in found)
    ids = [token for row in text.records for token in plain_ids(tiny_tokenizer, row["text"])]
    places = [ids[i : i + 16] for i in range(0, len(ids) - 15, 16)]
    rows = torch.cat([batch["input_ids"] for batch in found]).tolist()
    at = [places.index(row) for row in rows]
    assert at == sorted(at)
    # One of each sixth of the text.
    assert [6 * i // len(places) for i in at] == list(range(6))


def test_the_seed_draws(text, tiny_tokenizer):
    found = [batches(text, tiny_tokenizer, samples=4, max_length=8, seed=seed) for seed in (0, 0, 1)]
    one, same, other = (windows[0]["input_ids"] for windows in found)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_rows_of_a_classifier_keep_their_class_and_are_padded(tmp_path, tiny_tokenizer):
    words = ["good", "a bad day", "very good indeed", "bad"]
    rows = [{"text": text, "label": "no" if "bad" in text else "yes"} for text in words]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (plain,) = batches(load(str(file)), tiny_tokenizer, samples=4, max_length=32)
    assert plain.keys() == {"input_ids", "attention_mask"}  # a language model learns its tokens
    (batch,) = batches(load(str(file)), tiny_tokenizer, samples=4, max_length=32, classes=True)
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        text = tiny_tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)
        assert int(label) == ["no", "yes"].index("no" if "bad" in text else "yes")


def test_text_that_fills_no_window_is_refused(text, tiny_tokenizer):
    with pytest.raises(DataError, match="not one window of 4096"):
        batches(text, tiny_tokenizer, samples=4, max_length=4096)
