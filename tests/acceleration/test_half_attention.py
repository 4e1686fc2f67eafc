"""Short documents in half precision: torch's attention and its gradients, closer to the exact ones."""

import pytest
import torch

from luthier.acceleration import half_attention as half


def tensors(length: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Query, key and value (1, heads, length, 16) with two query heads a key head, as a model makes them."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, length, heads, 16, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for heads in (4, 2, 2)
    ]


def exact(inputs: list[torch.Tensor], scale: float) -> list[torch.Tensor]:
    """Output and gradients of sum(output * weights) by the formula in float64."""
    query, key, value = (t.detach().double().requires_grad_() for t in inputs)
    wide = [t.repeat_interleave(2, dim=1) for t in (key, value)]
    scores = scale * query @ wide[0].transpose(-1, -2)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    output = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ wide[1]
    (output * weights(output)).sum().backward()
    return [output.detach(), *(t.grad for t in (query, key, value) if t.grad is not None)]


def weights(output: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype)


@pytest.mark.parametrize("length", [1, 2, 33, 170])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_and_gradients_are_those_of_the_formula(length: int, dtype: torch.dtype) -> None:
    inputs = tensors(length, dtype)
    output = half.half_attention(*inputs, scale=0.3)
    (output * weights(output)).sum().backward()
    found = [output, *(t.grad for t in inputs)]
    for ours, true in zip(found, exact(inputs, 0.3), strict=True):
        bound = max(float(true.abs().max()), 0.5)  # a document of one or two tokens has hardly any gradient
        assert ours is not None
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), true, rtol=0.02, atol=0.02 * bound)


def test_what_is_kept_for_the_backward_pass_is_half() -> None:
    output = half.half_attention(*tensors(40))
    kept = output.grad_fn.saved_tensors  # type: ignore[union-attr]
    large = [t for t in kept if t.ndim == 4]
    assert len(large) == 4
    assert all(t.dtype == torch.bfloat16 for t in large)


def test_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half, "_matrix_unit", lambda: False)
    query, _, value = tensors(40)
    assert half.pays(query, value)
    assert not half.pays(query.float(), value.float())  # float32's own kernel is this one
    assert not half.pays(query, value[..., :8])  # the kernel wants equal widths
    long, _, long_value = tensors(half.LONGEST + 1)
    assert not half.pays(long, long_value)
    monkeypatch.setattr(half, "_matrix_unit", lambda: True)
    assert not half.pays(query, value)
