"""Learnt rows in the input: where they go, and that the model takes them for tokens of its own."""

import prompt_models as models
import pytest
import small_training as training
import tiny
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
)

from luthier import method
from luthier.acceleration import documents, label_only
from luthier.data.packing import prove_isolated
from luthier.errors import MethodError, ModelError
from luthier.tuning.attach import task_type
from luthier.tuning.input_prompts import layout

P = 3


def gemma3(seed=0):
    """Its embedding layer scales what it looks up."""
    config = Gemma3TextConfig(**models.SIZES, head_dim=8, num_key_value_heads=2, max_position_embeddings=64)
    return tiny._build(Gemma3ForCausalLM, config, seed)


def bloom(seed=0):
    config = BloomConfig(vocab_size=tiny.VOCAB, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.1)
    return tiny._build(BloomForCausalLM, config, seed)


def falcon(seed=0):
    config = FalconConfig(vocab_size=tiny.VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    return tiny._build(FalconForCausalLM, config, seed)


def deberta(seed=0):
    config = DebertaV2Config(
        **models.SIZES, **models.STILL, max_position_embeddings=64, pad_token_id=tiny.PAD
    )
    return tiny._build(DebertaV2ForSequenceClassification, config, seed)


DECODERS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "gemma3": gemma3, "bloom": bloom, "falcon": falcon}
ENCODERS = {
    "bert": tiny.bert,
    "roberta": models.roberta,
    "distilbert": models.distilbert,
    "modernbert": models.modernbert,
    "deberta": deberta,
}
ENCODER_DECODERS = {"t5": models.deep_t5, "bart": models.bart}
MODELS = DECODERS | ENCODERS | ENCODER_DECODERS


def each(found):
    return pytest.mark.parametrize("make", found.values(), ids=found)


def adapted(base, **options):
    torch.manual_seed(0)
    config = method("prompt")(**({"num_virtual_tokens": P, "init": "random"} | options))
    config.task_type = task_type(base)
    return get_peft_model(base, config)


def act_as(model, ids):
    """Make the prompt the embeddings of real tokens (1, P), as the model's own layer gives them."""
    tuner = model.base_model
    with torch.no_grad():
        tuner.prompt[0].table["default"].data = tuner.trunk[0].get_input_embeddings()(ids[0]).clone()
    return model


class TestLayout:
    """Columns of the longer batch: a, b, c are the prompt, numbers the text."""

    @staticmethod
    def shown(text, *args):
        found = layout(text, *args)
        prompt = torch.tensor([ord(c) for c in "abc"])
        longer = found.merge(prompt, text)
        assert torch.equal(found.text(longer), text)
        return ["".join(chr(n) if n > 96 else str(n) for n in row) for row in longer.tolist()]

    text = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])

    def test_in_front_without_padding(self):
        assert self.shown(self.text, None, None, P, 0) == ["abc1234", "abc5678"]

    def test_beside_the_first_real_token(self):
        mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
        assert self.shown(self.text, mask, None, P, 0) == ["12abc34", "abc5678"]

    def test_behind_the_first_real_token(self):
        mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
        assert self.shown(self.text, mask, None, P, 1) == ["12abc34", "5abc678"]
        assert self.shown(self.text, None, None, P, 1) == ["1abc234", "5abc678"]

    def test_before_every_packed_document(self):
        positions = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
        assert self.shown(self.text, None, positions, P, 0) == ["abc12abc34", "abc5678abc"]

    def test_whole_numbers_of_positions_are_one_document(self):
        assert self.shown(self.text, None, torch.tensor([[4, 5, 6, 7]]), P, 0) == ["abc1234", "abc5678"]


class TestModel:
    @each(DECODERS)
    def test_of_a_texts_embeddings_is_the_text(self, make):
        start, text = models.ids(1, P), models.ids(2, 7, seed=1)
        expected = models.forward(make(), input_ids=torch.cat([start.expand(2, -1), text], 1))[:, P:]
        assert torch.equal(models.forward(act_as(adapted(make()), start), input_ids=text), expected)

    @each(ENCODERS)
    def test_in_an_encoder_it_is_text_behind_the_first_token(self, make):
        start, text = models.ids(1, P), models.ids(2, 7, seed=1)
        longer = torch.cat([text[:, :1], start.expand(2, -1), text[:, 1:]], 1)
        expected = models.forward(make(), input_ids=longer)
        assert torch.equal(models.forward(act_as(adapted(make()), start), input_ids=text), expected)

    @each(ENCODER_DECODERS)
    @pytest.mark.parametrize("padding", [False, True])
    def test_in_an_encoder_decoder_it_is_the_encoders_text(self, make, padding):
        start, text, target = models.ids(1, P), models.ids(2, 7, seed=1), models.ids(2, 4, seed=2)
        mask = torch.ones_like(text)
        mask[0, 5:] = 1 - int(padding)
        expected = models.forward(
            make(),
            input_ids=torch.cat([start.expand(2, -1), text], 1),
            attention_mask=torch.cat([torch.ones(2, P).long(), mask], 1),
            decoder_input_ids=target,
        )
        model = act_as(adapted(make()), start)
        inputs = {"input_ids": text, "attention_mask": mask, "decoder_input_ids": target}
        assert torch.equal(models.forward(model, **inputs), expected)

    @each(DECODERS)
    def test_a_decoder_that_classifies_reads_the_last_token_of_the_text(self, make):
        """PEFT's class gives it vectors without ids, and it reads padding."""
        if make in (gemma3,):
            pytest.skip("has no classifier")
        config = make().config
        config.num_labels, config.pad_token_id = 3, tiny.PAD
        from transformers import AutoModelForSequenceClassification

        def build():
            torch.manual_seed(0)
            return AutoModelForSequenceClassification.from_config(config).eval()

        start = models.ids(1, P)
        texts = [models.ids(1, n, seed=n)[0] for n in (4, 7)]
        model = act_as(adapted(build()), start)
        alone = torch.cat([models.forward(build(), input_ids=torch.cat([start, t[None]], 1)) for t in texts])
        for side in ("left", "right"):
            if side == "left" and make in (falcon, bloom):
                continue
            found = models.forward(model, **models.padded(texts, side))
            assert torch.allclose(found, alone, atol=1e-5)

    @each({"bert": tiny.bert})
    def test_kinds_of_tokens_keep_their_tokens(self, make):
        start, text = models.ids(1, P), models.ids(1, 7, seed=1)
        kinds = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
        longer = torch.cat([text[:, :1], start, text[:, 1:]], 1)
        longer_kinds = torch.cat([torch.zeros(1, P).long(), kinds], 1)
        expected = models.forward(make(), input_ids=longer, token_type_ids=longer_kinds)
        model = act_as(adapted(make()), start)
        assert torch.equal(models.forward(model, input_ids=text, token_type_ids=kinds), expected)

    @each({"llama": tiny.llama, "gpt2": tiny.gpt2, "t5": models.deep_t5})
    def test_vectors_instead_of_ids(self, make):
        model, text = adapted(make()), models.ids(2, 7)
        target = {"decoder_input_ids": models.ids(2, 4)} if model.config.is_encoder_decoder else {}
        vectors = model.get_input_embeddings()(text)
        expected = models.forward(model, input_ids=text, **target)
        assert torch.equal(models.forward(model, inputs_embeds=vectors, **target), expected)

    @each(MODELS)
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing_gives_the_same_gradient(self, make, reentrant):
        found = [
            next(g for n, g in gradients.items() if ".table." in n)
            for gradients in models.gradients(lambda: adapted(make()), reentrant)
        ]
        assert (found[0].abs().amax(1) > 0).all(), "every row gets some"
        assert torch.allclose(*found, atol=1e-6)

    @each(MODELS)
    def test_taken_off_leaves_the_base_as_it_was(self, make):
        base = make()
        names = [n for n, _ in base.named_modules()]
        inputs = training.batch(base)
        before = models.forward(base, **inputs)
        model = adapted(base)
        assert not torch.allclose(models.forward(model, **inputs), before, atol=1e-4)
        with model.disable_adapter():
            assert torch.equal(models.forward(model, **inputs), before)
        back = model.unload()
        assert [n for n, _ in back.named_modules()] == names
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in back.modules())
        assert torch.equal(models.forward(back, **inputs), before)

    def test_hidden_states_have_the_texts_length_too(self, tiny_llama):
        model = adapted(tiny_llama).eval()
        out = model(models.ids(2, 7), output_hidden_states=True)
        assert {h.shape for h in out.hidden_states} == {(2, 7, 32)}
        logits = model(models.ids(2, 7), return_dict=False)[0]
        assert torch.equal(logits, out.logits)

    def test_an_id_beyond_the_prompt_is_still_an_error(self, tiny_llama):
        model = adapted(tiny_llama)
        with pytest.raises(IndexError):
            model(torch.tensor([[tiny.VOCAB + P]]))

    def test_text_that_outgrows_learnt_positions_is_refused(self, tiny_gpt2):
        model = adapted(tiny_gpt2)
        assert models.forward(model, input_ids=models.ids(1, 256 - P)).isfinite().all()
        with pytest.raises(ModelError, match=r"254 tokens behind a prompt of 3.*256 positions"):
            model(models.ids(1, 254))

    def test_a_mask_made_by_hand_is_refused(self, tiny_llama):
        model = adapted(tiny_llama)
        with pytest.raises(ModelError, match=r"needs the mask of the text.*static cache.*prefix"):
            model(models.ids(1, 4), attention_mask=torch.ones(1, 1, 4, 4).bool())

    def test_what_embeds_no_ids_is_refused(self):
        with pytest.raises(MethodError, match=r"Linear has no layer that embeds token ids.*lora"):
            method("prompt")().check_model(nn.Linear(2, 2))


class TestAdapters:
    def test_both_stand_one_after_the_other(self):
        model = adapted(tiny.llama())
        model.add_adapter("second", method("prompt")(num_virtual_tokens=2, init="random"))
        table = model.base_model.prompt[0].table
        model.base_model.set_adapter(["default", "second"])
        text = models.ids(1, 6)
        one = adapted(tiny.llama(), num_virtual_tokens=5)
        one.base_model.prompt[0].table["default"].data = torch.cat([table["default"], table["second"]]).data
        assert torch.equal(models.forward(model, input_ids=text), models.forward(one, input_ids=text))


class TestGeneration:
    options = pytest.mark.parametrize("cache", [True, False])

    @each({"llama": tiny.llama, "gpt2": tiny.gpt2, "bloom": bloom} | ENCODER_DECODERS)
    @options
    def test_is_that_of_the_longer_text(self, make, cache):
        start = models.ids(1, P)
        texts = [models.ids(1, n, seed=n)[0] for n in (3, 7)]
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": tiny.PAD}
        model = act_as(adapted(make()), start).eval()
        batch = models.padded(texts, "right" if model.config.is_encoder_decoder else "left")
        found = model.generate(**batch, **options, use_cache=cache)
        for row, text in enumerate(texts):
            longer = torch.cat([start, text[None]], 1)
            whole = make().generate(longer, attention_mask=torch.ones_like(longer), **options)
            assert torch.equal(found[row, -6:], whole[0, -6:])

    def test_step_by_step_without_a_mask(self, tiny_llama):
        model, text = adapted(tiny_llama).eval(), models.ids(1, 6)
        expected = models.forward(model, input_ids=text)
        cache, found = None, []
        for token in text[0]:
            out = model(token[None, None], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
        assert torch.allclose(torch.cat(found, 1), expected, atol=1e-5)


class TestPackedRows:
    @each({"llama": tiny.llama, "gpt2": tiny.gpt2})
    def test_each_document_has_a_prompt_of_its_own(self, make):
        lengths = (4, 7, 3)
        texts = [models.ids(1, n, seed=n) for n in lengths]
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        row = {"input_ids": torch.cat(texts, 1), "position_ids": positions, "use_cache": False}
        model = adapted(make())
        prove_isolated(model)
        expected = torch.cat([models.forward(model, input_ids=text) for text in texts], 1)
        assert torch.allclose(models.forward(model, **row), expected, atol=1e-5)
        assert documents.why_not(model) is None
        with documents.by_documents(model):
            assert torch.allclose(models.forward(model, **row), expected, atol=1e-5)
        labels = torch.where(positions == 0, -100, row["input_ids"])
        with label_only.label_only(model):
            loss = model(**row, labels=labels).loss
        parts = [model(input_ids=text, labels=text).loss * (text.shape[1] - 1) for text in texts]
        assert torch.allclose(loss, sum(parts) / (sum(lengths) - 3), atol=1e-5)
