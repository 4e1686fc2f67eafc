"""Serial adapters: where they stand in each kind of block, what learns, and what is left when they go."""

import contextlib
import copy

import pytest
import small_training as training
import tiny
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, PhiConfig, PhiForCausalLM

from luthier import checks, method
from luthier.acceleration import fused_norm
from luthier.errors import MethodError
from luthier.tuning.attach import attach, trainable
from luthier.tuning.merge import merge
from luthier.tuning.tuner import DeltaLayer

MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert, "t5": tiny.t5}
PLACEMENTS = ["houlsby", "pfeiffer"]


def serial(model, **options):
    torch.manual_seed(0)
    return attach(model, method("serial")(**{"bottleneck_dim": 4} | options))


def adapters(model):
    """The bottlenecks by the name of the module that they stand at."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, DeltaLayer):
            delta = module.deltas["default"]
            adapter = getattr(delta, "adapter", delta)
            if adapter is not None:
                found[name.removeprefix("base_model.model.")] = adapter
    return found


def change(adapter, x, activation):
    """A(x) from its matrices."""
    inner = activation(x @ adapter.down.weight.T + adapter.down.bias)
    return inner @ adapter.up.weight.T + adapter.up.bias


def tanh_gelu(x):
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def block_input(width=32):
    return torch.randn(2, 5, width, generator=torch.Generator().manual_seed(3))


def llama_parts(model, h):
    """(stream before the FFN without adapters, attention's output) of the first block of a Llama."""
    block = model.model.layers[0]
    positions = torch.arange(h.shape[1])[None]
    attended, _ = block.self_attn(
        block.input_layernorm(h),
        position_embeddings=model.model.rotary_emb(h, positions),
        attention_mask=None,
    )
    return block, attended


def llama_block(model, h):
    positions = torch.arange(h.shape[1])[None]
    return model.model.layers[0](h, position_embeddings=model.model.rotary_emb(h, positions))


@torch.no_grad()
def test_houlsby_in_a_pre_norm_block():
    model = training.disturb(serial(tiny.llama(), train_layernorm=False), 0.2).eval()
    base, h, found = tiny.llama(), block_input(), adapters(model)
    block, u = llama_parts(base, h)
    a = h + u + change(found["model.layers.0.self_attn.o_proj"], u, tanh_gelu)
    v = block.mlp(block.post_attention_layernorm(a))
    expected = a + v + change(found["model.layers.0.mlp.down_proj"], v, tanh_gelu)
    assert torch.allclose(llama_block(model.get_base_model(), h), expected, atol=1e-5)


@torch.no_grad()
def test_pfeiffer_in_a_pre_norm_block():
    model = training.disturb(serial(tiny.llama(), placement="pfeiffer"), 0.2).eval()
    base, h, found = tiny.llama(), block_input(), adapters(model)
    block, u = llama_parts(base, h)
    z = (a := h + u) + block.mlp(block.post_attention_layernorm(a))
    expected = z + change(found["model.layers.0.mlp.down_proj"], z, torch.relu)
    assert torch.allclose(llama_block(model.get_base_model(), h), expected, atol=1e-5)
    assert len(found) == 2


def bert_ffn(layer, a):
    return layer.output.dense(layer.intermediate(a))


@torch.no_grad()
def test_houlsby_in_a_post_norm_block():
    model = training.disturb(serial(tiny.bert(), train_layernorm=False), 0.2).eval()
    layer, h, found = tiny.bert().bert.encoder.layer[0], block_input(), adapters(model)
    place = "bert.encoder.layer.0"
    u = layer.attention.output.dense(layer.attention.self(h)[0])
    first = change(found[f"{place}.attention.output.dropout"], u, tanh_gelu)
    a = layer.attention.output.LayerNorm(h + u + first)
    v = bert_ffn(layer, a)
    expected = layer.output.LayerNorm(a + v + change(found[f"{place}.output.dropout"], v, tanh_gelu))
    assert torch.allclose(model.get_base_model().bert.encoder.layer[0](h), expected, atol=1e-5)


@torch.no_grad()
def test_pfeiffer_in_a_post_norm_block_uses_the_norm_twice_and_skips_before_it():
    model = training.disturb(serial(tiny.bert(), placement="pfeiffer"), 0.2).eval()
    layer, h = tiny.bert().bert.encoder.layer[0], block_input()
    for norm in (layer.output.LayerNorm, model.get_base_model().bert.encoder.layer[0].output.LayerNorm):
        getattr(norm, "base_layer", norm).weight.mul_(1.7).add_(0.1)
    norm, adapter = layer.output.LayerNorm, adapters(model)["bert.encoder.layer.0.output.LayerNorm"]
    a = layer.attention(h)[0]
    v = bert_ffn(layer, a)
    z = norm(v + a)
    added = change(adapter, z, torch.relu)
    found = model.get_base_model().bert.encoder.layer[0](h)
    assert torch.allclose(found, norm(v + added + a), atol=1e-5)
    assert not torch.allclose(found, norm(z + added + a), atol=1e-2)  # the skip of the normed state
    assert not torch.allclose(found, z + added, atol=1e-2)  # the norm once


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_with_a_zero_start_the_base_comes_out_bit_for_bit(kind, placement):
    base = training.logits(MODELS[kind]())
    model = serial(MODELS[kind](), placement=placement, train_layernorm=True)
    assert torch.equal(training.logits(model), base)
    with model.disable_adapter():
        assert torch.equal(training.logits(model), base)


def test_the_papers_start_is_small_but_not_zero():
    base = training.logits(tiny.bert())
    moved = {}
    for std in (1e-2, 1e-3):
        model = serial(tiny.bert(), init="normal", init_std=std)
        matrices = [w for a in adapters(model).values() for w in (a.down.weight, a.up.weight)]
        assert all(0 < w.detach().abs().max() <= 2 * std for w in matrices)
        assert not any(b.detach().any() for a in adapters(model).values() for b in (a.down.bias, a.up.bias))
        moved[std] = (training.logits(model) - base).norm()
    assert 0 < moved[1e-3] < moved[1e-2]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("learns", [True, False])
def test_trains_as_many_parameters_as_the_formula_says(kind, placement, learns):
    base = MODELS[kind]()
    model = serial(copy.deepcopy(base), placement=placement, train_layernorm=learns)
    blocks, d, m = (4 if kind == "t5" else 2), 32, 4
    norms = [p for n, p in base.named_parameters() if "norm" in n.lower() or "ln_" in n]
    expected = blocks * (2 if placement == "houlsby" else 1) * (2 * m * d + m + d)
    expected += learns * sum(p.numel() for p in norms) + (3 * d + 3 if kind == "bert" else 0)
    assert trainable(model)[0] == expected


def test_cross_attention_has_an_adapter_where_it_is_wanted():
    assert len(adapters(serial(tiny.t5()))) == 2 * 2 + 2 * 2
    found = adapters(serial(tiny.t5(), cross_attention=True))
    assert len(found) == 2 * 2 + 2 * 3
    assert "decoder.block.0.layer.1.dropout" in found


@pytest.mark.parametrize(
    ("options", "width"),
    [({}, 64), ({"placement": "pfeiffer"}, 2), ({"reduction_factor": 8}, 4), ({"reduction_factor": 64}, 1)],
)
def test_the_width_of_the_bottleneck(options, width):
    model = attach(tiny.llama(), method("serial")(**options))
    assert {len(adapter.down.weight) for adapter in adapters(model).values()} == {width}


def test_two_widths_are_refused():
    with pytest.raises(MethodError, match="both set the width"):
        method("serial")(bottleneck_dim=4, reduction_factor=2)


def test_blocks_can_be_chosen():
    model = serial(tiny.llama(), layers_to_transform=[1], train_layernorm=False)
    assert all(".layers.1." in name for name in adapters(model))
    with checks.collect() as lines:
        serial(tiny.t5(), layers_to_transform=[1], train_layernorm=False)
    placed = next(line for line in lines if line.name == "places adapted")
    assert (placed.value, placed.detail) == (4, "in 2 of 4 blocks")
    with pytest.raises(MethodError, match=r"\[7\] names no block"):
        serial(tiny.llama(), layers_to_transform=[7])


def test_norms_learn_as_differences_that_belong_to_one_adapter(tmp_path):
    model = serial(tiny.bert())
    base = training.logits(tiny.bert())
    training.train(model, tmp_path)
    first = training.logits(model)
    changed = [n for n, p in model.named_parameters() if ".norm." in n and p.detach().any()]
    assert len(changed) == 2 * 5  # gain and bias of the embeddings' norm and of two in each block
    assert any("embeddings.LayerNorm" in name for name in changed)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("other")
    trunk = model.get_base_model().bert
    with model.disable_adapter():
        assert torch.equal(training.logits(model), base)
        plain = trunk(input_ids=torch.arange(5, 9)[None]).last_hidden_state
    assert torch.equal(trunk(input_ids=torch.arange(5, 9)[None]).last_hidden_state, plain)
    model.set_adapter("default")
    assert torch.equal(training.logits(model), first)


def test_a_norm_with_a_changed_gain_computes_with_it():
    model = serial(tiny.llama())
    layer = model.get_base_model().model.layers[0].input_layernorm
    x, base = block_input(), tiny.llama().model.layers[0].input_layernorm
    layer.deltas["default"].norm["weight"].data += 0.5
    assert torch.allclose(layer(x), base(x) * 1.5, atol=1e-6)


def test_norms_learn_under_the_fused_kernel_for_frozen_norms():
    gradients = []
    for kernel in (contextlib.nullcontext, fused_norm.fused):
        model = training.disturb(serial(tiny.llama()), 0.1).train()
        with kernel(model) if kernel is fused_norm.fused else kernel():
            model(**training.batch(model)).loss.backward()
        gradients.append(
            {n: p.grad for n, p in model.named_parameters() if ".norm." in n and p.requires_grad}
        )
    assert gradients[0]
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_saved_file_holds_no_weight_of_the_base(placement, tmp_path):
    from safetensors.torch import load_file

    model = training.disturb(serial(tiny.bert(), placement=placement))
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert all("serial_delta" in name or ".classifier." in name for name in names)
    loaded = PeftModel.from_pretrained(tiny.bert(), tmp_path)
    assert torch.equal(training.logits(loaded), training.logits(model))


def test_nothing_is_merged():
    model = training.disturb(serial(tiny.llama()))
    with pytest.raises(MethodError, match="non-linearity"):
        merge(model)


def test_dropout_acts_in_training_alone():
    model = training.disturb(serial(tiny.llama(), dropout=0.5), 0.3)
    expected = training.logits(model)
    assert torch.equal(training.logits(model), expected)
    model.train()
    assert not torch.allclose(model(**training.batch(model)).logits, expected, atol=1e-3)


SMALL = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": tiny.IM_END,
    "pad_token_id": tiny.PAD,
}


@torch.no_grad()
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_norm_of_the_sub_layers_output_belongs_to_it(placement):
    base = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8)).eval()
    model = training.disturb(
        serial(copy.deepcopy(base), placement=placement, layers_to_transform=[0], train_layernorm=False), 0.2
    )
    inputs = {"input_ids": torch.arange(5, 12)[None], "output_hidden_states": True}
    first = base.model.layers[0]
    heard = {}
    for name in ("pre_feedforward_layernorm", "post_attention_layernorm"):
        first.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: heard.update({name: (args[0], out)})
        )
    h = base(**inputs).hidden_states[0]
    found = list(adapters(model).values())
    if placement == "houlsby":
        u = heard["post_attention_layernorm"][1]
        a = h + u + change(found[0], u, tanh_gelu)
        v = first.post_feedforward_layernorm(first.mlp(first.pre_feedforward_layernorm(a)))
        expected = a + v + change(found[1], v, tanh_gelu)
    else:
        a = heard["pre_feedforward_layernorm"][0]
        z = a + first.post_feedforward_layernorm(first.mlp(first.pre_feedforward_layernorm(a)))
        expected = z + change(found[0], z, torch.relu)
    assert torch.allclose(model(**inputs).hidden_states[1], expected, atol=1e-4)


def test_all_norms_learn_where_adapters_stand_behind_norms():
    base = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8))
    norms = {n for n, _ in base.named_parameters() if "norm" in n}
    model = serial(copy.deepcopy(base))
    learns = {n for n, p in model.named_parameters() if p.requires_grad and ".norm." in n}
    assert len(learns) == len(norms)
    with pytest.raises(MethodError, match="cannot learn beside"):
        serial(base, placement="pfeiffer", train_layernorm=True)


def test_a_dropout_that_serves_both_sub_layers_is_left_alone():
    model = serial(PhiForCausalLM(PhiConfig(**SMALL)).eval(), train_layernorm=False)
    assert [name.rpartition(".")[2] for name in adapters(model)] == ["dense", "fc2"] * 2


def test_two_placements_at_one_module_are_refused():
    model = serial(tiny.llama(), train_layernorm=False)
    with pytest.raises(MethodError, match="another variant"):
        model.add_adapter("other", method("serial")(placement="pfeiffer", bottleneck_dim=4))


def test_gelu_is_the_tanh_approximation():
    model = serial(tiny.llama())
    x = torch.linspace(-3, 3, 50)
    found = next(iter(adapters(model).values())).activation(x)
    assert torch.allclose(found, tanh_gelu(x), atol=1e-6)
    assert not torch.allclose(found, F.gelu(x), atol=1e-5)
