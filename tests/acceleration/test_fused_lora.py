"""The fused LoRA layer equals PEFT's, saves less, and steps aside where it would not."""

import copy

import peft
import pytest
import tiny
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.acceleration import fused_lora, fused_mlp
from luthier.acceleration.fused_lora import fuse, lora_linear, unfuse


def adapted(model, **options):
    """`model` with a LoRA whose B is not zero, so that every term of the layer counts."""
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def step(model, seed=0):
    """Loss and gradients of one batch."""
    ids = torch.randint(5, tiny.VOCAB, (2, 17), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_operation_equals_its_formula_in_float64():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    w, bias = torch.randn(6, 7, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    a, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 7), (6, 3)))
    ours = lora_linear(x, w, bias, a, b, 0.7)
    theirs = x @ w.T + bias + 0.7 * (x @ a.T) @ b.T
    torch.testing.assert_close(ours, theirs)
    g = torch.randn_like(ours)
    found, expected = (torch.autograd.grad(y, (x, a, b), g) for y in (ours, theirs))
    torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(lambda *t: lora_linear(t[0], w, bias, t[1], t[2], 0.7), (x, a, b))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_loss_and_gradients_equal_pefts_in_float32(kind):
    model = adapted(getattr(tiny, kind)())
    loss, gradients = step(model)
    report = fuse(model)
    assert report.fused == sum(isinstance(m, peft.tuners.lora.LoraLayer) for m in model.modules())
    assert not report.left
    fused_loss, fused_gradients = step(model)
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    assert fused_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (fused_gradients[name] - gradient).norm() <= 2e-6 * gradient.norm(), name


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adaloras_layers_are_fused_with_the_same_loss_and_gradients(kind):
    torch.manual_seed(1)
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=12, total_step=9, target_modules="all-linear", orth_reg_weight=0.0
    )
    model = peft.get_peft_model(getattr(tiny, kind)(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    loss, gradients = step(model)
    with fused_lora.fused(model) as report, fused_mlp.fused(model) as mlps:
        assert report.fused == sum(isinstance(m, peft.tuners.lora.LoraLayer) for m in model.modules())
        assert mlps == (2 if kind == "llama" else 0)
        fused_loss, fused_gradients = step(model)
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    assert fused_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (fused_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_bfloat16_is_no_further_from_float32_than_pefts():
    """Over several batches: which of the two rounds better on one of them depends on the CPU's kernels."""
    model = adapted(tiny.llama())
    exact = [step(model, seed)[1] for seed in range(8)]
    for module in model.modules():  # as PEFT holds it: the base in bfloat16, the adapter in float32
        if not isinstance(module, nn.Linear) or not any(n in str(module) for n in ("lora",)):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()
    pefts = [step(model, seed)[1] for seed in range(8)]
    fuse(model)
    ours = [step(model, seed)[1] for seed in range(8)]

    def error(batches):
        pairs = zip(batches, exact, strict=True)
        return sum(float((found[n] - g).square().sum()) for found, true in pairs for n, g in true.items())

    assert all(g.dtype == torch.float32 for g in ours[0].values())
    assert error(ours) ** 0.5 <= 1.15 * error(pefts) ** 0.5


@pytest.mark.parametrize("a_learns", [True, False])
def test_what_is_saved_for_backward_is_r_columns_and_the_input_where_a_learns(a_learns):
    rows, width, out, r = 64, 32, 48, 4
    x = torch.randn(rows, width, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(out, width, dtype=torch.bfloat16)
    a, b = torch.randn(r, width, requires_grad=a_learns), torch.randn(out, r, requires_grad=True)
    held = {t.data_ptr() for t in (w, a, b)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = lora_linear(x, w, None, a, b, 2.0)
    new = [t for t in saved if t.data_ptr() not in held]
    assert sum(t.numel() * t.element_size() for t in new) == 2 * rows * (a_learns * width + r)
    y.sum().backward()
    assert (a.grad is not None) == a_learns


def test_a_frozen_a_changes_no_other_gradient():
    model = adapted(tiny.llama())
    fuse(model)
    loss, gradients = step(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    with fused_mlp.fused(model):
        found_loss, found = step(model)
    assert found_loss == pytest.approx(loss, rel=1e-6)
    assert found.keys() == {name for name in gradients if "lora_B" in name}
    for name, gradient in found.items():
        assert (gradient - gradients[name]).norm() <= 2e-6 * gradients[name].norm(), name


def test_autocast_runs_in_its_dtype_and_gives_float32_gradients():
    model = adapted(tiny.llama())
    fuse(model)
    _, exact = step(model)
    with torch.autocast("cpu", torch.bfloat16):
        _, found = step(model)
    for name, gradient in exact.items():
        assert found[name].dtype == torch.float32
        assert 1e-5 < (found[name] - gradient).norm() / gradient.norm() < 5e-2


def test_state_dict_merge_and_disabled_adapter_are_unchanged():
    model = adapted(tiny.llama()).eval()
    ids = torch.randint(5, tiny.VOCAB, (1, 9))
    keys, plain = list(model.state_dict()), model(ids).logits
    with model.disable_adapter():
        base = model(ids).logits
    fuse(model)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(ids).logits, plain, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, base)
    model.merge_adapter()
    torch.testing.assert_close(model(ids).logits, plain, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(ids).logits, plain, rtol=1e-4, atol=1e-5)
    generated = model.generate(ids, max_new_tokens=3, do_sample=False)
    unfuse(model)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), generated)
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "Dora"),
        ({"lora_dropout": 0.1}, "dropout"),
        ({"target_modules": ["embed_tokens"]}, "Embedding"),
    ],
)
def test_what_is_not_plain_is_left_to_peft_and_said(options, reason):
    model = adapted(tiny.llama(), **options)
    report = fuse(model)
    assert report.fused == 0
    assert any(reason in why for why in report.left)
    assert reason in report.line()


def test_a_second_active_adapter_falls_back_at_once():
    model = adapted(tiny.llama())
    fuse(model)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "other"])
    ids = torch.randint(5, tiny.VOCAB, (1, 9))
    found = model(ids).logits
    unfuse(model)
    assert torch.equal(found, model(ids).logits)
    assert fuse(model).left == {"2 active adapters": len(list(lora_layers(model)))}


def lora_layers(model):
    return (m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer))


def test_dropout_is_fused_in_evaluation_and_not_in_training(monkeypatch):
    model = adapted(tiny.llama(), lora_dropout=0.5)
    model.eval()
    assert fuse(model).fused
    calls = []
    monkeypatch.setattr(fused_lora, "lora_linear", lambda *a: calls.append(1) or lora_linear(*a))
    ids = torch.randint(5, tiny.VOCAB, (1, 9))
    model(ids)
    assert calls
    calls.clear()
    model.train()
    model(ids)
    assert not calls


def test_fused_inside_leaves_a_model_as_it_was():
    model = adapted(tiny.llama())

    def count():
        return sum("forward" in module.__dict__ for module in model.modules())

    with fused_lora.fused(model) as report:
        assert count() == report.fused > 0
    assert count() == 0
    fuse(model)
    with fused_lora.fused(model):
        pass
    assert count() == report.fused  # an evaluation in the middle of a training takes nothing away


def test_a_copied_model_uses_its_own_weights():
    model = adapted(tiny.llama())
    fuse(model)
    twin = copy.deepcopy(model)
    for name, parameter in twin.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    ids = torch.randint(5, tiny.VOCAB, (1, 9))
    assert not torch.equal(model(ids).logits, twin(ids).logits)


def test_the_first_layer_makes_no_gradient_of_its_input():
    x = torch.randn(3, 4)
    a, b = torch.randn(2, 4, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    lora_linear(x, torch.randn(5, 4), None, a, b, 1.0).sum().backward()
    assert x.grad is None
    assert a.grad is not None


def test_conv1d_weights_are_read_transposed():
    layer = Conv1D(6, 4)
    assert layer.weight.shape == (4, 6)
    x = torch.randn(3, 4)
    a, b = torch.randn(2, 4), torch.zeros(6, 2)
    torch.testing.assert_close(lora_linear(x, layer.weight.t(), layer.bias, a, b, 1.0), layer(x))
