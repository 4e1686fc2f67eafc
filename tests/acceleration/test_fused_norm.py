"""The fused RMS norm computes what the model's own does, keeps its input as it is, leaves others alone."""

import pytest
import tiny
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from luthier.acceleration import fused_norm


def norm(kind=LlamaRMSNorm, dtype=torch.float32):
    torch.manual_seed(0)
    module = kind(16, eps=1e-5).to(dtype)
    nn.init.normal_(module.weight, 1.0, 0.3)
    return module.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_bit_by_bit_and_gradient_of_the_models_own(dtype):
    module = norm(dtype=dtype)
    x = (3 * torch.randn(2, 5, 16)).to(dtype).requires_grad_()
    g = torch.randn(2, 5, 16).to(dtype)
    expected = module(x)
    (wanted,) = torch.autograd.grad(expected, x, g)
    with fused_norm.fused(module) as count:
        assert count == 1
        found = module(x)
        (ours,) = torch.autograd.grad(found, x, g)
    assert torch.equal(found, expected)
    # In half precision the model's own rounds in between: the gradient in float64 is the judge.
    exact = norm(dtype=torch.float64)
    exact.weight.data.copy_(module.weight)
    wide = x.detach().double().requires_grad_()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    (true,) = torch.autograd.grad(exact.weight * wide * scale, wide, g.double())
    ours_off, own_off = ((t.double() - true).norm() for t in (ours, wanted))
    assert ours_off <= max(1.1 * own_off, 1e-6)


def test_the_input_is_kept_in_its_own_dtype():
    module = norm(dtype=torch.bfloat16)
    x = torch.randn(2, 5, 16, dtype=torch.bfloat16, requires_grad=True)
    with fused_norm.fused(module):
        kept = module(x).grad_fn.saved_tensors
    assert [t.dtype for t in kept if t.numel() == x.numel()] == [torch.bfloat16]


def test_a_norm_that_learns_and_another_kind_are_left_alone():
    learns = norm().requires_grad_(True)
    other = norm(GemmaRMSNorm)  # multiplies by 1 + w
    for module in (learns, other, nn.LayerNorm(16).requires_grad_(False), nn.Linear(16, 16)):
        with fused_norm.fused(module) as count:
            assert count == 0


def test_a_model_is_as_before_afterwards():
    model = tiny.llama().eval().requires_grad_(False)
    ids = torch.tensor([[11, 12, 13]])
    expected = model(input_ids=ids).logits
    with fused_norm.fused(model) as count:
        assert count == 2 * model.config.num_hidden_layers + 1
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert not any("forward" in m.__dict__ for m in model.modules())
