"""Prompt tuning: what it starts from, and PEFT's files both ways. That a prompt is text to the model stands
in `test_input_prompts.py`."""

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
from luthier.errors import MethodError, ModelError
from luthier.tuning import soft_prompts
from luthier.tuning.attach import attach, task_type, trainable

P = 5
PEFT_HAS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "t5": models.deep_t5, "bart": models.bart}
peft_has = pytest.mark.parametrize("make", PEFT_HAS.values(), ids=PEFT_HAS)


def adapted(base, **options):
    torch.manual_seed(0)
    return attach(base, method("prompt")(**({"num_virtual_tokens": P} | options)))


def table(model):
    return model.base_model.prompt[0].table["default"].detach()


def batch(model):
    inputs = models.padded([models.ids(1, n, seed=n)[0] for n in (4, 7)], "right")
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = models.ids(2, 4)
    return inputs


class TestStart:
    @pytest.fixture
    def base(self, tmp_path):
        luthier.save(tiny.llama(), tmp_path / "base", tiny.tokenizer())
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base")

    def test_vocabulary_draws_frequent_tokens_without_replacement(self, monkeypatch):
        monkeypatch.setattr("luthier.tuning.input_prompts.FREQUENT", 12)
        base = tiny.llama()
        weight = base.get_input_embeddings().weight.detach()
        rows = table(adapted(base, num_virtual_tokens=10))
        found = [int(i) for row in rows for i in (weight == row).all(1).nonzero().flatten()]
        special = {tiny.PAD, tiny.IM_END}
        assert sorted(found) == [i for i in range(12) if i not in special]
        assert len(table(adapted(base=tiny.llama(), num_virtual_tokens=30))) == 30  # then with replacement

    def test_random_is_the_papers_interval(self):
        rows = table(adapted(tiny.llama(), init="random", num_virtual_tokens=400))
        assert -0.5 <= rows.min() < -0.49
        assert 0.49 < rows.max() <= 0.5
        assert abs(rows.mean()) < 0.01

    def test_text_is_repeated_without_special_tokens(self, base):
        tokenizer = tiny.tokenizer()
        ids = tokenizer("Which product?", add_special_tokens=False)["input_ids"]
        expected = base.get_input_embeddings()(torch.tensor((ids * 9)[:9])).detach()
        model = adapted(base, init="text", init_text="Which product?", num_virtual_tokens=9)
        assert torch.equal(table(model), expected)

    def test_labels_are_the_means_of_their_tokens(self, base):
        tokenizer = tiny.tokenizer()
        model = adapted(base, init_labels=["laptop", "printer"])
        layer = base.get_input_embeddings()
        for row, label in enumerate(["laptop", "printer"]):
            ids = tokenizer(label, add_special_tokens=False)["input_ids"]
            assert torch.allclose(table(model)[row], layer(torch.tensor(ids)).mean(0), atol=1e-7)
        weight = layer.weight.detach()
        assert all((weight == row).all(1).any() for row in table(model)[2:])

    def test_a_scaled_embedding_is_taken_with_its_scale(self):
        base = models.bart()
        base.get_encoder().embed_tokens.embed_scale = 3.0
        rows = table(adapted(base))
        weight = base.get_input_embeddings().weight.detach()
        assert all(torch.isclose(weight * 3, row, atol=1e-6).all(1).any() for row in rows)

    def test_text_and_its_kind_go_together(self):
        for options in ({"init": "text"}, {"init_text": "So:"}):
            with pytest.raises(MethodError, match="go together"):
                method("prompt")(**options)


class TestFilesOfPeft:
    @peft_has
    def test_peft_loads_ours(self, make, tmp_path):
        model = training.disturb(adapted(make()), 0.2)
        inputs = batch(model)
        expected = models.forward(model, **inputs)
        soft_prompts.save(model, tmp_path / "a")
        stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
        assert {name: tuple(t.shape) for name, t in stored.items()} == {"prompt_embeddings": (P, 32)}
        theirs = PeftModel.from_pretrained(make(), tmp_path / "a")
        assert isinstance(theirs.peft_config["default"], peft.PromptTuningConfig)
        found = models.forward(theirs, **inputs)
        if not model.config.is_encoder_decoder:  # PEFT's logits have the prompt's too
            real = inputs["attention_mask"].bool()
            found, expected = found[:, P:][real], expected[real]
        assert torch.allclose(found, expected, atol=1e-5)

    @peft_has
    @pytest.mark.parametrize("kind", ["prompt", "p_tuning"])
    def test_we_load_pefts(self, make, kind, tmp_path):
        torch.manual_seed(0)
        base = make()
        options = {"num_virtual_tokens": P, "task_type": task_type(base)}
        if kind == "prompt":
            theirs = get_peft_model(base, peft.PromptTuningConfig(**options))
        else:
            theirs = get_peft_model(base, peft.PromptEncoderConfig(**options, encoder_hidden_size=16))
        inputs = batch(theirs)
        expected = models.forward(theirs, **inputs)
        theirs.save_pretrained(tmp_path / "a")
        model = soft_prompts.load(make(), tmp_path / "a")
        assert type(model.base_model).__module__ == "luthier.tuning.prompts.prompt"
        found = models.forward(model, **inputs)
        if not model.config.is_encoder_decoder:
            real = inputs["attention_mask"].bool()
            found, expected = found[real], expected[:, P:][real]
        assert torch.allclose(found, expected, atol=1e-5)

    def test_both_generate_the_same(self, tiny_llama, tmp_path):
        model = training.disturb(adapted(tiny_llama), 0.2).eval()
        soft_prompts.save(model, tmp_path / "a")
        theirs = PeftModel.from_pretrained(tiny.llama(), tmp_path / "a")
        text = models.ids(1, 6)
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": tiny.PAD}
        inputs = {"input_ids": text, "attention_mask": torch.ones_like(text)}
        assert torch.equal(model.generate(**inputs, **options), theirs.generate(**inputs, **options))

    def test_a_classifiers_file_is_our_own_type(self, tmp_path):
        """PEFT's class would read the answer from the prompt's first row."""
        model = training.disturb(adapted(tiny.bert()), 0.2)
        expected = models.forward(model, **batch(model))
        soft_prompts.save(model, tmp_path / "a")
        assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"] == "PROMPT"
        again = PeftModel.from_pretrained(tiny.bert(), tmp_path / "a")
        assert torch.equal(models.forward(again, **batch(model)), expected)

    def test_pefts_prompt_of_a_classifier_stays_pefts(self, tmp_path):
        theirs = get_peft_model(
            tiny.bert(), peft.PromptTuningConfig(num_virtual_tokens=P, task_type="SEQ_CLS")
        )
        theirs.save_pretrained(tmp_path / "a")
        assert soft_prompts.load(tiny.bert(), tmp_path / "a") is None

    def test_another_models_prompt_is_refused(self, tiny_llama, tmp_path):
        soft_prompts.save(adapted(tiny_llama), tmp_path / "a")
        with pytest.raises(ModelError, match=r"\(5, 32\).*takes \(5, 64\)"):
            soft_prompts.load(tiny.llama(hidden_size=64), tmp_path / "a")


def test_costs_what_is_said(tiny_llama):
    assert trainable(adapted(tiny_llama))[0] == P * 32


def test_learns_what_the_frozen_model_does_not_say(tiny_llama, tmp_path):
    model = adapted(tiny_llama)
    inputs = training.batch(model, 8, seed=0)
    before = model.eval()(**inputs).loss.item()
    training.train(model, tmp_path, training.rows(model), max_steps=60, learning_rate=5e-2)
    assert model.eval()(**inputs).loss.item() < before - 0.15
