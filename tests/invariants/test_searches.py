"""What every search keeps to: it changes no weight, repeats itself, and goes on where it was."""

from functools import partialmethod

import cloze_models as toy
import pytest
import torch

import luthier
from luthier import taxonomy
from luthier.errors import DataError, MethodError
from luthier.evaluation.cloze import Scorer
from luthier.evaluation.text_prompt import TextPrompt
from luthier.tuning import search

METHODS = [m.name for m in taxonomy.methods("tuning") if m.origin == "luthier" and m.searches]
KINDS = {"bert": " .", "llama": "", "t5": " ."}
# Options that make a search short, by method; END is what stands behind the gap.
OPTIONS = {
    "autoprompt": {"template": "{text} {triggers} {mask}END", "labels": "names", "iterations": 4,
                   "num_triggers": 2, "num_candidates": 3, "batch_size": 8, "accumulation": 1},
    "lpaqa": {"templates": ["{text} was {mask}END", "{text} overall {mask}END"], "epochs": 5},
}  # fmt: skip
every = pytest.mark.parametrize(("name", "kind"), [(n, k) for n in METHODS for k in KINDS])


def config(name, kind):
    def fitted(value):
        if isinstance(value, list):
            return [fitted(each) for each in value]
        return value.replace("END", KINDS[kind]) if isinstance(value, str) else value

    return luthier.method(name)(**{key: fitted(value) for key, value in OPTIONS[name].items()})


def data(count=30, seed=0):
    return toy.loaded(toy.facts(count, seed))


def found(name, kind, model=None, **options):
    model = toy.untrained(kind) if model is None else model
    return config(name, kind).search(model, toy.tokenizer(), data(), **options)


@every
def test_leaves_the_model_as_it_was(name, kind):
    model = toy.untrained(kind).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found(name, kind, model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@every
def test_the_same_seed_finds_the_same(name, kind):
    assert found(name, kind, seed=3) == found(name, kind, seed=3)


@every
def test_what_is_found_is_a_text_that_scores_as_it_says(name, kind, tmp_path):
    model, held_out = toy.untrained(kind), data(20, 5)
    prompt = config(name, kind).search(model, toy.tokenizer(), data(), eval_data=held_out)
    prompt.save(tmp_path)
    loaded = TextPrompt.load(tmp_path)
    predicted, wanted, _ = loaded.classify(model, toy.tokenizer(), held_out)
    assert (predicted == wanted).mean() == pytest.approx(prompt.scores["accuracy"])
    assert loaded.method == name
    assert loaded.base["fingerprint"]


@every
def test_interrupted_it_goes_on_to_the_same_end(name, kind, tmp_path, monkeypatch):
    straight, whole, calls = found(name, kind), Scorer.encode, []

    def counted(*arguments, stop=None):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(Scorer, "encode", counted)
    assert found(name, kind) == straight
    needed = len(calls)
    calls.clear()
    monkeypatch.setattr(Scorer, "encode", partialmethod(counted, stop=needed))
    with pytest.raises(KeyboardInterrupt):
        found(name, kind, folder=tmp_path)
    assert list(tmp_path.glob("checkpoint-*"))  # by this name a recipe's runner knows it
    calls.clear()
    monkeypatch.setattr(Scorer, "encode", counted)
    assert found(name, kind, folder=tmp_path) == straight
    assert len(calls) < needed


@pytest.mark.parametrize("name", METHODS)
def test_there_is_nothing_to_attach(name):
    with pytest.raises(MethodError, match=f"{name} trains no weights"):
        luthier.attach(toy.untrained("bert"), config(name, "bert"))


@pytest.mark.parametrize("name", METHODS)
def test_rows_without_classes_are_refused(name):
    rows = toy.loaded([{"text": "a"}] * 9, "text")
    with pytest.raises(DataError, match="needs classes"):
        config(name, "bert").search(toy.untrained("bert"), toy.tokenizer(), rows)


@pytest.mark.parametrize("name", METHODS)
def test_the_estimate_grows_with_the_rows(name):
    assert 0 < config(name, "bert").rows_scored(2, 10) < config(name, "bert").rows_scored(8, 100)


def test_rows_are_held_out_by_the_seed():
    rows = data(50)
    train, held_out = search.split_rows(rows, None, 0)
    assert (len(train), len(held_out)) == (40, 10)
    assert search.split_rows(rows, None, 0) == (train, held_out) != search.split_rows(rows, None, 1)
    assert sorted(map(str, [*train, *held_out])) == sorted(map(str, rows.records))
    with pytest.raises(DataError, match="too few"):
        search.split_rows(data(1), None, 0)
