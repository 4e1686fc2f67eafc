"""Magnitude pruning: the smallest weights, exactly as many as asked for."""

import pytest
import small_compression as small
import tiny
import torch

from luthier import method
from luthier.compression.compress import compress
from luthier.compression.linear import matrix
from luthier.models import structure

W = small.weight_of()


def magnitude(**options):
    return method("magnitude")(**options)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.77])
@pytest.mark.parametrize("scope", ["layer", "row"])
def test_the_smallest_go_and_the_others_stay_as_they_are(sparsity, scope):
    found = small.changed(magnitude(sparsity=sparsity, scope=scope), W)
    kept = found != 0
    assert torch.equal(found[kept], W[kept])
    for part, whole in zip(found, W, strict=True) if scope == "row" else [(found.flatten(), W.flatten())]:
        count = int(sparsity * len(whole) + 1e-9)
        assert (part == 0).sum() == count
        assert whole[part == 0].abs().max() < whole[part != 0].abs().min()


def test_ties_are_counted_exactly():
    for scope in ("layer", "row"):
        found = small.changed(magnitude(sparsity=0.3, scope=scope), torch.ones(8, 16))
        assert (found == 0).sum() == (int(0.3 * 16) * 8 if scope == "row" else int(0.3 * 128))


@pytest.mark.parametrize(("pattern", "zeros", "group"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4)])
@pytest.mark.parametrize("transposed", [False, True])
def test_groups_along_the_input_have_their_zeros(pattern, zeros, group, transposed):
    found = small.changed(magnitude(pattern=pattern), W, transposed=transposed)
    assert ((found == 0).reshape(-1, group).sum(1) == zeros).all()
    assert torch.equal(found[found != 0], W[found != 0])


def test_nothing_and_everything():
    assert torch.equal(small.changed(magnitude(sparsity=0), W), W)
    assert not small.changed(magnitude(sparsity=1), W).any()


def test_again_changes_nothing_and_more_keeps_less_of_the_same():
    once = small.changed(magnitude(sparsity=0.5), W)
    assert torch.equal(small.changed(magnitude(sparsity=0.5), once), once)
    more = small.changed(magnitude(sparsity=0.7), W)
    assert ((more != 0) <= (once != 0)).all()


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, tiny.bert])
def test_embeddings_norms_and_head_stay(build):
    model, before = build(), build()
    records = compress(model, magnitude())
    changed = {n for n, p in before.named_parameters() if not torch.equal(p, model.get_parameter(n))}
    assert changed == {f"{r.name}.weight" for r in records}
    assert changed == {f"{n}.weight" for n in structure.linears(model) if "pooler" not in n}
    for record in records:
        old, new = (matrix(m.get_submodule(record.name)) for m in (before, model))
        assert record.sparsity == pytest.approx(0.5, abs=1e-6)
        assert record.after == pytest.approx(float((new - old).square().sum() / old.square().sum()), rel=1e-4)
