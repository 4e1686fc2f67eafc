"""Prefix tuning: its projection, its three prefixes, its start from a text, and PEFT's files both ways."""

import json

import peft
import prompt_models as models
import pytest
import small_training as training
import tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import luthier
from luthier import method
from luthier.errors import ModelError
from luthier.tuning import soft_prompts
from luthier.tuning.attach import attach, task_type, trainable

P, HIDDEN = 5, 16
PEFT_HAS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert, "roberta": models.roberta}
PEFT_LACKS = {
    "t5": models.deep_t5,
    "bart": models.bart,
    "distilbert": models.distilbert,
    "modernbert": models.modernbert,
}
peft_has = pytest.mark.parametrize("make", PEFT_HAS.values(), ids=PEFT_HAS)
peft_lacks = pytest.mark.parametrize("make", PEFT_LACKS.values(), ids=PEFT_LACKS)


def adapted(base, **options):
    torch.manual_seed(0)
    config = method("prefix")(**({"num_virtual_tokens": P, "encoder_hidden_size": HIDDEN} | options))
    return training.disturb(attach(base, config))


def batch(model):
    """Two texts of different lengths, padded on the right; PEFT's class misplaces padding on the left."""
    inputs = models.padded([models.ids(1, n, seed=n)[0] for n in (4, 7)], "right")
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = models.ids(2, 4)
    return inputs


def projected(layers):
    """P_theta = W_2 tanh(W_1 P' + b_1) + b_2 by hand: (P, 2 L H d), layer after layer, keys before values."""
    shared = layers[0].shared["default"]
    inside = torch.tanh(shared.embedding.weight @ shared.inner.weight.T + shared.inner.bias)
    w2 = torch.cat([layer.head["default"].weight for layer in layers])
    b2 = torch.cat([layer.head["default"].bias for layer in layers])
    return inside @ w2.T + b2


class TestProjection:
    def test_is_the_papers(self, tiny_llama, tmp_path):
        model = adapted(tiny_llama)
        soft_prompts.save(model, tmp_path / "a")
        stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
        assert list(stored) == ["prompt_embeddings"]
        assert stored["prompt_embeddings"].shape == (P, 2 * 2 * 2 * 8)
        expected = projected(model.base_model.attentions)
        assert torch.allclose(stored["prompt_embeddings"], expected, atol=1e-6)

    def test_reaches_the_layers_in_order_keys_before_values(self, tiny_llama):
        """The rows of P_theta are cut as PEFT cuts them: slot 2l is K of layer l, slot 2l + 1 is V."""
        model = adapted(tiny_llama)
        expected = (
            projected(model.base_model.attentions).view(P, 4, 2, 8).permute(1, 2, 0, 3)
        )  # (2L, heads, P, dim)
        for number, layer in enumerate(model.base_model.attentions):
            key, value = layer(torch.empty(1))
            assert torch.allclose(key[0], expected[2 * number], atol=1e-6)
            assert torch.allclose(value[0], expected[2 * number + 1], atol=1e-6)

    @pytest.mark.parametrize("kind", ["encoder", "decoder", "cross"])
    def test_of_an_encoder_decoder_is_one_for_each_kind(self, kind):
        model = adapted(models.deep_t5())
        layers = [layer for layer in model.base_model.attentions if layer.site.kind == kind]
        expected = projected(layers)
        assert torch.allclose(torch.cat([layer.pairs("default") for layer in layers], 1), expected, atol=1e-6)

    @pytest.mark.parametrize("make", [*PEFT_HAS.values(), *PEFT_LACKS.values()])
    def test_costs_what_is_said(self, make):
        """Without a head: P d + m (d + 1) + 2 L H d_h (m + 1) for each kind of site."""
        model = adapted(make())
        sizes: dict = {}
        for layer in model.base_model.attentions:
            sizes[layer.site.kind] = sizes.get(layer.site.kind, 0) + layer.site.size
        width = model.get_input_embeddings().weight.shape[1]
        learnt = sum(
            p.numel() for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in n
        )
        assert learnt == sum(P * width + HIDDEN * (width + 1) + s * (HIDDEN + 1) for s in sizes.values())
        plain = adapted(make(), prefix_projection=False)
        heads = trainable(model)[0] - learnt
        assert trainable(plain)[0] - heads == P * sum(sizes.values())

    def test_is_dropped_when_saved_and_kept_in_checkpoints(self, tiny_llama, tmp_path):
        model = adapted(tiny_llama)
        text = models.ids(1, 6)
        expected = models.forward(model, input_ids=text)
        soft_prompts.save(model, tmp_path / "final")
        model.save_pretrained(tmp_path / "checkpoint")
        stored = load_file(tmp_path / "checkpoint" / "adapter_model.safetensors")
        assert sum(t.numel() for t in stored.values()) == trainable(model)[0]
        assert json.loads((tmp_path / "checkpoint" / "adapter_config.json").read_text())["prefix_projection"]
        again = PeftModel.from_pretrained(tiny.llama(), tmp_path / "checkpoint", is_trainable=True)
        assert {n for n, p in again.named_parameters() if p.requires_grad} == {
            n for n, p in model.named_parameters() if p.requires_grad
        }
        assert torch.equal(models.forward(again, input_ids=text), expected)
        final = soft_prompts.load(tiny.llama(), tmp_path / "final", train=True)
        assert torch.equal(models.forward(final, input_ids=text), expected)
        assert trainable(final)[0] == P * 2 * 2 * 2 * 8


class TestFilesOfPeft:
    @peft_has
    def test_peft_loads_ours(self, make, tmp_path):
        model = adapted(make())
        inputs = batch(model)
        expected = models.forward(model, **inputs)
        luthier.save(model, tmp_path / "a")
        theirs = PeftModel.from_pretrained(make(), tmp_path / "a")
        assert isinstance(theirs.peft_config["default"], peft.PrefixTuningConfig)
        real = inputs["attention_mask"].bool() if expected.ndim == 3 else slice(None)
        assert torch.allclose(models.forward(theirs, **inputs)[real], expected[real], atol=1e-5)

    @peft_has
    @pytest.mark.parametrize("projection", [False, True])
    def test_we_load_pefts(self, make, projection, tmp_path):
        torch.manual_seed(0)
        base = make()
        theirs = get_peft_model(
            base,
            peft.PrefixTuningConfig(
                num_virtual_tokens=P,
                prefix_projection=projection,
                encoder_hidden_size=HIDDEN,
                task_type=task_type(base),
            ),
        )
        training.disturb(theirs)
        inputs = batch(theirs)
        expected = models.forward(theirs, **inputs)
        theirs.save_pretrained(tmp_path / "a")
        model = soft_prompts.load(make(), tmp_path / "a")
        assert type(model.base_model).__module__ == "luthier.tuning.prompts.prefix"
        assert not any(p.requires_grad for p in model.parameters())
        real = inputs["attention_mask"].bool() if expected.ndim == 3 else slice(None)
        assert torch.allclose(models.forward(model, **inputs)[real], expected[real], atol=1e-5)

    def test_both_generate_the_same(self, tiny_llama, tmp_path):
        model = adapted(tiny_llama)
        luthier.save(model, tmp_path / "a")
        theirs = PeftModel.from_pretrained(tiny.llama(), tmp_path / "a")
        inputs = models.padded([models.ids(1, n, seed=n)[0] for n in (4, 7)], "left")
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": tiny.PAD}
        assert torch.equal(model.eval().generate(**inputs, **options), theirs.generate(**inputs, **options))

    @peft_lacks
    def test_where_pefts_class_differs_the_file_is_our_own_type(self, make, tmp_path):
        model = adapted(make())
        inputs = batch(model)
        expected = models.forward(model, **inputs)
        luthier.save(model, tmp_path / "a")
        assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"] == "PREFIX"
        again = PeftModel.from_pretrained(make(), tmp_path / "a")
        assert torch.allclose(models.forward(again, **inputs), expected, atol=1e-6)
        assert not again.peft_config["default"].prefix_projection

    def test_pefts_half_of_the_method_on_t5_stays_pefts(self, tmp_path):
        theirs = get_peft_model(
            tiny.t5(), peft.PrefixTuningConfig(num_virtual_tokens=P, task_type="SEQ_2_SEQ_LM")
        )
        theirs.save_pretrained(tmp_path / "a")
        base = tiny.t5()
        modules = [n for n, _ in base.named_modules()]
        assert soft_prompts.load(base, tmp_path / "a") is None
        assert [n for n, _ in base.named_modules()] == modules
        assert base.config._attn_implementation == "sdpa"

    def test_another_models_prompt_is_refused(self, tiny_llama, tmp_path):
        luthier.save(adapted(tiny_llama), tmp_path / "a")
        with pytest.raises(ModelError, match=r"\(5, 64\).*takes \(5, 96\)"):
            soft_prompts.load(tiny.llama(num_hidden_layers=3), tmp_path / "a")
        assert soft_prompts.load(tiny.t5(), tmp_path / "a") is None


@pytest.mark.parametrize("projection", [False, True])
def test_starts_from_the_keys_and_values_of_a_text(projection, tmp_path):
    tokenizer = tiny.tokenizer()
    luthier.save(tiny.llama(), tmp_path / "base", tokenizer)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    start = torch.tensor([tokenizer("Answer with the record:", add_special_tokens=False)["input_ids"]])
    text = models.ids(1, 6)
    long = torch.cat([start, start, text], 1)
    expected = models.forward(base, input_ids=long)[:, 2 * start.shape[1] :]
    torch.manual_seed(0)
    config = method("prefix")(
        num_virtual_tokens=2 * start.shape[1],  # longer than the text: it is repeated
        init_text="Answer with the record:",
        prefix_projection=projection,
        encoder_hidden_size=64,
    )
    model = attach(base, config)
    assert torch.allclose(models.forward(model, input_ids=text), expected, atol=1e-4)


def test_learns_what_the_frozen_model_does_not_say(tiny_llama, tmp_path):
    torch.manual_seed(0)
    model = attach(tiny_llama, method("prefix")(num_virtual_tokens=P, encoder_hidden_size=HIDDEN))
    inputs = training.batch(model, 8, seed=0)
    before = model.eval()(**inputs).loss.item()
    training.train(model, tmp_path, training.rows(model), max_steps=60, learning_rate=1e-2)
    assert model.eval()(**inputs).loss.item() < before - 0.3
