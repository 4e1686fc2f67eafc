"""KronA: the product that is never built, its shapes, its rank, and the variants beside the FFN."""

import math

import pytest
import small_training as training
import tiny
import torch
from torch import nn

from luthier import method
from luthier.errors import MethodError
from luthier.tuning.attach import attach, trainable
from luthier.tuning.lowrank.krona import balanced, kron_product, shapes
from luthier.tuning.merge import merge
from luthier.tuning.tuner import DeltaLayer

MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert, "t5": tiny.t5}
BESIDE = ["krona_b", "krona_b_res"]


def krona(model, **options):
    torch.manual_seed(0)
    return attach(model, method("krona")(**options))


def changes(model):
    """The change on each layer, by the layer's name in the base model."""
    return {
        name.removeprefix("base_model.model."): module.deltas["default"]
        for name, module in model.named_modules()
        if isinstance(module, DeltaLayer)
    }


def blockwise(a, b):
    """A ⊗ B from its definition: block (i, j) is A_ij B."""
    return torch.cat([torch.cat([value * b for value in row], dim=1) for row in a], dim=0)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


EVERY_DIVISOR = [(a1, a2) for a1 in (1, 2, 3, 4, 6, 12) for a2 in (1, 2, 3, 4, 6, 8, 12, 24)]


@pytest.mark.parametrize(("a1", "a2"), EVERY_DIVISOR, ids=str)
def test_the_product_is_that_of_the_built_matrix(a1, a2):
    a, b = random(a1, a2), random(12 // a1, 24 // a2, seed=1)
    x = random(2, 5, 24, seed=2)
    assert torch.allclose(kron_product(x, a, b), x @ blockwise(a, b).T, atol=1e-12)


def test_its_gradients_are_those_of_the_built_matrix():
    for a1, a2 in [(2, 12), (6, 2)]:  # one for each order of the two products
        found = [random(2, 3, 24, seed=2), random(a1, a2), random(12 // a1, 24 // a2, seed=1)]
        oracle = [t.clone().requires_grad_() for t in found]
        found = [t.requires_grad_() for t in found]
        kron_product(*found).pow(2).sum().backward()
        (oracle[0] @ blockwise(oracle[1], oracle[2]).T).pow(2).sum().backward()
        for one, other in zip(found, oracle, strict=True):
            assert torch.allclose(one.grad, other.grad, atol=1e-9)


def test_balanced_shapes_have_the_fewest_parameters_and_are_square():
    assert balanced(768, 768) == (32, 24)
    for out, in_ in [(576, 576), (192, 576), (1536, 576), (12, 7), (7, 7)]:
        a1, a2 = balanced(out, in_)
        assert out % a1 == in_ % a2 == 0
        fewest = min(
            p * q + (out // p) * (in_ // q)
            for p in range(1, out + 1)
            if out % p == 0
            for q in range(1, in_ + 1)
            if in_ % q == 0
        )
        assert a1 * a2 + (out // a1) * (in_ // a2) == fewest >= math.floor(2 * math.sqrt(out * in_))


def test_a_shape_that_does_not_divide_names_those_that_do():
    with pytest.raises(MethodError) as caught:
        krona(tiny.llama(), a_shape=[5, 4], target_modules=["v_proj"])
    text = str(caught.value)
    assert "a_shape: [5, 4] does not divide 'model.layers.0.self_attn.v_proj', which is 16 x 32" in text
    assert "rows must be one of [1, 2, 4, 8, 16], columns one of [1, 2, 4, 8, 16, 32]" in text
    assert "a_shape: [4, 4]" in text


@pytest.mark.parametrize("wrong", ["square", [4], [4, 4, 4], [0, 4]])
def test_what_is_no_shape_is_refused(wrong):
    with pytest.raises(MethodError, match="no shape"):
        method("krona")(a_shape=wrong)


@pytest.mark.parametrize("variant", ["krona", *BESIDE])
def test_trains_as_many_parameters_as_the_formula_says(variant):
    model = krona(tiny.llama(), variant=variant, a_shape=[4, 2])
    base = tiny.llama()
    if variant == "krona":
        layers = [m for n, m in base.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n]
        sizes = [(m.out_features, m.in_features) for m in layers]
    else:
        sizes = [(32, 32)] * 2
    expected = sum(4 * 2 + (out // 4) * (in_ // 2) + (variant == "krona_b_res") for out, in_ in sizes)
    assert trainable(model)[0] == expected


def test_the_rank_is_the_product_of_the_ranks():
    a, b = random(6, 4), random(4, 8, seed=1)
    b[2:] = b[:2]  # rank 2
    rank = int(torch.linalg.matrix_rank(blockwise(a, b)))
    assert rank == 4 * 2
    x = torch.eye(32, dtype=torch.float64)
    assert int(torch.linalg.matrix_rank(kron_product(x, a, b))) == rank


@pytest.mark.parametrize(("a_shape", "size", "rank"), [("balanced", 32 + 32, 4 * 4), ([4, 4], 16 + 64, 32)])
def test_a_merged_change_of_the_size_of_a_lora_of_rank_one_has_a_high_rank(a_shape, size, rank):
    options = {"target_modules": ["q_proj"], "a_shape": a_shape}
    model = training.disturb(krona(tiny.llama(), **options), 0.5)
    name = "model.layers.0.self_attn.q_proj"
    change = changes(model)[name]
    assert change.A.numel() + change.B.numel() == size
    moved = merge(model).get_submodule(name).weight - tiny.llama().get_submodule(name).weight
    assert int(torch.linalg.matrix_rank(moved.detach())) == rank


def test_with_an_outer_shape_it_is_a_lora_of_rank_one():
    a1, a2, b1, b2 = shapes([12, 1], 12, 24, "layer")
    assert (a2, b1) == (1, 1)
    a, b, x = random(a1, a2), random(b1, b2, seed=1), random(3, 24, seed=2)
    assert torch.allclose(kron_product(x, a, b), (x @ b.T) @ a.T, atol=1e-12)


def test_with_a_of_one_entry_it_is_any_matrix():
    a, b, x = random(1, 1), random(12, 24, seed=1), random(3, 24, seed=2)
    assert torch.allclose(kron_product(x, a, b), a.item() * (x @ b.T), atol=1e-12)


def test_only_the_product_of_the_sizes_counts():
    a, b, x = random(3, 4), random(4, 6, seed=1), random(5, 24, seed=2)
    assert torch.allclose(kron_product(x, 7 * a, b / 7), kron_product(x, a, b), atol=1e-12)
    whole = kron_product(torch.eye(24, dtype=torch.float64), a, b)
    assert torch.isclose(whole.norm(), a.norm() * b.norm())


@pytest.mark.parametrize("kind", MODELS)
def test_at_the_start_only_a_has_a_gradient(kind):
    model = krona(MODELS[kind]())
    model(**training.batch(model)).loss.backward()
    for name, change in changes(model).items():
        assert not change.A.detach().any()
        assert change.B.detach().abs().max() <= 1 / math.sqrt(change.B.shape[1])
        assert change.A.grad.any(), name
        assert not change.B.grad.any(), name


def test_training_fits_a_kronecker_matrix_no_better_than_its_best_fit(tmp_path):
    """Van Loan: the best A ⊗ B is the largest singular pair of the matrix of vectorised blocks."""
    target = random(12, 24).float()
    blocks = target.view(3, 4, 4, 6).permute(0, 2, 1, 3).reshape(12, 24)  # rows: blocks (i, j)
    best = float((torch.linalg.svdvals(blocks)[1:] ** 2).sum())
    a, b = torch.zeros(3, 4, requires_grad=True), random(4, 6, seed=3).float().requires_grad_()
    optimizer = torch.optim.Adam([a, b], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        loss = (kron_product(torch.eye(24), a, b).T - target).pow(2).sum()
        loss.backward()
        optimizer.step()
    assert best - 1e-3 <= loss.item() <= 1.02 * best


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_change_of_a_layer_is_scaled_once(scale):
    model = krona(tiny.llama(), target_modules=["up_proj"], scale=scale)
    training.disturb(model, 0.2)
    name = "model.layers.0.mlp.up_proj"
    change = changes(model)[name]
    expected = tiny.llama().get_submodule(name).weight + scale * blockwise(change.A, change.B)
    assert torch.allclose(merge(model).get_submodule(name).weight, expected, atol=1e-6)


def ffn_input_and_output(base, kind, x):
    """FFN(h) of the first block from the base's own parts, for h = x."""
    if kind == "llama":
        return base.model.layers[0].mlp(x)
    if kind == "gpt2":
        return base.transformer.h[0].mlp(x)
    if kind == "t5":
        return base.encoder.block[0].layer[1].DenseReluDense(x)
    layer = base.bert.encoder.layer[0]
    return layer.output.dense(layer.intermediate(x))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("variant", BESIDE)
def test_beside_the_ffn_the_formula_is_that_of_the_paper(kind, variant):
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    plain = ffn_input_and_output(MODELS[kind](), kind, x)
    model = training.disturb(krona(MODELS[kind](), variant=variant, scale=2.0), 0.3)
    change = next(iter(changes(model).values()))
    expected = plain + 2 * x @ blockwise(change.A, change.B).T
    if variant == "krona_b_res":
        expected = expected + change.residual * x
    found = ffn_input_and_output(model.get_base_model(), kind, x)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-2)


def test_every_block_of_encoder_and_decoder_has_one_change_beside_its_ffn():
    assert list(changes(krona(tiny.t5(), variant="krona_b"))) == [
        f"{half}.block.{i}.layer.{last}.DenseReluDense.wo"
        for half, last in [("encoder", 1), ("decoder", 2)]
        for i in range(2)
    ]


def test_blocks_can_be_chosen():
    model = krona(tiny.llama(), variant="krona_b", layers_to_transform=[1])
    assert list(changes(model)) == ["model.layers.1.mlp.down_proj"]
    with pytest.raises(MethodError, match="names no block"):
        krona(tiny.llama(), variant="krona_b", layers_to_transform=[7])


def test_with_a_residual_of_one_the_model_starts_elsewhere():
    base = training.logits(tiny.llama())
    assert torch.equal(training.logits(krona(tiny.llama(), variant="krona_b_res")), base)
    other = krona(tiny.llama(), variant="krona_b_res", res_init=1.0)
    assert not torch.allclose(training.logits(other), base, atol=1e-2)
    with other.disable_adapter():
        assert torch.equal(training.logits(other), base)


@pytest.mark.parametrize("variant", BESIDE)
def test_beside_the_ffn_nothing_is_merged(variant):
    model = training.disturb(krona(tiny.llama(), variant=variant))
    expected = training.logits(model)
    for attempt in (merge, lambda m: m.merge_and_unload(), lambda m: m.merge_adapter()):
        with pytest.raises(MethodError, match=r"down_proj.*no weight could hold.*format: adapter"):
            attempt(model)
    assert torch.equal(training.logits(model), expected)


def test_dropout_acts_on_the_change_alone_and_only_in_training():
    model = training.disturb(krona(tiny.llama(), dropout=0.5))
    expected = training.logits(model)
    assert torch.equal(training.logits(model), expected)
    model.train()
    torch.manual_seed(0)
    assert not torch.allclose(model(**training.batch(model)).logits, expected, atol=1e-3)
    with model.disable_adapter():
        base = model(**training.batch(model)).logits
    assert torch.allclose(base, training.logits(tiny.llama()), atol=1e-6)
