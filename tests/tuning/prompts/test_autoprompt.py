"""AutoPrompt: the first-order ranking, what may be a trigger, and a search that only goes up."""

import itertools

import cloze_models as toy
import pytest
import torch

from luthier import method
from luthier.errors import MethodError
from luthier.evaluation.cloze import Scorer, Template
from luthier.evaluation.text_prompt import TextPrompt
from luthier.tuning.prompts import autoprompt
from luthier.tuning.search import State

ASK = {"bert": "{text} {triggers} {mask} .", "llama": "{text} {triggers} {mask}"}
SMALL = {"num_triggers": 1, "iterations": 4, "num_candidates": 5, "batch_size": 16, "accumulation": 1}


def made(kind="bert", model=None, rows=40, **options):
    """The search on a toy model, before it runs."""
    config = method("autoprompt")(**{"template": ASK[kind], "labels": toy.LABELS} | SMALL | options)
    model = toy.untrained(kind) if model is None else model
    scorer = Scorer(model, toy.tokenizer(), batch_size=config.batch_size)
    search = autoprompt._Search(config, scorer, toy.rows(rows), toy.rows(20, 1), 0, State(None))
    search._set_labels(search._labels(search._with(search._initial())))
    return search


def loss_of(model, search, triggers, rows):
    """-log sum of p over the words of the right class, from plain forward passes."""
    total = 0.0
    tokenizer = search.tokenizer
    for row in rows:
        text = f"{row['text']} {tokenizer.decode(triggers)}"
        causal = type(model).__name__.startswith("Llama")
        ids = tokenizer(text)["input_ids"][:-1] if causal else tokenizer(f"{text} <mask> .")["input_ids"]
        column = -1 if causal else ids.index(tokenizer.mask_token_id)
        with torch.no_grad():
            p = model(input_ids=torch.tensor([ids])).logits[0, column].softmax(-1)
        words = tokenizer.convert_tokens_to_ids(toy.LABELS[row["label"]])
        total -= float(p[words].sum().log())
    return total / len(rows)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_gradient_is_that_of_the_loss_in_the_triggers_vectors(kind):
    search = made(kind, num_triggers=2)
    model, rows = search.scorer.model, toy.rows(6)
    triggers = search.tokenizer.convert_tokens_to_ids(["the", "it"])
    found = search._gradient(search._with(triggers), rows)
    weight = model.get_input_embeddings().weight
    # Rows of their own for the two triggers, so that a change moves nothing else (the head is tied).
    step, direction = 1e-2, torch.randn(2, 32, generator=torch.Generator().manual_seed(0))

    def moved(sign):
        hook = model.get_input_embeddings().register_forward_hook(
            lambda _m, ids, out: out + sign * step * sum(
                (ids[0] == token)[..., None] * direction[i] for i, token in enumerate(triggers)
            )
        )  # fmt: skip
        value = loss_of(model, search, triggers, rows)
        hook.remove()
        return value

    assert weight.grad is None
    slope = (moved(1) - moved(-1)) / (2 * step)
    assert slope == pytest.approx(float((found * direction).sum()), rel=2e-2, abs=1e-4)


def test_scores_rank_exactly_where_the_loss_is_linear():
    e = torch.Generator().manual_seed(0)
    embedding, slope = torch.randn(50, 8, generator=e), torch.randn(8, generator=e)
    allowed = torch.ones(50, dtype=torch.bool)
    allowed[[3, 7]] = False
    found = autoprompt.candidate_scores(embedding, slope, allowed)
    losses = torch.tensor([float(vector @ slope) for vector in embedding])  # linear in it
    kept = [i for i in range(50) if i not in (3, 7)]
    assert torch.allclose(found[kept], -losses[kept], atol=1e-5)
    assert found[[3, 7]].isinf().all()
    assert int(found.argmax()) == min(kept, key=lambda i: losses[i])


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_metric_is_the_likelihood_of_the_right_words(kind):
    search = made(kind, metric="likelihood")
    rows, triggers = toy.rows(5), search.tokenizer.convert_tokens_to_ids(["the"])
    (found,) = search._measure([search._with(triggers)], rows)
    assert found == pytest.approx(-loss_of(search.scorer.model, search, triggers, rows), abs=1e-5)


def test_the_loss_can_hold_the_classes_against_each_other_only():
    p, classes = torch.tensor([[0.02, 0.06], [0.3, 0.1]]), torch.tensor([1, 1])
    assert torch.allclose(autoprompt.class_loss(p.log(), classes).exp(), 1 / torch.tensor([0.06, 0.1]))
    found = autoprompt.class_loss(p.log(), classes, normalise=True)
    assert torch.allclose(found.exp(), 1 / torch.tensor([0.75, 0.25]))
    search = made(normalise=True, metric="likelihood")
    rows, template = toy.rows(6), search._with(search._initial())
    scores = TextPrompt({str(template): 1.0}, search.labels).class_scores(search.scorer, rows)
    expected = -torch.nn.functional.cross_entropy(scores, search._classes(rows))
    assert search._measure([template], rows)[0] == pytest.approx(float(expected), abs=1e-5)


def test_order_of_the_rows_changes_nothing():
    search, rows = made(), toy.rows(12)
    template = search._with(search._initial())
    assert torch.allclose(search._gradient(template, rows), search._gradient(template, rows[::-1]), atol=1e-6)


def test_what_may_be_a_trigger():
    search = made()
    words = search.tokenizer.convert_ids_to_tokens(search._allowed().nonzero()[:, 0].tolist())
    assert {"overall", "colour", "film"} <= set(words)
    assert not set(words) & {"good", "bad", "a", ".", "Overall", *toy.SPECIALS}


def test_no_class_word_stands_in_the_triggers_even_where_it_would_help():
    """good and bad are the strongest words; the search must not answer with them."""
    found = method("autoprompt")(template=ASK["bert"], labels=toy.LABELS, **SMALL).search(
        toy.trained("bert"), toy.tokenizer(), toy.loaded(toy.rows(40))
    )
    assert not {"good", "bad"} & set(next(iter(found.templates)).split())


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_it_finds_the_cue_that_asks_and_beats_the_plain_template(kind):
    config = method("autoprompt")(template=ASK[kind], labels=toy.LABELS, **SMALL)
    found = config.search(toy.trained(kind), toy.tokenizer(), toy.loaded(toy.rows(60)))
    assert "overall" in next(iter(found.templates))
    assert found.scores["accuracy"] >= 0.9 > found.scores["start"]


def test_every_token_measured_once_gives_the_best_of_all():
    rows = toy.rows(16)
    search = made(model=toy.trained("bert"), metric="likelihood", num_candidates=200)
    search.train = rows
    state = search._start()
    search._step(state, search._embedding(), search._allowed())
    allowed = search._allowed().nonzero()[:, 0].tolist()
    best = max(allowed, key=lambda token: -loss_of(search.scorer.model, search, [token], rows))
    assert state["triggers"] == [best]


def test_what_is_kept_never_falls_and_the_best_is_the_best_seen(monkeypatch):
    search = made(metric="likelihood", num_triggers=2, iterations=6, rows=16)
    seen = []
    measure = search._measure

    def noted(templates, rows):
        values = measure(templates, rows)
        if rows is search.held_out:
            seen.extend(values)
        return values

    monkeypatch.setattr(search, "_measure", noted)
    found = search.run()
    # Sixteen rows make each batch all rows: the metric of what stands is the same from step to step.
    kept = [entry["likelihood"] for entry in found.history]
    assert all(after > before - 1e-5 for before, after in itertools.pairwise(kept))
    assert kept[-1] > kept[0]
    assert found.scores["likelihood"] == pytest.approx(max(seen))
    assert found.scores["start"] == pytest.approx(seen[0])


def test_without_triggers_it_scores_the_template_as_written(tmp_path):
    model, tokenizer = toy.untrained("bert"), toy.tokenizer()
    found = made(template="{text} it {mask} .", num_triggers=0, model=model).run()
    assert list(found.templates) == ["{text} it {mask} ."]
    plain = TextPrompt({"{text} it {mask} .": 1.0}, toy.LABELS)
    rows = toy.rows(20, 1)
    names = list(found.labels)
    scores = plain.class_scores(Scorer(model, tokenizer), rows)
    right = [list(toy.LABELS)[i] == row["label"] for i, row in zip(scores.argmax(1), rows, strict=True)]
    assert sorted(names) == sorted(toy.LABELS)
    assert found.scores["accuracy"] == pytest.approx(sum(right) / len(right))


def test_candidates_read_back_as_the_tokens_they_are():
    """With pieces of words, some tokens side by side read as others."""
    import tiny

    model, tokenizer = tiny.llama(), tiny.tokenizer()
    rows = [{"text": "The printer", "label": "e"}, {"text": "Order 4711", "label": "o"}] * 8
    config = method("autoprompt")(
        template="{text} {triggers} {mask}", labels={"e": ["the"], "o": ["not"]}, num_triggers=2,
        iterations=3, num_candidates=6, batch_size=8, accumulation=1, metric="likelihood", slots="all",
        initial="of it",
    )  # fmt: skip
    search = autoprompt._Search(config, Scorer(model, tokenizer), rows, rows, 0, State(None))
    found = search.run()
    (text,) = found.templates
    middle = text.removeprefix("{text} ").removesuffix(" {mask}")
    ids = tokenizer(f"The printer {middle}")["input_ids"]
    assert len(ids) == len(tokenizer("The printer")["input_ids"]) + 2


class TestLabels:
    def test_are_found_where_the_model_has_them(self):
        options = {"labels": "search", "num_label_words": 1, "num_triggers": 0}
        found = made(template="{text} overall {mask} .", model=toy.trained("bert"), rows=60, **options)
        assert found.labels == {"down": ["bad"], "up": ["good"]}

    def test_names_stand_for_themselves(self):
        search = made()
        search.names = ["bad", "good"]
        search.config.labels = "names"
        assert search._labels(search.template) == {"bad": ["bad"], "good": ["good"]}

    def test_must_cover_the_classes_of_the_data(self):
        with pytest.raises(MethodError, match="labels has words for up"):
            made(labels={"up": ["good"]})


def test_a_start_of_another_length_is_refused():
    with pytest.raises(MethodError, match="is 2 tokens in the template, not 1"):
        made(initial="it was")


def test_a_template_without_triggers_is_measured_once():
    assert method("autoprompt")(num_triggers=0).rows_scored(500, 20) == 20


def test_triggers_need_their_place():
    with pytest.raises(MethodError, match="no place for triggers"):
        made(template="{text} {mask} .")


def test_the_template_is_kept_as_parts():
    assert Template.of(ASK["bert"]).places == {"text", "triggers", "mask"}
