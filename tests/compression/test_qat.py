"""Rounding in the loop: what a layer computes in training is what is left of it, and how gradients pass."""

import pytest
import small_compression as small
import tiny
import torch
from torch import nn
from torch.nn import functional
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

import luthier
from luthier.alignment.trainer import trainer
from luthier.compression.cached import CachedLinear
from luthier.compression.calibration import choose_layers
from luthier.compression.grid import Scheme, round_activations
from luthier.compression.linear import QuantizedLinear, quantized_layers
from luthier.compression.qat import (
    Rounding,
    RoundingLinear,
    bake,
    covering,
    divergence,
    insert,
    passed,
)
from luthier.errors import MethodError

SCHEMES = [Scheme(b, g, True, a) for b in (2, 3, 4, 8) for g in (None, 16) for a in (None, 8)]


def rounding_model(make=tiny.llama, scheme=Scheme(4, None, True, 8), **options):
    model = make()
    return insert(model, sorted(choose_layers(model, [], [])), Rounding(scheme, **options))


def ids(length=12, seed=0):
    return small.batches(1, rows=2, length=length, seed=seed)[0]["input_ids"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 16])
def test_a_weight_moves_by_half_a_step_at_most_and_the_largest_not_at_all(bits, group):
    weight = small.weight_of()
    grid = covering(weight, Scheme(bits, group), torch.float32)
    rounded, codes = grid.round(weight), grid.quantize(weight)
    step = grid.scale.repeat_interleave(weight.shape[1] // grid.scale.shape[1], 1)
    assert ((rounded - weight).abs() <= step / 2 * (1 + 1e-5)).all()
    assert int(codes.max()) <= 2 ** (bits - 1) - 1
    assert int(codes.min()) >= -(2 ** (bits - 1) - 1)
    grouped, before = (w.reshape(len(w), grid.scale.shape[1], -1) for w in (rounded, weight))
    assert torch.allclose(grouped.abs().amax(-1), before.abs().amax(-1), rtol=1e-6)
    again = covering(rounded, Scheme(bits, group), torch.float32)
    assert torch.equal(again.quantize(rounded), codes)
    assert torch.allclose(again.round(rounded), rounded, rtol=1e-6, atol=1e-7)


def test_gradients_pass_straight_through_or_where_numbers_are_small():
    x = torch.tensor([-3.0, -1.99, 0.0, 0.4, 2.0, 5.0], requires_grad=True)
    upstream = torch.arange(1.0, 7)
    for clip, expected in ((None, upstream), (2.0, upstream * torch.tensor([0.0, 1, 1, 1, 0, 0]))):
        x.grad = None
        y = passed(x, torch.round(x.detach()), clip)
        assert torch.equal(y, torch.round(x))
        y.backward(upstream)
        assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_the_gradients_of_a_layer_are_those_of_the_product_of_rounded_numbers(clip):
    layer = nn.Linear(32, 8)
    rounding = RoundingLinear(layer, Rounding(Scheme(4, 16, True, 8), clip=clip), output_bits=6)
    x = small.correlated(20, 32)[0].requires_grad_()
    y = rounding(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    weight, read = rounding.grid.round(layer.weight.detach()), round_activations(x.detach(), 8, "token")
    before = functional.linear(read, weight, layer.bias).detach()
    assert torch.equal(y, round_activations(before, 6, "token"))
    gate = (lambda t: t.abs() < clip) if clip else torch.ones_like
    g = upstream * gate(before)
    assert torch.allclose(rounding.weight.grad, g.T @ read * gate(layer.weight), atol=1e-5)
    assert torch.allclose(x.grad, g @ weight * gate(x.detach()), atol=1e-5)
    assert torch.allclose(rounding.bias.grad, g.sum(0), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_layer_that_is_left_computes_the_same(scheme, dtype):
    for plain in (nn.Linear(32, 8), Conv1D(8, 32)):
        layer = RoundingLinear(plain, Rounding(scheme, dtype=dtype), output_bits=5)
        left = layer.bake()
        assert type(left) is CachedLinear
        assert left.transposed == isinstance(plain, Conv1D)
        assert left.scale.dtype == dtype
        x = small.correlated(20, 32)
        if dtype == torch.float32:
            assert torch.equal(left(x), layer(x))
        else:  # its products are in bfloat16; the codes and scales are those of the training
            assert torch.equal(left.whole_weight(), layer.grid.round(layer.weight.detach()))


def test_eight_bits_with_a_scale_for_each_weight_lose_nothing():
    model, plain = rounding_model(scheme=Scheme(8, 1)), tiny.llama()
    assert torch.allclose(model(ids()).logits, plain(ids()).logits, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gemma2", "opt"])
def test_a_baked_model_computes_what_the_trained_one_did(kind):
    model = rounding_model(small.MODELS[kind], kv_bits=None if kind == "gpt2" else 4).eval()
    assert all(p.requires_grad for p in model.parameters())
    expected = model(ids()).logits
    bake(model)
    assert torch.equal(model(ids()).logits, expected)
    assert len(quantized_layers(model)) == len(choose_layers(small.MODELS[kind](), [], []))


def test_weights_tied_before_are_tied_after_in_the_models_own_precision():
    model = tiny.llama().bfloat16()
    insert(model, sorted(choose_layers(model, [], [])), Rounding(Scheme(4, 16), dtype=torch.bfloat16))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    bake(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.isfinite(model(ids()).logits).all()


def test_a_token_depends_on_none_that_follow():
    model = rounding_model(kv_bits=4).eval()
    one, other = ids(), ids()
    other[:, 7:] = ids(seed=5)[:, 7:]
    found, changed = model(one).logits, model(other).logits
    assert torch.equal(found[:, :7], changed[:, :7])
    assert not torch.allclose(found[:, 7:], changed[:, 7:], atol=1e-3)


@torch.no_grad()
def test_what_is_read_from_a_cache_is_what_a_whole_run_computes():
    # In float64 another order of sums does not move numbers to the next step of a grid.
    model = bake(rounding_model(kv_bits=4)).eval().double()
    text = ids()
    expected = model(text).logits
    cache, found = DynamicCache(config=model.config), []
    for i in range(text.shape[1]):
        found.append(model(text[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
    assert torch.allclose(torch.cat(found, 1), expected, atol=1e-6)


def test_keys_are_rounded_before_positions_are_turned_into_them():
    model = bake(rounding_model(scheme=Scheme(8, 16), kv_bits=4)).eval()
    makers = {n.rpartition(".")[2] for n, m in quantized_layers(model).items() if type(m) is CachedLinear}
    assert makers == {"k_proj", "v_proj"}
    layer = model.model.layers[0].self_attn.k_proj
    made = []
    layer.register_forward_hook(lambda _, __, output: made.append(output))
    cache = DynamicCache(config=model.config)
    model(ids(), past_key_values=cache, use_cache=True)
    assert all(len(token.unique()) <= 16 for token in made[0].flatten(0, 1))
    turned = cache.layers[0].keys.transpose(1, 2).flatten(2)  # (batch, seq, heads x width), with positions
    assert max(len(token.unique()) for token in turned[0, 1:]) > 14
    assert not torch.allclose(round_activations(turned, 4, "token"), turned, atol=1e-3)


def test_a_model_without_layers_for_keys_and_values_alone_says_so():
    with pytest.raises(MethodError, match="kv_bits: null"):
        rounding_model(tiny.gpt2, kv_bits=8)


def test_the_divergence_and_its_gradient():
    torch.manual_seed(0)
    student, teacher = torch.randn(150, 30, requires_grad=True), torch.randn(150, 30)
    found = divergence(student, teacher)
    p, log_q = teacher.softmax(-1), student.log_softmax(-1)
    cross, entropy = -(p * log_q).sum(), -(p * p.log()).sum()
    assert torch.allclose(found, cross - entropy, rtol=1e-5)
    (grad,) = torch.autograd.grad(2 * found, student)
    (expected,) = torch.autograd.grad(2 * cross, student)
    assert torch.allclose(grad, expected, atol=1e-6)
    assert float(divergence(teacher, teacher)) == pytest.approx(0, abs=1e-4)


def test_any_objective_trains_a_model_that_rounds(tmp_path):
    model = rounding_model(kv_bits=8)
    (tmp_path / "rows.jsonl").write_text(
        '{"text": "Order 4711 arrived on Monday, but the box was empty."}\n' * 8
    )
    args = {"output_dir": str(tmp_path / "out"), "max_steps": 3, "learning_rate": 1e-3, "save_strategy": "no"}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    made = trainer(
        "pretrain", model, tmp_path / "rows.jsonl", method=luthier.method("full")(), args=args,
        tokenizer=tiny.tokenizer(),
    )  # fmt: skip
    made.train()
    made.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    expected = model.eval()(ids()).logits
    assert torch.equal(bake(model)(ids()).logits, expected)
    assert all(isinstance(m, QuantizedLinear) for m in quantized_layers(model).values())
