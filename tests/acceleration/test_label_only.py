"""The loss from labelled rows alone is the model's own loss, through wrappers and for unusual heads."""

import peft
import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from luthier.acceleration.label_only import label_only, why_not

SMALL = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip


def batch(vocab=tiny.VOCAB, rows=3, seq=11):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, vocab, (rows, seq), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.5, -100)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model, inputs, tolerance=2e-6):
    model.train()
    expected_loss = model(**inputs).loss
    expected = gradients(model, expected_loss)
    with label_only(model):
        loss = model(**inputs).loss
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    found = gradients(model, loss)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-9, name


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_loss_and_gradients_are_the_models_own_with_a_tied_head_that_learns(kind):
    model = getattr(tiny, kind)()
    assert why_not(model) is None
    assert_same(model, batch())


def test_under_peft():
    torch.manual_seed(0)
    model = peft.get_peft_model(
        tiny.llama(), peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    )
    assert why_not(model) is None
    assert_same(model, batch())


def test_prompt_tuning_moves_the_labels_itself():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert_same(peft.get_peft_model(tiny.llama(), config), batch())


def test_an_adapter_on_the_head_is_trained_and_not_bypassed():
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(tiny.llama(), config)
    assert why_not(model) is None
    assert_same(model, batch())


@pytest.mark.parametrize(
    "model",
    [
        lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=3.0)),
        lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0)),
    ],
    ids=["gemma2", "granite"],
)
def test_soft_caps_and_scales_are_known(model):
    torch.manual_seed(0)
    model = model()
    for parameter in model.get_output_embeddings().parameters():
        nn.init.normal_(parameter, std=2.0)  # large logits, so that the cap bites
    assert why_not(model) is None
    assert_same(model, batch(64))


def test_an_unknown_change_of_the_logits_is_found_out():
    model = tiny.llama()

    class LlamaForCausalLM(type(model)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 3
            return output

    model.__class__ = LlamaForCausalLM
    assert "not known" in why_not(model)


def test_models_with_a_loss_of_their_own_are_left_alone():
    assert "loss of its own" in why_not(tiny.t5())
    assert "loss of its own" in why_not(tiny.bert())


def test_sum_is_divided_by_the_given_number_of_items():
    model, inputs = tiny.llama(), batch()
    with label_only(model), torch.no_grad():
        mean = model(**inputs).loss
        total = model(**inputs, num_items_in_batch=1).loss
    assert total.item() == pytest.approx(mean.item() * (inputs["labels"][:, 1:] != -100).sum().item())


def test_logits_of_unlabelled_rows_are_never_made(monkeypatch):
    model, inputs = tiny.llama(), batch()
    seen = []
    original = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **k: seen.append(len(a)) or original(a, b, **k))
    with label_only(model), torch.no_grad():
        model(**inputs)
    assert sum(seen) == (inputs["labels"][:, 1:] != -100).sum()


def test_the_model_is_as_before_afterwards():
    model, inputs = tiny.llama(), batch()
    before = model(**inputs).logits
    with pytest.raises(ZeroDivisionError), label_only(model):
        raise ZeroDivisionError
    assert "forward" not in model.__dict__
    assert torch.equal(model(**inputs).logits, before)
    loss = F.cross_entropy(before[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
    assert loss.item() == pytest.approx(model(**inputs).loss.item(), rel=1e-6)
