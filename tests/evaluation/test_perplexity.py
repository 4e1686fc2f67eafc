"""Perplexity: equal to a naive loop, whatever the batch and the window."""

import json
import math

import numpy as np
import pytest
import tiny
import torch

from luthier.data.load import load
from luthier.errors import DataError
from luthier.evaluation.perplexity import perplexity, sequences, windows


def text(length, seed, skip=0):
    ids = torch.randint(5, 200, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids, np.arange(max(1, skip), length)


def naive(model, ids, positions, window, stride):
    """One token at a time: each is predicted once, by the first window that holds it."""
    total, count, scored = 0.0, 0, 0
    for start in range(0, len(ids), stride):
        end = min(start + window, len(ids))
        for position in range(max(scored, start + 1), end):
            if position in positions:
                logits = model(torch.tensor([ids[start:position]])).logits[0, -1]
                total -= torch.log_softmax(logits.double(), -1)[ids[position]].item()
                count += 1
        scored = end
        if end == len(ids):
            break
    return total, count


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize(("window", "stride"), [(64, 32), (16, 8), (16, 5), (9, 1)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_equal_to_a_naive_loop(build, window, stride, batch_size):
    model = build()
    texts = [text(40, 0), text(7, 1, skip=3), text(23, 2), text(1, 3)]
    with torch.no_grad():
        counts = [naive(model, *one, window, stride) for one in texts]
    expected = math.exp(sum(c[0] for c in counts) / sum(c[1] for c in counts))
    found = perplexity(model, texts, batch_size=batch_size, window=window, stride=stride)
    assert found.value == pytest.approx(expected, rel=1e-5)
    assert found.low <= found.value <= found.high


def test_windows_score_each_token_but_the_first_once():
    for length in range(1, 60):
        scored = [p for begin, first, end in windows(length, 16, 6) for p in range(first, end)]
        assert scored == list(range(1, length))
        assert all(end - begin <= 16 for begin, _, end in windows(length, 16, 6))


def test_later_tokens_have_the_context_that_the_stride_leaves():
    for begin, first, _ in list(windows(100, 16, 6))[1:]:
        assert first - begin >= 10


def test_the_mean_is_over_tokens_not_texts(tiny_llama):
    """A text given twice counts twice; a long text outweighs a short one."""
    long, short = text(60, 0), text(3, 1)
    both = perplexity(tiny_llama, [long, short]).value
    logs = [math.log(perplexity(tiny_llama, [one]).value) for one in (long, short)]
    assert both == pytest.approx(math.exp((59 * logs[0] + 2 * logs[1]) / 61), rel=1e-6)


def test_chats_are_scored_where_training_trains_texts_everywhere(tmp_path, tiny_tokenizer):
    chat, plain = tmp_path / "chat.jsonl", tmp_path / "plain.jsonl"
    chat.write_text(json.dumps({"prompt": "What?", "completion": "That."}) + "\n")
    plain.write_text(json.dumps({"text": "What? That."}) + "\n")
    (ids, positions), *_ = sequences(load(chat), tiny_tokenizer)[0]
    assert tiny_tokenizer.decode([ids[p] for p in positions]) == "That.<|im_end|>"
    (ids, positions), *_ = sequences(load(plain), tiny_tokenizer)[0]
    assert tiny_tokenizer.decode(ids) == "What? That."
    assert positions.tolist() == list(range(1, len(ids)))


@pytest.mark.parametrize("stride", [16, -1, 17])
def test_a_stride_that_skips_tokens_is_refused(tiny_llama, stride):
    with pytest.raises(DataError, match="less than the window"):
        perplexity(tiny_llama, [text(40, 0)], window=16, stride=stride)


def test_nothing_to_score_is_refused(tiny_llama):
    with pytest.raises(DataError, match="no token to score"):
        perplexity(tiny_llama, [text(1, 0)])
