"""SparseGPT: exact counts, the recursion of Optimal Brain Surgeon, and what it may and may not gain."""

import pytest
import small_compression as small
import tiny
import torch

from luthier import method
from luthier.compression.compress import compress
from luthier.compression.linear import matrix
from luthier.compression.masks import in_groups, lowest
from luthier.models import structure

W, X = small.weight_of(), small.correlated()
H = small.hessian_of(X)


def sparsegpt(**options):
    return method("sparsegpt")(**options)


def damped(hessian, share=0.01):
    return hessian + share * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


def naive(weight, hessian, choose, every):
    """With an inverse of what is left at each step, all later columns brought up to date, in float64."""
    w, matrix = weight.double(), damped(hessian.double())
    columns = w.shape[1]
    inverses = [torch.linalg.inv(matrix[j:, j:])[0] for j in range(columns)]
    for j in range(columns):
        if j % every == 0:
            ahead = slice(j, min(j + every, columns))
            mask = choose(w[:, ahead] ** 2 / torch.stack([i[0] for i in inverses[ahead]]))
        lost = w[:, j].masked_fill(~mask[:, j % every], 0) / inverses[j][0]
        w[:, j:] -= lost[:, None] * inverses[j]
        w[:, j].masked_fill_(mask[:, j % every], 0)
    return w.float()


RULES = {
    "whole": ({"sparsity": 0.5}, lambda s: lowest(s, 0.5), 128),
    "blocks": ({"sparsity": 0.6, "mask_block": 16}, lambda s: lowest(s, 0.6), 16),
    "uneven blocks": ({"sparsity": 0.5, "mask_block": 24}, lambda s: lowest(s, 0.5), 24),
    "2:4": ({"pattern": "2:4"}, lambda s: in_groups(s, 2, 4), 4),
    "4:8": ({"pattern": "4:8"}, lambda s: in_groups(s, 4, 8), 8),
}


@pytest.mark.parametrize("rule", RULES)
def test_is_the_textbook_recursion(rule):
    options, choose, every = RULES[rule]
    found = small.changed(sparsegpt(**options), W, X)
    expected = naive(W, H, choose, every)
    # In float32 two all but equal saliencies may change places: a row that differs does so from there on.
    same = (found - expected).abs() < 1e-2
    assert same.all(1).float().mean() > 0.8
    assert small.error(found, W, X) == pytest.approx(small.error(expected, W, X), rel=0.05)


@pytest.mark.parametrize("mask_block", [1, 16, 24, 128])
@pytest.mark.parametrize("sparsity", [0.29, 0.5, 1])
def test_each_block_of_columns_loses_its_share_rounded_down(mask_block, sparsity):
    found = small.changed(sparsegpt(sparsity=sparsity, mask_block=mask_block), W, X)
    for start in range(0, 64, mask_block):
        part = found[:, start : start + mask_block]
        assert (part == 0).sum() == int(sparsity * part.numel() + 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("pattern", "zeros", "group"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4)])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_group_has_its_zeros_also_as_it_is_stored(pattern, zeros, group, dtype, transposed):
    found = small.changed(sparsegpt(pattern=pattern), W.to(dtype), X.to(dtype), transposed=transposed)
    assert found.dtype == dtype
    assert ((found == 0).reshape(-1, group).sum(1) == zeros).all()


def test_of_nothing_pruned_nothing_changes():
    for options in ({"sparsity": 0}, {"sparsity": 0, "mask_block": 16}, {"sparsity": 1e-6}):
        assert torch.equal(small.changed(sparsegpt(**options), W, X), W)
    model, before = tiny.llama(), tiny.llama()
    compress(model, sparsegpt(sparsity=0), calibration=small.batches())
    assert all(torch.equal(p, before.get_parameter(n)) for n, p in model.named_parameters())


def test_with_uncorrelated_inputs_of_one_size_it_is_magnitude_block_by_block():
    x = torch.eye(64)[None]
    found = small.changed(sparsegpt(mask_block=16), W, x)
    for start in range(0, 64, 16):
        part = slice(start, start + 16)
        assert torch.equal(found[:, part], small.changed(method("magnitude")(), W[:, part]))


@pytest.mark.parametrize("rule", RULES)
def test_no_better_than_least_squares_on_its_own_mask(rule):
    """With the damped H of the sweep: the best values for the same zeros, row by row."""
    found = small.changed(sparsegpt(**RULES[rule][0]), W, X).double()
    weight, hessian = W.double(), damped(H.double())
    best = torch.zeros_like(weight)
    for row, (values, zero) in enumerate(zip(weight, found == 0, strict=True)):
        kept = (~zero).nonzero().flatten()
        best[row, kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ values)

    def loss(new):
        return (((new - weight) @ hessian) * (new - weight)).sum(1)

    assert (loss(best) <= loss(found) * (1 + 1e-6)).all()
    masked = weight.masked_fill(found == 0, 0)
    assert loss(best).sum() < loss(found).sum() < 0.6 * loss(masked).sum()


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_on_correlated_inputs_it_beats_magnitude(options, seed):
    weight, x = small.weight_of(seed=seed), small.correlated(seed=seed + 10)
    swept = small.changed(sparsegpt(**options), weight, x)
    plain = small.changed(method("magnitude")(**options), weight)
    assert small.error(swept, weight, x) < 0.5 * small.error(plain, weight, x)


def test_the_record_tells_masking_from_making_up():
    block = small.alone(W, X)
    (record,) = sparsegpt().change(block)
    found, size = small.weight_in(block), float((X @ W.T).square().sum())
    masked = W.masked_fill(found == 0, 0)
    assert record.before == pytest.approx(small.error(masked, W, X) / size, rel=1e-3)
    assert record.after == pytest.approx(small.error(found, W, X) / size, rel=1e-3)
    assert record.after < record.before
    assert record.sparsity == 0.5


def test_pruned_and_rounded_in_one_pass_beats_rounding_what_magnitude_left():
    """`[sparsegpt, gptq]` on one layer: zeros exact, error below magnitude's 2:4 with plain rounding."""
    both = {}
    for prune, quantise in (("sparsegpt", "gptq"), ("magnitude", "rtn")):
        weight = small.changed(method(prune)(pattern="2:4"), W, X)
        both[prune] = small.changed(method(quantise)(bits=4, group_size=16), weight, X)
        assert not both[prune][weight == 0].any()
    assert small.error(both["sparsegpt"], W, X) < 0.5 * small.error(both["magnitude"], W, X)


def test_dead_inputs_and_few_tokens_do_no_harm():
    x = X.clone()
    x[..., [3, 40]] = 0
    found = small.changed(sparsegpt(), W, x)
    assert not found[:, [3, 40]].any()
    block = small.alone(W, torch.ones(1, 4, 64))
    (record,) = sparsegpt(damping=0).change(block)
    assert "damping raised to" in record.note
    assert torch.isfinite(small.weight_in(block)).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "opt"])
def test_a_model_keeps_more_than_by_magnitude(family):
    """Mean square of the change of its logits at 2:4, on the data that was seen."""
    data, build = small.batches(24, 4, 16), small.MODELS[family]
    off = {}
    for name in ("magnitude", "sparsegpt"):
        model = build()
        compress(model, method(name)(pattern="2:4"), calibration=data)
        with torch.no_grad():
            off[name] = sum(
                float((model(**b).logits - build()(**b).logits).square().mean()) for b in data[:4]
            )
        for layer_name, layer in structure.linears(model).items():
            if "pooler" not in layer_name:
                assert ((matrix(layer) == 0).reshape(-1, 4).sum(1) == 2).all()
    assert off["sparsegpt"] < off["magnitude"]
