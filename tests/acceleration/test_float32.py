"""Products of float32 through oneDNN: what torch computes, and who goes torch's way."""

import pytest
import tiny
import torch
from torch.nn import functional

from luthier.acceleration import float32
from luthier.acceleration.float32 import LinearLayers, linear

pytestmark = pytest.mark.skipif(float32._product is None, reason="this torch is built without oneDNN")


@pytest.fixture
def products(monkeypatch):
    """The shapes that oneDNN was handed."""
    found, plain = [], float32._product

    def product(x, weight, *rest):
        found.append((x.shape, weight.shape, x.is_contiguous() and weight.is_contiguous()))
        return plain(x, weight, *rest)

    monkeypatch.setattr(float32, "_product", product)
    return found


def made(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (made(5, 7), made(3, 7)),
        (made(2, 5, 7), made(3, 7)),
        (made(7, 5).T, made(7, 3).T),
        (made(9, 20)[2:7, 3:10], made(8, 20)[1:4, 5:12]),  # parts of larger matrices
        (made(1, 1), made(1, 1)),
    ],
)
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_the_product_of_torch(products, x, weight, biased):
    bias = made(len(weight)) if biased else None
    found = linear(x, weight, bias)
    assert torch.allclose(found, functional.linear(x, weight, bias), atol=1e-5)
    assert [contiguous for _, _, contiguous in products] == [True]


def test_what_it_does_not_compute_goes_the_way_of_torch(products):
    x, weight = made(5, 7), made(3, 7)
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(
            linear(x.to(dtype), weight.to(dtype)), functional.linear(x.to(dtype), weight.to(dtype))
        )
    assert linear(x[:0], weight).shape == (0, 3)
    learns = weight.clone().requires_grad_()
    linear(x, learns).square().sum().backward()
    assert torch.allclose(learns.grad, 2 * (x @ weight.T).T @ x, atol=1e-4)
    assert not products
    with torch.no_grad():
        linear(x, learns)
    assert len(products) == 1


def test_the_layers_of_a_model_compute_so_and_only_inside(products):
    model, ids = tiny.llama(), torch.arange(1, 11)[None]
    with torch.no_grad():
        plain = model(ids).logits
        assert not products
        with LinearLayers():
            found = model(ids).logits
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(products) == len(layers)
    assert torch.allclose(found, plain, atol=1e-5)
    with LinearLayers():
        model(ids).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
