"""Units are found by structure: which slices of which weights belong to a neuron, a head, a channel."""

import pytest
import tiny
import torch
from transformers import OPTConfig, OPTForCausalLM

from luthier.compression import units
from luthier.compression.grid import Scheme, fit
from luthier.compression.linear import quantize_layer
from luthier.compression.units import Part
from luthier.errors import MethodError


def opt():
    config = OPTConfig(
        vocab_size=tiny.VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=0,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


def test_a_neuron_of_llama_is_a_row_of_gate_and_up_and_a_column_of_down(tiny_llama):
    found = units.find(tiny_llama, ["mlp"])
    assert [u.count for u in found] == [64, 64]
    assert found[0].parts == (
        Part("model.layers.0.mlp.gate_proj.weight", 0),
        Part("model.layers.0.mlp.up_proj.weight", 0),
        Part("model.layers.0.mlp.down_proj.weight", 1),
    )


def test_a_head_of_grouped_attention_is_a_key_value_head_with_its_queries(tiny_llama):
    found = units.find(tiny_llama, ["attention"])[1]
    assert (found.block, found.count) == (1, 2)
    sizes = {part.name.split(".")[-2]: (part.dim, part.size) for part in found.parts}
    assert sizes == {"q_proj": (0, 16), "k_proj": (0, 8), "v_proj": (0, 8), "o_proj": (1, 16)}


def test_transposed_layers_and_biases_are_part_of_a_unit(tiny_gpt2):
    found = units.find(tiny_gpt2, ["mlp"])[0]
    assert found.parts == (
        Part("transformer.h.0.mlp.c_fc.weight", 1),
        Part("transformer.h.0.mlp.c_fc.bias", 0),
        Part("transformer.h.0.mlp.c_proj.weight", 0),
    )
    assert found.makers == ["transformer.h.0.mlp.c_fc"]


@pytest.mark.parametrize("make", [tiny.bert, opt], ids=["bert", "opt"])
def test_blocks_without_a_module_for_their_feed_forward_part_are_read_too(make):
    model = make()
    mlp, attention = units.find(model, ["mlp"]), units.find(model, ["attention"])
    assert len(mlp) == len(attention) == 2
    assert attention[0].count == 4
    assert len(attention[0].weights) == 4


def test_channels_are_every_slice_of_the_stream(tiny_llama):
    (found,) = units.find(tiny_llama, ["channel"])
    covered = {part.name for part in found.parts}
    assert covered == {name for name, _ in tiny_llama.named_parameters()}
    assert found.count == 32


def test_sum_by_unit():
    values = torch.arange(24.0).reshape(6, 4) - 10
    rows = units.by_unit(values, Part("w", 0, 2))
    torch.testing.assert_close(rows, values.reshape(3, 8).sum(1))
    columns = units.by_unit(values, Part("w", 1, 2))
    torch.testing.assert_close(columns, torch.stack([values[:, :2].sum(), values[:, 2:].sum()]))
    vector = units.by_unit(values, Part("w", 0, 2), vector=True)
    torch.testing.assert_close(vector, values.sum(1).abs().reshape(3, 2).sum(1))
    torch.testing.assert_close(units.by_unit(values[:, 0], Part("n", 0)), values[:, 0])


@pytest.mark.parametrize(
    ("count", "size", "ratio", "expected"),
    [(64, 1, 0.25, 16), (10, 1, 0.25, 3), (3, 64, 0.25, 0), (3, 64, 1 / 3, 1), (4, 8, 0.99, 3), (4, 8, 0, 0)],
)
def test_number_that_goes_at_a_ratio(count, size, ratio, expected):
    place = units.Units("attention", "o", 0, count, (Part("q.weight", 0, size), Part("o.weight", 1, size)))
    assert units.removed(place, ratio) == expected


def test_the_best_stay_and_of_equal_ones_the_first():
    assert units.best(torch.tensor([1.0, 3.0, 2.0, 3.0]), 2).tolist() == [1, 3]
    assert units.best(torch.zeros(4), 2).tolist() == [0, 1]
    with pytest.raises(MethodError, match="not finite"):
        units.best(torch.tensor([1.0, float("nan")]), 1)


def test_best_of_all_compares_places_and_leaves_one_in_each(tiny_llama):
    first, second = units.find(tiny_llama, ["mlp"])
    scores = {first: torch.arange(64.0), second: torch.arange(64.0) - 1000}
    kept = units.best_of_all(scores, 10)
    assert kept[second].tolist() == [63]
    assert kept[first].tolist() == list(range(55, 64))


def test_refusals_say_why(tiny_llama, tiny_gpt2, tiny_t5):
    with pytest.raises(MethodError, match="c_attn"):
        units.find(tiny_gpt2, ["attention"])
    with pytest.raises(MethodError, match="encoder-decoder"):
        units.find(tiny_t5, ["mlp"])
    broken = tiny.llama()
    broken.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(MethodError, match=r"layers\.1\.mlp\.up_proj.*not finite"):
        units.find(broken, ["mlp"])
    layer = tiny_llama.model.layers[0].mlp.up_proj
    grid = fit(layer.weight.detach(), Scheme(bits=8, group_size=16))
    tiny_llama.model.layers[0].mlp.up_proj = quantize_layer(layer, grid.quantize(layer.weight), grid)
    with pytest.raises(MethodError, match="quantised"):
        units.find(tiny_llama, ["mlp"])


def test_weights_that_blocks_share_are_refused(tiny_llama):
    blocks = tiny_llama.model.layers
    blocks[1].mlp.up_proj.weight = blocks[0].mlp.up_proj.weight
    with pytest.raises(MethodError, match="another layer"):
        units.find(tiny_llama, ["mlp"])
