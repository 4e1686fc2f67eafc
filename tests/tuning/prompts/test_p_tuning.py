"""P-tuning: its encoder by hand and as PEFT's, and its vectors anywhere in a text."""

import json

import peft
import prompt_models as models
import pytest
import small_training as training
import tiny
import torch
from peft import PeftModel
from peft.tuners.p_tuning import PromptEncoder as TheirEncoder
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import luthier
from luthier import method
from luthier.errors import MethodError, ModelError
from luthier.tuning import soft_prompts
from luthier.tuning.attach import attach, trainable

P = 3
MARKER = tiny.VOCAB  # an id beyond the vocabulary, as a token has that a tokenizer was given anew
MODELS = {
    "llama": tiny.llama,
    "gpt2": tiny.gpt2,
    "bert": tiny.bert,
    "roberta": models.roberta,
    "t5": models.deep_t5,
    "bart": models.bart,
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def adapted(base, **options):
    torch.manual_seed(0)
    return attach(base, method("p_tuning")(**({"num_virtual_tokens": P} | options)))


def encoder(model):
    return model.base_model.prompt[0].encoder["default"]


def lstm(cell, states, names):
    """One direction of one layer by hand: the four gates in torch's order, input, forget, cell, output."""
    w_x, w_h, b_x, b_h = (getattr(cell, name).detach() for name in names)
    units = w_h.shape[1]
    h = c = torch.zeros(units)
    found = []
    for x in states:
        i, f, g, o = (w_x @ x + b_x + w_h @ h + b_h).split(units)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        found.append(h)
    return torch.stack(found)


def by_hand(made):
    states = made.embedding.weight.detach()
    for layer in range(made.lstm.num_layers):
        names = [f"{kind}_l{layer}" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        ahead = lstm(made.lstm, states, names)
        back = lstm(made.lstm, states.flip(0), [f"{name}_reverse" for name in names]).flip(0)
        states = torch.cat([ahead, back], 1)
    w1, b1, w2, b2 = (p.detach() for p in made.mlp.parameters())
    return (states @ w1.T + b1).relu() @ w2.T + b2


class TestEncoder:
    @pytest.mark.parametrize("options", [{}, {"encoder_hidden_size": 32}, {"encoder_num_layers": 1}])
    def test_is_an_lstm_in_both_directions_and_two_layers(self, options):
        made = encoder(adapted(tiny.llama(), **options))
        assert torch.allclose(made(), by_hand(made), atol=1e-6)

    def test_of_half_the_width_is_pefts_and_the_authors(self):
        made = encoder(adapted(tiny.llama()))
        config = peft.PromptEncoderConfig(
            num_virtual_tokens=P,
            token_dim=32,
            num_transformer_submodules=1,
            encoder_reparameterization_type="LSTM",
            encoder_hidden_size=16,
            encoder_num_layers=2,
        )
        theirs = TheirEncoder(config)
        names = {"lstm.": "lstm_head.", "mlp.": "mlp_head."}
        state = made.state_dict()
        for old, new in names.items():
            state = {k.replace(old, new): v for k, v in state.items()}
        theirs.load_state_dict(state)
        assert torch.equal(theirs(torch.arange(P)[None])[0], made())

    def test_ties_every_vector_to_every_row(self):
        made = encoder(adapted(tiny.llama()))
        before = made()
        made.embedding.weight.data[1] += 1
        assert ((made() - before).abs().amax(1) > 1e-5).all()

    def test_without_the_lstm_a_row_is_its_own(self):
        made = encoder(adapted(tiny.llama(), encoder="mlp"))
        w1, b1, w2, b2 = made.mlp.parameters()
        expected = (made.embedding.weight @ w1.T + b1).relu() @ w2.T + b2
        assert torch.allclose(made(), expected, atol=1e-6)
        made.embedding.weight.data[1] += 1
        assert ((made() - expected).abs().amax(1) > 1e-5).tolist() == [False, True, False]

    @pytest.mark.parametrize(
        ("options", "count"),
        [
            # P H + 12 H^2 + 16 H of the LSTM + 2 H^2 + 2 H, H = 32
            ({}, P * 32 + 14 * 32**2 + 18 * 32),
            # of the few-shot code: 40 H^2 + 32 H, and 3 H^2 + 2 H
            ({"encoder_hidden_size": 32}, P * 32 + 43 * 32**2 + 34 * 32),
            ({"encoder": "mlp"}, P * 32 + 2 * 32 * 33),
            ({"encoder": "none"}, P * 32),
        ],
    )
    def test_costs_what_is_said(self, options, count):
        assert trainable(adapted(tiny.llama(), **options))[0] == count

    def test_is_dropped_when_saved_and_kept_in_checkpoints(self, tmp_path):
        model = adapted(tiny.llama())
        text = models.ids(1, 6)
        expected = models.forward(model, input_ids=text)
        soft_prompts.save(model, tmp_path / "final")
        stored = load_file(tmp_path / "final" / "adapter_model.safetensors")
        assert torch.allclose(stored["prompt_embeddings"], by_hand(encoder(model)), atol=1e-6)
        model.save_pretrained(tmp_path / "checkpoint")
        for train in (False, True):
            again = PeftModel.from_pretrained(tiny.llama(), tmp_path / "checkpoint", is_trainable=train)
            assert torch.equal(models.forward(again, input_ids=text), expected)
        assert trainable(again) == trainable(model)

    def test_is_evaluated_without_its_dropout_when_saved(self, tmp_path):
        model = adapted(tiny.llama(), encoder_dropout=0.5)
        model.train()
        soft_prompts.save(model, tmp_path / "a")
        stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
        assert torch.allclose(stored["prompt_embeddings"], by_hand(encoder(model)), atol=1e-6)
        assert encoder(model).training

    def test_in_front_its_file_is_pefts(self, tmp_path):
        model = adapted(tiny.llama())
        text = models.ids(1, 6)
        soft_prompts.save(model, tmp_path / "a")
        theirs = PeftModel.from_pretrained(tiny.llama(), tmp_path / "a")
        assert theirs.peft_config["default"].peft_type == "P_TUNING"
        expected = models.forward(model, input_ids=text)
        assert torch.allclose(models.forward(theirs, input_ids=text)[:, P:], expected, atol=1e-5)


class TestPlaces:
    """The vectors made equal to embeddings of real tokens: the text with those tokens in their places."""

    @pytest.fixture(autouse=True)
    def known_marker(self, monkeypatch):
        monkeypatch.setattr("luthier.tuning.input_prompts.token_id", lambda *_: MARKER)

    @staticmethod
    def act_as(model, ids):
        tuner = model.base_model
        with torch.no_grad():
            rows = tuner.trunk[0].get_input_embeddings()(ids)
        tuner.from_peft("default", rows)
        return model

    @every_model
    @pytest.mark.parametrize("places", [[0, 1, 2], [2, 3, 6], [0, 4, 8]])
    def test_are_where_the_marker_stands(self, make, places):
        real, text = models.ids(1, P, seed=3)[0], models.ids(2, 9)
        marked, written = text.clone(), text.clone()
        marked[:, places], written[:, places] = MARKER, real
        if make in (models.deep_t5, models.bart):
            target = {"decoder_input_ids": models.ids(2, 4)}
        else:
            target = {}
        expected = models.forward(make(), input_ids=written, **target)
        model = self.act_as(adapted(make(), marker="<p>"), real)
        assert torch.equal(models.forward(model, input_ids=marked, **target), expected)

    @pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
    def test_differ_from_text_to_text(self, make):
        """Padding on either side, and packed documents."""
        real = models.ids(1, P, seed=3)[0]
        marked, written = [], []
        for number, (length, places) in enumerate([(6, [0, 1, 2]), (9, [1, 5, 7])]):
            text = models.ids(1, length, seed=number)[0]
            places = torch.tensor(places)
            marked.append(text.index_fill(0, places, MARKER))
            written.append(text.index_copy(0, places, real))
        model = self.act_as(adapted(make(), marker="<p>"), real)
        for side in ("left", "right"):
            found = models.forward(model, **models.padded(marked, side))
            expected = models.forward(make(), **models.padded(written, side))
            mask = models.padded(marked, side)["attention_mask"].bool()
            assert torch.allclose(found[mask], expected[mask], atol=1e-5)
        positions = torch.cat([torch.arange(6), torch.arange(9)])[None]
        row = {"position_ids": positions, "use_cache": False}
        found = models.forward(model, input_ids=torch.cat(marked)[None], **row)
        expected = models.forward(make(), input_ids=torch.cat(written)[None], **row)
        assert torch.allclose(found, expected, atol=1e-5)

    def test_are_generated_from(self, tiny_llama):
        real, text = models.ids(1, P, seed=3)[0], models.ids(1, 7)
        marked, written = text.clone(), text.clone()
        marked[:, [0, 3, 4]], written[:, [0, 3, 4]] = MARKER, real
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tiny.PAD}
        expected = tiny.llama().generate(written, attention_mask=torch.ones_like(text), **options)
        model = self.act_as(adapted(tiny_llama, marker="<p>"), real).eval()
        for cache in (True, False):
            mask = torch.ones_like(text)
            found = model.generate(input_ids=marked, attention_mask=mask, **options, use_cache=cache)
            assert torch.equal(found[:, 7:], expected[:, 7:])

    def test_too_few_are_an_error(self, tiny_llama):
        model = adapted(tiny_llama, marker="<p>")
        text = models.ids(2, 6)
        text[0, :3] = MARKER
        text[1, :2] = MARKER
        with pytest.raises(ModelError, match=r"Text 2 of the batch has 2 places for a prompt of 3 rows"):
            model(text)

    def test_every_row_learns_and_the_model_does_not(self, tiny_llama):
        model = adapted(tiny_llama, marker="<p>")
        text = models.ids(2, 9)
        text[:, [1, 4, 6]] = MARKER
        labels = text.masked_fill(text == MARKER, -100)
        model(input_ids=text, labels=labels).loss.backward()
        assert (encoder(model).embedding.weight.grad.abs().amax(1) > 0).all()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())

    def test_are_saved_as_our_own_type(self, tiny_llama, tmp_path):
        model = adapted(tiny_llama, marker="<p>")
        text = models.ids(1, 9)
        text[:, [1, 4, 6]] = MARKER
        expected = models.forward(model, input_ids=text)
        soft_prompts.save(model, tmp_path / "a")
        fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        assert (fields["peft_type"], fields["marker_id"]) == ("P_TUNING_V1", MARKER)
        again = PeftModel.from_pretrained(tiny.llama(), tmp_path / "a", is_trainable=True)
        assert torch.equal(models.forward(again, input_ids=text), expected)
        assert trainable(again)[0] == P * 32


def test_the_marker_is_a_token_of_the_models_tokenizer(tmp_path):
    luthier.save(tiny.llama(), tmp_path / "base", tiny.tokenizer())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = adapted(base, marker="<|im_start|>")
    assert model.peft_config["default"].marker_id == tiny.IM_START
    with pytest.raises(MethodError, match=r"'<\|im_begin\|>' is no token.*<\|im_"):
        adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), marker="<|im_begin|>")


def test_learns_what_the_frozen_model_does_not_say(tiny_llama, tmp_path):
    model = adapted(tiny_llama, num_virtual_tokens=5)
    inputs = training.batch(model, 8, seed=0)
    before = model.eval()(**inputs).loss.item()
    training.train(model, tmp_path, training.rows(model), max_steps=60, learning_rate=1e-2)
    assert model.eval()(**inputs).loss.item() < before - 0.15
