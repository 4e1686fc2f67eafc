"""The fused MLP computes what the model's own does, keeps less, and leaves other MLPs alone."""

import peft
import pytest
import tiny
import torch
from torch import nn

from luthier.acceleration import fused_lora, fused_mlp


def adapted(**options):
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def step(model):
    """Loss, gradients, and how many numbers of width `inner` are kept for the backward pass."""
    ids = torch.randint(5, tiny.VOCAB, (2, 17), generator=torch.Generator().manual_seed(0))
    inner = model.config.intermediate_size
    kept = {}

    def pack(tensor):
        if tensor.numel() == ids.numel() * inner:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    count = len(kept)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, count


def test_operation_equals_its_formula_in_float64():
    torch.manual_seed(0)
    gate, up = (torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w, bias = torch.randn(6, 7, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    a, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 7), (6, 3)))
    ours = fused_mlp.gated_down(gate, up, w, bias, a, b, 0.7)
    hidden = gate * torch.sigmoid(gate) * up
    theirs = hidden @ w.T + bias + 0.7 * (hidden @ a.T) @ b.T
    torch.testing.assert_close(ours, theirs)
    g = torch.randn_like(ours)
    inputs = (gate, up, a, b)
    found, expected = (torch.autograd.grad(y, inputs, g) for y in (ours, theirs))
    torch.testing.assert_close(found, expected)


def test_loss_and_gradients_are_the_models_and_half_is_kept():
    model = adapted()
    with fused_lora.fused(model):
        loss, gradients, kept = step(model)
        with fused_mlp.fused(model) as count:
            assert count == model.config.num_hidden_layers
            fused_loss, fused_gradients, fused_kept = step(model)
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(fused_gradients, gradients, rtol=1e-4, atol=1e-7)
    assert (kept, fused_kept) == (4 * count, 2 * count)
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_disabled_adapter_gives_the_base_again():
    model = adapted()
    ids = torch.tensor([[11, 12, 13]])
    with torch.no_grad(), fused_lora.fused(model), fused_mlp.fused(model), model.disable_adapter():
        found = model(input_ids=ids).logits
    torch.testing.assert_close(found, tiny.llama().eval()(input_ids=ids).logits)


@pytest.mark.parametrize("change", ["activation", "dropout", "no adapter", "more"])
def test_what_it_cannot_do_is_left_alone(change):
    model = adapted(
        lora_dropout=0.1 if change == "dropout" else 0.0,
        target_modules=["q_proj"] if change == "no adapter" else "all-linear",
    )
    mlps = [m for m in model.modules() if hasattr(m, "gate_proj")]
    for mlp in mlps:
        if change == "activation":
            mlp.act_fn = nn.GELU()
        if change == "more":  # such as a scaled output
            mlp.__class__ = type("Scaled", (type(mlp),), {"forward": lambda s, x: 1.1 * twice(s, x)})
    with fused_lora.fused(model.train()), fused_mlp.fused(model) as count:
        assert count == 0


def twice(mlp, x):
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
