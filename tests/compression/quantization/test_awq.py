"""AWQ: scales and clips are the best of their grids by losses computed by hand, and beat plain rounding."""

import copy

import pytest
import small_blocks as blocks
import small_compression as small
import tiny
import torch

from luthier import method
from luthier.compression.compress import compress
from luthier.compression.folding import find
from luthier.compression.grid import Scheme, fit
from luthier.compression.linear import matrix, quantized_layers
from luthier.compression.quantization.awq import Replay, around, clip_limits, multiplied, scales
from luthier.models import structure

W, X = small.weight_of(), small.correlated()[0]
H = small.hessian_of(X)


def awq(**options):
    return method("awq")(**{"bits": 3, "group_size": 16} | options)


def rtn(**options):
    return method("rtn")(**{"bits": 3, "group_size": 16} | options)


def after(model, config):
    """Squared error of the logits of a compressed copy, relative."""
    new = copy.deepcopy(model)
    compress(new, config, calibration=small.batches(length=20))
    return blocks.error(blocks.logits(new), blocks.logits(model))


def rounded(weight, factors, scheme):
    return fit(weight * factors, scheme).round(weight * factors) / factors


def by_hand(size, ratio):
    c = [max(float(a) ** ratio, 1e-4) for a in size]
    return torch.tensor(c) / (max(c) * min(c)) ** 0.5


def test_scales_are_as_by_hand():
    size = torch.rand(9, generator=torch.Generator().manual_seed(0)) * 3
    size[4] = 0
    for ratio in (0.0, 0.35, 0.95):
        assert torch.allclose(scales(size, ratio), by_hand(size, ratio))
    assert torch.equal(scales(size[:4], 0.0), torch.ones(4))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "opt", "gemma2", "phi3", "experts"])
def test_scaling_alone_changes_nothing(kind):
    model = blocks.KINDS[kind]()
    for index in range(2):
        block = blocks.block_of(model, index)
        before = blocks.outputs(block)
        awq().prepare(block)
        assert blocks.change(blocks.outputs(block), before) < 1e-5


def test_the_ratio_of_a_lone_layer_is_the_best_by_its_output():
    block = blocks.block_of(blocks.with_outlier(50.0))
    config = awq(symmetric=False)  # a symmetric grid has the peak between two points: the last bit decides
    x, weight = blocks.inputs_of(block, "mlp.down_proj"), matrix(block.module.mlp.down_proj)
    losses = []
    for step in range(20):
        new = rounded(weight, by_hand(x.abs().mean(0), step / 20), config.scheme)
        losses.append(float((x @ (new - weight).T).square().sum()))
    config.prepare(block)
    found = config._notes["model.layers.0.mlp.down_proj"]
    assert found == f"ratio {losses.index(min(losses)) / 20:g}"
    assert min(losses) < losses[0]


@torch.no_grad()
def test_the_ratio_of_a_group_is_the_best_by_the_module_around_it():
    """Gate and up by the output of the whole MLP."""
    block = blocks.block_of(blocks.with_outlier(50.0))
    config, mlp = awq(symmetric=False), copy.deepcopy(block.module.mlp)
    x = blocks.inputs_of(block, "mlp.up_proj")
    exact, losses = mlp(x), []
    for step in range(20):
        c, trial = by_hand(x.abs().mean(0), step / 20), copy.deepcopy(mlp)
        for layer in (trial.gate_proj, trial.up_proj):
            layer.weight.copy_(rounded(layer.weight, c, config.scheme))
        losses.append(float((trial(x) - exact).square().sum()))
    config.prepare(block)
    assert config._notes["model.layers.0.mlp.gate_proj"] == f"ratio {losses.index(min(losses)) / 20:g}"
    assert min(losses) < losses[0]


def test_heads_that_share_values_share_the_mean():
    block = blocks.block_of(tiny.llama())
    size = blocks.inputs_of(block, "self_attn.o_proj").abs().mean(0).reshape(2, 2, 8)
    config, old = awq(), block.module.self_attn.o_proj.weight.detach().clone()
    config.prepare(block)
    ratio = float(config._notes["model.layers.0.self_attn.o_proj"].removeprefix("ratio "))
    c = by_hand(size.mean(1, keepdim=True).expand(2, 2, 8).reshape(32), ratio)
    assert torch.allclose(block.module.self_attn.o_proj.weight, old * c, rtol=1e-4)


def test_the_search_leaves_the_weights_as_they_were():
    """With one ratio nothing is scaled: whatever was tried is undone, to the bit."""
    model = tiny.llama().bfloat16()
    old = copy.deepcopy(model.state_dict())
    awq(ratios=1).prepare(blocks.block_of(model))
    assert all(torch.equal(value, old[name]) for name, value in model.state_dict().items())


def test_a_module_is_replayed_as_the_block_calls_it():
    block = blocks.block_of(tiny.llama())
    seen = []
    handle = block.module.self_attn.register_forward_hook(lambda _m, _i, output: seen.append(output[0]))
    blocks.outputs(block)
    handle.remove()
    with Replay(block, "model.layers.0.self_attn", 10**6) as replay:
        blocks.outputs(block)
    found = replay()
    assert len(found) == 3
    for new, old, mask in zip(found, seen, block.masks, strict=True):
        assert torch.equal(new, old[mask])
    with Replay(block, "model.layers.0.self_attn", block.hidden[0].shape[1]) as replay:
        blocks.outputs(block)
    few = replay()
    first = seen[0][:1][block.masks[0][:1]]
    assert len(few) == 1
    assert torch.allclose(few[0], first, atol=1e-6)


def test_the_smallest_module_around_a_group():
    assert around(["a.b.attn.q", "a.b.attn.k"]) == "a.b.attn"
    assert around(["a.b.attn.q", "a.b.mlp.up"]) == "a.b"
    assert around(["a.b.attn.q", "a.b.attn.qk"]) == "a.b.attn"


def best_limits(weight, x, scheme):
    """Loops over rows, groups and limits; error of the group's part of the output on the inputs."""
    width = scheme.width(weight.shape[1])
    found = torch.empty_like(weight)
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], width):
            part, inputs = weight[row : row + 1, start : start + width], x[:, start : start + width]
            peak, losses = part.abs().max(), {}
            for step in range(10):
                limit = peak * (1 - step / 20)
                new = fit(part.clamp(-limit, limit), Scheme(scheme.bits, None, scheme.symmetric))
                lost = (inputs @ (new.round(part.clamp(-limit, limit)) - part).T).square().sum()
                losses.setdefault(float(lost), limit)
            found[row, start : start + width] = losses[min(losses)]
    return found


@pytest.mark.parametrize("group", [16, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_limits_are_the_best_of_each_row_and_group(group, symmetric):
    scheme = Scheme(3, group, symmetric)
    found, expected = clip_limits(W[:6], H, scheme), best_limits(W[:6], X, scheme)
    assert ((found - expected).abs() < 1e-5).float().mean() > 0.95  # some losses agree to 6 digits
    assert (expected < W[:6].abs().amax()).any()


def test_one_scale_for_the_tensor_has_one_limit():
    scheme = Scheme(3, 0)
    limits = clip_limits(W, H, scheme)
    assert len(limits.unique()) == 1
    losses = []
    for step in range(10):
        clipped = W.clamp(-W.abs().max() * (1 - step / 20), W.abs().max() * (1 - step / 20))
        losses.append(float((X @ (fit(clipped, scheme).round(clipped) - W).T).square().sum()))
    best = losses.index(min(losses))
    assert float(limits[0, 0]) == pytest.approx(float(W.abs().max()) * (1 - best / 20))


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("llama", "q_proj k_proj"),
        ("gpt2", "c_attn"),
        ("bert", "query key"),
        ("opt", "q_proj k_proj"),
        ("phi3", "qkv_proj"),
    ],
)
def test_queries_and_keys_are_not_clipped(kind, layers):
    block = blocks.block_of(blocks.KINDS[kind]())
    found = multiplied(block, find(block))
    assert {name.rpartition(".")[2] for name in found} == set(layers.split())
    config = awq()
    config.prepare(block)
    before = {name: matrix(layer) for name, layer in block.layers().items()}
    list(config.change(block))
    for name, layer in quantized_layers(block.module).items():
        weight = before[f"{block.name}.{name}"]
        same = torch.equal(layer.codes, fit(weight, config.scheme).quantize(weight))
        assert same == (f"{block.name}.{name}" in found)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, None])
def test_beats_plain_rounding_with_large_channels(symmetric, group):
    options = {"symmetric": symmetric, "group_size": group}
    model = blocks.with_outlier(50.0)
    plain, scaled = after(model, rtn(**options)), after(model, awq(clip=False, **options))
    assert scaled < 0.8 * plain
    assert after(model, awq(**options)) < 0.6 * plain


def test_beats_plain_rounding_without_them_too():
    assert after(tiny.llama(), awq()) < 0.8 * after(tiny.llama(), rtn())


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_without_searches_it_is_plain_rounding(kind):
    first, second = blocks.KINDS[kind](), blocks.KINDS[kind]()
    compress(first, awq(ratios=1, clip=False), calibration=small.batches())
    compress(second, rtn())
    for name, layer in quantized_layers(second).items():
        assert torch.equal(quantized_layers(first)[name].codes, layer.codes)


def test_no_lone_layer_gets_worse_than_plain_rounding():
    records = compress(tiny.llama(), awq(clip=False), calibration=small.batches())
    lone = [r for r in records if r.name.endswith(("o_proj", "down_proj"))]
    assert all(r.after <= r.before * (1 + 1e-4) for r in lone)
    assert all(r.note.startswith("ratio ") for r in records)


def test_records_give_the_error_of_outputs():
    block = blocks.block_of(blocks.with_outlier(50.0))
    x, weight = blocks.inputs_of(block, "mlp.down_proj"), matrix(block.module.mlp.down_proj)
    config = awq()
    config.prepare(block)
    scaled = blocks.inputs_of(block, "mlp.down_proj")  # of the block as it is before it is rounded
    exact = x @ weight.T
    record = next(r for r in config.change(block) if r.name.endswith("down_proj"))
    plain = x @ fit(weight, config.scheme).round(weight).T
    new = scaled @ block.module.mlp.down_proj.weight.T
    whole = exact.square().sum()
    assert record.before == pytest.approx(float((plain - exact).square().sum() / whole), rel=1e-3)
    assert record.after == pytest.approx(float((new - exact).square().sum() / whole), rel=1e-3)


def test_before_another_method_it_only_scales():
    model = blocks.with_outlier(50.0)
    norm = model.model.layers[0].input_layernorm.weight.detach().clone()
    gptq = method("gptq")(bits=3, group_size=16)
    compress(model, [awq(), gptq], calibration=small.batches())
    assert not torch.allclose(model.model.layers[0].input_layernorm.weight, norm)
    assert all(layer.scheme == gptq.scheme for layer in quantized_layers(model).values())


def test_zeros_of_a_pruned_model_stay():
    model = tiny.llama()
    compress(model, [method("magnitude")(sparsity=0.5), awq()], calibration=small.batches())
    for layer in quantized_layers(model).values():
        assert (layer.weight == 0).float().mean() >= 0.5


def test_blocks_do_not_see_what_became_of_those_before():
    """As in the paper: what the second becomes does not depend on how coarsely the first was rounded."""
    found = []
    for bits in (2, 8):
        model = tiny.llama()
        first = {name: bits for name in structure.linears(model) if ".layers.0." in name}
        compress(model, awq(layer_bits=first), calibration=small.batches())
        found.append(quantized_layers(model.model.layers[1]))
    for name, layer in found[0].items():
        assert (layer.codes == found[1][name].codes).float().mean() > 0.99, name
