"""Who can take over a factor or an order: found by structure, refused where the block would change."""

import pytest
import small_blocks as blocks
import small_compression as small
import tiny
import torch
from transformers.pytorch_utils import Conv1D

from luthier.compression.folding import Order, Row, find, find_orders
from luthier.compression.grid import Scheme, fit
from luthier.compression.linear import matrix, quantize_layer

# Of each kind of block: which layers read one tensor, what takes their factor, and how many outputs that has.
ROWS = {
    "llama": [
        ("q_proj k_proj v_proj", "input_layernorm", 32),
        ("o_proj", "self_attn.v_proj", 16),
        ("gate_proj up_proj", "post_attention_layernorm", 32),
        ("down_proj", "mlp.up_proj", 64),
    ],
    "gpt2": [
        ("c_attn", "ln_1", 32),
        ("c_proj", "attn.c_attn", 32),
        ("c_fc", "ln_2", 32),
        ("c_proj", "", 128),  # behind a GELU
    ],
    "bert": [
        ("query key value", "", 32),  # the norm before is in the block before
        ("dense", "attention.self.value", 32),
        ("dense", "", 32),  # the norm feeds the residual stream too
        ("dense", "", 64),
    ],
    "opt": [
        ("q_proj k_proj v_proj", "self_attn_layer_norm", 32),
        ("out_proj", "self_attn.v_proj", 32),
        ("fc1", "final_layer_norm", 32),
        ("fc2", "fc1", 64),
    ],
    "opt, norms after": [
        ("q_proj k_proj v_proj", "", 32),
        ("out_proj", "self_attn.v_proj", 32),
        ("fc1", "", 32),
        ("fc2", "fc1", 64),
    ],
    "gemma2": [
        ("q_proj k_proj v_proj", "input_layernorm", 32),
        ("o_proj", "self_attn.v_proj", 16),
        ("gate_proj up_proj", "pre_feedforward_layernorm", 32),
        ("down_proj", "mlp.up_proj", 64),
    ],
    "phi3": [
        ("qkv_proj", "input_layernorm", 32),
        ("o_proj", "self_attn.qkv_proj", 16),
        ("gate_up_proj", "post_attention_layernorm", 32),
        ("down_proj", "mlp.gate_up_proj", 64),
    ],
    "experts": [
        ("q_proj k_proj v_proj", "input_layernorm", 32),
        ("o_proj", "self_attn.v_proj", 16),
        ("gate_proj up_proj shared_expert_gate", "post_attention_layernorm", 32),
        ("down_proj", "mlp.shared_expert.up_proj", 48),
    ],
}
# Which layers give inputs in another order, and within how many neighbours.
ORDERS = {
    "llama": [("v_proj", 8), ("up_proj gate_proj", 64)],
    "gpt2": [("c_attn", 8), ("c_fc", 128)],
    "bert": [("value", 8), ("dense", 64)],
    "opt": [("v_proj", 8), ("fc1", 64)],
    "phi3": [("qkv_proj", 8), ("gate_up_proj gate_up_proj", 64)],
    "experts": [("v_proj", 8), ("up_proj gate_proj", 48)],
}


def last(names):
    return " ".join(name.rpartition(".")[2] for name in names)


def drawn(row, seed=3):
    factors = torch.exp2(torch.rand(row.features, generator=torch.Generator().manual_seed(seed)) * 2 - 1)
    return row.share(factors, "mean")


@pytest.mark.parametrize("kind", ROWS)
def test_finds_what_made_each_tensor(kind):
    rows = find(blocks.block_of(blocks.KINDS[kind]()))
    assert [(last(r.layers), r.maker, len(r.outputs.unique())) for r in rows] == ROWS[kind]
    assert all(bool(row.why) != bool(row.maker) for row in rows)


@pytest.mark.parametrize("kind", sorted(set(blocks.KINDS) | set(small.MODELS)))
def test_the_block_computes_the_same_with_any_factors(kind):
    block = blocks.block_of((blocks.KINDS | small.MODELS)[kind](), 1)
    before = blocks.outputs(block)
    rows = [row for row in find(block) if row.maker]
    assert rows
    for row in rows:
        weight = matrix(block.layers()[row.layers[0]])
        row.scale(block.module, drawn(row))
        assert not torch.allclose(matrix(block.layers()[row.layers[0]]), weight)
        assert blocks.change(blocks.outputs(block), before) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_columns_are_multiplied_and_outputs_divided(kind):
    block = blocks.block_of(blocks.KINDS[kind]())
    for row in find(block)[:2]:
        maker, factors = block.module.get_submodule(row.maker), drawn(row)
        columns = {name: matrix(block.layers()[name]) for name in row.layers}
        if row.by_norm:
            old = {name: p.detach().clone() for name, p in maker.named_parameters()}
            row.scale(block.module, factors)
            for name, parameter in maker.named_parameters():
                assert torch.allclose(parameter, old[name] / factors)
        else:
            rows, bias = matrix(maker), None if maker.bias is None else maker.bias.detach().clone()
            row.scale(block.module, factors)
            expected = rows.clone()
            for k, output in enumerate(row.outputs.tolist()):
                expected[output] = rows[output] / factors[k]
            assert torch.allclose(matrix(maker), expected)
            if bias is not None and not isinstance(maker, Conv1D):
                assert torch.allclose(maker.bias, bias / factors)
        for name, weight in columns.items():
            assert torch.allclose(matrix(block.layers()[name]), weight * factors)


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_a_norm_that_adds_one_to_its_weight_is_seen(kind):
    block = blocks.block_of(blocks.KINDS[kind]())
    row = find(block)[0]
    norm = block.module.get_submodule(row.maker)
    weight, factors = norm.weight.detach().clone(), drawn(row)
    row.scale(block.module, factors)
    assert row.offset == 1
    assert torch.allclose(norm.weight, (1 + weight) / factors - 1, atol=1e-6)


def test_query_heads_that_share_values_share_factors():
    row = find(blocks.block_of(tiny.llama()))[1]  # 4 heads of 8 over 2
    values = torch.rand(32, generator=torch.Generator().manual_seed(0))
    heads = values.reshape(2, 2, 8)  # (heads of values, heads that share one, width)
    assert torch.equal(row.outputs.reshape(2, 2, 8)[:, 0], torch.arange(16).reshape(2, 8))
    for shared in range(2):
        assert torch.allclose(row.share(values, "mean").reshape(2, 2, 8)[:, shared], heads.mean(1))
        assert torch.equal(row.share(values, "amax").reshape(2, 2, 8)[:, shared], heads.amax(1))


def forced(block, layer, **changes):
    """A row as if it had been proven."""
    row = next(r for r in find(block) if r.layers[0].endswith(layer))
    return Row(**{**vars(row), "why": ""} | changes)


@pytest.mark.parametrize(
    ("kind", "layer", "maker"),
    [
        ("bert", "intermediate.dense", {"maker": "attention.output.LayerNorm", "by_norm": True}),
        ("llama", "down_proj", {"maker": "mlp.gate_proj"}),
        ("gpt2", "mlp.c_proj", {"maker": "mlp.c_fc"}),
    ],
)
def test_what_is_refused_would_change_the_block(kind, layer, maker):
    block = blocks.block_of(blocks.KINDS[kind]())
    before = blocks.outputs(block)
    row = forced(block, layer, **maker)
    row.scale(block.module, drawn(row))
    assert blocks.change(blocks.outputs(block), before) > 1e-2


def test_layers_that_are_left_out_take_the_factor_too():
    block = blocks.block_of(tiny.llama(), exclude=["k_proj", "up_proj"])
    before, key = blocks.outputs(block), block.module.self_attn.k_proj.weight.detach().clone()
    rows = find(block)
    assert [last(row.layers) for row in rows] == ["q_proj v_proj", "o_proj", "gate_proj", "down_proj"]
    for row in rows:
        row.scale(block.module, drawn(row))
    assert torch.allclose(block.module.self_attn.k_proj.weight, key * drawn(rows[0]))
    assert blocks.change(blocks.outputs(block), before) < 1e-5


def test_the_router_and_the_experts_take_the_factor_too():
    block = blocks.block_of(blocks.KINDS["experts"]())
    row = find(block)[2]
    router = block.module.mlp.gate.weight.detach().clone()
    row.scale(block.module, drawn(row))
    assert {"mlp.gate", "mlp.experts"} <= set(row.readers)
    assert torch.allclose(block.module.mlp.gate.weight, router * drawn(row))


@torch.no_grad()
def test_neurons_that_never_fire_do_not_hide_the_others():
    model = small.opt()
    model.model.decoder.layers[0].fc1.bias[::3] = -1e3
    assert find(blocks.block_of(model))[3].maker == "fc1"


def test_a_norm_that_two_blocks_share_is_left_alone():
    model = tiny.llama()
    model.model.layers[1].input_layernorm = model.model.layers[0].input_layernorm
    row = find(blocks.block_of(model))[0]
    assert not row.maker
    assert row.why == "input_layernorm feeds something else too"


def test_a_quantised_reader_cannot_be_multiplied():
    model = tiny.llama()
    block = blocks.block_of(model, exclude=["k_proj"])
    layer = model.model.layers[0].self_attn.k_proj
    weight = matrix(layer)
    grid = fit(weight, Scheme(8, None))
    block.replace("model.layers.0.self_attn.k_proj", quantize_layer(layer, grid.quantize(weight), grid))
    row = find(block)[0]
    assert not row.maker
    assert "k_proj reads it too" in row.why


def test_half_precision_changes_nothing():
    rows = find(blocks.block_of(tiny.llama().bfloat16()))
    assert [row.maker for row in rows] == [maker for _, maker, _ in ROWS["llama"]]


def test_looking_changes_nothing():
    block = blocks.block_of(tiny.llama())
    before = {name: p.detach().clone() for name, p in block.module.named_parameters()}
    find(block)
    find_orders(block)
    assert all(torch.equal(p, before[name]) for name, p in block.module.named_parameters())
    assert all(not module._forward_hooks for module in block.module.modules())


def test_norms_alone_can_be_asked_for():
    rows = find(blocks.block_of(tiny.llama()), only_norms=True)
    assert [bool(row.maker) for row in rows] == [True, False, True, False]
    assert rows[1].why == "no norm makes it"


@pytest.mark.parametrize("kind", ORDERS)
def test_finds_what_can_give_inputs_in_another_order(kind):
    orders = find_orders(blocks.block_of(blocks.KINDS[kind]()))
    found = [(last(name for name, _ in o.makers), o.span) for o in orders if o.makers]
    assert found == ORDERS[kind]
    assert [o.from_stream for o in orders] == [True, False, True, False]


def shuffled(order):
    lot = torch.Generator().manual_seed(3)
    return torch.stack([torch.randperm(order.span, generator=lot) for _ in order.blocks.unique()])


@pytest.mark.parametrize("kind", ORDERS)
def test_the_block_computes_the_same_in_any_order(kind):
    block = blocks.block_of(blocks.KINDS[kind](), 1)
    before = blocks.outputs(block)
    for order in find_orders(block):
        if order.makers:
            weight = matrix(block.layers()[order.layers[0]])
            moved = order.spread(shuffled(order))
            order.permute(block.module, moved)
            assert torch.equal(matrix(block.layers()[order.layers[0]]), weight[:, moved])
            assert blocks.change(blocks.outputs(block), before) < 1e-5


def test_values_do_not_leave_their_head():
    block = blocks.block_of(small.opt())
    before = blocks.outputs(block)
    found = find_orders(block)[1]
    free = Order(**{**vars(found), "span": 32})
    free.permute(block.module, torch.randperm(32, generator=torch.Generator().manual_seed(1)))
    assert blocks.change(blocks.outputs(block), before) > 1e-2
