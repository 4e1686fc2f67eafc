"""Perplexity: equal to a naive loop, whatever the batch and the window."""

import numpy as np
import pytest
import torch

from luthier.evaluation.perplexity import IGNORED, token_losses, windows


def example(length, seed, skip=0):
    ids = torch.randint(5, 200, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids, [IGNORED] * skip + ids[skip:]


def naive(model, ids, labels, window, stride):
    """One token at a time: each is predicted once, by the first window that holds it."""
    total, count, scored = 0.0, 0, 0
    for start in range(0, len(ids), stride):
        end = min(start + window, len(ids))
        for position in range(max(scored, start + 1), end):
            if labels[position] != IGNORED:
                logits = model(torch.tensor([ids[start:position]])).logits[0, -1]
                total -= torch.log_softmax(logits.double(), -1)[ids[position]].item()
                count += 1
        scored = end
        if end == len(ids):
            break
    return total, count


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize(("window", "stride"), [(64, 32), (16, 8), (16, 16)])
def test_equal_to_a_naive_loop(request, fixture, window, stride):
    model = request.getfixturevalue(fixture)
    examples = [example(40, 0), example(7, 1, skip=3), example(23, 2), example(1, 3)]
    with torch.no_grad():
        expected = np.array([naive(model, *e, window, stride) for e in examples])
    found = token_losses(model, examples, window=window, stride=stride, batch_tokens=80)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_windows_score_each_token_once():
    ids, labels = example(50, 0)
    scored = [x for piece in windows([(ids, labels)], 16, 6) for x in piece.labels if x != IGNORED]
    assert scored == labels


def test_an_example_without_label_counts_nothing(tiny_llama):
    ids, _ = example(9, 0)
    assert token_losses(tiny_llama, [(ids, [IGNORED] * 9)], window=64).tolist() == [[0.0, 0.0]]
