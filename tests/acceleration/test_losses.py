"""The blocked cross-entropy equals the dense one: loss and every gradient, for any block and any head."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from luthier.acceleration import losses

ROWS, HIDDEN, VOCAB = 37, 12, 50


def dense(hidden, weight, labels, bias=None, scale=1.0, softcap=None):
    """The oracle: all logits in memory, torch's own cross-entropy."""
    z = F.linear(hidden, weight, bias) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return F.cross_entropy(z.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum")


def problem(dtype=torch.float64, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, **options):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(True)

    labels = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    labels[torch.rand(ROWS, generator=generator) < 0.4] = -100
    return draw(ROWS, HIDDEN), draw(VOCAB, HIDDEN), draw(VOCAB) if bias else None, labels


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, [t for t in tensors if t is not None])


@pytest.mark.parametrize("block", [1, 7, 16, 1000])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 3.0), (2.0, 5.0)])
def test_loss_and_gradients_equal_dense(block, bias, scale, softcap):
    hidden, weight, offset, labels = problem(torch.float32, bias)
    options = {"bias": offset, "scale": scale, "softcap": softcap}
    ours = losses.linear_cross_entropy(hidden, weight, labels, block=block, **options) / 9
    theirs = dense(hidden, weight, labels, **options) / 9
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    found = gradients(ours, hidden, weight, offset)
    expected = gradients(theirs, hidden, weight, offset)
    for f, e in zip(found, expected, strict=True):
        assert (f - e).norm() / e.norm() < 1e-6


def test_leading_dimensions_are_kept_and_ignored_rows_have_no_gradient():
    hidden, weight, _, labels = problem(torch.float32)
    shaped = hidden.detach()[:36].view(2, 18, HIDDEN).requires_grad_(True)
    targets = labels[:36].view(2, 18)
    (found,) = gradients(losses.linear_cross_entropy(shaped, weight, targets), shaped)
    (expected,) = gradients(dense(shaped, weight, targets), shaped)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert found[targets == -100].abs().max() == 0


def test_a_frozen_head_gets_no_gradient_and_none_is_made(monkeypatch):
    hidden, weight, _, labels = problem(torch.float32)
    made = []
    original = losses._loss_and_gradients
    monkeypatch.setattr(losses, "_loss_and_gradients", lambda *a: made.append(original(*a)) or made[-1])
    losses.linear_cross_entropy(hidden, weight.detach(), labels).backward()
    _, (d_hidden, d_weight, d_bias) = made[0]
    assert d_hidden is not None
    assert d_weight is None
    assert d_bias is None


@pytest.mark.parametrize("use_module", [False, True])
def test_no_label_at_all_gives_zero_and_not_nan(use_module):
    hidden, weight, _, labels = problem(torch.float32)
    nothing = torch.full_like(labels, -100)
    head = nn.Linear(HIDDEN, VOCAB, bias=False)
    if use_module:
        loss = losses.module_cross_entropy(head, hidden, nothing)
    else:
        loss = losses.linear_cross_entropy(hidden, weight, nothing)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_the_loss_of_a_sure_mistake_is_finite_and_exact():
    hidden = torch.tensor([[200.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]])
    loss = losses.linear_cross_entropy(hidden, weight, torch.tensor([1]))
    assert loss.item() == 400
    (gradient,) = gradients(loss, hidden)
    assert gradient.item() == 2


def test_no_logits_are_kept_for_backward():
    hidden, weight, _, labels = problem(torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        losses.linear_cross_entropy(hidden, weight.detach(), labels)
    assert max(saved) <= ROWS * HIDDEN


def test_without_grad_only_the_loss_is_computed():
    hidden, weight, _, labels = problem(torch.float32)
    with torch.no_grad():
        loss = losses.linear_cross_entropy(hidden, weight, labels)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(dense(hidden, weight, labels).item(), rel=1e-6)


def test_in_bfloat16_it_is_no_further_from_float64_than_the_dense_loss():
    hidden, weight, _, labels = problem(torch.float64)
    exact_loss = dense(hidden, weight, labels)
    (exact,) = gradients(exact_loss, hidden)
    h, w = (t.detach().bfloat16().requires_grad_(True) for t in (hidden, weight))
    ours, theirs = losses.linear_cross_entropy(h, w, labels), dense(h, w, labels)
    assert ours.dtype == torch.float32
    assert abs(ours - exact_loss) <= abs(theirs - exact_loss) + 1e-3 * abs(exact_loss)
    error = [(gradients(loss, h)[0].double() - exact).norm() for loss in (ours, theirs)]
    assert error[0] <= 1.1 * error[1]


def test_autocast_multiplies_in_its_dtype_and_returns_float32_gradients():
    hidden, weight, _, labels = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = losses.linear_cross_entropy(hidden, weight, labels)
    found = gradients(loss, hidden, weight)
    expected = gradients(dense(hidden, weight, labels), hidden, weight)
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == torch.float32
        assert 1e-5 < (f - e).norm() / e.norm() < 2e-2


def test_a_head_that_is_a_module_gives_the_same():
    hidden, weight, offset, labels = problem(torch.float32)
    head = nn.Linear(HIDDEN, VOCAB)
    head.weight.data, head.bias.data = weight.detach().clone(), offset.detach().clone()
    ours = losses.module_cross_entropy(head, hidden, labels, softcap=4.0, block=5)
    theirs = dense(hidden, weight, labels, offset, softcap=4.0)
    found = gradients(ours, hidden, head.weight, head.bias)
    for f, e in zip(found, gradients(theirs, hidden, weight, offset), strict=True):
        assert (f - e).norm() / e.norm() < 1e-6
    with torch.no_grad():
        assert losses.module_cross_entropy(head, hidden, labels, softcap=4.0).item() == pytest.approx(
            theirs.item(), rel=1e-6
        )


def test_differentiating_twice_is_refused():
    hidden, weight, _, labels = problem(torch.float32)
    loss = losses.linear_cross_entropy(hidden, weight, labels)
    (first,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


def test_going_backward_twice_through_one_loss_is_refused_and_not_silently_wrong():
    hidden, weight, _, labels = problem(torch.float32)
    loss = losses.linear_cross_entropy(hidden, weight, labels)
    (loss / 3).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        (loss / 3).backward()
