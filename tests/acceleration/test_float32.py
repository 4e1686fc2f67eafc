"""Linear layers and attention in float32: what torch computes, and what goes torch's way."""

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from luthier.acceleration import float32, native
from luthier.acceleration.float32 import Float32, attention, linear, norms, why_no_norm

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
        with Float32():
            found = model(ids).logits
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(products) == len(layers)
    assert torch.allclose(found, plain, atol=1e-5)
    with Float32():
        model(ids).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


machine = pytest.mark.skipif(not native.here(), reason=f"no kernels: {native._library()}")
torchs = functional.scaled_dot_product_attention


@pytest.fixture
def attended(monkeypatch):
    """The shapes of queries that our kernel was handed."""
    found, plain = [], native.attention

    def attend(query, *rest, **options):
        found.append(tuple(query.shape))
        return plain(query, *rest, **options)

    monkeypatch.setattr(native, "attention", attend)
    return found


def heads_of(batch, heads, seq, dim, times=1.0):
    """As a model makes them: (batch, seq, heads, dim), turned."""
    return times * made(batch, seq, heads, dim).transpose(1, 2)


@machine
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "seq", "dim"),
    [
        (9, 3, 100, 64),
        (4, 4, 1, 16),
        (4, 2, 7, 48),
        (2, 1, 130, 128),
        (3, 3, 64, 80),
        (2, 2, 49, 32),
        (1, 1, 96, 144),
    ],
)
def test_attention_is_that_of_torch(attended, heads, kv_heads, seq, dim, causal):
    q, k, v = (heads_of(2, n, seq, dim, times) for n, times in ((heads, 3), (kv_heads, 1), (kv_heads, 1)))
    options = {"is_causal": causal, "enable_gqa": heads != kv_heads}
    exact = torchs(q.double(), k.double(), v.double(), **options)
    found = attention(q, k, v, **options)
    assert attended == [(2, heads, seq, dim)]
    assert torch.allclose(found.double(), exact, rtol=0, atol=1e-5)
    assert torch.allclose(
        attention(q, k, v, scale=0.3, **options), torchs(q, k, v, scale=0.3, **options), atol=1e-5
    )


@machine
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_of_half_precision_is_rounded_once(attended, dtype):
    q, k, v = (heads_of(2, 3, 40, 32).to(dtype) for _ in range(3))
    found = attention(q, k, v, is_causal=True)
    assert attended
    assert torch.equal(found, attention(q.float(), k.float(), v.float(), is_causal=True).to(dtype))


@machine
def test_attention_of_scores_that_are_huge_and_of_numbers_that_are_none(attended):
    q, k, v = (heads_of(1, 2, 20, 16, times) for times in (100, 100, 1))
    exact = torchs(q.double(), k.double(), v.double(), is_causal=True)
    assert torch.allclose(attention(q, k, v, is_causal=True).double(), exact, atol=1e-4)
    k[0, 0, 5, 3] = torch.nan
    found = attention(q, k, v, is_causal=True)
    assert found[0, 0, 5:].isnan().all()
    assert found[0, 0, :5].isfinite().all()
    assert found[0, 1].isfinite().all()


def test_attention_that_is_not_ours_goes_the_way_of_torch(attended):
    q, k, v = (heads_of(2, 4, 6, 16) for _ in range(3))
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    for queries, keys, values, options in (
        (q, k, v, {"attn_mask": mask}),
        (q[:, :, -1:], k, v, {}),  # behind a cache
        (q[..., :8], k[..., :8], v[..., :8], {}),
        (q.double(), k.double(), v.double(), {"is_causal": True}),
        (q[0], k[0], v[0], {}),
        (q.clone().requires_grad_(), k, v, {}),
    ):
        assert torch.equal(
            attention(queries, keys, values, **options), torchs(queries, keys, values, **options)
        )
    assert not attended
    with pytest.raises(RuntimeError):  # as torch: grouped heads want to be asked for
        attention(q, k[:, :2], v[:, :2])


@machine
def test_the_attention_of_a_model_computes_so(attended):
    model, ids = tiny.llama(head_dim=16), torch.arange(1, 11)[None]
    with torch.no_grad():
        plain = model(ids).logits
        assert not attended
        with Float32():
            found = model(ids).logits
    assert len(attended) == len(model.model.layers)
    assert torch.allclose(found, plain, atol=1e-5)


@machine
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [1, 16, 24, 96, 577])
def test_an_rms_norm_is_that_of_transformers(width, threads):
    norm = LlamaRMSNorm(width, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(made(width))
    x = 10 * made(3, 5, width)
    torch.set_num_threads(threads)
    with norms(norm) as found, torch.no_grad():
        assert found == 1
        given = norm(x), norm(x.transpose(0, 1)).transpose(0, 1)
    torch.set_num_threads(1)
    for y in given:
        assert torch.allclose(y, norm(x), rtol=1e-5, atol=1e-6)
    assert "forward" not in norm.__dict__


@machine
def test_norms_of_other_kinds_are_left_alone():
    class Shifted(LlamaRMSNorm):
        def forward(self, x):
            return super().forward(x) * (1 + self.weight)

    others = [nn.LayerNorm(8), nn.Linear(8, 8), Shifted(8), LlamaRMSNorm(8).to(torch.bfloat16)]
    assert all(why_no_norm(module) for module in others)
    with norms(nn.ModuleList(others)) as found:
        assert not found


@machine
def test_what_the_kernel_of_norms_does_not_take_goes_the_way_of_the_model(monkeypatch):
    handed = []
    norm = LlamaRMSNorm(8)
    with norms(norm) as found:
        assert found == 1
        monkeypatch.setattr(native, "rms_norm", lambda x, *_: handed.append(x) or x)
        norm(made(2, 8)).sum().backward()
        assert norm.weight.grad is not None
        with torch.no_grad():
            for x in (made(2, 8).bfloat16(), made(2, 8).double(), made(0, 8)):
                assert norm(x).shape == x.shape
        assert not handed
        with torch.no_grad():
            norm(made(2, 8))
        assert len(handed) == 1
