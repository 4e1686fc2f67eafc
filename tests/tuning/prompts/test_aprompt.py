"""APrompt: the rows before every layer, the scores by hand, and each part alone as the method that it is."""

import json

import prompt_models as models
import pytest
import small_training as training
import tiny
import torch
from peft import PeftModel
from torch import nn

from luthier import method
from luthier.acceleration import documents
from luthier.errors import MethodError, ModelError
from luthier.tuning import soft_prompts
from luthier.tuning.attach import attach, trainable
from luthier.tuning.attention_prompts import Places, Site, prompted_attention
from luthier.tuning.prompts.aprompt import ScoredPrompt, score_bias

P, L, R, M = 3, 4, 2, 40
ROWS, PAIRS, SCORES = ({"num_virtual_tokens": P}, {"kv_length": L}, {"qk_rank": R})
NOTHING = {"num_virtual_tokens": 0, "kv_length": 0, "qk_rank": 0, "max_positions": M}
MODELS = {
    "llama": tiny.llama,
    "gpt2": tiny.gpt2,
    "bert": tiny.bert,
    "distilbert": models.distilbert,
    "t5": models.deep_t5,
    "bart": models.bart,
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
decoders = pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2], ids=["llama", "gpt2"])


def adapted(base, **options):
    torch.manual_seed(0)
    return attach(base, method("aprompt")(**(NOTHING | options)))


def whole(base):
    """All three parts, as if trained."""
    return training.disturb(adapted(base, **ROWS, **PAIRS, **SCORES), 0.3)


def inputs_of(model):
    return {k: v for k, v in training.batch(model).items() if k != "labels"} | (
        {"decoder_input_ids": models.ids(2, 4)} if model.config.is_encoder_decoder else {}
    )


class TestScores:
    def test_are_features_appended_to_queries_and_keys(self):
        """softmax((q k + Q_p K_p) s) v = softmax([q, Q_p] [k, K_p]^T s) v."""
        torch.manual_seed(0)
        q, k, v, q_p, k_p = (
            torch.randn(2, n, d, dtype=torch.float64) for n, d in [(5, 8), (9, 8), (9, 8), (5, R), (9, R)]
        )
        s = 8**-0.5
        places = Places(torch.arange(5)[None], torch.arange(5)[None])
        bias = score_bias(q_p, k_p, places, 4, 5, s)[0]
        assert torch.linalg.matrix_rank(bias).max() <= R
        found = (q @ k.mT * s + bias).softmax(-1) @ v
        longer = (torch.cat([q, q_p], -1) @ torch.cat([k, k_p], -1).mT * s).softmax(-1) @ v
        assert torch.allclose(found, longer, atol=1e-12)

    @pytest.mark.parametrize("inner", ["sdpa", "eager"])
    @pytest.mark.parametrize("pairs", [0, L])
    def test_reach_every_head_of_grouped_attention(self, inner, pairs):
        torch.manual_seed(0)

        class Attention(nn.Module):
            is_causal = True
            num_key_value_groups = 2
            scaling = 8**-0.5

        Attention.__module__ = "transformers.models.llama.modeling_llama"  # whose eager function it takes
        module = Attention()
        module.prompt = ScoredPrompt(Site("", "self", 0, 4, 2, 8, 8))
        if pairs:
            module.prompt.add_table("default", pairs, 1.0)
        module.prompt.add_scores("default", M, pairs, R, 1.0)
        module.double().eval()
        nn.init.normal_(module.prompt.score_key["default"])
        q, k, v = (torch.randn(2, heads, 6, 8, dtype=torch.float64) for heads in (4, 2, 2))
        seen = torch.ones(6, 6, dtype=torch.bool).tril()
        mask = torch.where(seen, 0.0, -torch.inf).double()[None, None] if inner == "eager" else None
        places = Places(torch.arange(6)[None], torch.arange(6)[None])
        kwargs = {"scaling": 8**-0.5, "prompt_places": places}
        found, _ = prompted_attention(module, q, k, v, mask, inner=inner, **kwargs)

        front = module.prompt(q) or (k[:, :, :0], v[:, :, :0])
        keys, values = (
            torch.cat([f.expand(2, -1, -1, -1), t], 2).repeat_interleave(2, 1)
            for f, t in zip(front, (k, v), strict=True)
        )
        q_p, k_p = (module.prompt.score_query["default"][:, :6], module.prompt.score_key["default"])
        scores = q @ keys.mT + q_p @ k_p[:, : pairs + 6].mT
        scores = scores * 8**-0.5
        scores[..., pairs:] = scores[..., pairs:].masked_fill(~seen, -torch.inf)
        tolerance = 1e-6 if inner == "eager" else 1e-12  # Llama's eager softmax is in float32
        assert torch.allclose(found, (scores.softmax(-1) @ values).transpose(1, 2), atol=tolerance)

    @every_model
    def test_start_as_no_change_at_all(self, make):
        base = make()
        inputs = inputs_of(base)
        before = models.forward(base, **inputs)
        model = adapted(base, **SCORES)
        assert torch.allclose(models.forward(model, **inputs), before, atol=1e-6)
        model.train()
        model(**training.batch(model)).loss.backward()
        for n, p in model.named_parameters():  # one factor at zero: only it has a gradient
            if ".score_" in n:
                assert bool(p.grad.abs().max() > 0) == (".score_key." in n), n

    def test_are_chosen_by_position_not_by_column(self, tiny_llama):
        """Padding on the left, and packed documents."""
        model = training.disturb(adapted(tiny_llama, **PAIRS, **SCORES), 0.3)
        texts = [models.ids(1, n, seed=n) for n in (4, 7, 3)]
        alone = [models.forward(model, input_ids=text)[0] for text in texts]
        batch = models.padded([text[0] for text in texts], "left")
        found = models.forward(model, **batch)[batch["attention_mask"].bool()]
        assert torch.allclose(found, torch.cat(alone), atol=1e-5)

    @decoders
    def test_keep_packed_documents_apart(self, make):
        model = whole(make())
        lengths = (4, 7, 3)
        texts = [models.ids(1, n, seed=n) for n in lengths]
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        row = {"input_ids": torch.cat(texts, 1), "position_ids": positions, "use_cache": False}
        expected = torch.cat([models.forward(model, input_ids=text) for text in texts], 1)
        assert torch.allclose(models.forward(model, **row), expected, atol=1e-5)
        assert documents.why_not(model) is None
        with documents.by_documents(model):
            assert torch.allclose(models.forward(model, **row), expected, atol=1e-5)

    def test_end_at_the_positions_that_they_know(self, tiny_llama):
        model = adapted(tiny_llama, **ROWS, **SCORES)
        assert models.forward(model, input_ids=models.ids(1, M)).isfinite().all()
        with pytest.raises(ModelError, match=r"text of 41 tokens is longer than the 40 positions"):
            model(models.ids(1, M + 1))
        positions = torch.arange(M - 10).repeat(2)[None]  # a row longer than M, of documents that are not
        row = {"input_ids": models.ids(1, 2 * (M - 10)), "position_ids": positions, "use_cache": False}
        assert models.forward(model, **row).isfinite().all()

    def test_in_a_static_cache_are_refused(self, tiny_llama):
        model = adapted(tiny_llama, **SCORES).eval()
        text = models.ids(1, 6)
        with pytest.raises(ModelError, match=r"static cache.*prefix"):
            model.generate(
                input_ids=text,
                attention_mask=torch.ones_like(text),
                max_new_tokens=2,
                cache_implementation="static",
                disable_compile=True,
            )


class TestParts:
    @decoders
    def test_rows_made_of_the_models_own_states_are_the_text(self, make):
        """P_j := what layer j gets for real tokens S: the outputs are those behind S."""
        base = make()
        start, text = models.ids(1, P), models.ids(2, 8, seed=1)
        expected = models.forward(base, input_ids=torch.cat([start.expand(2, -1), text], 1))[:, P:]
        states = base(start, output_hidden_states=True).hidden_states
        model = adapted(base, **ROWS)
        prompt = model.base_model.prompt[0]
        with torch.no_grad():
            prompt.table["default"].copy_(base.get_input_embeddings()(start[0]))
            prompt.deep["default"].copy_(torch.stack([states[1][0]]))
        assert torch.allclose(models.forward(model, input_ids=text), expected, atol=1e-5)

    @decoders
    def test_rows_start_as_a_text_of_frequent_tokens(self, make):
        """Also of an adapter that is added while another is active, and goes on being so."""
        base = make()
        table, text = base.get_input_embeddings().weight.detach().clone(), models.ids(2, 8, seed=1)
        model = training.disturb(adapted(base, **ROWS, **PAIRS, **SCORES), 0.3)
        first = models.forward(model, input_ids=text)
        model.add_adapter("second", method("aprompt")(**(NOTHING | ROWS)))
        assert torch.equal(models.forward(model, input_ids=text), first)
        model.set_adapter("second")
        rows = model.base_model.prompt[0].table["second"].detach()
        start = torch.cdist(rows, table).argmin(1)
        assert torch.equal(table[start], rows)
        behind = torch.cat([start.expand(2, -1), text], 1)
        expected = models.forward(make(), input_ids=behind)[:, P:]
        assert torch.allclose(models.forward(model, input_ids=text), expected, atol=1e-5)

    @every_model
    def test_rows_start_at_random_where_that_is_asked(self, make):
        model = adapted(make(), **(ROWS | {"num_virtual_tokens": 50}), init="random", init_std=0.3)
        prompt = model.base_model.prompt[0]
        for rows in (prompt.table["default"], prompt.deep["default"]):
            assert 0.25 < float(rows.detach().std()) < 0.35

    @every_model
    def test_rows_of_every_layer_act(self, make):
        model = training.disturb(adapted(make(), **ROWS), 0.3)
        inputs = inputs_of(model)
        before = models.forward(model, **inputs)
        for rows in (model.base_model.prompt[0].table["default"], model.base_model.prompt[0].deep["default"]):
            kept = rows.data.clone()
            rows.data = torch.randn_like(rows)
            assert not torch.allclose(models.forward(model, **inputs), before, atol=1e-4)
            rows.data = kept

    def test_rows_replace_what_the_layer_below_made_of_its_own(self, tiny_llama):
        """With one row for all layers but the last, nothing of the rows below can come through it."""
        model = training.disturb(adapted(tiny_llama, **ROWS), 0.3).eval()
        states = []
        block = tiny_llama.model.layers[1]
        block.register_forward_pre_hook(lambda _, args, kwargs: states.append(args[0]), with_kwargs=True)
        model(models.ids(2, 5))
        deep = model.base_model.prompt[0].deep["default"]
        assert torch.equal(states[0][:, :P], deep[0].expand(2, -1, -1))

    @every_model
    def test_pairs_alone_are_p_tuning_v2_without_its_shift(self, make):
        model = training.disturb(adapted(make(), **PAIRS), 0.3)
        inputs = inputs_of(model)
        torch.manual_seed(0)
        same = attach(make(), method("p_tuning_v2")(num_virtual_tokens=L, shift_positions=False))
        tables = {layer.site.path: layer for layer in model.base_model.attentions}
        for layer in same.base_model.attentions:
            if layer.site.kind == "cross":
                layer.enable_adapters(False)
            else:
                layer.table["default"].data = tables[layer.site.path].table["default"].data
        if "bert" in make.__name__:
            name = "classifier"
            heads = [getattr(m.get_base_model(), name) for m in (same, model)]
            heads[0].load_state_dict(heads[1].state_dict())
            if make is models.distilbert:
                same.get_base_model().pre_classifier = model.get_base_model().pre_classifier
        assert torch.allclose(models.forward(same, **inputs), models.forward(model, **inputs), atol=1e-6)

    @every_model
    def test_cost_what_is_said(self, make):
        model = adapted(make(), **ROWS, **PAIRS, **SCORES)
        sites = [s for s in model.base_model._sites if s.kind != "cross"]
        rows = P * 32 * len([s for s in sites if s.kind != "decoder"])
        pairs = sum(L * s.size for s in sites)
        scores = sum(s.queries * R * (L + 2 * P + 2 * M) for s in sites)
        learnt = sum(
            p.numel() for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in n
        )
        assert learnt == rows + pairs + scores

    def test_none_at_all_is_refused(self):
        with pytest.raises(MethodError, match="nothing would learn"):
            method("aprompt")(**NOTHING)


class TestWhole:
    @every_model
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing_gives_the_same_gradients(self, make, reentrant):
        plain, again = models.gradients(lambda: whole(make()), reentrant)
        for name, gradient in plain.items():
            assert gradient.abs().max() > 0, name
            assert torch.allclose(again[name], gradient, atol=1e-6), name

    def test_of_two_adapters_one_is_active(self, tiny_llama):
        model = whole(tiny_llama)
        model.add_adapter("second", method("aprompt")(**(NOTHING | SCORES)))
        model.base_model.set_adapter(["default", "second"])
        with pytest.raises(MethodError, match="one can be active"):
            model(models.ids(1, 4))

    @every_model
    def test_is_saved_as_our_own_type(self, make, tmp_path):
        model = whole(make())
        inputs = inputs_of(model)
        expected = models.forward(model, **inputs)
        soft_prompts.save(model, tmp_path / "a")
        assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"] == "APROMPT"
        again = PeftModel.from_pretrained(make(), tmp_path / "a", is_trainable=True)
        assert torch.equal(models.forward(again, **inputs), expected)
        assert trainable(again) == trainable(model)
