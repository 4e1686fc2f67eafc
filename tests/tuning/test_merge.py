"""Merging: the merged model is the unmerged one, whatever is tied; what would lose the adapter is refused."""

import peft
import pytest
import small_training as training
import tiny
import torch

from luthier import checks, method
from luthier.errors import CheckError, MethodError
from luthier.tuning.attach import attach
from luthier.tuning.merge import combine, merge


def lora(model, size=0.05, **options):
    torch.manual_seed(0)
    return training.disturb(attach(model, method("lora")(r=4, **options)), size)


def reloaded(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def tied_pair(model):
    """Adapters on embeddings and head that PEFT keeps equal."""
    return lora(model, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)


def test_a_tied_head_with_an_adapter_of_its_own_is_untied(tmp_path):
    model = lora(tiny.llama(), target_modules=["lm_head"])
    expected = training.logits(model)
    embeddings = tiny.llama().get_input_embeddings().weight
    merged = merge(model)
    assert torch.allclose(training.logits(merged), expected, atol=1e-4)
    assert merged.config.tie_word_embeddings is False
    loaded = reloaded(merged, tmp_path)
    assert torch.equal(training.logits(loaded), training.logits(merged))
    assert torch.equal(loaded.get_input_embeddings().weight, embeddings)


def test_tied_embeddings_with_an_adapter_of_their_own_are_untied(tmp_path):
    model = lora(tiny.llama(), target_modules=["embed_tokens"])
    expected = training.logits(model)
    merged = merge(model)
    assert torch.allclose(training.logits(merged), expected, atol=1e-4)
    assert torch.equal(merged.get_output_embeddings().weight, tiny.llama().get_output_embeddings().weight)
    assert torch.equal(training.logits(reloaded(merged, tmp_path)), training.logits(merged))


def test_tied_adapters_are_merged_once_and_stay_tied(tmp_path):
    model = tied_pair(tiny.llama())
    expected = training.logits(model)
    merged = merge(model)
    assert torch.allclose(training.logits(merged), expected, atol=1e-4)
    assert merged.config.tie_word_embeddings is True
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert torch.equal(training.logits(reloaded(merged, tmp_path)), training.logits(merged))


def test_a_trained_head_beside_tied_embeddings_survives(tmp_path):
    model = lora(tiny.llama(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    expected = training.logits(model)
    merged = merge(model)
    assert torch.allclose(training.logits(merged), expected, atol=1e-4)
    assert torch.allclose(training.logits(reloaded(merged, tmp_path)), expected, atol=1e-4)


def test_untouched_ties_stay():
    merged = merge(lora(tiny.llama()))
    assert merged.config.tie_word_embeddings is True
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight


def test_an_architecture_that_cannot_be_untied_is_refused():
    with pytest.raises(MethodError, match="always ties"):
        merge(lora(tiny.t5(), target_modules=["lm_head"]))


def test_half_precision_is_merged_in_fp32_and_rounded_once():
    model = lora(training.half(tiny.llama()), size=0.2)
    base = {n: p.detach().clone() for n, p in training.half(tiny.llama()).named_parameters()}
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    a, b = layer.lora_A["default"].weight.detach().float(), layer.lora_B["default"].weight.detach().float()
    expected = (base["model.layers.0.mlp.up_proj.weight"].float() + 8 * b @ a).bfloat16()
    merged = merge(model)
    assert torch.equal(merged.model.layers[0].mlp.up_proj.weight, expected)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert merged.model.rotary_emb.inv_freq.dtype == torch.float32


def test_the_error_is_recorded_relative_to_the_effect():
    with checks.collect() as lines:
        merge(lora(training.half(tiny.llama()), size=0.2))
    assert [(line.when, line.name) for line in lines if line.when == "merge"] == [
        ("merge", "merged = unmerged (lora, float32)"),
        ("merge", "merged = unmerged (lora, bfloat16)"),
    ]
    exact, rounded = (line.value for line in lines if line.when == "merge")
    assert exact < 1e-5 < rounded < 0.1


def test_a_merge_that_goes_wrong_is_refused(monkeypatch):
    model = lora(tiny.llama())
    original = peft.tuners.lora.Linear.get_delta_weight
    monkeypatch.setattr(peft.tuners.lora.Linear, "get_delta_weight", lambda *a: 1.1 * original(*a))
    with pytest.raises(CheckError, match="merged = unmerged"):
        merge(model)


def test_a_broken_adapter_is_refused():
    model = lora(tiny.llama())
    next(p for n, p in model.named_parameters() if "lora_B" in n).data.fill_(float("nan"))
    with pytest.raises(CheckError, match="cannot be merged"):
        merge(model)


def test_a_prompt_cannot_be_merged():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(MethodError, match="no change of weights"):
        merge(peft.get_peft_model(tiny.llama(), config))


def test_a_model_without_adapter_is_returned_as_it_is():
    model = tiny.llama()
    assert merge(model) is model


def test_a_fresh_adapter_merges_to_the_base():
    torch.manual_seed(0)
    merged = merge(attach(tiny.llama(), method("lora")(r=4)))
    for name, parameter in tiny.llama().named_parameters():
        assert torch.equal(parameter, merged.get_parameter(name))


def several(*configs):
    """A model with one disturbed adapter for each config, named 'a', 'b', ..."""
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny.llama(), configs[0], adapter_name="a")
    for name, config in zip("bcd", configs[1:], strict=False):
        model.add_adapter(name, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def plain(**options):
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **options)


KINDS = {
    "plain": lambda: plain(),
    "rslora": lambda: plain(use_rslora=True),
    "dora": lambda: plain(use_dora=True),
    "ours": lambda: method("dora")(r=4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_weight_one_is_itself(kind):
    model = several(KINDS[kind]())
    expected = training.logits(model)
    assert torch.allclose(training.logits(combine(model, {"a": 1.0})), expected, atol=1e-4)


def test_changes_are_summed_by_their_weights():
    configs = (plain(), plain(use_rslora=True), plain(use_dora=True))
    name, base = (
        "model.layers.0.mlp.up_proj.weight",
        tiny.llama().get_parameter("model.layers.0.mlp.up_proj.weight"),
    )
    alone = []
    for adapter in "abc":
        alone.append(combine(several(*configs), {adapter: 1.0}).get_parameter(name) - base)
    merged = combine(several(*configs), {"a": 0.3, "b": 0.7, "c": -0.5})
    expected = base + 0.3 * alone[0] + 0.7 * alone[1] - 0.5 * alone[2]
    assert torch.allclose(merged.get_parameter(name), expected, atol=1e-6)


NAME = "model.layers.0.mlp.up_proj.weight"


def changes_of(weights, **options):
    """What is added to one weight, and what each adapter adds to it alone."""
    base = tiny.llama().get_parameter(NAME)
    together, *alone = (
        combine(several(plain(), plain()), names, **given).get_parameter(NAME) - base
        for names, given in [(weights, options), *(({name: 1.0}, {}) for name in weights)]
    )
    return together, torch.stack(alone)


def test_ties_takes_the_largest_that_agree_in_sign():
    found, alone = changes_of({"a": 1.0, "b": 1.0}, how="ties", density=0.25)
    kept = torch.zeros_like(alone)
    for row, change in zip(kept, alone, strict=True):
        bound = change.abs().flatten().sort(descending=True).values[change.numel() // 4 - 1]
        row[change.abs() >= bound] = 1
    trimmed = alone * kept
    agrees = (trimmed.sign() == torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)) & (trimmed != 0)
    expected = (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_dare_drops_at_random_and_keeps_the_mean():
    found, alone = changes_of({"a": 1.0}, how="dare_linear", density=0.5)
    dropped = found.abs() < 1e-7
    assert 0.4 < dropped.float().mean() < 0.6
    torch.testing.assert_close(found[~dropped], 2 * alone[0][~dropped], rtol=1e-4, atol=1e-6)
    again, _ = changes_of({"a": 1.0}, how="dare_linear", density=0.5)
    other, _ = changes_of({"a": 1.0}, how="dare_linear", density=0.5, seed=1)
    assert torch.equal(found, again)
    assert not torch.equal(found, other)


@pytest.mark.parametrize("how", ["ties", "dare_linear", "dare_ties"])
def test_alone_and_whole_an_adapter_is_itself(how):
    found, alone = changes_of({"a": 1.0}, how=how, density=1.0)
    torch.testing.assert_close(found, alone[0], rtol=1e-4, atol=1e-6)


def test_unknown_adapters_and_ways_are_refused():
    with pytest.raises(MethodError, match="no adapter 'x'"):
        combine(several(plain()), {"x": 1.0})
    with pytest.raises(MethodError, match="'tie'") as error:
        combine(several(plain()), {"a": 1.0}, how="tie")
    assert "ties" in error.value.fix
    with pytest.raises(MethodError, match="density"):
        combine(several(plain()), {"a": 1.0}, how="ties", density=0.0)


def test_adapters_that_replace_modules_are_not_summed():
    with pytest.raises(MethodError, match="lm_head"):
        combine(several(plain(modules_to_save=["lm_head"])), {"a": 1.0})
