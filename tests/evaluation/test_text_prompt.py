"""Text prompts: a readable file, and a language model that classifies with it."""

import json

import cloze_models as toy
import numpy as np
import pytest
import torch

import luthier
from luthier import checks
from luthier.errors import DataError, ModelError
from luthier.evaluation.cloze import Scorer
from luthier.evaluation.text_prompt import TextPrompt

GOOD = TextPrompt({"{text} overall {mask}": 1.0}, toy.LABELS)
POOR = TextPrompt({"{text} colour {mask}": 1.0}, toy.LABELS)


def test_it_is_written_as_a_small_file_and_read_again(tmp_path):
    model = toy.untrained("bert")
    history = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    prompt = TextPrompt({"{text} ü {mask}": 0.25}, toy.LABELS, "mean", "lpaqa", {"accuracy": 0.5}, history)
    path = prompt.made_for(model).save(tmp_path / "prompt")
    assert TextPrompt.load(path) == TextPrompt.load(tmp_path / "prompt") == prompt
    text = path.read_text()
    assert '{"step": 1, "loss": 0.5},\n' in text
    assert json.loads(text)["base"]["fingerprint"]


@pytest.mark.parametrize("content", ["", "[]", '{"format": 9}', '{"format": 1, "x": 2}'])
def test_another_file_is_refused(content, tmp_path):
    (tmp_path / "prompt.json").write_text(content)
    with pytest.raises(ModelError, match="cannot be read as a text prompt"):
        TextPrompt.load(tmp_path)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_model_is_measured_with_it(kind, tmp_path):
    model, tokenizer, data = toy.trained(kind), toy.tokenizer(), toy.loaded(toy.rows(40, 9))
    GOOD.save(tmp_path)
    found = luthier.evaluate(model, data, ["accuracy", "f1"], tokenizer=tokenizer, prompt=tmp_path)
    poor = luthier.evaluate(model, data, ["accuracy"], tokenizer=tokenizer, prompt=POOR)
    assert found.metrics["accuracy"].value >= 0.95 > 0.8 >= poor.metrics["accuracy"].value
    right = np.mean([p["prediction"] == p["gold"] for p in found.predictions])
    assert right == found.metrics["accuracy"].value


def test_templates_vote_by_the_weighted_sum_of_their_scores():
    scorer = Scorer(toy.trained("bert"), toy.tokenizer())
    rows = toy.rows(5)
    both = TextPrompt(GOOD.templates | {"{text} colour {mask}": 3.0}, toy.LABELS)
    expected = GOOD.class_scores(scorer, rows) + 3 * POOR.class_scores(scorer, rows)
    assert torch.allclose(both.class_scores(scorer, rows), expected)


def test_rows_of_a_class_without_a_word_are_refused_by_their_place():
    prompt = TextPrompt(GOOD.templates, {"up": ["good"], "flat": ["low"]})
    with pytest.raises(DataError, match="no word for class 'down'"):
        prompt.classify(toy.untrained("bert"), toy.tokenizer(), toy.loaded(toy.rows(20)))


def test_use_on_another_model_is_said():
    data = toy.loaded(toy.rows(20))
    prompt = TextPrompt(GOOD.templates, toy.LABELS).made_for(toy.untrained("bert", seed=1))
    with checks.collect() as lines:
        prompt.classify(toy.untrained("bert"), toy.tokenizer(), data)
    (line,) = [line for line in lines if line.name == "text prompt on its own model"]
    assert line.value == "no"
    assert "found on" in line.detail
