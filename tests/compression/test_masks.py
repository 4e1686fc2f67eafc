"""Masks: exact counts, ties, groups, and zeros that outlive training."""

import pytest
import small_compression as small
import torch
from torch import nn

from luthier.compression import masks
from luthier.errors import MethodError


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.29, 0.5, 0.999, 1])
@pytest.mark.parametrize("scope", ["layer", "row"])
def test_exactly_the_share_rounded_down(sparsity, scope):
    for scores in (small.weight_of(7, 100), torch.ones(7, 100)):
        mask = masks.lowest(scores, sparsity, scope)
        if scope == "row":
            assert (mask.sum(1) == int(round(sparsity * 1000) * 100 // 1000)).all()
        else:
            assert mask.sum() == round(sparsity * 1000) * 700 // 1000
        if mask.any() and not mask.all() and scope == "layer":
            assert scores[mask].max() <= scores[~mask].min()


def test_of_equal_scores_the_first_go():
    assert masks.lowest(torch.ones(2, 4), 0.5, "layer").tolist() == [[True] * 4, [False] * 4]
    assert masks.lowest(torch.ones(2, 4), 0.5, "row").tolist() == [[True, True, False, False]] * 2


@pytest.mark.parametrize(("zeros", "group"), [(2, 4), (4, 8), (1, 4), (3, 4)])
def test_every_group_has_its_zeros_and_they_are_the_lowest(zeros, group):
    scores = small.weight_of().abs()
    mask = masks.in_groups(scores, zeros, group)
    for row, chosen in zip(scores, mask, strict=True):
        for start in range(0, len(row), group):
            lowest = sorted(range(group), key=lambda i: float(row[start + i]))[:zeros]
            assert set(chosen[start : start + group].nonzero().flatten().tolist()) == set(lowest)


def test_patterns_are_read_or_refused():
    assert masks.parse("2:4") == (2, 4)
    assert masks.parse(None) is None
    for wrong in ("3:2", "a:b", "0:4", "4:4", "2-4", "2:4:8", "", 4, 0.5):
        with pytest.raises(MethodError, match=r"pattern: .* is not zeros:group\. Write 2:4"):
            masks.parse(wrong)
    with pytest.raises(MethodError, match=r"Groups of 8 do not fill a row of the 12 inputs of up.*exclude"):
        masks.require_divides(12, 8, "up")


def test_zeros_stay_under_an_optimiser_with_momentum():
    layer, dense = nn.Linear(8, 8), nn.Linear(8, 8)
    model = nn.Sequential(layer, dense)
    with torch.no_grad():
        layer.weight[:, ::2] = 0
    keep = masks.KeepZeros()
    keep.on_train_begin(None, None, None, model=model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    before = model.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
        keep.on_optimizer_step(None, None, None)
    assert not layer.weight[:, ::2].any()
    assert masks.share_of_zeros(layer.weight) == 0.5
    for name, tensor in model.state_dict().items():
        assert not torch.equal(tensor, before[name])  # what was not zero has learnt
