"""Statistics of inputs do not depend on how the inputs were cut, and are those of their definitions."""

import pytest
import small_compression as small
import torch

from luthier.acceleration import native
from luthier.compression.statistics import Hessian, Moments, Samples

X = small.correlated(200, 16)[0]
CUTS = {"whole": [200], "one by one": [1] * 200, "uneven": [3, 0, 90, 100, 7]}


def fed(statistic, cut, x=X):
    for part in x.split(CUTS[cut]):
        statistic.add(part)
    return statistic


@pytest.mark.parametrize("cut", CUTS)
def test_hessian(cut):
    found = fed(Hessian(16), cut)
    assert torch.allclose(found.value.double(), 2 / 200 * X.double().T @ X.double(), rtol=1e-4, atol=1e-4)
    assert found.tokens == 200


@pytest.mark.parametrize("cut", CUTS)
def test_moments(cut):
    found = fed(Moments(16), cut)
    assert torch.allclose(found.norm, X.norm(dim=0))
    assert torch.allclose(found.mean, X.abs().mean(0))
    assert torch.equal(found.peak, X.abs().amax(0))


def test_order_of_the_tokens_does_not_matter():
    mixed = X[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    assert torch.allclose(fed(Hessian(16), "whole").value, fed(Hessian(16), "uneven", mixed).value, rtol=1e-4)
    assert torch.allclose(fed(Moments(16), "whole").norm, fed(Moments(16), "uneven", mixed).norm)


def test_half_precision_inputs_are_summed_in_full_precision():
    """In float16 the sum of 1000 squares of 30 would overflow."""
    x = torch.full((1000, 2), 30.0, dtype=torch.float16)
    hessian, moments = Hessian(2), Moments(2)
    hessian.add(x)
    moments.add(x)
    assert hessian.value[0, 1].item() == pytest.approx(1800)
    assert moments.norm[0].item() == pytest.approx(30 * 1000**0.5)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("count", [1, 7, 101, 199, 200, 500])
def test_samples_are_spread_over_all_tokens(cut, count):
    x = torch.arange(200.0)[:, None]
    found = fed(Samples(count, 200), cut, x).value.flatten()
    expected = [i * 200 // min(count, 200) for i in range(min(count, 200))]
    assert found.tolist() == expected


def test_of_no_tokens_there_is_nothing():
    assert not Hessian(4).value.any()
    assert not Moments(4).norm.any()


class TestCap:
    """A token of huge inputs counts no more than `cap` usual ones."""

    @pytest.fixture
    def inputs(self):
        x = torch.randn(3000, 6, generator=torch.Generator().manual_seed(0))
        x[0] *= 1000
        return x

    def capped(self, x, cut):
        hessian = Hessian(6, cap=4.0)
        for part in x.split(cut):
            hessian.add(part)
        return hessian.value

    def test_equals_the_formula_however_inputs_are_cut(self, inputs):
        square = inputs.square().sum(1)
        weight = (4 * square[:2048].median() / square).clamp(max=1)
        expected = 2 * (inputs * weight[:, None]).T @ inputs / len(inputs)
        for cut in (1, 700, 3000):
            assert torch.allclose(self.capped(inputs, cut), expected, rtol=1e-4, atol=1e-5)

    def test_changes_nothing_where_no_token_is_unusual(self):
        x = torch.nn.functional.normalize(
            torch.randn(50, 6, generator=torch.Generator().manual_seed(1)), dim=1
        )
        plain = Hessian(6)
        plain.add(x)
        assert torch.allclose(self.capped(x, 20), plain.value, rtol=1e-5, atol=1e-7)

    def test_the_huge_token_no_longer_decides(self, inputs):
        plain = Hessian(6)
        plain.add(inputs)
        usual = Hessian(6)
        usual.add(inputs[1:])
        assert (plain.value - usual.value).norm() > 100 * usual.value.norm()
        assert (self.capped(inputs, 500) - usual.value).norm() < 0.1 * usual.value.norm()


@pytest.mark.skipif(not native.here(), reason=f"no kernels: {native._library()}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [1, 7, 64, 65, 200])
@pytest.mark.parametrize("threads", [1, 2])
def test_our_kernel_gives_the_sums_of_torch(monkeypatch, dtype, features, threads):
    """More tokens than a chunk of the kernel has, widths that leave tiles half empty, two threads."""
    x = torch.randn(700, features, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[3] *= 100
    torch.set_num_threads(threads)
    found = {cap: Hessian(features, cap=cap) for cap in (None, 4.0)}
    for hessian in found.values():
        for part in x.split(300):
            hessian.add(part)
    values = {cap: hessian.value for cap, hessian in found.items()}
    torch.set_num_threads(1)
    monkeypatch.setattr(native, "here", lambda: False)
    for cap, value in values.items():
        plain = Hessian(features, cap=cap)
        plain.add(x)
        assert torch.allclose(value, plain.value, rtol=1e-5, atol=1e-5 * float(plain.value.diagonal().max()))
        assert torch.equal(value, value.T)


@pytest.mark.skipif(not native.here(), reason=f"no kernels: {native._library()}")
@pytest.mark.parametrize("cap", [None, 4.0])
def test_of_a_large_layer_it_is_that_of_inputs_in_bfloat16(cap):
    """And what a change of the weight costs under it is what it costs."""
    x = torch.randn(700, 300, generator=torch.Generator().manual_seed(0))
    x = x @ torch.randn(300, 300, generator=torch.Generator().manual_seed(1))
    hessian = Hessian(300, cap=cap)
    hessian.add(x)
    exact = x.double()
    if cap is not None:
        square = exact.square().sum(1, keepdim=True)
        exact = exact * (cap * square.median() / square).clamp(max=1).sqrt()
    rounded = exact.to(torch.bfloat16).double()
    assert torch.allclose(hessian.value.double(), rounded.T @ rounded * (2 / 700), rtol=1e-4, atol=5e-3)
    exact_value = exact.T @ exact * (2 / 700)
    change = torch.randn(64, 300, generator=torch.Generator().manual_seed(2)).double()
    costs = [float(((change @ h) * change).sum()) for h in (hessian.value.double(), exact_value)]
    assert costs[0] == pytest.approx(costs[1], rel=1e-4)
