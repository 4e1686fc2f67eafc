"""A search in a recipe: its prompt is kept, measured by the evaluations behind it, and taken up again."""

import json

import cloze_models as toy
import pytest
import torch

from luthier.errors import RecipeError
from luthier.evaluation.text_prompt import TextPrompt
from luthier.models.saving import save
from luthier.recipe.planner import plan
from luthier.recipe.runner import run
from luthier.recipe.source import load_recipe
from luthier.tuning.prompts import autoprompt

RECIPE = """\
name: {name}
model: {{name: {folder}/{kind}, task: {task}, dtype: float32, device: cpu}}
output: {folder}/runs
stages:
{stages}
"""
SEARCH = (
    "tune: {data: train.jsonl, method: {name: autoprompt, template: '{text} {triggers} {mask}', labels: "
    "{up: [good], down: [bad]}, num_triggers: N, iterations: 3, num_candidates: 5, batch_size: 16, "
    "accumulation: 1}NAME}"
)
PLAIN = SEARCH.replace("N,", "0,").replace("NAME", ", name: plain")
FULL = SEARCH.replace("N,", "1,").replace("NAME", "")
EVALUATE = "evaluate: {data: test.jsonl, metrics: [accuracy]}"
TASKS = {"bert": "masked", "llama": "causal"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("searches")
    for kind in TASKS:
        save(toy.trained(kind), place / kind, toy.tokenizer())
    for name, count, seed in (("train", 60, 0), ("test", 30, 7)):
        rows = toy.rows(count, seed)
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def recipe(folder, *stages, kind="bert", name="demo"):
    lines = "\n".join(f"  - {stage}" for stage in stages)
    path = folder / f"{name}.yaml"
    path.write_text(RECIPE.format(name=name, folder=folder, kind=kind, task=TASKS[kind], stages=lines))
    return path


@pytest.mark.parametrize("kind", TASKS)
def test_evaluations_measure_with_the_prompt_that_was_found_last(folder, kind):
    path = recipe(
        folder, PLAIN, EVALUATE, FULL, EVALUATE.replace("}", ", name: after}"), kind=kind, name=kind
    )
    result = run(path)
    plain, before, tune, after = result.stages
    assert before.manifest.metrics["accuracy"]["value"] < 0.9 <= after.manifest.metrics["accuracy"]["value"]
    found = TextPrompt.load(tune.artefact)
    assert "overall" in next(iter(found.templates))
    assert tune.manifest.trainable == 0
    assert tune.manifest.metrics == found.scores
    assert set(tune.manifest.artefacts) == {"prompt/prompt.json"}
    assert plain.artefact.name == "prompt"
    assert result.passed
    assert "given a prompt by autoprompt on train.jsonl" in result.report.read_text()
    assert [s.status for s in run(path).stages] == ["unchanged"] * 4


def test_a_prompt_from_elsewhere_is_measured_and_a_change_of_it_seen(folder):
    prompt = TextPrompt({"{text} overall {mask}": 1.0}, toy.LABELS)
    prompt.save(folder / "mine")
    path = recipe(folder, EVALUATE.replace("}", ", prompt: mine}"), name="mine")
    first = run(path)
    assert first.metrics["accuracy"]["value"] >= 0.9
    assert run(path).stages[0].status == "unchanged"
    TextPrompt({"{text} colour {mask}": 1.0}, toy.LABELS).save(folder / "mine")
    again = run(path)
    assert "prompt changed" in again.stages[0].reason
    assert again.metrics["accuracy"]["value"] < 0.9


def test_an_interrupted_search_goes_on(folder, monkeypatch):
    straight = run(recipe(folder, FULL, name="straight"))
    path, step, seen = recipe(folder, FULL, name="cut"), autoprompt._Search._step, []

    def stopped(self, *arguments):
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        step(self, *arguments)

    monkeypatch.setattr(autoprompt._Search, "_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(path)
    result = run(path)
    assert len(seen) == 4  # of three steps the third was begun twice
    assert result.stages[0].manifest.sessions == 2
    assert TextPrompt.load(result.artefact) == TextPrompt.load(straight.artefact)


def test_the_plan_knows_that_nothing_is_trained(folder):
    found = plan(load_recipe(recipe(folder, FULL, EVALUATE, name="planned"))).stages
    assert found[0].trainable == 0
    assert found[0].memory.gradients == found[0].memory.optimizer == 0
    assert found[0].seconds > 0


REFUSED = {
    "there is no text prompt none": [EVALUATE.replace("}", ", prompt: none}")],
    "cannot follow autoprompt": [FULL, "export: {format: safetensors}"],
    "objective has no effect": [FULL[:-1] + ", objective: pretrain}"],
    "training has no effect": [FULL[:-1] + ", training: {max_steps: 3}}"],
    "perplexity cannot be measured on a model with a text prompt": [
        FULL,
        EVALUATE.replace("accuracy", "perplexity"),
    ],
    "accuracy cannot be measured on a masked model": [EVALUATE],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_refused_before_it_starts(folder, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe(folder, *REFUSED[message], name="refused"))


def test_a_classifier_has_no_words_to_read(folder):
    path = recipe(folder, FULL, name="classifier")
    path.write_text(path.read_text().replace("task: masked", "task: classification"))
    with pytest.raises(RecipeError, match="reads the words of a language model"):
        load_recipe(path)
