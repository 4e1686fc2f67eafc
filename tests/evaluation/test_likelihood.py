"""Log-likelihoods from hidden states equal those of the model's own logits, alone and in batches."""

import pytest
import tiny
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from luthier.evaluation import likelihood
from luthier.evaluation.likelihood import token_log_probs


def sequences():
    draw = torch.Generator().manual_seed(0)
    made = []
    for length in (12, 5, 30, 2, 19):
        ids = torch.randint(5, 200, (length,), generator=draw).tolist()
        made.append((ids, list(range(1, length))[-7:]))
    return [*made, (made[0][0], [])]


def alone(model, ids, positions):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -len(ids) :]
    logs = torch.log_softmax(logits.float(), -1)
    return torch.stack([logs[p - 1, ids[p]] for p in positions]) if positions else torch.empty(0)


def build_lora():
    return get_peft_model(tiny.llama(), LoraConfig(target_modules="all-linear", init_lora_weights=False))


def build_prompt():
    return get_peft_model(tiny.llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, build_lora, build_prompt])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_equal_to_the_models_own_logits(build, batch_size, monkeypatch):
    monkeypatch.setattr(likelihood, "BLOCK", 3)
    model = build().eval()
    found = token_log_probs(model, sequences(), batch_size=batch_size)
    for mine, (ids, positions) in zip(found, sequences(), strict=True):
        torch.testing.assert_close(mine, alone(model, ids, positions), atol=2e-5, rtol=1e-5)


def test_logits_are_never_held_whole(tiny_llama, monkeypatch):
    """The largest product with the head has BLOCK rows, however long the texts are."""
    monkeypatch.setattr(likelihood, "BLOCK", 8)
    rows = []
    tiny_llama.lm_head.register_forward_hook(lambda m, i, out: rows.append(out.numel() // out.shape[-1]))
    token_log_probs(tiny_llama, [(list(range(5, 105)), list(range(1, 100)))], batch_size=1)
    assert max(rows) <= 8


def test_a_model_that_changes_its_logits_after_the_head_is_measured_as_it_is(tiny_llama):
    plain = tiny_llama.forward

    def forward(*args, **kwargs):
        out = plain(*args, **kwargs)
        out.logits = 3 * torch.tanh(out.logits / 3)
        return out

    tiny_llama.forward = forward
    for mine, (ids, positions) in zip(
        token_log_probs(tiny_llama, sequences(), batch_size=4), sequences(), strict=True
    ):
        torch.testing.assert_close(mine, alone(tiny_llama, ids, positions), atol=2e-5, rtol=1e-5)


def test_dropout_is_off_and_the_mode_is_left_as_it_was():
    model = tiny.gpt2(resid_pdrop=0.5).train()
    first, second = (token_log_probs(model, sequences(), batch_size=2) for _ in range(2))
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
