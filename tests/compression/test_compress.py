"""`compress`: which methods go together, and that a mistake is named before anything is changed."""

import gc
import logging
import weakref
from contextlib import contextmanager

import peft
import pytest
import small_compression as small
import tiny
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from luthier import method
from luthier.compression.compress import compress
from luthier.compression.linear import matrix, quantized_layers
from luthier.compression.masks import in_groups, share_of_zeros
from luthier.errors import DataError, MethodError, ModelError
from luthier.models import structure

DATA = small.batches()
IDS = DATA[0]["input_ids"]


def gptq(**options):
    return method("gptq")(**{"group_size": 16} | options)


def everything():
    return [
        gptq(),
        method("rtn")(group_size=16),
        *(method(name)() for name in ("magnitude", "random", "wanda", "sparsegpt")),
    ]


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def refused(kind, words, model, methods, calibration=DATA):
    """The error, which comes before the model is changed."""
    before = state(model)
    with pytest.raises(kind, match=words):
        compress(model, methods, calibration=calibration)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[key]) or t.isnan().any() for key, t in before.items())


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        ([], r"gptq needs calibration data, and there is none.*thousand tokens"),
        ([{"input_ids": IDS[:, :0]}], r"batch 0 has input_ids of shape \(2, 0\).*at least one token"),
        ([{"input_ids": IDS[0]}], r"batch 0 has input_ids of shape \(10,\).*\(batch, seq\)"),
        ([*DATA, {"input_ids": IDS, "attention_mask": IDS[:1]}], r"batch 3 .*attention_mask \(1, 10\)"),
        (
            [{"input_ids": IDS + tiny.VOCAB}],
            r"batch 0 has ids \d+ to \d+; the model knows 0 to 383.*tokenizer",
        ),
        ([{"input_ids": -IDS}], r"the model knows 0 to 383"),
        ([{"input_ids": IDS, "attention_mask": 0 * IDS}], r"All calibration tokens are padding"),
        ([{"input_ids": IDS.repeat(1, 30)}], r"batch 0 is 300 tokens long; the model takes 256.*max_length"),
        ([{"input_ids": IDS.float()}], r"no input_ids, a tensor of integers"),
        ([{"input_ids": IDS.tolist()}], r"no input_ids, a tensor of integers"),
        ([{"input_ids": IDS, "labels": IDS[0]}], r"labels that are neither \(batch,\) nor \(batch, seq\)"),
        (["some text"], r"no input_ids"),
        ([{"ids": IDS}], r"no input_ids"),
    ],
)
@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
def test_calibration_that_will_not_do(calibration, words, build):
    refused(DataError, words, build(), gptq(), calibration)


def test_calibration_in_other_guises():
    found = [compress(tiny.llama(), gptq(), calibration=c)[0] for c in (DATA[0], DATA[:1], iter(DATA[:1]))]
    assert len({record.after for record in found}) == 1
    whole = [{"input_ids": IDS}], [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
    assert len({compress(tiny.gpt2(), gptq(), calibration=c)[0].after for c in whole}) == 1
    assert compress(tiny.gpt2(), gptq(), calibration=[{"input_ids": IDS[:1, :1]}])  # a single token


@pytest.mark.parametrize("config", everything(), ids=lambda c: type(c).__module__.rpartition(".")[2])
class TestAnyMethod:
    def test_a_weight_that_is_not_finite(self, config):
        model = tiny.llama()
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
        refused(MethodError, r"layers.1.mlp.up_proj has values that are not finite", model, config)

    def test_a_layer_that_is_quantised_already(self, config):
        model = tiny.llama()
        compress(model, method("rtn")(group_size=16, targets=["down_proj"]))
        refused(MethodError, r"layers.0.mlp.down_proj is quantised already", model, config)
        config = type(config)(**vars(config) | {"exclude": ["down_proj"]})
        assert len(compress(model, config, calibration=DATA)) == 12

    def test_an_adapter(self, config):
        plain = peft.LoraConfig(target_modules=["q_proj"], r=2)
        refused(
            MethodError,
            r"carries an adapter.*Merge it first",
            peft.get_peft_model(tiny.llama(), plain),
            config,
        )
        inside = peft.inject_adapter_in_model(plain, tiny.llama())  # as transformers' add_adapter does
        refused(MethodError, r"carries an adapter", inside, config)

    def test_an_encoder_decoder(self, config):
        refused(ModelError, r"T5.* is an encoder-decoder", tiny.t5(), config)

    def test_layers_that_are_not_there(self, config):
        for name, words in (("qproj", "'q_proj'"), ("lm_head", "head stay as they are")):
            wrong = type(config)(**vars(config) | {"targets": [name]})
            refused(MethodError, words, tiny.llama(), wrong)
        nothing = type(config)(**vars(config) | {"targets": ["q_proj"], "exclude": ["q_proj"]})
        refused(MethodError, "No layer is left to compress", tiny.llama(), nothing)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, config, dtype):
        model = tiny.llama().to(dtype)
        records = compress(model, config, calibration=DATA)
        assert len(records) == 14
        assert all(0 <= r.after < 1 for r in records)
        logits = model(IDS).logits
        assert logits.dtype == dtype
        assert torch.isfinite(logits).all()

    def test_only_what_is_named_changes(self, config):
        model, before = tiny.llama(), state(tiny.llama())
        chosen = type(config)(
            **vars(config) | {"targets": ["mlp.up_proj", "o_proj"], "exclude": ["layers.0.mlp.up_proj"]}
        )
        records = compress(model, chosen, calibration=DATA)
        named = {
            "model.layers.1.mlp.up_proj",
            "model.layers.0.self_attn.o_proj",
            "model.layers.1.self_attn.o_proj",
        }
        assert {r.name for r in records} == named
        after = model.state_dict()
        changed = {
            k.rpartition(".")[0] for k, t in before.items() if k not in after or not torch.equal(t, after[k])
        }
        assert changed == named


def test_group_sizes_that_do_not_divide_name_those_that_do():
    words = r"group_size 48 does not divide the \d+ inputs of model.layers.0.* Choose one of 16, 32"
    for name in ("gptq", "rtn"):
        refused(MethodError, words, tiny.llama(), method(name)(group_size=48))


@pytest.mark.parametrize("name", ["magnitude", "random", "wanda", "sparsegpt"])
def test_shares_and_patterns_that_are_none(name):
    for wrong in (1.5, -0.1, float("nan")):
        with pytest.raises(MethodError, match=r"sparsity must be >= 0 and <= 1"):
            method(name)(sparsity=wrong)
    for wrong in ("3:2", "a:b", "4:4"):
        refused(MethodError, r"pattern: .*is not zeros:group.*2:4", tiny.llama(), method(name)(pattern=wrong))
    refused(MethodError, r"Groups of 7 do not fill a row", tiny.llama(), method(name)(pattern="3:7"))


def test_inputs_that_are_not_finite_name_the_layer():
    model = tiny.llama()
    model.model.embed_tokens.weight.data[int(IDS[0, 0])] = torch.inf
    for name in ("gptq", "wanda", "sparsegpt"):
        config = gptq() if name == "gptq" else method(name)()
        refused(
            MethodError, r"inputs of model.layers.0.self_attn.q_proj are not finite.*float32", model, config
        )


@pytest.mark.parametrize("wrong", ["gptq", None, method("gptq"), "lora"])
def test_what_is_no_method(wrong):
    with pytest.raises(MethodError, match=r"is no compression method.*luthier.method\('gptq'\)\(\)"):
        compress(tiny.llama(), method("lora")() if wrong == "lora" else wrong, calibration=DATA)
    with pytest.raises(MethodError, match="No compression method is given"):
        compress(tiny.llama(), [], calibration=DATA)


def test_static_steps_of_inputs_need_data():
    config = method("rtn")(group_size=16, activation_bits=8, activation_per="static")
    refused(DataError, "rtn needs calibration data", tiny.llama(), config, [])
    model = tiny.llama()
    compress(model, config, calibration=DATA)
    assert all(layer.input_scale > 0 for layer in quantized_layers(model).values())


def test_zeros_outlive_the_rounding_that_follows():
    model = tiny.llama()
    records = compress(model, [method("sparsegpt")(pattern="2:4"), gptq(bits=4)], calibration=DATA)
    assert len(records) == 28
    for layer in structure.linears(model).values():
        groups = (matrix(layer) == 0).reshape(layer.out_features, -1, 4)
        assert (groups.sum(-1) >= 2).all()
        assert share_of_zeros(matrix(layer)) < 0.6
    assert len(quantized_layers(model)) == 14


def test_each_layer_is_rounded_by_the_last_that_names_it():
    model = tiny.llama()
    records = compress(
        model, [gptq(bits=3), method("rtn")(bits=8, group_size=None, targets=["down_proj"])], calibration=DATA
    )
    bits = {name: layer.scheme.bits for name, layer in quantized_layers(model).items()}
    assert bits == {name: 8 if "down_proj" in name else 3 for name in structure.linears(model)}
    assert {r.name: r.bits for r in records} == bits
    assert len(records) == 14


def test_methods_that_do_not_go_together():
    words = r"gptq is left nothing to do: a later method rounds all"
    refused(MethodError, words, tiny.llama(), [gptq(), method("rtn")(group_size=16)])
    words = r"wanda comes after a method that rounds model.layers.0.mlp.down_proj.*Put it first"
    refused(MethodError, words, tiny.llama(), [gptq(), method("wanda")()])
    apart = [gptq(targets=["down_proj"]), method("wanda")(exclude=["down_proj"])]
    assert len(compress(tiny.llama(), apart, calibration=DATA)) == 14


def test_two_masks_one_after_the_other():
    model, before = tiny.llama(), tiny.llama()
    compress(model, [method("wanda")(sparsity=0.3), method("magnitude")(pattern="2:4")], calibration=DATA)
    for name, layer in structure.linears(model).items():
        groups = (matrix(layer) == 0).reshape(-1, 4).sum(-1)
        assert (groups >= 2).all()
        only = in_groups(matrix(before.get_submodule(name)).abs(), 2, 4)
        assert not torch.equal(matrix(layer) == 0, only)


def test_stacked_experts_that_stay_are_named(caplog):
    config = MixtralConfig(**small.GROUPED, num_local_experts=4)
    model = small.build(MixtralForCausalLM, config)
    with caplog.at_level(logging.WARNING, logger="luthier.compression"):
        records = compress(model, method("magnitude")())
    assert len(records) == 12  # attention alone
    assert "experts stacked in one tensor" in caplog.text
    caplog.clear()
    compress(tiny.llama(), method("magnitude")())
    assert not caplog.text


@pytest.mark.parametrize("name", ["rtn", "magnitude", "random"])
def test_methods_that_look_at_weights_alone_do_not_run_the_model(name):
    model = tiny.llama()
    model.model.layers[0].register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    config = method(name)(**{"group_size": 16} if name == "rtn" else {})
    assert len(compress(model, config, calibration=DATA)) == 14


@pytest.mark.parametrize("name", ["rtn", "gptq", "smoothquant"])
def test_old_weights_are_freed_block_by_block(name, monkeypatch):
    """Else a pass would hold the whole model twice."""
    model = tiny.llama(num_hidden_layers=3)
    old = [weakref.ref(block.mlp.up_proj) for block in model.model.layers]
    held = []

    @contextmanager
    def look(block):
        yield
        gc.collect()
        held.append(sum(layer() is not None for layer in old))

    for module in ("calibration", "compress"):
        monkeypatch.setattr(f"luthier.compression.{module}.replaces_weights", look)
    compress(model, method(name)(**({} if name == "smoothquant" else {"group_size": 16})), calibration=DATA)
    assert held == [2, 1, 0]


def test_the_same_twice():
    for config in everything():
        one, other = tiny.llama(), tiny.llama()
        for model in (one, other):
            compress(model, config, calibration=DATA)
        assert all(torch.equal(t, other.state_dict()[key]) for key, t in one.state_dict().items())
