"""Encoded data are reused only where rows, template, tokenizer, settings and code are the same."""

import json

import pytest
import rendering
import tiny

from luthier.data import cache, tokenize
from luthier.data.load import load


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """Encode a row, and say whether it was built (and not taken from the cache)."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    built = []
    finish = tokenize._finish
    monkeypatch.setattr(tokenize, "_finish", lambda *a: built.append(1) or finish(*a))

    def run(answer="Yo", tokenizer=None, **settings):
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps({"prompt": "Hi", "completion": answer}) + "\n")
        before = len(built)
        options = {"max_length": 64, **settings}
        encoded = tokenize.encode(load(path), tokenizer or rendering.tokenizer(rendering.CHATML), **options)
        return encoded, len(built) > before

    return run


def test_same_inputs_are_encoded_once(counted):
    first, built = counted()
    again, rebuilt = counted()
    assert (built, rebuilt) == (True, False)
    assert first.dataset[:] == again.dataset[:]
    assert first.report == again.report
    assert first.source == again.source


@pytest.mark.parametrize(
    "change",
    [
        {"answer": "No"},
        {"max_length": 63},
        {"train_on": "all"},
        {"chat": "off"},
        {"options": {"x": 1}},
        {"tokenizer": rendering.tokenizer(rendering.ZEPHYR)},
        {"tokenizer": rendering.tokenizer(rendering.CHATML, eos="<|endoftext|>")},
        {"tokenizer": tiny.tokenizer()},
    ],
    ids=["rows", "max_length", "train_on", "chat", "options", "template", "special tokens", "vocabulary"],
)
def test_any_change_is_encoded_anew(counted, change):
    counted()
    assert counted(**change)[1]


def test_change_of_the_masking_code_is_a_new_key(counted, monkeypatch):
    counted()
    monkeypatch.setattr(cache, "code_version", lambda *modules: "another")
    assert counted()[1]


def test_cache_that_cannot_be_written_is_done_without(counted, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "file"))
    assert counted()[1]
    assert counted()[1]


def test_interrupted_write_is_no_entry(counted, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache.os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            counted()
    assert counted()[1]
