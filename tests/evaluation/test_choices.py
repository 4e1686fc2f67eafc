"""Multiple choice: scores equal a naive loop over the joint tokenisation, raw and per letter."""

import json

import numpy as np
import pytest
import tiny
import torch

from luthier.data.load import load
from luthier.errors import DataError
from luthier.evaluation.choices import rank

QUESTIONS = [
    {
        "prompt": "The printer of the second floor",
        "choices": ["prints.", "does not print any more."],
        "label": 1,
    },
    {"prompt": "Order 4711 ", "choices": ["arrived", "was", "is 12 + 30"], "label": 0},
    {"prompt": "Question: what is 12 + 30? Answer:", "choices": [" 42.", " 4"], "label": 0},
]


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    return load(path)


def naive(model, tokenizer, prompt, choice, prefix=()):
    """Sum of log p over the tokens of the whole text that hold a letter of the choice."""
    text = prompt.rstrip() + " " + choice.strip()
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = [*prefix, *encoding["input_ids"]]
    score = 0.0
    for at, (_, end) in enumerate(encoding["offset_mapping"], start=len(prefix)):
        if end > len(prompt.rstrip()):
            with torch.no_grad():
                logits = model(torch.tensor([ids[:at]])).logits[0, -1]
            score += torch.log_softmax(logits.double(), -1)[ids[at]].item()
    return score


@pytest.mark.parametrize("bos", [False, True])
def test_scores_equal_a_naive_loop(tiny_llama, questions, bos):
    tokenizer = tiny.tokenizer(template=None, bos=bos)
    found = rank(tiny_llama, tokenizer, questions, batch_size=3)
    for ranked, question in zip(found, QUESTIONS, strict=True):
        prefix = (tiny.BOS,) if bos else ()
        expected = [naive(tiny_llama, tokenizer, question["prompt"], c, prefix) for c in question["choices"]]
        np.testing.assert_allclose(ranked.raw, expected, atol=1e-4)
        lengths = [len(c) for c in question["choices"]]
        np.testing.assert_allclose(ranked.norm, np.array(expected) / lengths, atol=1e-4)
        assert ranked.right(normalised=False) == (np.argmax(expected) == question["label"])


def test_with_a_template_the_choice_is_the_assistants_answer(tiny_llama, tiny_tokenizer, questions):
    found = rank(tiny_llama, tiny_tokenizer, questions)
    prompt = "<|im_start|>user\nThe printer of the second floor<|im_end|>\n<|im_start|>assistant\n"
    ids = tiny_tokenizer(prompt + "prints.", add_special_tokens=False)["input_ids"]
    start = len(tiny_tokenizer(prompt, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        logs = torch.log_softmax(tiny_llama(torch.tensor([ids])).logits[0].double(), -1)
    expected = sum(logs[p - 1, ids[p]].item() for p in range(start, len(ids)))
    assert found[0].raw[0] == pytest.approx(expected, abs=1e-4)


def test_a_longer_choice_wins_only_per_letter():
    from luthier.evaluation.choices import Ranked

    ranked = Ranked(np.array([-3.0, -4.0]), np.array([-3.0 / 2, -4.0 / 20]), label=1)
    assert ranked.right(normalised=False) == 0
    assert ranked.right(normalised=True) == 1


def test_other_rows_are_refused(tiny_llama, tiny_tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    with pytest.raises(DataError, match="choices"):
        rank(tiny_llama, tiny_tokenizer, load(path))
