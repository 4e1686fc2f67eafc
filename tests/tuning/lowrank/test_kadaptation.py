"""KAdaptation: the sum of Kronecker products, what layers share, the start that learns, and the bias."""

import copy
import math
import re

import pytest
import small_training as training
import tiny
import torch
from safetensors.torch import load_file
from torch import nn

from luthier import checks, method
from luthier.alignment.callbacks import prove_gradients
from luthier.errors import MethodError
from luthier.tuning.attach import attach, trainable
from luthier.tuning.convert import to_lora
from luthier.tuning.lowrank.kadaptation import summed_product, thin
from luthier.tuning.merge import merge
from luthier.tuning.tuner import DeltaLayer

N, K = 4, 2


def kadaptation(model, **options):
    torch.manual_seed(0)
    return attach(model, method("kadaptation")(**{"phm_dim": N, "phm_rank": K} | options))


def changes(model, adapter="default"):
    return {
        name.removeprefix("base_model.model."): module.deltas[adapter]
        for name, module in model.named_modules()
        if isinstance(module, DeltaLayer)
    }


def slow(model, adapter="default"):
    return model.base_model.kadaptation_shared[adapter]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts(out=12, in_=20, k=K):
    """P, Q (n, n), U (n, out/n, k), V (n, k, in/n)."""
    shapes = [(N, N), (N, N), (N, out // N, k), (N, k, in_ // N)]
    return [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def summed(s, u, v):
    """The sum of Kronecker products from its definition."""
    return sum(torch.kron(s[j], u[j] @ v[j]) for j in range(len(s)))


def outer(p, q):
    return torch.stack([torch.outer(p[j], q[j]) for j in range(len(p))])


# The formula -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("out", "in_", "k"), [(12, 20, 2), (20, 12, 1), (8, 8, 3)])
def test_both_ways_to_compute_are_the_sum_of_kronecker_products(out, in_, k):
    p, q, u, v = parts(out, in_, k)
    x = random(3, 5, in_, seed=9)
    expected = x @ summed(outer(p, q), u, v).T
    a, b = thin(p, q, u, v)
    assert torch.allclose(x @ a.T @ b.T, expected, atol=1e-12)
    assert torch.allclose(summed_product(x, outer(p, q), u, v), expected, atol=1e-12)
    whole = random(N, N, N, seed=5)
    assert torch.allclose(summed_product(x, whole, u, v), x @ summed(whole, u, v).T, atol=1e-12)


def test_the_rank_is_up_to_n_k_where_a_lora_of_that_size_has_k():
    p, q, u, v = parts(24, 24)
    assert int(torch.linalg.matrix_rank(summed(outer(p, q), u, v))) == N * K
    assert u.numel() + v.numel() == K * (24 + 24)
    a, b = thin(p, q, u, v)
    assert len(a) == b.shape[1] == N * K


def test_with_unit_slow_matrices_the_change_is_block_diagonal():
    _, _, u, v = parts()
    a, b = thin(torch.eye(N).double(), torch.eye(N).double(), u, v)
    assert torch.allclose(b @ a, torch.block_diag(*[u[j] @ v[j] for j in range(N)]))


def test_with_one_term_it_is_a_lora_of_rank_k():
    p, q, u, v = (t[:1] for t in parts())
    p, q = p[:, :1], q[:, :1]
    a, b = thin(p, q, u, v)
    assert torch.allclose(b @ a, p * q * u[0] @ v[0])


@pytest.mark.parametrize("factorized", [True, False])
@pytest.mark.parametrize("kind", [tiny.llama, tiny.gpt2, tiny.t5])
def test_a_layer_adds_its_scaled_change(kind, factorized):
    model = training.disturb(kadaptation(kind(), factorized=factorized, scale=3.0), 0.3)
    name, delta = next(iter(changes(model).items()))
    pool = slow(model)[name.rpartition(".")[2]]
    s = outer(pool.P, pool.Q) if factorized else pool.S
    layer = model.get_base_model().get_submodule(name)
    x = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(0))
    expected = layer.base_layer(x) + 3 * x @ summed(s, delta.U, delta.V).T
    if delta.b is not None:
        expected = expected + delta.b
    assert (delta.b is not None) == (layer.base_layer.bias is not None)
    assert torch.allclose(layer(x), expected, atol=1e-4)


# The start -------------------------------------------------------------------------------------------------


def gradients(model):
    model.zero_grad()
    model(**training.batch(model)).loss.backward()
    own = changes(model).values()
    pools = list(slow(model).parameters())
    return {
        "U": all(d.U.grad.any() for d in own),
        "V": all(d.V.grad.any() for d in own),
        "slow": all(p.grad.any() for p in pools),
    }


def test_v_learns_first_and_all_after_one_step():
    model = kadaptation(tiny.llama())
    assert gradients(model) == {"U": False, "V": True, "slow": False}
    with checks.collect() as lines:
        prove_gradients(model)
    assert all(line.passed for line in lines)
    with torch.no_grad():
        for delta in changes(model).values():
            delta.V -= delta.V.grad.sign()
    assert gradients(model) == {"U": True, "V": True, "slow": True}


def test_the_start_of_the_authors_code_has_no_gradient_at_all():
    model = kadaptation(tiny.llama())
    with torch.no_grad():
        for delta in changes(model).values():
            delta.U.zero_()
    assert gradients(model) == {"U": False, "V": False, "slow": False}


def test_the_start_is_drawn_within_its_bounds():
    model = kadaptation(tiny.llama(), target_modules=["down_proj"])
    delta, pool = changes(model)["model.layers.0.mlp.down_proj"], slow(model)["down_proj"]
    bound = math.sqrt(2) * math.sqrt(6 / (32 / N + K))
    assert 0.8 * bound < delta.U.abs().max() <= bound
    assert 0.005 < pool.P.abs().max() <= 0.01
    assert pool.P.dtype == torch.float32


# What is shared --------------------------------------------------------------------------------------------


def test_slow_matrices_are_one_for_each_kind_of_layer():
    model = training.disturb(kadaptation(tiny.llama(), target_modules=["q_proj", "v_proj"]), 0.3)
    assert set(slow(model)) == {"q_proj", "v_proj"}
    before = {n: d.weight().detach() for n, d in changes(model).items()}
    with torch.no_grad():
        slow(model)["q_proj"].P.mul_(2)
    for name, delta in changes(model).items():
        factor = 2 if name.endswith("q_proj") else 1
        assert torch.allclose(delta.weight(), factor * before[name])


@pytest.mark.parametrize("factorized", [True, False])
def test_trains_as_many_parameters_as_the_formula_says(factorized):
    model = kadaptation(tiny.llama(), factorized=factorized)
    layers = {n: m for n, m in tiny.llama().named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    fast = sum(K * (m.in_features + m.out_features) for m in layers.values())
    kinds = len({n.rpartition(".")[2] for n in layers})
    assert trainable(model)[0] == fast + kinds * (2 * N**2 if factorized else N**3)


def test_the_file_has_what_is_shared_once(tmp_path):
    model = training.disturb(kadaptation(tiny.llama()))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == trainable(model)[0]
    assert sum(bool(re.search(r"shared\.q_proj\.[PQ]$", name)) for name in tensors) == 2
    expected = training.logits(model)
    other = kadaptation(tiny.llama())
    other.load_adapter(tmp_path, "loaded")
    assert not any(p.requires_grad for p in slow(other, "loaded").parameters())
    other.set_adapter("loaded")
    assert torch.equal(training.logits(other), expected)


def test_a_copy_of_the_model_has_slow_matrices_of_its_own():
    model = training.disturb(kadaptation(tiny.llama()))
    expected = training.logits(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        slow(other)["q_proj"].P.mul_(3)
    assert torch.equal(training.logits(model), expected)
    assert not torch.allclose(training.logits(other), expected, atol=1e-4)


def test_every_adapter_learns_alone_and_leaves_nothing_behind():
    model = kadaptation(tiny.llama())
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    assert all(p.requires_grad for p in slow(model).parameters())
    assert not any(p.requires_grad for p in slow(model, "second").parameters())
    model.set_adapter("second")
    assert not any(p.requires_grad for p in slow(model).parameters())
    assert all(p.requires_grad for p in slow(model, "second").parameters())
    model.delete_adapter("second")
    assert "second" not in model.base_model.kadaptation_shared


def test_a_model_in_double_precision_gets_all_of_it_in_that():
    model = kadaptation(tiny.llama().double())
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_with_the_adapter_in_half_precision_it_still_computes():
    from peft import get_peft_model

    config = method("kadaptation")(phm_dim=N)
    model = get_peft_model(training.half(tiny.llama()), config, autocast_adapter_dtype=False)
    assert {p.dtype for p in slow(model).parameters()} == {torch.bfloat16}
    assert torch.isfinite(training.logits(model)).all()


# Bias and merging ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("learn_bias", "count"), [("present", 1), ("none", 0), ("all", 1)])
def test_a_learnt_bias_is_merged_into_the_layers_own(learn_bias, count):
    model = kadaptation(tiny.bert(), target_modules=["query"], learn_bias=learn_bias)
    delta = changes(model)["bert.encoder.layer.0.attention.self.query"]
    assert sum(name == "b" for name, _ in delta.named_parameters()) == count
    training.disturb(model, 0.3)
    expected, shift = training.logits(model), delta.bias()
    merged = merge(model)
    assert torch.allclose(training.logits(merged), expected, atol=1e-5)
    own = merged.bert.encoder.layer[0].attention.self.query.bias
    start = tiny.bert().bert.encoder.layer[0].attention.self.query.bias
    assert torch.allclose(own, start if shift is None else start + shift, atol=1e-6)


def test_taken_off_again_the_bias_is_what_it_was():
    model = training.disturb(kadaptation(tiny.bert()), 0.3)
    expected = training.logits(model)
    model.merge_adapter()
    assert torch.allclose(training.logits(model), expected, atol=1e-4)
    model.unmerge_adapter()
    assert torch.allclose(training.logits(model), expected, atol=1e-4)


def test_a_bias_that_a_layer_has_no_place_for_is_not_merged():
    model = training.disturb(kadaptation(tiny.llama(), learn_bias="all"))
    expected = training.logits(model)
    with pytest.raises(MethodError, match=r"learns a bias, which the Linear has no place for.*adapter"):
        merge(model)
    assert torch.equal(training.logits(model), expected)


def test_exported_as_a_lora_of_rank_n_k_it_is_the_same():
    model = training.disturb(kadaptation(tiny.llama(), target_modules=["q_proj", "v_proj"]), 0.3)
    expected = training.logits(model)
    assert torch.allclose(training.logits(to_lora(model, N * K)), expected, atol=1e-4)


# Wrong use -------------------------------------------------------------------------------------------------


def test_a_dimension_that_does_not_divide_names_those_that_do():
    with pytest.raises(MethodError) as caught:
        kadaptation(tiny.llama(), phm_dim=32)
    text = str(caught.value)
    assert "phm_dim: 32 does not divide 'model.layers.0.self_attn.k_proj', which is 16 x 32" in text
    assert "Write one of [1, 2, 4, 8, 16]" in text
