"""DoRA: lengths and directions, the cheaper norm, rows of length zero, and PEFT's own DoRA as oracle."""

import peft
import pytest
import small_training as training
import tiny
import torch

from luthier import method
from luthier.errors import MethodError
from luthier.tuning import hooks
from luthier.tuning.attach import attach, trainable
from luthier.tuning.lowrank.dora import DoraLinear, row_norms, scale_rows
from luthier.tuning.merge import merge


def dora(model, **options):
    torch.manual_seed(0)
    return attach(model, method("dora")(**{"r": 4, "lora_alpha": 8} | options))


def plain_peft(model, **options):
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "use_dora": True} | options
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))


def disturb(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, DoraLinear)}


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_forward_and_gradients_are_those_of_peft(make, dropout):
    results = []
    for build in (dora, plain_peft):
        model = disturb(build(make(), lora_dropout=dropout))
        model.train()
        torch.manual_seed(3)
        loss = model(**training.batch(model)).loss
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (loss, gradients), (expected, oracle) = results
    assert torch.allclose(loss, expected, atol=1e-6)
    assert set(gradients) == set(oracle)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, oracle[name], rtol=1e-4, atol=1e-5), name


def test_the_cheaper_norm_is_the_norm():
    generator = torch.Generator().manual_seed(0)
    w, a, b = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((7, 5), (2, 5), (7, 2)))
    direct = (w + 0.5 * b @ a).norm(dim=1)
    assert torch.allclose(row_norms(w, a, b, 0.5, w.norm(dim=1)), direct, rtol=1e-12)
    assert torch.equal(row_norms(w, a, 0 * b, 0.5, w.norm(dim=1)), w.norm(dim=1))
    w[3] = 0
    direct = (w + 0.5 * b @ a).norm(dim=1)
    assert torch.allclose(row_norms(w, a, b, 0.5, w.norm(dim=1)), direct, rtol=1e-12)


def test_an_empty_row_is_scaled_by_one():
    assert torch.equal(
        scale_rows(torch.tensor([2.0, 0.0]), torch.tensor([4.0, 0.0])), torch.tensor([0.5, 1.0])
    )


def test_trains_lora_and_one_length_a_row():
    model = dora(tiny.llama())
    shapes = [layer.get_base_layer().weight.shape for layer in layers(model).values()]
    assert trainable(model)[0] == sum(4 * (out + in_) + out for out, in_ in shapes)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_rows_of_the_merged_weight_have_the_learnt_lengths(make):
    model = disturb(dora(make()))
    lengths = {
        name.removeprefix("base_model.model."): layer.lora_magnitude_vector["default"].weight.detach().clone()
        for name, layer in layers(model).items()
    }
    merged = merge(model)
    for name, length in lengths.items():
        weight = merged.get_submodule(name).weight.detach()
        rows = weight.T if make is tiny.gpt2 else weight
        assert torch.allclose(rows.norm(dim=1), length.abs(), atol=1e-6)


def test_lengths_set_to_the_norms_give_plain_lora():
    model = disturb(dora(tiny.llama()))
    torch.manual_seed(0)
    plain = disturb(attach(tiny.llama(), method("lora")(r=4, lora_alpha=8)))
    state = {n: p for n, p in model.named_parameters() if ".lora_A." in n or ".lora_B." in n}
    for name, parameter in state.items():
        plain.get_parameter(name).data.copy_(parameter.data)
    for layer in layers(model).values():
        magnitude = layer.lora_magnitude_vector["default"]
        magnitude.weight.data = magnitude.norms(
            layer.get_base_layer(), layer.lora_A["default"].weight, layer.lora_B["default"].weight, 2.0
        )
    assert torch.allclose(training.logits(model), training.logits(plain), atol=1e-5)


def test_only_the_direction_of_a_row_counts():
    model = disturb(dora(tiny.llama()))
    expected = training.logits(model)
    for layer in layers(model).values():
        layer.get_base_layer().weight.data[1] *= 3
        layer.lora_B["default"].weight.data[1] *= 3
    # Written through .data, which no version counter sees: the cached norms must be dropped by hand.
    for layer in layers(model).values():
        layer.lora_magnitude_vector["default"]._dora_cache.clear()
    assert torch.allclose(training.logits(model), expected, atol=1e-5)


def with_empty_row():
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[2] = 0
        model.model.layers[1].self_attn.v_proj.weight[0] = 0
    return model


def test_a_row_of_length_zero_trains_where_plain_peft_gives_nan(tmp_path):
    oracle = plain_peft(with_empty_row())
    oracle.base_model.model.set_attn_implementation("eager")  # SDPA on the CPU swallows the NaN
    assert not torch.isfinite(training.logits(oracle)).all()
    model = dora(with_empty_row())
    assert torch.allclose(training.logits(model), training.logits(with_empty_row()), atol=1e-6)
    training.train(model, tmp_path)
    expected = training.logits(model)
    assert torch.isfinite(expected).all()
    assert torch.allclose(training.logits(merge(model)), expected, atol=1e-4)


def test_a_fresh_adapter_on_an_empty_row_merges():
    merged = merge(dora(with_empty_row()))
    assert torch.allclose(training.logits(merged), training.logits(with_empty_row()), atol=1e-6)


def test_unmerging_restores_the_base_or_refuses():
    model = disturb(dora(tiny.llama()))
    before = training.weights(model)
    model.merge_adapter()
    model.unmerge_adapter()
    for name, tensor in before.items():
        assert torch.allclose(model.get_parameter(name), tensor, atol=1e-5)
    broken = dora(with_empty_row())
    broken.merge_adapter()
    with pytest.raises(MethodError, match="length 0"):
        broken.unmerge_adapter()


def test_the_checkpoint_is_an_ordinary_dora(tmp_path):
    model = disturb(dora(tiny.llama()))
    expected = training.logits(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert type(loaded.peft_config["default"]) is peft.LoraConfig
    assert not layers(loaded)
    assert torch.allclose(training.logits(loaded), expected, atol=1e-5)


def test_starts_as_the_base_in_bfloat16():
    base = tiny.llama().bfloat16()
    expected = training.logits(base)
    assert torch.equal(training.logits(dora(base)), expected)


def test_lengths_do_not_decay():
    model = dora(tiny.llama())
    groups = hooks.parameter_groups(model, training.arguments("unused", weight_decay=0.1))
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert decays.pop(id(parameter)) == (0.0 if "magnitude" in name else 0.1)
    assert not decays


def test_norms_follow_a_base_that_is_loaded_anew():
    model = disturb(dora(tiny.llama()))
    training.logits(model)  # fills the caches
    other = disturb(dora(tiny.llama(seed=5)))
    model.load_state_dict(other.state_dict())
    assert torch.allclose(training.logits(model), training.logits(other), atol=1e-6)


def test_pissa_keeps_the_lengths_of_the_original_rows(tmp_path):
    model = disturb(dora(tiny.llama(), init_lora_weights="pissa"))
    expected = training.logits(model)
    hooks.save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert torch.allclose(training.logits(loaded), expected, atol=1e-4)


def test_without_dora_it_is_another_method():
    with pytest.raises(MethodError, match="lora"):
        method("dora")(use_dora=False)
