"""A model whose blocks differ is built, saved and found again by transformers' Auto classes."""

import copy
import pickle

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.models import per_layer, structure
from luthier.models.placement import place
from luthier.recipe import footprint

IDS = torch.arange(20, 44).reshape(2, 12)
DIFFERENT = {"intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1}


def build(model, differences):
    config = per_layer.config_with(model.config, differences)
    return per_layer.class_of(model)(config).eval()


@pytest.mark.parametrize(
    ("make", "differences"),
    [(tiny.llama, {1: DIFFERENT}), (tiny.gpt2, {0: {"n_inner": 24}})],
    ids=["llama", "gpt2"],
)
def test_saved_and_loaded_it_is_the_same(make, differences, tmp_path):
    model = build(make(), differences)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    torch.testing.assert_close(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()


def test_each_block_has_its_width_and_all_have_one_config():
    model = build(tiny.llama(), {1: DIFFERENT})
    first, second = model.model.layers
    assert (first.mlp.up_proj.out_features, second.mlp.up_proj.out_features) == (64, 40)
    assert (first.self_attn.k_proj.out_features, second.self_attn.k_proj.out_features) == (16, 8)
    assert first.self_attn.config is second.self_attn.config is model.config
    model.set_attn_implementation("eager")
    expected = model(input_ids=IDS).logits
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-4)


def test_what_is_known_of_the_stock_class_is_known_of_it():
    model = build(tiny.llama(), {1: DIFFERENT})
    assert structure.task(model) == "causal"
    assert per_layer.is_per_layer(model)
    assert not per_layer.is_per_layer(tiny.llama())
    assert per_layer.class_of(model) is type(model)
    assert isinstance(pickle.loads(pickle.dumps(model)), type(model))
    torch.testing.assert_close(copy.deepcopy(model)(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_its_size_is_planned_from_its_config():
    model = build(tiny.llama(), {1: DIFFERENT})
    skeleton = footprint.skeleton(
        model.config.to_dict(), "causal", place("float32", "cpu", train=False), None
    )
    shapes = {name: p.shape for name, p in skeleton.named_parameters()}
    assert shapes == {name: p.shape for name, p in model.named_parameters()}


def test_a_config_that_is_asked_for_one_width_gives_the_widest():
    model = build(tiny.llama(), {1: DIFFERENT})
    assert model.config.intermediate_size == 64
    assert [own.intermediate_size for own in model.config.per_layer_config] == [64, 40]
