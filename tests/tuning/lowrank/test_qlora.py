"""QLoRA: the numbers in 4 bits, what learns on them, merging without going back, and loading as trained."""

import copy
import gc
import importlib.util
import json
from pathlib import Path

import peft
import pytest
import quantised_models as quantised
import small_training as training
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import luthier
from luthier import checks, method
from luthier.acceleration import fused_lora
from luthier.errors import CheckError, MethodError, ModelError
from luthier.models import quantized
from luthier.models.saving import verify_export
from luthier.tuning.attach import attach, trainable
from luthier.tuning.convert import to_lora
from luthier.tuning.merge import merge

pytest.importorskip("bitsandbytes", reason="the extra bnb is not installed")

KINDS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert, "t5": tiny.t5}
SMALL = {"r": 4, "lora_alpha": 8}
NF4 = [
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
]  # fmt: skip


def qlora(make=tiny.llama, dtype="float32", **options):
    config = method("qlora")(**SMALL | options)
    model = quantised.load(make, config.quantization, dtype)
    torch.manual_seed(0)
    return attach(model, config)


def weights(shape=(64, 128), seed=0):
    return 0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nf4(weight):
    """Each block of 64 as the nearest of 16 numbers, times its largest size."""
    blocks = weight.reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    code = torch.tensor(NF4)
    nearest = (blocks / largest)[..., None].sub(code).abs().argmin(-1)
    return (code[nearest] * largest).reshape(weight.shape)


def in_4_bits(weight, kind="nf4", double=False):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=double)
    return packed, state, dequantize_4bit(packed, state)


# The numbers -----------------------------------------------------------------------------------------------


def test_the_numbers_are_quantiles_of_a_normal_distribution():
    at = torch.distributions.Normal(0, 1).icdf
    first = 0.9677083
    above, below = at(torch.linspace(first, 0.5, 9)[:-1]), -at(torch.linspace(first, 0.5, 8)[:-1])
    made = torch.cat([below, torch.zeros(1), above]).sort().values
    assert torch.allclose(made / made.max(), torch.tensor(NF4), atol=1e-6)


def test_a_weight_is_the_nearest_number_times_its_blocks_largest():
    weight = weights()
    packed, state, found = in_4_bits(weight)
    assert torch.allclose(found, nf4(weight), atol=1e-7)
    again = in_4_bits(found)
    assert torch.equal(again[0], packed)
    assert packed.numel() == weight.numel() // 2
    assert state.absmax.numel() == weight.numel() // 64


def test_nf4_is_nearer_to_normal_weights_than_fp4_and_than_steps_of_one_size():
    weight = weights((256, 512))

    def error(found):
        return float((found - weight).norm() / weight.norm())

    blocks = weight.reshape(-1, 64)
    step = blocks.abs().amax(1, keepdim=True) / 7
    even = ((blocks / step).round() * step).reshape(weight.shape)
    nf4, doubled, fp4 = (error(in_4_bits(weight, k, d)[2]) for k, d in [("nf4", 0), ("nf4", 1), ("fp4", 0)])
    assert nf4 == pytest.approx(0.092, abs=0.002)
    assert doubled == pytest.approx(nf4, rel=0.01)
    assert nf4 < error(even) < fp4


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_the_bits_of_a_weight_are_those_that_are_stated(kind):
    (name, double), bits = quantized.KINDS[kind]
    weight = weights((256, 512))
    packed, state, _ = in_4_bits(weight, name, double)
    held = packed.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if double else 0)
    assert held * 8 / weight.numel() == pytest.approx(bits, abs=1e-3)


# The base --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_all_layers_below_the_head_are_held_in_4_bits(kind):
    plain, model = KINDS[kind](), quantised.load(KINDS[kind])
    linear = [n for n, m in plain.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    left_out = {"llama": ["lm_head"], "gpt2": ["lm_head"], "bert": ["classifier"], "t5": ["lm_head"]}[kind]
    held = set(quantized.layers(model))
    assert {n for n in linear if n not in held and not n.endswith(".wo")} == set(left_out)
    assert quantized.of(model) == "nf4-dq"
    for name, layer in quantized.layers(model).items():
        own = plain.get_submodule(name)
        weight = own.weight.T if isinstance(own, Conv1D) else own.weight
        expected = in_4_bits(weight.detach().contiguous(), double=True)[2]
        x = torch.eye(layer.in_features)
        zero = 0 if layer.bias is None else layer.bias
        assert torch.allclose((layer(x) - zero).T, expected, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_answering_leaves_the_bits_of_the_base_as_they_are(kind):
    model = quantised.load(KINDS[kind])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    training.logits(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
def test_nothing_but_the_weights_in_4_bits_stays_in_memory():
    def mapped():
        return str(quantised.folder(tiny.llama)) in Path("/proc/self/maps").read_text()

    plain = quantised.load(tiny.llama, None)
    assert mapped()
    del plain
    gc.collect()
    model = quantised.load(tiny.llama)
    assert not mapped()
    assert len(quantized.layers(model)) == 14


def test_a_model_in_4_bits_counts_its_weights_and_not_its_bytes():
    assert trainable(qlora())[1] - trainable(qlora())[0] == sum(p.numel() for p in tiny.llama().parameters())


def test_other_bases_are_refused_with_what_to_write():
    with pytest.raises(MethodError, match=r"not quantised.*quantization='nf4-dq'"):
        attach(tiny.llama(), method("qlora")())
    with pytest.raises(MethodError, match=r"wants a base in nf4, and this one is in nf4-dq"):
        attach(quantised.load(tiny.llama), method("qlora")(double_quant=False))
    with pytest.raises(ModelError, match="nf3"):
        luthier.load(quantised.folder(tiny.llama), quantization="nf3")
    with pytest.raises(MethodError, match="factorises weights"):
        method("qlora")(init_lora_weights="pissa")
    with pytest.raises(MethodError, match=r"quantised model cannot learn.*qlora"):
        attach(quantised.load(tiny.llama), method("top_layers")(k=1))


def test_without_bitsandbytes_the_extra_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else find(n, *a)
    )
    with pytest.raises(ModelError, match=r"needs bitsandbytes.*pip install 'luthier\[bnb\]'"):
        luthier.load(quantised.folder(tiny.llama), quantization="nf4")


# Training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_and_b_learn_and_the_base_does_not(kind, dtype, tmp_path):
    model = qlora(KINDS[kind], dtype)
    before = training.weights(model)
    training.train(model, tmp_path)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in n or ".modules_to_save." in n for n in moved)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert torch.isfinite(training.logits(model)).all()


def test_the_gradient_is_that_of_a_lora_on_the_weights_made_anew():
    model = training.disturb(qlora(), 0.3)
    plain = quantized.dequantize(quantised.load(tiny.llama))
    other = peft.get_peft_model(plain, peft.LoraConfig(**SMALL, target_modules="all-linear"))
    other.load_state_dict({n: p for n, p in model.named_parameters() if ".lora_" in n}, strict=False)
    for each in (model, other):
        each(**training.batch(each)).loss.backward()
    for name, parameter in other.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(model.get_parameter(name).grad, parameter.grad, atol=1e-5), name


def test_fused_layers_stand_aside():
    with fused_lora.fused(training.disturb(qlora(), 0.3)) as report:
        assert report.fused == 0
        assert list(report.left) == ["Linear4bit layer"]


def test_it_trains_through_the_trainer_with_all_proofs(tmp_path):
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = {"output_dir": str(tmp_path / "out"), "max_steps": 2, "per_device_train_batch_size": 4}
    trainer = luthier.trainer("sft", qlora(), tmp_path / "rows.jsonl", args=args, tokenizer=tiny.tokenizer())
    with checks.collect() as lines:
        trainer.train()
    assert [line for line in lines if not line.passed] == []
    assert "frozen weights unchanged" in {line.name for line in lines}


@pytest.mark.parametrize("name", ["kadaptation", "krona", "lora", "lora_fa", "prefix"])
def test_other_methods_learn_on_such_a_base_too(name, tmp_path):
    options = {"phm_dim": 4} if name == "kadaptation" else {}
    torch.manual_seed(0)
    model = attach(quantised.load(tiny.llama), method(name)(**options))
    before = training.weights(model)
    training.train(model, tmp_path)
    assert all(torch.equal(p, before[n]) != p.requires_grad for n, p in model.named_parameters())


# Merging and files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qlora", "kadaptation"])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_adds_to_the_weights_made_anew_and_leaves_them_plain(kind, name, tmp_path):
    base = quantised.load(KINDS[kind])
    start = {n: p.detach().clone() for n, p in quantized.dequantize(copy.deepcopy(base)).named_parameters()}
    model = attach(base, method(name)(**(SMALL if name == "qlora" else {"phm_dim": 4})))
    training.disturb(model, 0.2)
    expected = training.logits(model)
    with checks.collect() as lines:
        merged = merge(model)
    assert {"dequantised = in 4 bits"} <= {line.name for line in lines if line.passed}
    assert torch.allclose(training.logits(merged), expected, atol=1e-4)
    assert not quantized.layers(merged)
    assert [type(m) for m in merged.modules()] == [type(m) for m in KINDS[kind]().modules()]
    moved = {n for n, p in merged.named_parameters() if not torch.equal(p, start[n])}
    assert moved
    merged.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded = type(merged).from_pretrained(tmp_path)
    assert torch.equal(training.logits(loaded), training.logits(merged))


def test_merging_back_into_4_bits_loses_what_merging_here_keeps():
    model = training.disturb(qlora(), 0.05)
    expected = training.logits(model)
    base = training.logits(quantised.load(tiny.llama))
    rounded = training.logits(copy.deepcopy(model).merge_and_unload())
    effect = (expected - base).norm()
    assert (rounded - expected).norm() > 0.1 * effect
    assert (training.logits(merge(model)) - expected).norm() < 1e-3 * effect


def test_in_half_precision_too_the_weights_are_held_to_be_those_in_4_bits():
    """Rounding of sums to bfloat16, which grows with the depth, says nothing about the weights."""
    model = training.disturb(qlora(dtype="bfloat16"), 0.2)
    products = {n: m.weight.quant_state.dtype for n, m in quantized.layers(model.get_base_model()).items()}
    with checks.collect() as lines:
        merged = merge(model)
    (line,) = (line for line in lines if line.name == "dequantised = in 4 bits")
    assert line.passed
    assert line.value < 1e-5
    assert set(products.values()) == {p.dtype for p in merged.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_whose_weights_do_not_come_back_is_not_merged(monkeypatch, dtype):
    model = training.disturb(qlora(dtype=dtype), 0.2)
    real = quantized.dequantize

    def wrong(*arguments):
        found = real(*arguments)
        found.model.layers[0].mlp.up_proj.weight.data *= 1.01
        return found

    monkeypatch.setattr(quantized, "dequantize", wrong)
    with pytest.raises(CheckError, match="dequantised = in 4 bits"):
        merge(model)


def test_a_change_is_not_merged_into_4_bits_by_pefts_call():
    model = attach(quantised.load(tiny.llama), method("krona")())
    with pytest.raises(MethodError, match=r"held in 4 bits.*luthier\.tuning\.merge\.merge"):
        model.merge_and_unload()


def test_what_is_saved_is_a_lora_that_comes_back_on_the_base_it_was_trained_on(tmp_path):
    model = training.disturb(qlora(), 0.2)
    expected = training.logits(model)
    luthier.save(model, tmp_path / "saved", tiny.tokenizer())
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert not {"quant_type", "double_quant"} & set(config)
    assert all(".lora_" in n for n in load_file(tmp_path / "saved" / "adapter_model.safetensors"))
    loaded, _ = luthier.load(tmp_path / "saved", dtype="float32", device="cpu")
    assert quantized.of(loaded) == "nf4-dq"
    assert torch.equal(training.logits(loaded), expected)
    verify_export(tmp_path / "saved", model, tiny.tokenizer())
    plain = PeftModel.from_pretrained(tiny.llama(), tmp_path / "saved")
    assert not torch.allclose(training.logits(plain), expected, atol=1e-3)


@pytest.mark.parametrize("name", ["qlora", "krona"])
def test_an_adapter_on_4_bits_becomes_a_lora_of_another_rank(name):
    options = SMALL if name == "qlora" else {"a_shape": [4, 1]}
    model = training.disturb(attach(quantised.load(tiny.llama), method(name)(**options)), 0.2)
    expected = training.logits(model)
    found = to_lora(model, 4 if name == "qlora" else 0.9999)
    assert quantized.of(found) == "nf4-dq"
    assert torch.allclose(training.logits(found), expected, atol=2e-2)


def test_a_recipe_tunes_evaluates_and_exports_on_one_base(tmp_path):
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(8)]
    for name in ("train", "test"):
        marked = [row | {"prompt": row["prompt"] + name} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in marked))
    recipe = {
        "name": "four",
        "output": str(tmp_path / "runs"),
        "model": {"name": str(quantised.folder(tiny.llama)), "dtype": "float32"},
        "stages": [
            {"tune": {
                "data": str(tmp_path / "train.jsonl"),
                "method": {"name": "qlora", **SMALL},
                "training": {"max_steps": 2, "per_device_train_batch_size": 4},
            }},
            {"evaluate": {"data": str(tmp_path / "test.jsonl"), "metrics": ["perplexity"]}},
            {"export": {"format": "safetensors"}},
        ],
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    result = luthier.run(tmp_path / "recipe.yaml")
    exported = next((tmp_path / "runs" / "four").glob("*export*/model"))
    model, _ = luthier.load(exported, dtype="float32", device="cpu")
    assert quantized.of(model) is None
    assert result is not None
