"""Attaching: every pattern matches or is refused with the nearest names; frozen experts are said."""

import peft
import pytest
import small_training as training
import tiny
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from luthier import checks, method
from luthier.errors import CheckError, MethodError
from luthier.tuning import hooks
from luthier.tuning.attach import attach, table, task_type, trainable, tuning_of


def lora(**options):
    return method("lora")(r=2, **options)


def mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
        )
    )


def test_patterns_of_another_architecture_are_refused_with_the_modules_that_exist():
    with pytest.raises(MethodError, match=r"query.*"):
        attach(tiny.gpt2(), lora(target_modules=["query"]))


def test_a_regular_expression_that_matches_nothing_is_refused():
    with pytest.raises(MethodError, match=r"regular expression.*q_proj"):
        attach(tiny.llama(), lora(target_modules="q_proj"))
    with pytest.raises(MethodError, match="not a regular expression"):
        attach(tiny.llama(), lora(target_modules="q_proj("))


def test_a_regular_expression_is_read_as_peft_reads_it():
    model = attach(tiny.llama(), lora(target_modules=r".*layers\.1.*\.(q|v)_proj"))
    ends = {
        n.split(".lora_")[0].removeprefix("base_model.model.")
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    assert ends == {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"}


def test_a_container_is_not_a_layer():
    with pytest.raises(MethodError, match="mlp"):
        attach(tiny.llama(), lora(target_modules=["mlp"]))


def test_experts_that_stay_frozen_are_said():
    with checks.collect() as lines:
        attach(mixtral(), lora(target_modules=["q_proj", "v_proj"]))
    line = next(line for line in lines if "share" in line.name)
    base = mixtral()
    experts = sum(p.numel() for n, p in base.named_parameters() if "experts" in n)
    assert f"experts stay frozen: {experts / trainable(base)[1]:.0%}" in line.detail


def test_experts_that_are_reached_are_counted():
    with checks.collect() as lines:
        attach(mixtral(), lora(target_modules="all-linear"))
    line = next(line for line in lines if "share" in line.name)
    assert line.detail == ""
    base = mixtral()
    reached = sum(p.numel() for n, p in base.named_parameters() if "layers" in n and p.ndim > 1)
    assert line.value == pytest.approx(reached / trainable(base)[1])


def test_a_parameter_that_does_not_exist_is_refused():
    with pytest.raises(MethodError, match=r"experts.down_projj.*experts.down_proj'"):
        attach(mixtral(), lora(target_modules=["q_proj"], target_parameters=["experts.down_projj"]))


def test_matched_patterns_and_share_are_recorded():
    with checks.collect() as lines:
        attach(tiny.llama(), lora(target_modules=["q_proj", "v_proj"]))
    found = {line.name: line for line in lines}
    assert found["target patterns matched"].value == 2
    assert found["target patterns matched"].detail == "q_proj 2, v_proj 2"
    base = tiny.llama()
    covered = sum(p.numel() for n, p in base.named_parameters() if "q_proj" in n or "v_proj" in n)
    assert found["share of the weights adapted"].value == pytest.approx(covered / trainable(base)[1])


def test_an_adapter_that_changes_the_output_at_step_0_is_refused():
    class Loud(type(lora())):
        def attached(self, model):
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.data += 1

    with pytest.raises(CheckError, match="identity at step 0"):
        attach(tiny.llama(), Loud(r=2))


def test_a_base_weight_left_open_is_refused():
    class Leaky(type(lora())):
        def attached(self, model):
            model.get_input_embeddings().weight.requires_grad_(True)

    with pytest.raises(CheckError, match=r"trainable as declared.*embed_tokens"):
        attach(tiny.llama(), Leaky(r=2))


def test_a_frozen_adapter_weight_is_refused():
    class Lazy(type(lora())):
        def attached(self, model):
            next(p for n, p in model.named_parameters() if "lora_A" in n).requires_grad_(False)

    with pytest.raises(CheckError, match=r"trainable as declared.*lora_A"):
        attach(tiny.llama(), Lazy(r=2))


def test_the_config_given_is_left_as_it_was():
    config = lora()
    attach(tiny.llama(), config)
    assert config.target_modules == "all-linear"
    attach(tiny.gpt2(), config)  # serves a second model with other names


def test_a_second_adapter_is_refused():
    with pytest.raises(MethodError, match="already carries"):
        attach(attach(tiny.llama(), lora()), lora())


def test_what_is_no_method_is_refused():
    with pytest.raises(MethodError, match="not the config of a tuning method"):
        attach(tiny.llama(), {"name": "lora"})


def test_the_new_head_of_a_classifier_learns_and_is_saved(tmp_path):
    model = training.train(attach(tiny.bert(), lora()), tmp_path)
    assert not torch.equal(
        model.base_model.model.classifier.modules_to_save["default"].weight, tiny.bert().classifier.weight
    )


@pytest.mark.parametrize(
    ("make", "expected"), [(tiny.llama, "CAUSAL_LM"), (tiny.bert, "SEQ_CLS"), (tiny.t5, "SEQ_2_SEQ_LM")]
)
def test_peft_is_told_the_task(make, expected):
    assert task_type(make()) == expected


def test_plain_peft_configs_are_taken_too():
    model = attach(tiny.llama(), peft.LoHaConfig(r=2, target_modules=["q_proj"]))
    assert tuning_of(model).peft_type == "LOHA"


def test_table_joins_the_blocks():
    rows = table(attach(tiny.llama(), method("top_layers")(k=1)))
    found = {name: (learns, total) for name, learns, total in rows}
    assert found["model.layers.*.mlp.up_proj.weight"] == (2048, 4096)
    assert "model.embed_tokens.weight" not in found


def test_a_model_without_method_has_no_hooks():
    model = tiny.llama()
    assert tuning_of(model) is None
    assert hooks.callbacks(model) == []
    assert hooks.parameter_groups(model, training.arguments("unused")) is None


def test_attaching_leaves_the_users_random_stream_alone_for_partial_methods():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    attach(tiny.llama(), method("full")())
    assert torch.equal(torch.rand(3), expected)
