"""A step without data counts what a real one holds: parameters exactly, tensors and operations closely."""

import copy

import pytest
import tiny
import torch

import luthier
from luthier.errors import MethodError
from luthier.models.placement import Placement
from luthier.recipe import footprint
from luthier.tuning.attach import attach, trainable

FP32 = Placement(torch.float32, "cpu", "sdpa", "test")
METHODS = [
    ("full", {}),
    ("lora", {"r": 4}),
    ("lora", {"r": 4, "init_lora_weights": "pissa"}),
    ("lora", {"target_modules": ["q_proj"]}),
    ("dora", {"r": 4}),
    ("top_layers", {"k": 1}),
    ("linear_probe", {"untie_head": True}),
]


def config_of(model):
    return model.config.to_dict()


@pytest.mark.parametrize(("name", "options"), METHODS)
def test_what_learns_is_what_learns_in_training(name, options):
    method = luthier.method(name)(**options)
    skeleton = footprint.skeleton(config_of(tiny.llama()), "causal", FP32, None)
    planned = trainable(footprint.attach(skeleton, method))
    assert planned == trainable(attach(tiny.llama(), method))


@pytest.mark.parametrize(
    ("kind", "task", "methods"),
    [
        (tiny.gpt2, "causal", ["lora", "full"]),
        (tiny.bert, "classification", ["lora", "full", "linear_probe"]),
        (tiny.t5, "seq2seq", ["lora", "full"]),
    ],
)
def test_other_architectures_are_planned_alike(kind, task, methods):
    for name in methods:
        method = luthier.method(name)()
        model = kind()
        labels = getattr(model.config, "num_labels", None)
        planned = footprint.attach(footprint.skeleton(config_of(model), task, FP32, labels), method)
        assert trainable(planned) == trainable(attach(model, method))
        step = footprint.simulate(planned, 2, 8, FP32, labelled=16)
        assert 0 < step.kept <= step.peak


def test_codes_of_a_quantised_base_are_weights():
    plain = tiny.llama()
    model = attach(tiny.llama(), luthier.method("peqa")(group_size=16))
    layers = [m.weight for m in plain.modules() if isinstance(m, torch.nn.Linear) and m is not plain.lm_head]
    scales = sum(w.numel() // 16 * (w.element_size() + 1) for w in layers)  # with their zero points
    codes = sum(w.numel() for w in layers)  # a byte each
    rest = sum(p.nbytes for p in plain.parameters()) - sum(w.nbytes for w in layers)
    assert footprint.sizes(model)[0] == rest + codes + scales


def test_a_target_that_matches_nothing_is_refused_before_anything_is_loaded():
    skeleton = footprint.skeleton(config_of(tiny.llama()), "causal", FP32, None)
    with pytest.raises(MethodError, match=r"vproj.*v_proj"):
        footprint.attach(skeleton, luthier.method("lora")(target_modules=["q_proj", "vproj"]))


def kept_for_backward(model, rows, length):
    """Bytes of all tensors that autograd keeps, weights and views counted once."""
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hidden = model.base_model(
            input_ids=torch.zeros(rows, length, dtype=torch.long), use_cache=False
        ).last_hidden_state
        total = sum(kept.values())
        del hidden
    return total


@pytest.mark.parametrize("length", [16, 64])
def test_what_a_pass_keeps_is_what_autograd_saves(length):
    model = tiny.llama(hidden_size=64, intermediate_size=256, num_hidden_layers=4)
    saved = kept_for_backward(copy.deepcopy(model).train(), 4, length)
    skeleton = footprint.attach(
        footprint.skeleton(config_of(model), "causal", FP32, None), luthier.method("full")()
    )
    step = footprint.simulate(skeleton, 4, length, FP32, labelled=4 * length)
    assert step.kept == pytest.approx(saved, rel=0.15)
    assert step.gradients == sum(p.numel() * 4 for p in model.parameters())


def simulated(method, rows=4, length=64, **options):
    config = config_of(tiny.llama(num_hidden_layers=4))
    model = footprint.attach(footprint.skeleton(config, "causal", FP32, None), luthier.method(method)())
    return footprint.simulate(model, rows, length, FP32, labelled=rows * length, **options)


def test_memory_follows_the_batch_and_falls_with_checkpointing():
    one, two = simulated("full", rows=2), simulated("full", rows=4)
    assert two.kept == pytest.approx(2 * one.kept, rel=0.1)
    assert simulated("full", checkpointing=True).kept < 0.5 * two.kept


def test_frozen_blocks_keep_nothing_and_cost_no_backward():
    full, top = simulated("full"), simulated("top_layers")
    assert top.kept < full.kept
    assert top.operations < full.operations


def test_operations_of_a_full_step_are_six_a_weight_and_token():
    model = tiny.llama(num_hidden_layers=4)
    tokens = 4 * 16
    found = simulated("full", rows=4, length=16).operations
    # Embeddings are looked up, but the tied head multiplies; norms do not count; attention comes on top.
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert found == pytest.approx(6 * matrices * tokens, rel=0.15)
