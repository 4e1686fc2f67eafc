"""Learnt keys and values before the text's: the attention function, where it goes, and what it leaves."""

import copy

import prompt_models as models
import pytest
import small_training as training
import tiny
import torch
from peft import get_peft_model
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, DebertaV2Config, DebertaV2ForSequenceClassification

from luthier import method
from luthier.acceleration import documents, label_only
from luthier.data.packing import prove_isolated
from luthier.errors import MethodError, ModelError
from luthier.tuning.attach import attach, task_type
from luthier.tuning.attention_prompts import AttentionPrompt, Site, find_sites, over, prompted_attention

P = 5
MODELS = {
    "llama": tiny.llama,
    "gpt2": tiny.gpt2,
    "bert": tiny.bert,
    "roberta": models.roberta,
    "distilbert": models.distilbert,
    "modernbert": models.modernbert,
    "t5": models.deep_t5,
    "bart": models.bart,
}
DECODERS = {"llama": tiny.llama, "gpt2": tiny.gpt2}
ENCODER_DECODERS = {"t5": models.deep_t5, "bart": models.bart}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
decoders = pytest.mark.parametrize("make", DECODERS.values(), ids=DECODERS)
encoder_decoders = pytest.mark.parametrize("make", ENCODER_DECODERS.values(), ids=ENCODER_DECODERS)


def adapted(base, **options):
    """The model with a prefix of length P that learns directly."""
    torch.manual_seed(0)
    config = method("prefix")(**({"num_virtual_tokens": P, "prefix_projection": False} | options))
    config.task_type = task_type(base)
    return get_peft_model(base, config)


def prompts(model):
    return [m for m in model.modules() if isinstance(m, AttentionPrompt)]


class TestFunction:
    """Against softmax written out, in double precision."""

    @staticmethod
    def reference(q, k, v, pair, scores_mask=None, bias=None):
        """q (B, H, T, d), k and v (B, G, S, d), the prompt in front and open to every query."""
        groups = q.shape[1] // k.shape[1]
        k = torch.cat([pair[0].expand(len(k), -1, -1, -1), k], 2).repeat_interleave(groups, 1)
        v = torch.cat([pair[1].expand(len(v), -1, -1, -1), v], 2).repeat_interleave(groups, 1)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if bias is not None:
            scores[..., P:] += bias
        if scores_mask is not None:
            scores[..., P:] = scores[..., P:].masked_fill(~scores_mask, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    @pytest.fixture
    def parts(self):
        class Attention(nn.Module):
            is_causal = True
            num_key_value_groups = 2

        torch.manual_seed(0)
        module = Attention()
        module.prompt = AttentionPrompt(Site("", "self", 0, 4, 2, 8, 8))
        module.prompt.add_table("default", P, 1.0)
        module.double().eval()
        pair = module.prompt(torch.empty(1, dtype=torch.float64))

        def tensors(queries, keys, batch=2):
            sizes = [(4, queries), (2, keys), (2, keys)]
            return [torch.randn(batch, heads, length, 8, dtype=torch.float64) for heads, length in sizes]

        return module, pair, tensors

    @staticmethod
    def run(module, q, k, v, mask=None, inner="sdpa", **kwargs):
        return prompted_attention(module, q, k, v, mask, inner=inner, **kwargs)[0]

    def test_causal_without_a_mask(self, parts):
        module, pair, tensors = parts
        q, k, v = tensors(7, 7)
        causal = torch.ones(7, 7, dtype=torch.bool).tril()
        assert torch.allclose(self.run(module, q, k, v), self.reference(q, k, v, pair, causal), atol=1e-12)

    def test_into_an_empty_static_cache(self, parts):
        module, pair, tensors = parts
        q, k, v = tensors(3, 9)  # six places are still empty
        causal = torch.ones(3, 3, dtype=torch.bool).tril()
        expected = self.reference(q, k[:, :, :3], v[:, :, :3], pair, causal)
        assert torch.allclose(self.run(module, q, k, v), expected, atol=1e-12)

    def test_one_query_sees_everything(self, parts):
        module, pair, tensors = parts
        q, k, v = tensors(1, 6)
        assert torch.allclose(self.run(module, q, k, v), self.reference(q, k, v, pair), atol=1e-12)

    def test_bidirectional_and_across(self, parts):
        module, pair, tensors = parts
        module.is_causal = False
        q, k, v = tensors(4, 6)
        assert torch.allclose(self.run(module, q, k, v), self.reference(q, k, v, pair), atol=1e-12)

    @pytest.mark.parametrize("additive", [False, True])
    def test_with_a_mask(self, parts, additive):
        module, pair, tensors = parts
        q, k, v = tensors(4, 6)
        seen = torch.rand(2, 1, 4, 6) < 0.5
        mask = torch.where(seen, 0.0, -torch.inf).double() if additive else seen
        expected = self.reference(q, k, v, pair, seen)
        assert torch.allclose(self.run(module, q, k, v, mask), expected, atol=1e-12)

    @pytest.mark.parametrize("causal", [False, True])
    def test_with_a_position_bias(self, parts, causal):
        module, pair, tensors = parts
        module.is_causal = causal
        q, k, v = tensors(6, 6)
        bias = torch.randn(1, 4, 6, 6, dtype=torch.float64)
        seen = torch.ones(6, 6, dtype=torch.bool).tril() if causal else None
        expected = self.reference(q, k, v, pair, seen, bias)
        assert torch.allclose(self.run(module, q, k, v, position_bias=bias), expected, atol=1e-12)

    def test_is_a_mixture_of_two_attentions(self, parts):
        """o = a Attn(q, K_pre, V_pre) + (1 - a) Attn(q, K, V), a the prompt's share of the scores."""
        module, pair, tensors = parts
        module.is_causal, module.num_key_value_groups = False, 1
        q, k, v = tensors(4, 6)
        q = q[:, :2]
        share = [(q @ keys.mT / 8**0.5).exp().sum(-1, keepdim=True) for keys in (pair[0], k)]
        a = share[0] / (share[0] + share[1])
        alone = [(q @ keys.mT / 8**0.5).softmax(-1) @ values for keys, values in (pair, (k, v))]
        expected = (a * alone[0] + (1 - a) * alone[1]).transpose(1, 2)
        assert torch.allclose(self.run(module, q, k, v), expected, atol=1e-12)

    def test_order_of_the_pairs_does_not_matter(self, parts):
        module, _, tensors = parts
        q, k, v = tensors(4, 4)
        before = self.run(module, q, k, v)
        table = module.prompt.table["default"]
        table.data = table.data[torch.randperm(P)]
        assert torch.allclose(self.run(module, q, k, v), before, atol=1e-12)


class TestSites:
    @every_model
    def test_are_the_same_without_numbers(self, make):
        with torch.device("meta"):
            bare = make()
        assert find_sites(bare) == find_sites(make())

    def test_of_grouped_heads_have_the_keys_heads(self):
        assert [(s.heads, s.key_dim, s.size) for s in find_sites(tiny.llama())] == [(2, 8, 32)] * 2

    @encoder_decoders
    def test_of_an_encoder_decoder_are_three_kinds(self, make):
        kinds = [(s.kind, s.layer) for s in find_sites(make())]
        assert kinds == [
            *(("encoder", layer) for layer in range(3)),
            *((kind, layer) for layer in range(2) for kind in ("decoder", "cross")),
        ]

    def test_an_architecture_with_its_own_attention_is_refused(self):
        bloom = BloomForCausalLM(BloomConfig(vocab_size=99, hidden_size=16, n_layer=1, n_head=2))
        deberta = DebertaV2ForSequenceClassification(DebertaV2Config(**models.SIZES))
        for model in (bloom, deberta):
            with pytest.raises(
                MethodError, match=rf"{type(model).__name__}.*AttentionInterface.*method: prompt"
            ):
                adapted(model)
            assert "prompts" not in model.config._attn_implementation

    def test_another_kernel_is_refused(self, tiny_llama):
        tiny_llama.config._attn_implementation_internal = "flex_attention"
        with pytest.raises(MethodError, match=r"sdpa or eager; .* uses flex_attention.*attn: sdpa"):
            adapted(tiny_llama)


class TestModel:
    @decoders
    def test_of_a_texts_keys_and_values_is_the_text(self, make):
        """The best test of all: the prefix made of what the model computes for S acts as S in front of x."""
        base = make()
        start, text = models.ids(1, P), models.ids(2, 9, seed=1)
        expected = models.forward(base, input_ids=torch.cat([start.expand(2, -1), text], 1))[:, P:]
        cache = base(start).past_key_values
        model = adapted(base)
        for layer, kept in zip(prompts(model), cache.layers, strict=True):
            pair = [t[0].transpose(0, 1).flatten(1) for t in (kept.keys, kept.values)]
            layer.table["default"].data = torch.cat(pair, 1)
        assert torch.allclose(models.forward(model, input_ids=text), expected, atol=1e-5)

    @every_model
    def test_disabled_is_the_base_exactly(self, make):
        base = make()
        inputs = training.batch(base)
        before = models.forward(base, **inputs)
        model = adapted(base)
        assert not torch.allclose(models.forward(model, **inputs), before, atol=1e-3)
        with model.disable_adapter():
            assert torch.equal(models.forward(model, **inputs), before)

    @every_model
    def test_taken_off_leaves_the_base_as_it_was(self, make):
        base = make()
        names, attention = [n for n, _ in base.named_modules()], base.config._attn_implementation
        inputs = training.batch(base)
        before = models.forward(base, **inputs)
        back = adapted(base).unload()
        assert [n for n, _ in back.named_modules()] == names
        assert back.config._attn_implementation == attention
        assert not any(m._forward_pre_hooks for m in back.modules())
        assert torch.equal(models.forward(back, **inputs), before)

    @every_model
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_changes_nothing(self, make, side):
        model = adapted(make())
        model.eval()
        texts = [models.ids(1, 5, seed=1)[0], models.ids(1, 9, seed=2)[0]]
        target = {}
        if model.config.is_encoder_decoder:
            if side == "left" and "T5" not in type(model.get_base_model()).__name__:
                pytest.skip("learnt positions of an encoder do not look at the mask")
            target["decoder_input_ids"] = models.ids(1, 4)
        many = {k: v.expand(2, -1) for k, v in target.items()}
        logits = models.forward(model, **models.padded(texts, side), **many)
        for row, text in enumerate(texts):
            alone = models.forward(model, input_ids=text[None], **target)[0]
            found = logits[row]
            if alone.ndim == 2 and not target:
                found = found[-len(text) :] if side == "left" else found[: len(text)]
            if side == "left" and alone.ndim == 1:
                continue  # an encoder's first token is padding there
            assert torch.allclose(found, alone, atol=1e-5)

    @decoders
    def test_eager_attention_is_the_same(self, make):
        text = models.ids(2, 9)
        expected = models.forward(adapted(make()), input_ids=text)
        eager = make()
        eager.set_attn_implementation("eager")
        assert torch.allclose(models.forward(adapted(eager), input_ids=text), expected, atol=1e-5)

    @decoders
    def test_text_that_outgrows_learnt_positions_is_refused(self, make):
        model = adapted(make())
        text = models.ids(1, 256 - P + 1)
        if make is tiny.llama:  # rotated positions have no end
            assert models.forward(model, input_ids=text).isfinite().all()
            return
        assert models.forward(model, input_ids=text[:, 1:]).isfinite().all()
        with pytest.raises(
            ModelError, match=r"252 tokens behind a prompt of 5.*256 positions.*to 251 tokens"
        ):
            model(text)

    @every_model
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing_gives_the_same_gradients(self, make, reentrant):
        plain, again = models.gradients(
            lambda: adapted(make(), prefix_projection=True, encoder_hidden_size=8), reentrant
        )
        for name, gradient in plain.items():
            assert gradient.abs().max() > 0, name
            assert torch.allclose(again[name], gradient, atol=1e-6), name

    @encoder_decoders
    def test_every_kind_of_site_acts(self, make):
        model = adapted(make())
        inputs = {"input_ids": models.ids(2, 7), "decoder_input_ids": models.ids(2, 4, seed=1)}
        whole = models.forward(model, **inputs)
        states = model.get_encoder()(inputs["input_ids"]).last_hidden_state
        with model.disable_adapter():
            assert not torch.allclose(model.get_encoder()(inputs["input_ids"]).last_hidden_state, states)
        for kind in ("encoder", "decoder", "cross"):
            layers = [layer for layer in prompts(model) if layer.site.kind == kind]
            for layer in layers:
                layer.enable_adapters(False)
            assert not torch.allclose(models.forward(model, **inputs), whole, atol=1e-4), kind
            for layer in layers:
                layer.enable_adapters(True)

    def test_half_precision_keeps_the_prompt_in_float32(self):
        model = adapted(training.half(tiny.llama()))
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
        assert models.forward(model, input_ids=models.ids(1, 6)).dtype == torch.bfloat16
        double = adapted(tiny.llama().double())
        assert all(p.dtype == torch.float64 for p in double.parameters() if p.requires_grad)

    def test_a_copy_is_a_model_of_its_own(self, tiny_llama):
        model = adapted(tiny_llama, prefix_projection=True, encoder_hidden_size=8)
        text = models.ids(1, 6)
        before = models.forward(model, input_ids=text)
        other = copy.deepcopy(model)
        training.disturb(other)
        other.disable_adapter_layers()
        other.enable_adapter_layers()
        assert not torch.allclose(models.forward(other, input_ids=text), before, atol=1e-3)
        assert torch.equal(models.forward(model, input_ids=text), before)


class TestAdapters:
    @pytest.fixture
    def two(self, tiny_llama):
        model = adapted(tiny_llama)
        model.add_adapter("longer", method("prefix")(num_virtual_tokens=8, prefix_projection=False))
        return model

    def test_switch(self, two):
        text = models.ids(1, 6)
        first = models.forward(two, input_ids=text)
        two.set_adapter("longer")
        second = models.forward(two, input_ids=text)
        assert not torch.allclose(first, second, atol=1e-3)
        assert [n for n, p in two.named_parameters() if p.requires_grad] == [
            f"base_model.model.model.layers.{i}.self_attn.prefix_prompt.table.longer" for i in range(2)
        ]
        two.set_adapter("default")
        assert torch.equal(models.forward(two, input_ids=text), first)

    def test_both_stand_one_after_the_other(self, two):
        text = models.ids(1, 6)
        two.base_model.set_adapter(["default", "longer"])
        both = models.forward(two, input_ids=text)
        one = adapted(tiny.llama(), num_virtual_tokens=13)
        for layer, pair in zip(prompts(one), prompts(two), strict=True):
            layer.table["default"].data = torch.cat([pair.table["default"], pair.table["longer"]]).data
        assert torch.allclose(models.forward(one, input_ids=text), both, atol=1e-6)

    def test_delete(self, two):
        text = models.ids(1, 6)
        first = models.forward(two, input_ids=text)
        two.delete_adapter("longer")
        assert all(list(layer.table) == ["default"] for layer in prompts(two))
        assert torch.equal(models.forward(two, input_ids=text), first)


GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": tiny.PAD}


class TestGeneration:
    @pytest.mark.parametrize("make", [*DECODERS.values(), *ENCODER_DECODERS.values()])
    def test_with_cache_without_and_one_by_one_agree(self, make):
        model = adapted(make(), prefix_projection=True, encoder_hidden_size=8)
        training.disturb(model)
        model.eval()
        sides = "right" if model.config.is_encoder_decoder else "left"
        texts = [models.ids(1, n, seed=n)[0] for n in (4, 7)]
        batch = models.padded(texts, sides)
        found = model.generate(**batch, **GREEDY)
        assert torch.equal(model.generate(**batch, **GREEDY, use_cache=False), found)
        for row, text in enumerate(texts):
            alone = model.generate(input_ids=text[None], attention_mask=torch.ones_like(text[None]), **GREEDY)
            assert torch.equal(alone[0, -8:], found[row, -8:])

    @decoders
    def test_greedy_is_the_argmax_of_the_forward(self, make):
        model = adapted(make()).eval()
        text = models.ids(1, 6)
        found = model.generate(input_ids=text, attention_mask=torch.ones_like(text), **GREEDY)
        logits = models.forward(model, input_ids=found[:, :-1])
        assert torch.equal(logits[0, 5:].argmax(-1), found[0, 6:])

    @decoders
    @pytest.mark.parametrize("extra", [{"num_beams": 3}, {"cache_implementation": "static"}])
    def test_beams_and_static_caches(self, make, extra):
        model = adapted(make()).eval()
        batch = models.padded([models.ids(1, n, seed=n)[0] for n in (4, 7)], "left")
        found = model.generate(**batch, **GREEDY, **extra, disable_compile=True)
        plain = {"num_beams": extra.get("num_beams", 1), "use_cache": False}
        assert torch.equal(model.generate(**batch, **GREEDY, **plain), found)

    def test_reparametrised_prompts_are_evaluated_once(self, tiny_llama, monkeypatch):
        model = adapted(tiny_llama, prefix_projection=True, encoder_hidden_size=8).eval()
        heads = [layer.head["default"] for layer in prompts(model)]
        calls = []
        for head in heads:
            head.register_forward_hook(lambda *_: calls.append(1))
        text = models.ids(1, 6)
        model.generate(input_ids=text, attention_mask=torch.ones_like(text), **GREEDY)
        assert len(calls) == len(heads)
        training.disturb(model)  # in place, as nobody is told
        before = models.forward(model, input_ids=text)
        assert len(calls) == 2 * len(heads)
        assert torch.equal(models.forward(copy.deepcopy(model), input_ids=text), before)


class TestPackedRows:
    @pytest.fixture
    def packed(self):
        lengths = (4, 7, 3)
        texts = [models.ids(1, n, seed=n) for n in lengths]
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        return texts, {"input_ids": torch.cat(texts, 1), "position_ids": positions, "use_cache": False}

    @decoders
    def test_each_document_sees_the_prompt_and_no_other_document(self, make, packed):
        texts, row = packed
        model = adapted(make())
        prove_isolated(model)
        expected = torch.cat([models.forward(model, input_ids=text) for text in texts], 1)
        assert torch.allclose(models.forward(model, **row), expected, atol=1e-5)

    @decoders
    def test_document_by_document_is_the_same(self, make, packed):
        _texts, row = packed
        model = adapted(make())
        assert documents.why_not(model) is None
        expected = models.forward(model, **row)
        with documents.by_documents(model):
            assert model.config._attn_implementation == over(documents.NAME)
            assert torch.allclose(models.forward(model, **row), expected, atol=1e-5)
            two = {k: v if k == "use_cache" else v.expand(2, -1) for k, v in row.items()}
            assert torch.allclose(models.forward(model, **two)[1], expected[0], atol=1e-5)
            with model.disable_adapter():
                alone = models.forward(model, **row)
        with model.disable_adapter():
            assert torch.allclose(alone, models.forward(model, **row), atol=1e-5)
        assert model.config._attn_implementation == "sdpa-prompts"

    def test_layers_without_a_prompt_keep_documents_apart_too(self, packed, monkeypatch):
        _texts, row = packed
        model = adapted(tiny.llama())
        prompts(model)[0].table.pop("default")
        expected = models.forward(model, **row)
        with documents.by_documents(model):
            assert torch.allclose(models.forward(model, **row), expected, atol=1e-5)

    @decoders
    def test_gradients_of_packed_rows_are_those_of_single_ones(self, make, packed):
        texts, row = packed
        model = adapted(make())
        model.train()
        total = sum(model(input_ids=text, labels=text).loss * (text.shape[1] - 1) for text in texts)
        total.backward()
        expected = [layer.table["default"].grad.clone() for layer in prompts(model)]
        model.zero_grad()
        labels = torch.cat([torch.cat([torch.tensor([[-100]]), text[:, 1:]], 1) for text in texts], 1)
        with documents.by_documents(model), label_only.label_only(model):
            model(**row, labels=labels, num_items_in_batch=1).loss.backward()
        for layer, gradient in zip(prompts(model), expected, strict=True):
            assert torch.allclose(layer.table["default"].grad, gradient, atol=1e-5)


@decoders
def test_the_loss_of_labelled_rows_alone_is_the_loss(make):
    model = adapted(make())
    assert label_only.why_not(model) is None


def test_attach_proves_what_it_can(tiny_llama):
    model = attach(tiny_llama, method("prefix")(num_virtual_tokens=P))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "prefix_prompt" in n
    }
