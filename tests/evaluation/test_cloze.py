"""Cloze prompts: what a template becomes, where its gap is, and the words' likelihoods there."""

import cloze_models as toy
import pytest
import tiny
import torch
from torch import nn

from luthier import method
from luthier.errors import MethodError, ModelError
from luthier.evaluation.cloze import Cloze, Scorer, Template, label_scores
from luthier.tuning.attach import attach

ROWS = [{"text": "bright film"}, {"text": "a dull story the plot"}, {"text": "music"}]


class TestTemplate:
    def test_puts_the_row_in_and_says_where(self):
        text, spans = Template.of("So {text}: it was {mask}.").render({"text": "fine"}, "<mask>")
        assert text == "So fine: it was <mask>."
        assert text[slice(*spans["text"])] == "fine"
        assert text[slice(*spans["mask"])] == "<mask>"

    def test_ends_before_the_gap_of_a_causal_model(self):
        text, _ = Template.of("{text} It was {mask}").render({"text": "Fine."}, None)
        assert text == "Fine. It was"

    def test_is_read_again_from_what_it_shows_triggers_and_braces_included(self):
        from dataclasses import replace

        filled = replace(Template.of("{text} {{x}} {triggers} {mask}"), triggers="a {b}")
        again = Template.of(str(filled))
        assert again.render({"text": "t"}, "M")[0] == filled.render({"text": "t"}, "M")[0] == "t {x} a {b} M"

    def test_without_triggers_their_place_leaves_no_gap(self):
        assert Template.of("{text} {triggers} it {mask}").render({"text": "t"}, "M")[0] == "t it M"

    @pytest.mark.parametrize("text", ["", " {mask} {mask}", " {mask", " {txt} {mask}"])
    def test_that_cannot_ask_is_refused(self, text):
        with pytest.raises(MethodError):
            Template.of("{text}" + text)

    def test_without_the_rows_text_is_refused(self):
        with pytest.raises(MethodError):
            Template.of("It was {mask}")


def ids_of(model, tokenizer, text):
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    # A causal model's text goes on: it begins with <cls> and has no <sep> behind it.
    return ids[:, :-1] if type(model).__name__.endswith("CausalLM") else ids


def at_the_gap(model, tokenizer, template, row):
    """log p over the vocabulary from one plain forward pass, by the definition of the gap."""
    kind = type(model).__name__
    text = template.replace("{text}", row["text"])
    if kind == "LlamaForCausalLM":
        ids = ids_of(model, tokenizer, text.replace(" {mask}", ""))
        return model(input_ids=ids).logits[0, -1].log_softmax(-1)
    if kind == "BertForMaskedLM":
        ids = ids_of(model, tokenizer, text.replace("{mask}", "<mask>"))
        column = ids[0].tolist().index(tokenizer.mask_token_id)
        return model(input_ids=ids).logits[0, column].log_softmax(-1)
    ids = ids_of(model, tokenizer, text.replace("{mask}", "<extra_id_0>"))
    start = torch.tensor([[0, tokenizer.convert_tokens_to_ids("<extra_id_0>")]])
    return model(input_ids=ids, decoder_input_ids=start).logits[0, 1].log_softmax(-1)


TEMPLATES = {"bert": "a {text} was {mask} .", "llama": "a {text} was {mask}", "t5": "a {text} was {mask} ."}


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_likelihoods_are_those_of_plain_forward_passes_whatever_the_batch(kind):
    model, tokenizer = toy.untrained(kind), toy.tokenizer()
    template = Template.of(TEMPLATES[kind])
    words = tokenizer.convert_tokens_to_ids(["good", "bad", "red"])
    for batch_size in (1, 3):
        scorer = Scorer(model, tokenizer, batch_size=batch_size)
        found = scorer.log_probs(scorer.encode(template, ROWS), words)
        with torch.no_grad():
            expected = torch.stack(
                [at_the_gap(model, tokenizer, TEMPLATES[kind], row)[words] for row in ROWS]
            )
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_pieces_of_words_are_read_as_the_whole_text_is(make):
    model, tokenizer = make(), tiny.tokenizer()
    scorer = Scorer(model, tokenizer)
    row = {"text": "The printer of the second floor"}
    found = scorer.encode(Template.of("{text} does not {mask}"), [row])[0]
    assert found.ids == tokenizer("The printer of the second floor does not")["input_ids"]
    assert found.gap == len(found.ids) - 1


@pytest.mark.parametrize("make", [toy.trained, toy.untrained, tiny.llama, tiny.gpt2])
def test_texts_that_begin_alike_are_read_as_whole_ones_are(make, monkeypatch):
    own = make in (tiny.llama, tiny.gpt2)
    model, tokenizer = make() if own else make("llama"), tiny.tokenizer() if own else toy.tokenizer()
    scorer = Scorer(model, tokenizer, batch_size=1)
    ends = ["was {mask}", "was the plot the {mask}", "{mask}"]
    clozes = [scorer.encode(Template.of(f"{{text}} {end}"), ROWS) for end in ends]
    expected = torch.stack([scorer.log_probs(each, [7, 8, 9]) for each in clozes], 1)
    monkeypatch.setattr(Scorer, "log_probs", None)
    found = scorer.variant_log_probs(list(zip(*clozes, strict=True)), [7, 8, 9])
    assert torch.allclose(found, expected, atol=1e-5)


def test_texts_that_begin_apart_are_read_whole():
    scorer = Scorer(toy.untrained("llama"), toy.tokenizer())
    clozes = [scorer.encode(Template.of(text), ROWS) for text in ("{text} {mask}", "the {text} {mask}")]
    without = [[Cloze(c.ids[1:], c.gap - 1, []) for c in each] for each in clozes]  # without <cls>
    found = scorer.variant_log_probs(list(zip(*without, strict=True)), [7])
    assert torch.allclose(found[:, 1], scorer.log_probs(without[1], [7]), atol=1e-6)


def test_triggers_that_are_not_there_have_no_tokens():
    """Their place lies within a token that carries its space."""
    scorer = Scorer(tiny.llama(), tiny.tokenizer())
    (found,) = scorer.encode(Template.of("{text} {triggers}the {mask}"), [{"text": "The printer"}])
    assert found.triggers == []


def test_the_head_computes_the_gaps_only():
    model, seen = toy.untrained("bert"), []
    model.cls.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].shape))
    scorer = Scorer(model, toy.tokenizer())
    scorer.log_probs(scorer.encode(Template.of("{text} {mask} ."), ROWS), [7])
    assert seen == [(3, 1, 32)]


def test_a_text_that_is_too_long_loses_its_end_and_the_template_stays():
    model, tokenizer = toy.untrained("bert"), toy.tokenizer()
    row = {"text": " ".join(["bright"] + ["film"] * 200)}
    scorer = Scorer(model, tokenizer)
    (cloze,) = scorer.encode(Template.of("{text} it was {mask} ."), [row])
    words = tokenizer.convert_ids_to_tokens(cloze.ids)
    assert len(words) <= 64
    assert words[:2] == ["<cls>", "bright"]
    assert words[-5:] == ["it", "was", "<mask>", ".", "<sep>"]
    with pytest.raises(MethodError, match="alone has"):
        Scorer(model, tokenizer, max_length=5).encode(Template.of("it was it was {text} {mask} ."), [row])


def test_words_of_a_class_are_joined():
    p = torch.tensor([[0.1, 0.2, 0.3, 0.05]])
    groups = [[0, 1], [2]]
    assert torch.allclose(label_scores(p.log(), groups).exp(), torch.tensor([[0.3, 0.3]]))
    means = torch.tensor([[(p[0, 0] * p[0, 1]).sqrt(), p[0, 2]]])
    assert torch.allclose(label_scores(p.log(), groups, "mean").exp(), means)
    # A word named twice changes a sum, and no mean; single words make the two the same.
    doubled = label_scores(p.log()[:, [0, 0, 1, 1, 2]], [[0, 1, 2, 3], [4]], "mean")
    assert torch.allclose(doubled, label_scores(p.log(), groups, "mean"))
    single = [[0], [2]]
    assert torch.equal(label_scores(p.log(), single), label_scores(p.log(), single, "mean"))


def test_a_learnt_prompt_at_marked_places_of_the_template_is_read_as_the_words_it_copies():
    """P-tuning's vectors stand anywhere in a template; equal to a word's, they are that word."""
    tokenizer = toy.tokenizer()
    model = toy.untrained("bert")
    scorer = Scorer(model, tokenizer)
    words = tokenizer.convert_tokens_to_ids(["good", "bad"])
    expected = scorer.log_probs(scorer.encode(Template.of("{text} was {mask} the ."), ROWS), words)
    copied = model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(["was", "the"])].detach()
    marker = {"marker": "colour", "marker_id": tokenizer.convert_tokens_to_ids("colour")}
    config = method("p_tuning")(num_virtual_tokens=2, encoder="none", **marker)
    tuned = attach(model, config)
    with torch.no_grad():
        next(p for p in tuned.parameters() if p.requires_grad).copy_(copied)
    scorer = Scorer(tuned, tokenizer)
    found = scorer.log_probs(scorer.encode(Template.of("{text} colour {mask} colour ."), ROWS), words)
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_prompt_in_front_leaves_the_gap_where_it_is():
    tokenizer, model = toy.tokenizer(), toy.untrained("llama")
    words = tokenizer.convert_tokens_to_ids(["good", "bad"])
    template = Template.of("{text} was {mask}")
    tuned = attach(model, method("prompt")(num_virtual_tokens=3, init="random"))
    scorer = Scorer(tuned, tokenizer)
    found = scorer.log_probs(scorer.encode(template, ROWS), words)
    with torch.no_grad():
        for row, line in zip(ROWS, found, strict=True):
            ids = ids_of(model, tokenizer, f"{row['text']} was")
            assert torch.allclose(tuned(input_ids=ids).logits[0, -1].log_softmax(-1)[words], line, atol=1e-5)


class TestRefusals:
    def test_words_behind_the_gap_of_a_causal_model(self):
        scorer = Scorer(toy.untrained("llama"), toy.tokenizer())
        with pytest.raises(MethodError, match="goes on behind its gap"):
            scorer.encode(Template.of("{text} was {mask} ."), ROWS)

    def test_a_word_of_several_tokens_names_them(self):
        with pytest.raises(MethodError, match="not one token"):
            Scorer(tiny.llama(), tiny.tokenizer()).word_id("xylophone")

    def test_a_word_that_the_tokenizer_does_not_know(self):
        with pytest.raises(MethodError, match="not one token"):
            Scorer(toy.untrained("bert"), toy.tokenizer()).word_id("zebra")

    def test_a_model_without_words(self):
        with pytest.raises(ModelError, match="predicts no words"):
            Scorer(tiny.bert(), tiny.tokenizer())
        with pytest.raises(ModelError, match="no token for a gap"):
            Scorer(tiny.t5(), tiny.tokenizer())


def test_a_word_behind_a_space_is_the_token_that_carries_it():
    tokenizer = tiny.tokenizer()
    scorer = Scorer(tiny.llama(), tokenizer)
    (spaced,) = scorer.word_ids("the", spaced=True)
    assert tokenizer.decode([spaced]) == " the"
    assert scorer.word_ids("e", spaced=False) == tokenizer("e")["input_ids"]


def test_vectors_are_leaves_and_weights_get_no_gradient():
    model = toy.untrained("bert")
    scorer = Scorer(model, toy.tokenizer())
    clozes = scorer.encode(Template.of("{text} {mask} ."), ROWS)
    with scorer.input_vectors() as vectors:
        loss = nn.functional.log_softmax(scorer.logits(clozes), -1)[:, 7].sum()
        (slope,) = torch.autograd.grad(loss, vectors[0])
    assert slope.shape == (3, max(len(c.ids) for c in clozes), 32)
    assert all(p.grad is None for p in model.parameters())
