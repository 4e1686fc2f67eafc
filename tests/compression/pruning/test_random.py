"""Random pruning: a lot that is drawn from the seed and the name, and nothing that a criterion would find."""

import small_compression as small
import tiny
import torch

from luthier import method
from luthier.compression.compress import compress
from luthier.compression.linear import matrix
from luthier.models import structure

W = small.weight_of(64, 256)


def random(**options):
    return method("random")(**options)


def test_exactly_the_share_goes_and_the_rest_stays():
    for sparsity in (0, 0.3, 0.5, 1):
        found = small.changed(random(sparsity=sparsity), W)
        assert (found == 0).sum() == int(sparsity * W.numel() + 1e-9)
        assert torch.equal(found[found != 0], W[found != 0])
    found = small.changed(random(pattern="2:4"), W)
    assert ((found == 0).reshape(-1, 4).sum(1) == 2).all()


def test_it_does_not_look_at_the_weights():
    """What goes has the size of what stays, within what chance allows (5 standard errors)."""
    gone = small.changed(random(), W) == 0
    size = W.abs()
    assert abs(size[gone].mean() - size[~gone].mean()) < 5 * size.std() * (4 / W.numel()) ** 0.5
    assert torch.equal(small.changed(random(), 3 * W + 7) == 0, gone)
    assert abs(gone.float().mean(0) - 0.5).max() < 5 * 0.5 / 64**0.5


def test_the_lot_is_that_of_seed_and_name():
    masks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed + 5)  # the run's own stream plays no part and is not disturbed
        state, model = torch.get_rng_state(), tiny.llama()
        compress(model, random(seed=seed, exclude=["up_proj"] if len(masks) == 1 else []))
        assert torch.equal(torch.get_rng_state(), state)
        masks.append({n: matrix(m) == 0 for n, m in structure.linears(model).items()})
    first, again, other = masks
    for name in first:
        if "up_proj" in name:
            assert not again[name].any()
        else:
            assert torch.equal(first[name], again[name])
            assert not torch.equal(first[name], other[name])
    one, two = (first[f"model.layers.{i}.mlp.down_proj"] for i in (0, 1))
    assert not torch.equal(one, two)


def test_a_criterion_beats_it():
    lost = {name: float((small.changed(method(name)(), W) - W).norm()) for name in ("random", "magnitude")}
    assert lost["magnitude"] < 0.6 * lost["random"]
