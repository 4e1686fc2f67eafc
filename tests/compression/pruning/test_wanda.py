"""Wanda: of each row the lowest |W| times the norm of the input, and kept weights untouched."""

import pytest
import small_compression as small
import tiny
import torch

from luthier import method
from luthier.compression.compress import compress
from luthier.compression.linear import matrix
from luthier.compression.sweep import factor
from luthier.models import structure

W, X = small.weight_of(), small.correlated()


def wanda(**options):
    return method("wanda")(**options)


def naive(weight, x, sparsity=0.5, pattern=None):
    """Number by number."""
    found = weight.clone()
    norms = [sum(float(v) ** 2 for v in column) ** 0.5 for column in x.flatten(0, -2).T]
    zeros, group = pattern or (int(sparsity * weight.shape[1]), weight.shape[1])
    for row in found:
        scores = [abs(float(w)) * n for w, n in zip(row, norms, strict=True)]
        for start in range(0, len(scores), group):
            for index in sorted(range(start, start + group), key=scores.__getitem__)[:zeros]:
                row[index] = 0
    return found


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_is_the_naive_loop(sparsity):
    assert torch.equal(small.changed(wanda(sparsity=sparsity), W, X), naive(W, X, sparsity))


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_have_their_zeros(pattern, dtype):
    weight, x = W.to(dtype), X.to(dtype)
    found = small.changed(wanda(pattern="{}:{}".format(*pattern)), weight, x)
    assert torch.equal(found, naive(weight.float(), x.float(), pattern=pattern).to(dtype))
    assert ((found == 0).reshape(-1, pattern[1]).sum(1) == pattern[0]).all()


def test_every_row_loses_as_many_and_what_stays_is_untouched():
    found = small.changed(wanda(sparsity=0.37), W, X, transposed=True)
    assert ((found == 0).sum(1) == int(0.37 * 64)).all()
    assert torch.equal(found[found != 0], W[found != 0])
    assert torch.equal(small.changed(wanda(sparsity=0), W, X), W)


def test_with_equal_norms_it_is_magnitude_by_row():
    even = X / X.norm(dim=1, keepdim=True)
    expected = small.changed(method("magnitude")(scope="row"), W)
    assert torch.equal(small.changed(wanda(), W, even), expected)


def test_scaling_inputs_against_weights_changes_no_mask():
    """Powers of two: exact in floating point."""
    factor = 2.0 ** torch.randint(-3, 4, (64,), generator=torch.Generator().manual_seed(0))
    mask = small.changed(wanda(), W, X) == 0
    assert torch.equal(small.changed(wanda(), W / factor, X * factor) == 0, mask)


def test_how_the_data_is_cut_and_ordered_does_not_matter():
    found = small.changed(wanda(), W, X)
    mixed = X[:, torch.randperm(512, generator=torch.Generator().manual_seed(0))]
    for parts in (X.split(1, dim=1), X.split([100, 400, 12], dim=1), (mixed,), (X.reshape(4, 128, 64),)):
        assert torch.equal(small.changed(wanda(), W, *parts), found)


def test_padding_does_not_count():
    x = torch.cat([X, 1e4 * torch.randn(1, 100, 64, generator=torch.Generator().manual_seed(0))], 1)
    mask = torch.arange(612)[None] < 512
    assert torch.equal(small.changed(wanda(), W, x, mask=mask), small.changed(wanda(), W, X))


def test_inputs_that_are_always_zero_lose_their_weights_first():
    x = X.clone()
    x[..., [3, 40]] = 0
    found = small.changed(wanda(sparsity=2 / 64), W, x)
    assert torch.equal((found == 0).sum(0).nonzero().flatten(), torch.tensor([3, 40]))
    assert small.error(found, W, x) == 0


def test_for_uncorrelated_inputs_it_is_the_saliency_of_optimal_brain_surgeon():
    hessian = torch.diag(torch.linspace(0.5, 4, 64))
    saliency = (W * factor(hessian, 0.0).roots) ** 2
    x = (hessian / 2).sqrt() * 8  # 64 tokens, 2/64 X^T X = H
    found = small.changed(wanda(), W, x[None])
    expected = W.clone().scatter_(1, saliency.argsort(1)[:, :32], 0)
    assert torch.equal(found, expected)


def test_where_a_feature_is_large_it_beats_magnitude():
    x = torch.randn(1, 256, 64, generator=torch.Generator().manual_seed(0))
    x[..., ::8] *= 20
    plain = small.changed(method("magnitude")(scope="row"), W)
    assert small.error(small.changed(wanda(), W, x), W, x) < 0.5 * small.error(plain, W, x)


def test_the_record_is_the_error_for_uncorrelated_inputs():
    block = small.alone(W, X)
    (record,) = wanda().change(block)
    found, power = small.weight_in(block), X.square().sum((0, 1))
    expected = float(((found - W) ** 2 * power).sum() / (W**2 * power).sum())
    assert record.after == pytest.approx(expected, rel=1e-3)
    assert "uncorrelated" in record.note
    assert record.sparsity == 0.5


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_layers_of_a_block_are_scored_on_it_as_it_came(family):
    """Not one after the other: the last layer's norms are those of the dense layers before it."""
    data, build = small.batches(), small.MODELS[family]
    together, alone = build(), build()
    compress(together, wanda(), calibration=data)
    last = list(structure.linears(alone))
    last = [n for n in last if ".0." in n][-1]
    compress(alone, wanda(targets=[last]), calibration=data)
    assert torch.equal(matrix(together.get_submodule(last)), matrix(alone.get_submodule(last)))


def test_a_pruned_model_is_an_ordinary_one(tmp_path):
    model, data = tiny.llama(), small.batches()
    compress(model, wanda(pattern="2:4"), calibration=data)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(**data[0]).logits, model(**data[0]).logits)
