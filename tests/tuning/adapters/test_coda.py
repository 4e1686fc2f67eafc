"""Conditional adapters: soft top-k, which tokens go through a block, and what padding and the cache do."""

import math

import pytest
import small_training as training
import tiny
import torch
from torch.nn import functional as F
from transformers import LlamaForSequenceClassification

from luthier import method
from luthier.errors import MethodError
from luthier.tuning.attach import attach, trainable
from luthier.tuning.merge import merge
from luthier.tuning.routing import RoutedLayer, choose, iterative_top_k, soft_top_k


def coda(model, **options):
    torch.manual_seed(0)
    plain = {"bottleneck_dim": 4, "eps": 0.5, "keep_read": False}
    return attach(model, method("coda")(**plain | options))


def routed(model):
    return [m for m in model.modules() if isinstance(m, RoutedLayer)]


def scores(n=64, rows=2, seed=0):
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(*k):
    return torch.tensor(k, dtype=torch.float64)


def by_bisection(s, k, eps):
    """min(1, exp((s + a) / eps)) for the a at which it sums to k."""
    low, high = -s.max() - 50 * eps, -s.min() + 50 * eps
    for _ in range(200):
        a = (low + high) / 2
        total = torch.exp(((s + a) / eps).clamp(max=0)).sum()
        low, high = (a, high) if total < k else (low, a)
    return torch.exp(((s + a) / eps).clamp(max=0))


# Soft top-k ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1.0, 0.3, 0.03])
def test_the_exact_solver_finds_the_threshold(eps):
    s, k = scores(), whole(16, 5)
    found = soft_top_k(s, k, eps)
    assert torch.allclose(found.sum(1), k)
    assert found.max() <= 1
    for row, expected in enumerate((by_bisection(s[0], 16, eps), by_bisection(s[1], 5, eps))):
        assert torch.allclose(found[row], expected, atol=1e-9)


def test_with_little_softness_it_is_the_hard_choice():
    s = scores()
    hard = torch.zeros_like(s).scatter(1, s.topk(16).indices, 1.0)
    assert torch.allclose(soft_top_k(s, whole(16, 16), 1e-3), hard, atol=1e-9)


def test_for_one_token_it_is_the_softmax_and_shifts_do_nothing():
    s, k = scores(), whole(1, 1)
    assert torch.allclose(soft_top_k(s, k, 0.3), torch.softmax(s / 0.3, 1))
    assert torch.allclose(iterative_top_k(s, k, 0.3, 1, 0.3, 1.0), torch.softmax(s / 0.3, 1))
    assert torch.allclose(soft_top_k(s + 7, whole(9, 9), 0.3), soft_top_k(s, whole(9, 9), 0.3))


def test_the_jacobian_is_that_of_the_closed_form():
    s, eps = scores(12, 1)[0], 0.3
    weights = soft_top_k(s[None], whole(4), eps)[0]
    free = weights < 1
    assert 0 < free.sum() < 12
    share = torch.where(free, weights, 0.0)
    expected = (torch.diag(share) - torch.outer(share, share) / share.sum()) / eps
    found = torch.autograd.functional.jacobian(lambda x: soft_top_k(x[None], whole(4), eps)[0], s)
    assert torch.allclose(found, expected, atol=1e-12)
    assert torch.allclose(found.sum(1), torch.zeros(12, dtype=torch.float64), atol=1e-12)


def test_the_iterative_solver_meets_the_exact_one_where_it_has_time():
    s, k = scores(), whole(16, 16)
    assert torch.allclose(iterative_top_k(s, k, 1.0, 20, 1.0, 1.0), soft_top_k(s, k, 1.0), atol=1e-6)
    assert torch.allclose(iterative_top_k(s, k, 0.3, 2000, 0.3, 1.0), soft_top_k(s, k, 0.3), atol=1e-6)
    early = iterative_top_k(s, k, 0.03, 20, 0.03, 1.0)
    falling = iterative_top_k(s, k, 0.03, 20, 4.0, 0.7)
    assert (early.sum(1) < falling.sum(1)).all()
    assert (falling.sum(1) < 16).all()  # from below
    assert falling.max() <= 1 + 1e-9
    order = s[0].argsort()
    assert (falling[0][order].diff() >= -1e-12).all()


def weigh(s, k):
    return soft_top_k(s, k, 0.3)


def test_how_many_are_chosen_follows_the_real_length():
    s = scores(10, 3).float()
    real = torch.arange(10) < torch.tensor([10, 4, 1])[:, None]
    found = choose(s, real, 3.0, weigh)
    assert found.real.sum(1).tolist() == [math.ceil(10 / 3), math.ceil(4 / 3), 1]
    assert found.index.shape == (3, 4)
    for row, count in enumerate((4, 2, 1)):
        where = found.index[row, :count]
        best = s[row].masked_fill(~real[row], -99).topk(count).indices
        assert where.tolist() == sorted(best.tolist())  # in the order of the text
        assert (found.weight[row, count:] == 0).all()
        assert (found.weight[row, :count] > 0).all()
    assert found.weight[2, 0] == 1  # all of its one token


def test_a_token_can_be_kept_in_any_case():
    s = scores(10, 3).float()
    s[:, 2] = -50.0
    real = torch.arange(10) < torch.tensor([10, 4, 3])[:, None]
    found = choose(s, real, 3.0, weigh, kept=torch.tensor([2, 2, 2]))
    assert found.real.sum(1).tolist() == [4, 2, 1]
    where = found.index == 2
    assert (where.sum(1) == 1).all()
    assert (found.weight[where] == 1).all()
    others = choose(s[:1, [i for i in range(10) if i != 2]], real[:1, :9], 3.0, weigh)
    assert torch.allclose(found.weight[0][~where[0]], others.weight[0], atol=1e-5)
    assert found.weight[2].tolist() == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_what_a_classifier_reads_is_always_chosen(kind):
    """Else a block whose choice leaves it out has no part in the loss."""
    base = tiny.bert() if kind == "bert" else LlamaForSequenceClassification(tiny.llama(num_labels=3).config)
    ids = torch.tensor([[5, 6, 7, 8, 9, 0, 0], [9, 8, 7, 6, 5, 4, 3]])
    real = ids != tiny.PAD
    model = training.disturb(coda(base, keep_read=True, eps=0.03), 0.05).train()
    places = [0, 0] if kind == "bert" else [4, 6]
    assert all(layer.deltas["default"].kept(real).tolist() == places for layer in routed(model))
    model(input_ids=ids, attention_mask=real.long(), labels=torch.tensor([0, 1])).loss.backward()
    learns = {n: p for n, p in model.named_parameters() if ".norm." in n and p.requires_grad}
    assert learns
    assert all(p.grad.any() for p in learns.values())


# One block ----------------------------------------------------------------------------------------------


def adapted(change, x):
    inner = torch.relu(x @ change.adapter.down.weight.T + change.adapter.down.bias)
    return inner @ change.adapter.up.weight.T + change.adapter.up.bias


def expected_choice(change, x, reduction=3.0):
    """Of one row (n, d): the places of the chosen tokens, and their weights."""
    k = math.ceil(len(x) / reduction)
    s = x @ change.router
    where = s.topk(k).indices.sort().values
    return where, by_bisection(s.double(), k, change.config.eps).float()[where]


@torch.no_grad()
@pytest.mark.parametrize("solver", ["exact", "iterative"])
def test_a_post_norm_block(solver):
    options = {"train_layernorm": False, "solver": solver, "eps": 1.0, "eps_init": 1.0, "solver_iters": 100}
    model = training.disturb(coda(tiny.bert(), **options), 0.2).eval()
    block, change = tiny.bert().bert.encoder.layer[0], routed(model)[0].deltas["default"]
    x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(3))
    found = model.get_base_model().bert.encoder.layer[0](x)
    for row in range(2):
        where, m = expected_choice(change, x[row])
        rows = x[row, where][None]
        expected = x[row] + adapted(change, x[row])
        expected[where] += m[:, None] * (block(rows) - rows)[0]
        assert torch.allclose(found[row], expected, atol=1e-4)
        others = [i for i in range(8) if i not in where]
        assert torch.allclose(found[row, others], (x[row] + adapted(change, x[row]))[others], atol=1e-6)


@torch.no_grad()
def test_a_pre_norm_block_attends_at_the_positions_of_the_text():
    model = training.disturb(coda(tiny.t5(), train_layernorm=False, router_input="normed"), 0.2).eval()
    base, change = tiny.t5().encoder, routed(model)[0].deltas["default"]
    block = base.block[0]
    attention, norm = block.layer[0].SelfAttention, block.layer[0].layer_norm
    x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(3))
    found, bias = model.get_base_model().encoder.block[0](x)[:2]
    full = attention.compute_bias(9, 9)
    assert torch.equal(bias, full)  # the blocks above choose from it anew
    where, m = expected_choice(change, norm(x)[0])
    h = norm(x)[:, where]
    q, key, value = (
        part(h).view(1, 3, 4, 8).transpose(1, 2) for part in (attention.q, attention.k, attention.v)
    )
    weights = torch.softmax(q @ key.transpose(2, 3) + full[:, :, where][..., where], -1)
    u = attention.o((weights @ value).transpose(1, 2).reshape(1, 3, 32))
    a = x[:, where] + u
    change_of_block = u + block.layer[1].DenseReluDense(block.layer[1].layer_norm(a))
    expected = x + adapted(change, norm(x))
    expected[:, where] += m[None, :, None] * change_of_block
    assert torch.allclose(found, expected, atol=1e-4)


@torch.no_grad()
def test_what_is_not_chosen_is_not_seen_by_what_is():
    model = training.disturb(coda(tiny.bert(), train_layernorm=False), 0.2).eval()
    block, change = model.get_base_model().bert.encoder.layer[0], routed(model)[0].deltas["default"]
    x = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(3))
    where, _ = expected_choice(change, x[0])
    first = block(x)
    w = change.router / change.router.norm()
    push = torch.randn(32, generator=torch.Generator().manual_seed(4))
    push -= (push @ w) * w  # the scores stay
    moved = x.clone()
    others = [i for i in range(8) if i not in where]
    moved[:, others] += push
    second = block(moved)
    assert torch.allclose(first[:, where], second[:, where], atol=1e-5)
    assert not torch.allclose(first[:, others], second[:, others], atol=1e-2)


@pytest.mark.parametrize("build", [tiny.bert, tiny.t5])
def test_with_all_tokens_it_is_the_dense_model_with_adapters_beside(build):
    base = training.logits(build())
    model = coda(build(), reduction=1.0)
    assert torch.equal(training.logits(model), base)
    training.disturb(model, 0.2)
    assert not torch.allclose(training.logits(model), base, atol=1e-3)


@torch.no_grad()
def test_with_all_tokens_a_block_is_itself_and_its_adapter():
    model = training.disturb(coda(tiny.bert(), reduction=1.0, train_layernorm=False), 0.2).eval()
    x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(3))
    change = routed(model)[0].deltas["default"]
    expected = tiny.bert().bert.encoder.layer[0](x) + adapted(change, x)
    assert torch.allclose(model.get_base_model().bert.encoder.layer[0](x), expected, atol=1e-5)


# Models -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(("build", "left"), [(tiny.bert, False), (tiny.t5, False), (tiny.t5, True)])
def test_padding_changes_nothing(build, left, attn):
    model = training.disturb(coda(build()), 0.2).eval()
    model.get_base_model().set_attn_implementation(attn)
    ids = [torch.arange(5, 12), torch.arange(40, 51)]
    more = {"decoder_input_ids": torch.tensor([[0, 7, 9]])} if build is tiny.t5 else {}
    alone = [model(input_ids=row[None], **more).logits[0] for row in ids]
    gaps = [11 - len(row) + 2 for row in ids]
    padded = torch.stack([F.pad(r, (g, 0) if left else (0, g)) for r, g in zip(ids, gaps, strict=True)])
    more = {name: value.expand(2, -1) for name, value in more.items()}
    found = model(input_ids=padded, attention_mask=(padded != tiny.PAD).long(), **more).logits
    for one, together in zip(alone, found, strict=True):
        assert torch.allclose(one, together, atol=1e-4)


@pytest.mark.parametrize("build", [tiny.bert, tiny.t5])
def test_routers_adapters_and_norms_have_gradients_and_nothing_else(build):
    model = training.disturb(coda(build()), 0.1).train()
    model(**training.batch(model)).loss.backward()
    for name, parameter in model.named_parameters():
        own = "coda_delta" in name or "modules_to_save" in name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == own, name


def test_trains_as_many_parameters_as_the_formula_says():
    d, h = 32, 4
    adapter, head = 2 * d * h + d + h, 3 * d + 3
    model = coda(tiny.bert())
    assert trainable(model)[0] == 2 * (adapter + d) + 4 * 2 * d + head  # two norms of gain and bias a block
    model = coda(tiny.t5(), train_layernorm=False)
    assert trainable(model)[0] == 2 * (adapter + d) + 2 * adapter
    assert len(routed(model)) == 2


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
def test_models_that_write_are_refused_with_the_reason(build):
    with pytest.raises(MethodError, match=r"writes token by token.*not written yet.*method: parallel"):
        coda(build())


def test_a_decoder_that_only_reads_may_choose():
    """A text is read at once, with causal attention at the rotations of its own positions."""
    base = LlamaForSequenceClassification(tiny.llama(num_labels=3).config).eval()
    model = training.disturb(coda(base, train_layernorm=False), 0.2).eval()
    ids = torch.arange(5, 14)[None]
    with torch.no_grad():
        alone = model(input_ids=ids).logits
        padded = F.pad(ids, (0, 3))
        found = model(input_ids=padded, attention_mask=(padded != tiny.PAD).long()).logits
        assert torch.allclose(found, alone, atol=1e-4)
        trunk = model.get_base_model().model
        layer, change = trunk.layers[0], routed(model)[0].deltas["default"]
        x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(3))
        rope = trunk.rotary_emb(x, torch.arange(9)[None])
        found = layer(x, position_embeddings=rope)
        where, m = expected_choice(change, x[0])
        with model.disable_adapter():
            rows = x[:, where]
            made = layer(rows, position_embeddings=tuple(part[:, where] for part in rope))
        expected = x + adapted(change, layer.input_layernorm(x))
        expected[:, where] += m[None, :, None] * (made - rows)
        assert torch.allclose(found, expected, atol=1e-4)


def test_a_text_is_not_continued_from_a_cache():
    base = LlamaForSequenceClassification(tiny.llama(num_labels=3).config).eval()
    cache = base.model(input_ids=torch.arange(5, 9)[None], use_cache=True).past_key_values
    model = coda(base, train_layernorm=False)
    with pytest.raises(MethodError, match="continued from a cache"):
        model(input_ids=torch.arange(9, 12)[None], past_key_values=cache)


def test_two_choices_at_once_are_refused():
    model = coda(tiny.t5())
    model.add_adapter("other", method("coda")(bottleneck_dim=4))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(MethodError, match="choose their own tokens"):
        training.logits(model)


def test_taken_off_again_the_model_is_the_base():
    base = training.logits(tiny.t5())
    model = training.disturb(coda(tiny.t5()), 0.2)
    with pytest.raises(MethodError, match="cannot be merged"):
        merge(model)
    names = set(tiny.t5().state_dict())
    plain = model.unload()
    assert torch.equal(training.logits(plain), base)
    assert set(plain.state_dict()) == names
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in plain.encoder.block)


def test_of_chosen_blocks_the_others_are_dense():
    model = coda(tiny.bert(), layers_to_transform=[1], train_layernorm=False)
    assert len(routed(model)) == 1
    assert hasattr(model.get_base_model().bert.encoder.layer[1], "routing")
