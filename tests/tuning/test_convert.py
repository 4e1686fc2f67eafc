"""An adapter as a LoRA: exact where the rank suffices, the nearest possible where it does not."""

import peft
import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import luthier
from luthier import checks
from luthier.errors import MethodError
from luthier.tuning.convert import change, factorise, to_lora
from luthier.tuning.probe import probe_logits


def adapted(config, build=tiny.llama):
    """A model whose adapter does something."""
    torch.manual_seed(0)
    model = get_peft_model(build(), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model


def lora(**options):
    return peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options)


CONFIGS = {
    "lora": (lora(), tiny.llama, 4),
    "rslora": (lora(use_rslora=True, lora_alpha=7), tiny.llama, 4),
    "dora": (lora(use_dora=True), tiny.llama, 1000),
    "conv1d": (lora(fan_in_fan_out=True), tiny.gpt2, 4),
    "loha": (peft.LoHaConfig(r=2, alpha=4, target_modules=["q_proj", "down_proj"]), tiny.llama, 4),
    "krona": (luthier.method("krona")(), tiny.llama, 1000),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_the_adapters_where_the_rank_suffices(kind, tmp_path):
    config, build, rank = CONFIGS[kind]
    model = adapted(config, build)
    expected = probe_logits(model)
    with checks.collect() as lines:
        converted = to_lora(model, rank)
    torch.testing.assert_close(probe_logits(converted), expected, rtol=1e-3, atol=1e-4)
    assert lines[-1].name == "as a LoRA"
    assert isinstance(lines[-1].value, float)
    assert lines[-1].value < 1e-3
    converted.save_pretrained(tmp_path)  # and any PEFT loads it
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    assert type(loaded.peft_config["default"]) is peft.LoraConfig
    torch.testing.assert_close(probe_logits(loaded), expected, rtol=1e-3, atol=1e-4)


def test_the_base_is_as_before():
    model = to_lora(adapted(lora()), 2)
    with model.disable_adapter():
        torch.testing.assert_close(probe_logits(model), probe_logits(tiny.llama().eval()), rtol=0, atol=0)


def test_a_smaller_rank_loses_what_eckart_and_young_say():
    matrix = torch.randn(12, 9, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(matrix)
    found = factorise(matrix, 3)
    assert found.a.shape == (3, 9)
    assert found.b.shape == (12, 3)
    error = (matrix - found.b @ found.a).square().sum()
    torch.testing.assert_close(error, values[3:].square().sum())
    assert found.lost == pytest.approx(float(error / matrix.square().sum()), rel=1e-4)


def test_a_share_takes_the_least_rank_that_keeps_it():
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))  # squared norms 9, 4, 1 of 14
    assert [len(factorise(matrix, share).a) for share in (0.5, 0.64, 0.65, 0.92, 0.93, 0.999)] == [
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    assert len(factorise(torch.zeros(3, 3), 0.9).a) == 1


def test_ranks_may_differ_between_layers(tmp_path):
    model = adapted(lora(rank_pattern={"q_proj": 2}))
    expected = probe_logits(model)
    converted = to_lora(model, 0.9999999)
    assert {
        len(m.lora_A["default"].weight) for n, m in converted.named_modules() if n.endswith("q_proj")
    } == {2}
    torch.testing.assert_close(probe_logits(converted), expected, rtol=1e-3, atol=1e-3)
    converted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    torch.testing.assert_close(probe_logits(loaded), expected, rtol=1e-3, atol=1e-3)


def test_a_classifiers_head_goes_along():
    model = adapted(lora(task_type="SEQ_CLS", target_modules=["query", "value"]), tiny.bert)
    expected = probe_logits(model)
    converted = to_lora(model, 4)
    torch.testing.assert_close(probe_logits(converted), expected, rtol=1e-3, atol=1e-4)


def test_the_change_of_a_half_precision_layer_is_not_rounded():
    model = adapted(lora(), lambda: tiny.llama().to(torch.bfloat16))
    name, layer = next((n, m) for n, m in model.named_modules() if hasattr(m, "lora_A"))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.scaling["default"] * b.double() @ a.double()
    torch.testing.assert_close(change(layer, "default", name).double(), expected, rtol=1e-2, atol=1e-3)
    assert layer.get_base_layer().weight.dtype == torch.bfloat16
    assert not layer.merged


@pytest.mark.parametrize("rank", [0, -1, 2.5, 1.0001])
def test_ranks_out_of_range_are_refused(rank):
    with pytest.raises(MethodError, match="whole number"):
        to_lora(adapted(lora()), rank)


def test_what_is_no_linear_change_is_refused():
    with pytest.raises(MethodError, match="Embedding"):
        to_lora(adapted(lora(target_modules=["embed_tokens"])), 4)
    with pytest.raises(MethodError, match="biases of the base"):
        to_lora(adapted(lora(bias="lora_only", target_modules=["c_attn"], fan_in_fan_out=True), tiny.gpt2), 4)
    with pytest.raises(MethodError, match="bias of 'bert"):
        to_lora(adapted(lora(lora_bias=True, task_type="SEQ_CLS", target_modules=["query"]), tiny.bert), 4)
    with pytest.raises(MethodError, match="feed-forward"):
        to_lora(adapted(luthier.method("krona")(variant="krona_b")), 4)
