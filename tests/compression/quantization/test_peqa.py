"""PEQA: the ranges tried, the gradients of scales, what is frozen, saved, swapped and merged."""

import copy
import json

import pruned_models
import pytest
import quantised_models as quantised
import small_compression as small
import small_training as training
import tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

import luthier
from luthier import checks, method
from luthier.compression.compress import compress
from luthier.compression.grid import Scheme, fit
from luthier.compression.linear import matrix, quantized_layers
from luthier.compression.quantization.peqa import ScaledLinear, integers, least_error
from luthier.errors import MethodError
from luthier.models import structure
from luthier.models.saving import verify_export
from luthier.tuning.attach import attach, trainable
from luthier.tuning.convert import to_lora
from luthier.tuning.merge import combine, merge

MAKES = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert, "t5": tiny.t5}
SCHEMES = [Scheme(b, g, s) for b in (2, 3, 4) for g in (None, 16, 0) for s in (True, False)]


def peqa(model=None, **options):
    torch.manual_seed(0)
    return attach(quantised.rounded(tiny.llama) if model is None else model, method("peqa")(**options))


def scaled(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, ScaledLinear)}


def codes(model):
    return {n: layer.codes.clone() for n, layer in quantized_layers(model).items()}


# Rounding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_range_is_the_best_of_those_tried(scheme):
    weight = small.weight_of()
    weight[0, 0] = 12.0  # an outlier, for which a narrower range is better
    found = (least_error(weight, scheme, torch.float32).round(weight) - weight).square()
    whole = (fit(weight, scheme).round(weight) - weight).square()
    assert found.sum() < 0.97 * whole.sum()
    groups = (1, 1, -1) if scheme.group_size == 0 else (len(weight), -1, scheme.width(weight.shape[1]))
    tried = [fit(weight, scheme, shrink=1 - 0.8 * i / 40).round(weight) for i in range(40)]
    each = torch.stack([(t - weight).square().reshape(groups).sum(-1) for t in tried])
    assert torch.allclose(found.reshape(groups).sum(-1), each.amin(0), rtol=1e-5)


def test_one_range_is_that_of_the_least_and_greatest_weight():
    weight = small.weight_of()
    one, plain = (
        least_error(weight, Scheme(3, 16, False), torch.float32, 1),
        fit(weight, Scheme(3, 16, False)),
    )
    assert torch.equal(one.scale, plain.scale)
    assert torch.equal(one.zero, plain.zero)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_as_a_compression_method_it_rounds_every_layer_below_the_head(kind):
    plain, model = MAKES[kind](), MAKES[kind]()
    records = compress(model, method("peqa")(bits=3, group_size=16))
    layers = quantized_layers(model)
    assert set(layers) == set(structure.linears(plain)) == {record.name for record in records}
    assert all(record.after <= record.before for record in records)
    for record in records:
        weight = matrix(plain.get_submodule(record.name))
        error = (layers[record.name].whole_weight() - weight).square().sum() / weight.square().sum()
        assert record.after == pytest.approx(float(error), rel=1e-4)
        assert layers[record.name].scheme == Scheme(3, 16, False)


def test_layers_can_be_chosen_by_name_or_pattern():
    for wanted in (["q_proj", "v_proj"], r".*\.(q|v)_proj"):
        model = tiny.llama()
        compress(model, method("peqa")(target_modules=wanted))
        assert {n.rpartition(".")[2] for n in quantized_layers(model)} == {"q_proj", "v_proj"}
    with pytest.raises(MethodError, match="matches no"):
        compress(tiny.llama(), method("peqa")(target_modules="x_proj"))
    with pytest.raises(MethodError, match="does not divide"):
        compress(tiny.llama(), method("peqa")(group_size=24))


# What learns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKES)
@pytest.mark.parametrize("group_size", [None, 16])
def test_it_learns_a_number_for_each_group_and_nothing_else(kind, group_size, tmp_path):
    model = peqa(quantised.rounded(MAKES[kind], group_size=group_size))
    expected = sum(
        layer.out_features * (layer.in_features // group_size if group_size else 1)
        for layer in quantized_layers(model).values()
    )
    learns = {n for n, p in model.named_parameters() if p.requires_grad}
    whole = {n for n in learns if ".modules_to_save." in n}
    assert sum(model.get_parameter(n).numel() for n in learns - whole) == expected
    before, frozen = codes(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    zeros = {n: layer.zero.clone() for n, layer in quantized_layers(model).items()}
    scales = {n: layer.scale.clone() for n, layer in quantized_layers(model).items()}
    training.train(model, tmp_path)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, frozen[n])}
    assert moved == learns
    assert all(n.endswith(".learnt") for n in learns - whole)
    for name, layer in quantized_layers(model).items():
        assert torch.equal(layer.codes, before[name])
        assert torch.equal(layer.zero, zeros[name])
        assert torch.equal(layer.scale, scales[name])


@pytest.mark.parametrize("scheme", [*SCHEMES, Scheme(4, 16, True, 8)], ids=str)
@pytest.mark.parametrize("parametrization", ["absolute", "relative"])
def test_the_gradient_of_a_scale_is_that_of_the_weight_times_its_integers(scheme, parametrization):
    model = tiny.llama()
    options = {k: v for k, v in scheme.as_dict().items() if k not in ("activation_per",)}
    compress(model, method("rtn")(**options))
    model = training.disturb(peqa(model, parametrization=parametrization), 0.01)
    layer = scaled(model)["base_model.model.model.layers.0.mlp.up_proj"]
    base, x = layer.get_base_layer(), small.correlated(30, 32).requires_grad_()
    layer(x).square().sum().backward()
    learnt = layer.deltas["default"].learnt
    weight = (base.whole_weight() + layer.get_delta_weight("default")).detach().requires_grad_()
    read = x.detach().clone().requires_grad_()
    functional.linear(base.quantize_input(read), weight, base.bias).square().sum().backward()
    expected = (weight.grad * integers(base)).reshape(*base.scale.shape, -1).sum(-1)
    if parametrization == "relative":
        expected = expected * base.scale
    assert torch.allclose(learnt.grad, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert torch.allclose(x.grad, read.grad, rtol=1e-3, atol=1e-3 * float(read.grad.abs().max()))


def test_the_weights_made_for_a_product_are_not_kept():
    layer = scaled(peqa())["base_model.model.model.layers.0.mlp.up_proj"]
    x = torch.randn(1, 3, 32, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert not [t for t in kept if t.is_floating_point() and t.shape == (64, 32)]


def test_scales_of_rows_are_gains_of_outputs():
    model = training.disturb(peqa(), 0.01)
    layer = scaled(model)["base_model.model.model.layers.0.mlp.up_proj"]
    base, x = layer.get_base_layer(), small.correlated(30, 32)
    gain = 1 + layer.deltas["default"].learnt[:, 0] / base.scale[:, 0]
    assert torch.allclose(layer(x), base(x) * gain, atol=1e-4)


def test_a_group_as_long_as_the_row_is_the_row():
    found = [quantised.rounded(tiny.llama, group_size=g, target_modules=["up_proj"]) for g in (None, 32)]
    logits = [training.logits(training.disturb(peqa(m, target_modules=["up_proj"]), 0.01)) for m in found]
    assert torch.equal(*logits)


# The base --------------------------------------------------------------------------------------------------


def test_it_starts_as_the_quantised_base_bit_for_bit():
    for name, options in {"rtn": {"group_size": 16}, "gptq": {"group_size": 16, "bits": 3}}.items():
        base = tiny.llama()
        compress(base, method(name)(**options), calibration=small.batches())
        expected = training.logits(base)
        assert torch.equal(training.logits(peqa(base)), expected)


def test_a_plain_base_is_rounded_on_the_way():
    with checks.collect() as lines:
        model = peqa(tiny.llama(), bits=3)
    assert torch.equal(training.logits(model), training.logits(quantised.rounded(tiny.llama, bits=3)))
    line = next(line for line in lines if line.name == "identity at step 0")
    assert line.value == 0
    assert "14 layers rounded to W3 row asym" in line.detail
    assert all(line.passed for line in lines)
    by_peft = get_peft_model(tiny.llama(), method("peqa")(bits=3))
    assert torch.equal(training.logits(by_peft), training.logits(model))


def test_weights_count_as_weights_whether_they_are_numbers_or_codes():
    plain = trainable(tiny.llama())[1]
    learns, total = trainable(peqa())
    assert total - learns == plain


def test_layers_that_compute_more_are_refused():
    base = tiny.llama()
    compress(base, method("llm_int8")())
    with pytest.raises(MethodError, match="more than a product with its codes"):
        peqa(base)


def test_it_learns_again_what_rounding_to_2_bits_lost(tmp_path):
    full = pruned_models.loss(pruned_models.trained())
    base = pruned_models.trained()
    compress(base, method("peqa")(bits=2, group_size=16))
    lost = pruned_models.loss(base) - full
    model = peqa(base)
    rows = [
        {"input_ids": row, "attention_mask": [1] * 24, "labels": row}
        for row in pruned_models.chains(256, 24, 7).tolist()
    ]
    training.train(
        model,
        tmp_path,
        rows,
        max_steps=60,
        learning_rate=1e-2,
        per_device_train_batch_size=16,
        weight_decay=0.0,
    )
    assert pruned_models.loss(model) - full < 0.6 * lost


# Files, tasks, merging -------------------------------------------------------------------------------------


def test_what_is_saved_are_the_scales_alone(tmp_path):
    model = training.disturb(peqa(), 0.01)
    expected = training.logits(model)
    model.save_pretrained(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    numbers = {n: t for n, t in tensors.items() if t.is_floating_point()}
    assert sum(t.numel() for t in numbers.values()) == trainable(model)[0]
    assert len(tensors) == 2 * len(numbers)  # and for each layer a number that tells its integers
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["peft_type"] == "PEQA"
    for base in (quantised.rounded(tiny.llama), tiny.llama()):  # the plain base is rounded as it was
        loaded = PeftModel.from_pretrained(base, tmp_path / "saved")
        assert torch.equal(training.logits(loaded), expected)


def test_scales_are_refused_by_integers_that_they_were_not_trained_on(tmp_path):
    luthier.save(training.disturb(peqa(), 0.01), tmp_path / "saved")
    for base in (quantised.rounded(tiny.llama, bits=3), quantised.rounded(lambda: tiny.llama(seed=1))):
        with pytest.raises(MethodError, match="belong to other integers"):
            PeftModel.from_pretrained(base, tmp_path / "saved")


def test_tasks_are_swapped_on_one_set_of_integers(tmp_path):
    models = [training.disturb(peqa(), 0.01, seed=seed) for seed in (1, 2)]
    expected = [training.logits(model) for model in models]
    for name, model in zip("ab", models, strict=True):
        luthier.save(model, tmp_path / name)
    both = PeftModel.from_pretrained(quantised.rounded(tiny.llama), tmp_path / "a", adapter_name="a")
    both.load_adapter(tmp_path / "b", adapter_name="b")
    for name, logits in [("a", expected[0]), ("b", expected[1]), ("a", expected[0])]:
        both.set_adapter(name)
        assert torch.equal(training.logits(both), logits)
    with both.disable_adapter():
        assert torch.equal(training.logits(both), training.logits(quantised.rounded(tiny.llama)))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("parametrization", ["absolute", "relative"])
def test_merged_it_is_a_quantised_model_with_the_same_codes_and_other_scales(kind, parametrization):
    model = peqa(quantised.rounded(MAKES[kind], group_size=16), parametrization=parametrization)
    training.disturb(model, 0.01)
    expected, before = training.logits(model), codes(model)
    merged = merge(model)
    assert torch.allclose(training.logits(merged), expected, atol=1e-6)
    assert [torch.equal(a, b) for a, b in zip(codes(merged).values(), before.values(), strict=True)] == [
        True
    ] * len(before)
    own = quantized_layers(quantised.rounded(MAKES[kind], group_size=16))
    assert all(not torch.equal(layer.scale, own[n].scale) for n, layer in quantized_layers(merged).items())
    assert not any("peqa" in n for n in merged.state_dict())


def test_merging_by_peft_alone_can_be_undone():
    model = training.disturb(peqa(), 0.01)
    base, expected = training.logits(quantised.rounded(tiny.llama)), training.logits(model)
    model.merge_adapter()
    assert torch.equal(training.logits(model), expected)
    model.unmerge_adapter()
    assert torch.equal(training.logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(training.logits(model), base)


def test_merged_in_half_precision_scales_are_rounded_once_and_held_against_the_effect():
    base = quantised.rounded(tiny.llama, dtype="bfloat16")
    merged = merge(training.disturb(peqa(copy.deepcopy(base)), 0.02))
    assert {layer.scale.dtype for layer in quantized_layers(merged).values()} == {torch.bfloat16}
    assert {layer.dtype for layer in quantized_layers(merged).values()} == {torch.bfloat16}
    tiny_effect = training.disturb(peqa(base), 1e-5)
    with pytest.raises(luthier.errors.CheckError, match="merged = unmerged"):
        merge(tiny_effect)


def test_a_merged_model_is_stored_with_codes_as_they_were(tmp_path):
    base = quantised.rounded(tiny.llama, symmetric=True, group_size=16)
    model = training.disturb(peqa(copy.deepcopy(base)), 0.01)
    expected = training.logits(model)
    merged = merge(model)
    luthier.save(base, tmp_path / "base", tiny.tokenizer())
    luthier.save(merged, tmp_path / "merged", tiny.tokenizer())
    verify_export(tmp_path / "merged", merged, tiny.tokenizer())
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("base", "merged"))
    differing = {n for n in one if not torch.equal(one[n], other[n])}
    assert differing == {n for n in one if n.endswith(".weight_scale")}
    loaded, _ = luthier.load(tmp_path / "merged", dtype="float32", device="cpu")
    assert torch.allclose(training.logits(loaded), expected, atol=1e-5)


def test_an_adapter_on_a_stored_quantised_base_comes_back_on_it(tmp_path):
    base = quantised.rounded(tiny.llama)
    luthier.save(base, tmp_path / "base", tiny.tokenizer())
    loaded, tokenizer = luthier.load(tmp_path / "base", dtype="float32", device="cpu")
    model = training.disturb(peqa(loaded), 0.01)
    expected = training.logits(model)
    luthier.save(model, tmp_path / "scales", tokenizer)
    again, _ = luthier.load(tmp_path / "scales", dtype="float32", device="cpu")
    assert torch.equal(training.logits(again), expected)


def test_as_a_lora_of_full_rank_it_computes_the_same():
    model = training.disturb(peqa(target_modules=["up_proj"]), 0.01)
    expected = training.logits(model)
    assert torch.allclose(training.logits(to_lora(model, 32)), expected, atol=1e-4)


def test_a_sum_of_tasks_has_no_place_in_scales_and_says_so():
    model = training.disturb(peqa(), 0.01)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    with pytest.raises(MethodError, match="Merge one adapter"):
        combine(model, {"default": 0.5, "other": 0.5})


def test_under_autocast_it_is_the_base_to_the_last_bit():
    base = quantised.rounded(tiny.bert)  # its layers have biases
    model = peqa(copy.deepcopy(base), target_modules=["query", "dense"], modules_to_save=None)
    for layer in scaled(model).values():
        assert isinstance(layer.get_base_layer().bias, nn.Parameter)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(training.logits(model), training.logits(base))


@pytest.mark.parametrize("first", [True, False], ids=["after gptq", "alone"])
def test_a_recipe_quantises_tunes_measures_and_exports(first, tmp_path):
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(8)]
    for name in ("train", "test"):
        marked = [row | {"prompt": row["prompt"] + name} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in marked))
    quantise = {
        "method": {"name": "gptq", "group_size": 16},
        "calibration": {"data": str(tmp_path / "train.jsonl"), "max_length": 16},
    }
    tune = {
        "data": str(tmp_path / "train.jsonl"),
        "method": {"name": "peqa", "group_size": 16, "symmetric": True},
        "training": {"max_steps": 2, "per_device_train_batch_size": 4},
    }
    recipe = {
        "name": "integers",
        "output": str(tmp_path / "runs"),
        "model": {"name": str(quantised.folder(tiny.llama)), "dtype": "float32"},
        "stages": [
            *([{"compress": quantise}] if first else []),
            {"tune": tune},
            {"evaluate": {"data": str(tmp_path / "test.jsonl"), "metrics": ["perplexity"]}},
            {"export": {"format": "safetensors"}},
        ],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    luthier.run(tmp_path / "recipe.yaml")
    (exported,) = (tmp_path / "runs" / "integers").glob("*export*/model")
    model, _ = luthier.load(exported, dtype="float32", device="cpu")
    layers = quantized_layers(model)
    assert {layer.scheme for layer in layers.values()} == {Scheme(4, 16)}
    stages = {path.name.partition("-")[2]: path for path in (tmp_path / "runs" / "integers").iterdir()}
    if first:  # the codes are those of the stage before
        before, _ = luthier.load(stages["compress"] / "model", dtype="float32", device="cpu")
        for name, layer in quantized_layers(before).items():
            assert torch.equal(layers[name].codes, layer.codes)
            assert not torch.equal(layers[name].scale, layer.scale)
