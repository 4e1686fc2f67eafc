"""LoRA: the paper's properties and those of its options, derived anew from the factors."""

import json
import math

import peft
import pytest
import small_training as training
import tiny
import torch

from luthier import method
from luthier.errors import MethodError
from luthier.tuning import hooks
from luthier.tuning.attach import attach, trainable
from luthier.tuning.merge import merge


def lora(model, seed=0, **options):
    torch.manual_seed(seed)
    return attach(model, method("lora")(**{"r": 4, "lora_alpha": 8} | options))


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}


def factors(layer):
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def weight(layer):
    """(out, in), also of GPT-2's transposed layers."""
    base = layer.get_base_layer().weight.detach()
    return base.T if layer.fan_in_fan_out else base


def disturb(model, seed=1):
    """Stand in for a training: every adapter weight moves."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.t5])
def test_trains_r_times_in_plus_out_a_layer(make):
    model = lora(make(), r=4)
    expected = sum(4 * sum(weight(layer).shape) for layer in layers(model).values())
    assert trainable(model)[0] == expected > 0


def test_starts_uniform_in_a_and_zero_in_b():
    for layer in layers(lora(tiny.llama())).values():
        a, b = factors(layer)
        bound = 1 / math.sqrt(a.shape[1])
        assert 0.5 * bound < a.abs().max() <= bound
        assert not b.any()


def test_all_linear_is_every_linear_layer_but_the_head():
    ends = {name.rsplit(".", 1)[-1] for name in layers(lora(tiny.llama(tie_word_embeddings=False)))}
    assert ends == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_rank_stabilised_scale_is_alpha_over_root_r():
    base = training.logits(disturb(lora(tiny.llama(), r=4, lora_alpha=16)))
    stabilised = training.logits(disturb(lora(tiny.llama(), r=4, lora_alpha=8, use_rslora=True)))
    assert torch.allclose(base, stabilised, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_merging_adds_an_update_of_rank_r(make):
    model = disturb(lora(make(), r=3))
    names = [name.removeprefix("base_model.model.") for name in layers(model)]
    before = {n: p.detach().clone() for n, p in make().named_parameters()}
    merged = merge(model)
    for name in names:
        update = merged.get_parameter(f"{name}.weight") - before[f"{name}.weight"]
        singular = torch.linalg.svdvals(update.detach().double())
        assert singular[2] > 1e-4
        assert singular[3:].max() < 1e-6


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_pissa_takes_the_principal_part_out_of_the_base(make):
    originals = dict(make().named_parameters())
    for name, layer in layers(lora(make(), init_lora_weights="pissa")).items():
        original = originals[name.removeprefix("base_model.model.") + ".weight"].detach()
        original = original.T if layer.fan_in_fan_out else original
        a, b = factors(layer)
        u, s, v = torch.linalg.svd(original, full_matrices=False)
        assert torch.allclose(2 * b @ a, u[:, :4] @ torch.diag(s[:4]) @ v[:4], atol=1e-5)
        left = torch.linalg.svdvals(weight(layer))
        assert torch.allclose(left, torch.cat([s[4:], torch.zeros(4)]), atol=1e-5)


def test_olora_starts_from_the_qr_factors():
    originals = dict(tiny.llama().named_parameters())
    for name, layer in layers(lora(tiny.llama(), init_lora_weights="olora")).items():
        original = originals[name.removeprefix("base_model.model.") + ".weight"].detach()
        a, b = factors(layer)
        q, r = torch.linalg.qr(original)
        assert torch.allclose(b, q[:, :4], atol=1e-6)
        assert torch.allclose(a, r[:4], atol=1e-6)
        assert torch.allclose(weight(layer) + 2 * b @ a, original, atol=1e-5)


def test_olora_on_transposed_weights_is_refused():
    with pytest.raises(MethodError, match=r"olora.*pissa"):
        lora(tiny.gpt2(), init_lora_weights="olora")


def test_an_unknown_initialisation_is_refused():
    with pytest.raises(MethodError, match=r"'pisa'.*pissa"):
        lora(tiny.llama(), init_lora_weights="pisa")


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_residual_adapter_is_saved_for_the_original_base(init, use_rslora, tmp_path):
    model = disturb(lora(tiny.llama(), init_lora_weights=init, use_rslora=use_rslora))
    expected = training.logits(model)
    hooks.save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert torch.allclose(training.logits(loaded), expected, rtol=0, atol=1e-4)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 8


def test_the_saved_config_is_an_ordinary_lora(tmp_path):
    lora(tiny.llama(), loraplus_lr_ratio=4.0).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(fields) <= set(peft.LoraConfig.__dataclass_fields__) | {"auto_mapping"}
    assert type(peft.PeftConfig.from_pretrained(tmp_path)) is peft.LoraConfig


def test_lora_plus_trains_b_faster():
    model = lora(tiny.llama(), loraplus_lr_ratio=16.0)
    groups = hooks.parameter_groups(model, training.arguments("unused", learning_rate=1e-3))
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(rates) == len(named)
    for name, parameter in named.items():
        assert rates[id(parameter)] == pytest.approx(1.6e-2 if "lora_B" in name else 1e-3)


def test_lora_plus_at_ratio_one_is_plain_lora(tmp_path):
    plain = training.train(lora(tiny.llama()), tmp_path)
    plus = training.train(lora(tiny.llama(), loraplus_lr_ratio=1.0), tmp_path)
    for name, tensor in training.weights(plain).items():
        assert torch.allclose(tensor, plus.get_parameter(name), rtol=0, atol=1e-7)


def test_the_seed_decides_the_adapter():
    first, again, other = (
        factors(next(iter(layers(lora(tiny.llama(), seed=s)).values())))[0] for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_config_works_with_plain_peft():
    model = peft.get_peft_model(tiny.llama(), method("lora")(r=2))
    assert isinstance(model, peft.PeftModel)


@pytest.mark.parametrize("options", [{"r": 0}, {"r": -1}, {"lora_dropout": 1.0}, {"rank": 4}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(MethodError):
        method("lora")(**options)
