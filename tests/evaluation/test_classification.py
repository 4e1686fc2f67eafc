"""Classes: batches equal one by one, F1 equals its definition."""

import json

import numpy as np
import pytest
import torch

from luthier.data.load import load
from luthier.evaluation.classification import binary_f1, class_counts, class_names, classify, macro_f1


def by_definition(predicted, wanted, c):
    hit = ((wanted == c) & (predicted == c)).sum()
    precision = hit / max((predicted == c).sum(), 1)
    recall = hit / max((wanted == c).sum(), 1)
    return 2 * precision * recall / (precision + recall) if hit else 0.0


def test_macro_f1_equals_the_definition():
    rng = np.random.default_rng(0)
    for _ in range(20):
        predicted, wanted = rng.integers(0, 3, 12), rng.integers(0, 3, 12)
        occurring = sorted(set(predicted) | set(wanted))
        expected = np.mean([by_definition(predicted, wanted, c) for c in occurring])
        assert macro_f1(class_counts(predicted, wanted, 3).sum(0)) == pytest.approx(expected)


def test_binary_f1_is_of_the_second_class():
    predicted, wanted = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1])
    found = binary_f1(class_counts(predicted, wanted, 2).sum(0))
    assert found == pytest.approx(by_definition(predicted, wanted, 1))
    nothing = class_counts(np.zeros(3), np.zeros(3), 2).sum(0)
    assert binary_f1(nothing) == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_equal_one_by_one(tiny_bert, tiny_tokenizer, tmp_path, side):
    path = tmp_path / "data.jsonl"
    texts = [("good printer " * (i + 1), "abc"[i % 3]) for i in range(9)]
    path.write_text("".join(json.dumps({"text": t, "label": c}) + "\n" for t, c in texts))
    tiny_bert.config.id2label = dict(enumerate("abc"))
    tiny_tokenizer.padding_side = side
    predicted, wanted, names = classify(tiny_bert, tiny_tokenizer, load(path), batch_size=4)
    assert names == list("abc")
    assert wanted.tolist() == [i % 3 for i in range(9)]
    if side == "left":  # BERT's learnt positions make left padding another input
        return
    for i, (text, _) in enumerate(texts):
        with torch.no_grad():
            logits = tiny_bert(**tiny_tokenizer(text, return_tensors="pt")).logits
        assert predicted[i] == int(logits.argmax())


def test_names_are_the_models_unless_it_has_none(tiny_bert, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 2}\n')
    loaded = load(path)
    assert class_names(tiny_bert.config, loaded) is None  # LABEL_0, ...
    tiny_bert.config.id2label = {0: "low", 1: "normal", 2: "high"}
    assert class_names(tiny_bert.config, loaded) is None  # data that numbers the classes
    loaded.records[0]["label"] = "low"
    assert class_names(tiny_bert.config, loaded) == ["low", "normal", "high"]
