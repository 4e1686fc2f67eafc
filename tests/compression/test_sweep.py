"""The sweep against the textbook: the same with H inverted at each step, and the identity of its errors."""

import logging

import pytest
import small_compression as small
import torch

from luthier.acceleration import native
from luthier.compression import masks
from luthier.compression.grid import Scheme, fit
from luthier.compression.sweep import Rounding, factor, sweep
from luthier.errors import MethodError

N, K = 12, 32
W = small.weight_of(N, K, dtype=torch.float64)
H = small.hessian_of(small.correlated(200, K).double())
STEP = 0.25


def rounded(column, _=None):
    return torch.round(column / STEP) * STEP


def damped(hessian, share):
    return hessian + share * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


def textbook(weight, hessian, settle, order=None):
    """Optimal Brain Surgeon with an inverse of what is left at each step; `hessian` is damped already."""
    order = list(range(weight.shape[1])) if order is None else order.tolist()
    left, w, found = list(order), weight.clone(), torch.zeros_like(weight)
    for j in order:
        inverse = torch.linalg.inv(hessian[left][:, left])
        found[:, j] = settle(w[:, j], j)
        lost = (w[:, j] - found[:, j]) / inverse[0, 0]
        w[:, left] -= lost[:, None] * inverse[0]
        left.remove(j)
    return found


@pytest.mark.parametrize("block", [1, 5, 16, K, 1000])
@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_is_the_textbook_recursion_whatever_the_block(block, damping):
    found = sweep(W, H, settle=rounded, block=block, damping=damping)
    expected = textbook(W, damped(H, damping), rounded)
    assert torch.equal(found.weight, expected)
    assert found.damping == damping
    assert not torch.equal(expected, rounded(W))


def test_any_order_of_the_columns():
    order = torch.randperm(K, generator=torch.Generator().manual_seed(3))
    found = sweep(W, H, settle=rounded, order=order, block=8).weight
    assert torch.equal(found, textbook(W, damped(H, 0.01), rounded, order))
    # The same columns under other names: nothing but the names may change.
    renamed = sweep(W[:, order], H[order][:, order], settle=rounded).weight
    assert torch.equal(renamed, found[:, order])


def test_the_index_that_settle_is_given_is_that_of_the_weight():
    order = torch.arange(K).flip(0)
    seen = []
    sweep(W, H, settle=lambda column, index: seen.append(index) or column, order=order, block=8)
    assert seen == order.tolist()


@pytest.mark.parametrize("block", [1, 16, 64])
def test_the_errors_add_up_to_the_change_of_the_output(block):
    order = H.diagonal().argsort(descending=True)
    found = sweep(W, H, settle=rounded, order=order, block=block)
    change = W - found.weight
    assert found.square == pytest.approx(float(((change @ H) * change).sum()), rel=1e-9)
    # A dead input has no part in it, whatever its weights were.
    dead = H.clone()
    dead[5], dead[:, 5] = 0, 0
    found = sweep(W, dead, settle=rounded, block=block)
    change = W - found.weight
    assert found.square == pytest.approx(float(((change @ dead) * change).sum()), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("columns", [1, 7, 48, 131])
def test_the_factor_is_that_of_what_is_left(columns, dtype):
    """In float32 it is that of our kernel, where the machine has it."""
    hessian = small.hessian_of(small.correlated(3 * columns + 5, columns).double())
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(3))
    found = factor(hessian.to(dtype), 0.01, order)
    matrix = damped(hessian, 0.01)[order][:, order]
    unit, roots = found.unit.double(), found.roots.double()
    exact = 1e-9 if dtype == torch.float64 else 1e-4
    made, largest = unit * roots.square() @ unit.T, float(matrix.max())
    assert torch.allclose(made, matrix, rtol=exact, atol=exact * largest)
    assert torch.equal(unit, unit.triu())
    assert (unit.diagonal() == 1).all()
    assert found.added == pytest.approx(0.01 * float(hessian.diagonal().mean()))
    # The r are those of the papers' factor of the inverse, H^-1 = U^T U.
    for j in (0, columns // 2, columns - 1):
        assert torch.allclose(roots[j] ** -2, torch.linalg.inv(matrix[j:, j:])[0, 0], rtol=10 * exact)


def test_without_correlations_nothing_is_made_up_for():
    diagonal = torch.diag(torch.logspace(-2, 2, K, dtype=torch.float64))
    assert torch.equal(sweep(W, diagonal, settle=rounded).weight, rounded(W))


def test_what_is_not_settled_stays():
    found = sweep(W, H)
    assert torch.equal(found.weight, W)
    assert found.square == 0
    assert torch.equal(W, small.weight_of(N, K, dtype=torch.float64))


def test_dead_inputs_become_zero_and_disturb_nothing():
    hessian = H.clone()
    hessian[5], hessian[:, 5] = 0, 0
    found = sweep(W, hessian, settle=rounded).weight
    assert not found[:, 5].any()
    assert torch.isfinite(found).all()
    alive = [j for j in range(K) if j != 5]
    # A dead input counts as 1 in the mean of the diagonal.
    share = 0.01 * ((hessian.diagonal().sum() + 1) / K) / hessian.diagonal()[alive].mean()
    others = sweep(W[:, alive], hessian[alive][:, alive], settle=rounded, damping=float(share)).weight
    assert torch.equal(found[:, alive], others)
    assert torch.isfinite(sweep(W, torch.zeros_like(H), settle=rounded).weight).all()


@pytest.mark.parametrize("every", [4, 8, 12])
@pytest.mark.parametrize("block", [4, 10, 64])
def test_a_mask_is_chosen_on_the_columns_as_they_then_are(every, block):
    """Naive: a full update of all later columns after each, and a look at every n-th of them."""
    matrix = damped(H, 0.01)
    w, expected, mask = W.clone(), W.clone(), torch.zeros(N, K, dtype=torch.bool)
    for j in range(K):
        inverse = torch.linalg.inv(matrix[j:, j:])
        if j % every == 0:
            ahead = min(j + every, K)
            diagonal = torch.stack([torch.linalg.inv(matrix[k:, k:])[0, 0] for k in range(j, ahead)]).sqrt()
            mask[:, j:ahead] = (w[:, j:ahead] / diagonal).abs() < 1.5
        expected[:, j] = rounded(w[:, j].masked_fill(mask[:, j], 0))
        w[:, j:] -= ((w[:, j] - expected[:, j]) / inverse[0, 0])[:, None] * inverse[0]
    found = sweep(
        W,
        H,
        settle=rounded,
        look=lambda columns, diagonal, _: (columns / diagonal).abs() < 1.5,
        look_every=every,
        block=block,
    ).weight
    assert mask.any()
    assert torch.equal(found, expected)


def test_where_h_has_no_inverse_damping_is_raised_and_that_is_said(caplog):
    single = torch.ones(K, K)
    with caplog.at_level(logging.WARNING, logger="luthier.compression"):
        found = sweep(W.float(), single, settle=rounded, damping=0.0)
    assert found.damping > 0
    assert torch.isfinite(found.weight).all()
    assert "damping raised from 0 to" in caplog.text
    caplog.clear()
    sweep(W.float(), single, settle=rounded, damping=0.01)
    assert not caplog.text


def test_what_has_no_inverse_at_all_is_refused():
    with pytest.raises(MethodError, match="not finite"):
        sweep(W, H * float("nan"), settle=rounded)
    with pytest.raises(MethodError, match=r"cannot be inverted.*more calibration data"):
        sweep(W, H - 1000 * torch.eye(K, dtype=torch.float64), settle=rounded)


def test_pruned_columns_before_kept_ones_are_made_up_for_by_least_squares():
    """Only then is the sweep no worse than the best: later kept columns see all of the error."""
    mask = torch.zeros(N, K, dtype=torch.bool)
    mask[:, : K // 2] = True
    found = sweep(W, H, look=lambda *_: mask[:, :K], look_every=K).weight
    matrix = damped(H, 0.01)
    kept = list(range(K // 2, K))
    best = torch.linalg.solve(matrix[kept][:, kept], matrix[kept] @ W.T).T
    assert torch.allclose(found[:, kept], best, atol=1e-10)
    assert not found[:, : K // 2].any()


SCHEMES = [Scheme(4, 16), Scheme(3, None, symmetric=False), Scheme(2, 8, symmetric=False), Scheme(4, 0), None]


@pytest.mark.skipif(not native.here(), reason=f"no kernels: {native._library()}")
@pytest.mark.parametrize("rows", [1, 48, 101])
@pytest.mark.parametrize("pattern", ["dense", "half", "2:4"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_our_kernel_gives_what_single_columns_give(monkeypatch, rows, pattern, scheme, threads):
    """Codes alike, and weights that are on no grid to the last bits: the kernel rounds a sum once less."""
    weight, columns = small.weight_of(rows, 112), 112
    hessian = small.hessian_of(small.correlated(400, columns)).float()
    order = hessian.diagonal().argsort(descending=True)
    options = {"order": order, "block": 40}
    if scheme is not None:
        options["settle"] = Rounding(fit(weight, scheme))
    if pattern == "half":
        options["look"] = lambda now, diagonal, _: masks.lowest((now / diagonal) ** 2, 0.5)
    elif pattern == "2:4":
        options["look"] = lambda now, diagonal, _: masks.in_groups((now / diagonal) ** 2, 2, 4)
        options["look_every"] = 4
    torch.set_num_threads(threads)
    found = sweep(weight, hessian, **options)
    torch.set_num_threads(1)
    monkeypatch.setattr(native, "here", lambda: False)
    expected = sweep(weight, hessian, **options)
    assert torch.equal(found.weight == 0, expected.weight == 0)
    assert torch.allclose(found.weight, expected.weight, rtol=1e-4, atol=1e-5)
    assert found.square == pytest.approx(expected.square, rel=1e-4)
    if pattern != "dense":
        assert (found.weight == 0).float().mean() >= 0.49
