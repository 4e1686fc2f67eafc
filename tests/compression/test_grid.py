"""Grids: what each scheme covers, that its points stay, and that codes are found with the stored scale."""

import pytest
import small_compression as small
import torch

from luthier.compression.grid import Scheme, activation_step, fit, require_divides, round_activations
from luthier.errors import MethodError

SCHEMES = [
    Scheme(bits=b, group_size=g, symmetric=s)
    for b in (2, 3, 4, 8)
    for g in (16, None, 0)
    for s in (True, False)
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_points_of_the_grid_stay_and_codes_give_them_back(scheme, dtype):
    weight = small.weight_of()
    grid = fit(weight, scheme, dtype)
    codes = grid.quantize(weight)
    rounded = grid.dequantize(codes)
    assert grid.scale.dtype == dtype
    assert codes.min() >= scheme.low
    assert codes.max() <= scheme.high
    assert torch.equal(grid.round(weight), rounded)
    assert torch.equal(grid.quantize(rounded), codes)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_weight_moves_by_more_than_half_a_step_of_its_group(scheme):
    weight = small.weight_of()
    grid = fit(weight, scheme)
    step = grid.scale.repeat_interleave(16, 1) if scheme.group_size == 16 else grid.scale
    # The highest magnitude is half a step beyond the last code of a symmetric grid, or the zero is rounded.
    limit = 0.5 if scheme.symmetric else 1.0
    assert ((grid.round(weight) - weight).abs() <= step * (limit + 1e-4)).all()


def test_steps_by_hand():
    weight = torch.tensor([[-1.0, 3.0, 0.0, 0.5]])
    symmetric = fit(weight, Scheme(bits=4, group_size=None))
    assert symmetric.scale.item() == pytest.approx(3 / 7.5)
    assert symmetric.zero.item() == 0
    asymmetric = fit(weight, Scheme(bits=4, group_size=2, symmetric=False))
    assert asymmetric.scale.flatten().tolist() == pytest.approx([4 / 15, 0.5 / 15])
    assert asymmetric.zero.flatten().tolist() == [-4, -8]  # -8 + round(1 / (4/15)), and no negative values


def test_a_row_of_one_sign_has_zero_on_its_grid():
    for sign in (1, -1):
        weight = sign * (small.weight_of().abs() + 1)
        grid = fit(weight, Scheme(symmetric=False))
        assert torch.equal(grid.round(torch.zeros_like(weight)), torch.zeros_like(weight))
        assert (grid.round(weight) - weight).abs().max() <= grid.scale.max()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_of_zeros_stays_zero(symmetric):
    weight = torch.zeros(2, 32)
    weight[1, 16:] = 1
    rounded = fit(weight, Scheme(group_size=16, symmetric=symmetric)).round(weight)
    assert torch.isfinite(rounded).all()
    assert torch.allclose(rounded, weight, atol=0.07)


def test_small_weights_survive_a_half_precision_scale():
    """The scale of such rows is below the least normal number of float16."""
    weight = small.weight_of() * 1e-3 / 4
    rounded = fit(weight, Scheme(bits=8, group_size=16), torch.float16).round(weight)
    assert (rounded - weight).norm() < 0.05 * weight.norm()


def test_a_column_of_the_grid_is_that_column():
    weight = small.weight_of()
    for scheme in (Scheme(group_size=16, symmetric=False), Scheme(group_size=None)):
        grid = fit(weight, scheme)
        for index in (0, 15, 16, 63):
            column = weight[:, index : index + 1]
            assert torch.equal(grid.column(index).round(column), grid.round(weight)[:, index : index + 1])


def test_shrinking_clips_the_range_and_makes_finer_steps():
    weight = small.weight_of()
    whole, clipped = (fit(weight, Scheme(), shrink=s) for s in (1.0, 0.5))
    assert torch.allclose(clipped.scale, whole.scale / 2)
    assert clipped.round(weight).abs().max() <= weight.abs().max() / 2 * 8 / 7.5 + 1e-6


def test_group_sizes_that_fit_are_named():
    with pytest.raises(MethodError, match=r"48 does not divide the 64 inputs of up.*16, 32, 64, or null"):
        require_divides(Scheme(group_size=48), 64, "up")
    with pytest.raises(MethodError, match="group_size: null"):
        require_divides(Scheme(group_size=64), 23, "up")
    for size in (None, 0, 32):
        require_divides(Scheme(group_size=size), 64, "up")


@pytest.mark.parametrize("per", ["token", "tensor"])
def test_inputs_are_rounded_by_their_own_step(per):
    x = small.correlated()[0]
    step = activation_step(x, 8, per)
    found = round_activations(x, 8, per)
    assert ((found - x).abs() <= step * 0.5001).all()
    assert torch.equal(round_activations(x, 8, per, step), found)
    tokens = round_activations(10 * x[:1], 8, per)
    if per == "token":
        assert torch.allclose(tokens, 10 * found[:1], rtol=1e-5)


def test_a_static_step_clips_what_lies_beyond():
    found = round_activations(
        torch.tensor([0.0, 0.24, 0.26, 1000.0, -1000.0]), 8, "static", torch.tensor(0.5)
    )
    assert found.tolist() == [0, 0, 0.5, 63.5, -64]
    assert round_activations(torch.zeros(3, 4), 8, "token").abs().max() == 0
