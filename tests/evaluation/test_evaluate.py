"""`evaluate` on data files: metrics with intervals and one prediction an example."""

import json

import numpy as np
import pytest
import torch

from luthier.data.load import load
from luthier.data.tokenize import encode
from luthier.errors import MethodError
from luthier.evaluation.classification import confusion, macro_f1
from luthier.evaluation.evaluate import evaluate


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"Count to {i}.", "completion": json.dumps({"n": i})} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_perplexity_weighs_tokens_of_the_answers(tiny_llama, tiny_tokenizer, records):
    found = evaluate(tiny_llama, records, ["perplexity"], tokenizer=tiny_tokenizer).metrics["perplexity"]
    total, count = 0.0, 0
    for row in encode(load(records), tiny_tokenizer, max_length=None).dataset:
        ids, labels = torch.tensor(row["input_ids"]).long(), torch.tensor(row["labels"]).long()
        with torch.no_grad():
            logs = torch.log_softmax(tiny_llama(ids[None]).logits[0].double(), -1)
        for position in range(1, len(ids)):
            if labels[position] != -100:
                total, count = total - logs[position - 1, ids[position]].item(), count + 1
    assert found.value == pytest.approx(np.exp(total / count), rel=1e-5)
    assert found.low < found.value < found.high
    assert found.n == 6


def test_answers_are_scored_and_kept(tiny_llama, tiny_tokenizer, records):
    tiny_llama.train()
    found = evaluate(
        tiny_llama,
        records,
        ["exact_match", "field_f1", "rougeL"],
        tokenizer=tiny_tokenizer,
        generation={"max_new_tokens": 4},
        samples=4,
    )
    assert tiny_llama.training, "the mode is left as it was"
    assert set(found.metrics) == {"exact_match", "field_f1", "rougeL", "ended"}
    assert found.metrics["exact_match"].n == len(found.predictions) == 4
    assert found.metrics["exact_match"].value == 0.0  # an untrained model writes no JSON
    first = found.predictions[0]
    assert first["gold"].startswith("{")
    assert first["prompt"].startswith("Count to")
    assert set(first["scores"]) == {"exact_match", "field_f1", "rougeL"}


def test_a_classifier_is_measured_by_accuracy_and_macro_f1(tiny_bert, tiny_tokenizer, tmp_path):
    path = tmp_path / "data.jsonl"
    texts = [("good " * (i + 1), "abc"[i % 3]) for i in range(9)]
    path.write_text("".join(json.dumps({"text": t, "label": c}) + "\n" for t, c in texts))
    tiny_bert.config.id2label = dict(enumerate("abc"))
    found = evaluate(tiny_bert, path, ["accuracy", "f1"], tokenizer=tiny_tokenizer, batch_size=4)
    right = [p["prediction"] == p["gold"] for p in found.predictions]
    assert [p["gold"] for p in found.predictions] == [c for _, c in texts]
    assert found.metrics["accuracy"].value == pytest.approx(np.mean(right))


def test_macro_f1_equals_the_definition():
    gold, mine = np.array([0, 0, 1, 2, 2]), np.array([0, 1, 1, 2, 0])
    scores = []
    for c in range(3):
        hit = ((gold == c) & (mine == c)).sum()
        precision, recall = hit / (mine == c).sum(), hit / (gold == c).sum()
        scores.append(2 * precision * recall / (precision + recall))
    assert macro_f1(confusion(mine, gold, 3).sum(0, keepdims=True))[0] == pytest.approx(np.mean(scores))


@pytest.mark.parametrize(
    ("metric", "says"), [("exact_macth", "Did you mean 'exact_match'"), ("accuracy", "cannot be measured")]
)
def test_metrics_that_do_not_fit_are_refused(tiny_llama, tiny_tokenizer, records, metric, says):
    with pytest.raises(MethodError, match=says):
        evaluate(tiny_llama, records, [metric], tokenizer=tiny_tokenizer)
