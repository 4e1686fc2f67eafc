"""Parallel adapters: what they read and where they add, and MAM: with a prefix in the same adapter."""

import copy

import pytest
import small_training as training
import tiny
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from luthier import method
from luthier.errors import MethodError
from luthier.tuning.attach import adapt, attach
from luthier.tuning.attention_prompts import AttentionPrompt
from luthier.tuning.hooks import save_adapter
from luthier.tuning.merge import merge
from luthier.tuning.tuner import DeltaLayer

MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert, "t5": tiny.t5}
MAM = {"prefix_length": 5, "prefix_hidden_size": 16}


def parallel(model, **options):
    torch.manual_seed(0)
    return attach(model, method("parallel")(**{"bottleneck_dim": 8, "dropout": 0.0} | options))


def adapters(model):
    return {
        name.removeprefix("base_model.model."): module.deltas["default"]
        for name, module in model.named_modules()
        if isinstance(module, DeltaLayer)
    }


def change(adapter, x, scale):
    """s (W_up relu(W_down x + b_down) + b_up) from its matrices."""
    inner = torch.relu(x @ adapter.down.weight.T + adapter.down.bias)
    return scale * (inner @ adapter.up.weight.T + adapter.up.bias)


def states():
    return torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))


def llama_block(model, h):
    positions = torch.arange(h.shape[1])[None]
    return model.model.layers[0](h, position_embeddings=model.model.rotary_emb(h, positions))


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("reads", ["residual", "normed"])
def test_beside_the_ffn_of_a_pre_norm_block(scale, reads):
    model = training.disturb(parallel(tiny.llama(), scale=scale, parallel_input=reads), 0.2).eval()
    base, h = tiny.llama(), states()
    block = base.model.layers[0]
    rope = base.model.rotary_emb(h, torch.arange(h.shape[1])[None])
    a = h + block.self_attn(block.input_layernorm(h), position_embeddings=rope, attention_mask=None)[0]
    normed = block.post_attention_layernorm(a)
    read = a if reads == "residual" else normed
    expected = a + block.mlp(normed) + change(adapters(model)["model.layers.0.mlp.down_proj"], read, scale)
    assert torch.allclose(llama_block(model.get_base_model(), h), expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("reads", ["residual", "normed"])
def test_beside_the_ffn_of_a_post_norm_block_both_inputs_are_one(reads):
    model = training.disturb(parallel(tiny.bert(), parallel_input=reads), 0.2).eval()
    layer, h = tiny.bert().bert.encoder.layer[0], states()
    a = layer.attention(h)[0]
    added = change(adapters(model)["bert.encoder.layer.0.output.dropout"], a, 4.0)
    expected = layer.output.LayerNorm(a + layer.output.dense(layer.intermediate(a)) + added)
    assert torch.allclose(model.get_base_model().bert.encoder.layer[0](h), expected, atol=1e-5)


@torch.no_grad()
def test_beside_attention_the_change_stands_before_the_output_projection():
    model = training.disturb(parallel(tiny.bert(), attention_dim=3), 0.2).eval()
    layer, h = tiny.bert().bert.encoder.layer[0], states()
    adapter = adapters(model)["bert.encoder.layer.0.attention.output.dense"]
    heads = layer.attention.self(h)[0] + change(adapter, h, 1.0)
    expected = layer.attention.output.LayerNorm(h + layer.attention.output.dense(heads))
    found = model.get_base_model().bert.encoder.layer[0].attention(h)[0]
    assert torch.allclose(found, expected, atol=1e-5)
    assert adapter.down.weight.shape == (3, 32)


def test_every_attention_of_an_encoder_decoder_gets_one():
    found = adapters(parallel(tiny.t5(), attention_dim=3))
    assert len(found) == 2 * 2 + 2 * 3
    assert "decoder.block.1.layer.1.EncDecAttention.o" in found


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_starts_as_the_base_at_any_scale(kind, scale):
    model = parallel(MODELS[kind](), scale=scale, attention_dim=2)
    assert torch.equal(training.logits(model), training.logits(MODELS[kind]()))


def test_the_other_start_is_small_but_not_zero():
    model = parallel(tiny.llama(), init="normal")
    assert all(0 < a.up.weight.abs().max() <= 0.04 for a in adapters(model).values())
    assert not torch.equal(training.logits(model), training.logits(tiny.llama()))


def test_the_scale_can_be_folded_into_the_second_layer():
    model = training.disturb(parallel(tiny.llama(), scale=4.0), 0.2)
    expected = training.logits(model)
    for adapter in adapters(model).values():
        adapter.up.weight.data *= 4
        adapter.up.bias.data *= 4
        adapter.scale = 1.0
    assert torch.allclose(training.logits(model), expected, atol=1e-5)


def test_an_adapter_differs_from_a_serial_one_of_equal_weights():
    first = training.disturb(parallel(tiny.llama(), scale=1.0), 0.2)
    options = {"bottleneck_dim": 8, "non_linearity": "relu", "train_layernorm": False}
    second = attach(tiny.llama(), method("serial")(**options))
    ffn = {n: a for n, a in adapters(second).items() if "mlp" in n}
    for name, adapter in adapters(first).items():
        ffn[name].load_state_dict(adapter.state_dict())
    assert not torch.allclose(training.logits(first), training.logits(second), atol=1e-2)


def test_dropout_acts_between_the_two_layers():
    adapter = next(iter(adapters(parallel(tiny.llama(), dropout=0.5, scale=1.0)).values())).train()
    torch.nn.init.eye_(adapter.up.weight)
    torch.nn.init.ones_(adapter.down.bias)
    torch.nn.init.zeros_(adapter.down.weight)
    assert set(adapter(states(), None)[..., :8].unique().tolist()) == {0.0, 2.0}


def test_two_inputs_at_one_module_are_refused():
    model = parallel(tiny.llama())
    with pytest.raises(MethodError, match="another variant"):
        model.add_adapter("other", method("parallel")(bottleneck_dim=8, parallel_input="normed"))


def size_without_biases(model):
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and not n.endswith("bias"))


def test_sizes_are_those_of_the_papers_table():
    """BART-large with l = 30 and r = 512, and RoBERTa-base with 16 and 16, biases and head not counted."""
    with torch.device("meta"):
        bart = BartForConditionalGeneration(BartConfig())
        roberta = RobertaForSequenceClassification(RobertaConfig())
    direct = {"prefix_projection": False}
    found = adapt(bart, method("parallel")(prefix_length=30, bottleneck_dim=512, **direct))
    assert size_without_biases(found) == 27_377_664
    found = adapt(roberta, method("parallel")(prefix_length=16, bottleneck_dim=16, **direct))
    head = 768 * 768 + 768 * 2
    assert size_without_biases(found) - head == 589_824


def test_nothing_is_merged():
    model = training.disturb(parallel(tiny.llama(), attention_dim=2))
    with pytest.raises(MethodError, match="cannot be merged"):
        merge(model)
    with pytest.raises(MethodError, match="cannot be merged"):
        model.merge_and_unload()


# MAM ----------------------------------------------------------------------------------------------------


def prompts(model):
    return [m for m in model.modules() if isinstance(m, AttentionPrompt)]


@pytest.mark.parametrize("kind", MODELS)
def test_mam_is_the_prefix_and_the_adapters(kind):
    """With the adapters at zero it computes what prefix tuning with the same table does."""
    model = parallel(MODELS[kind](), prefix_length=5, prefix_projection=False)
    options = {"num_virtual_tokens": 5, "prefix_projection": False}
    other = attach(MODELS[kind](), method("prefix")(**options))
    for mine, its in zip(prompts(model), prompts(other), strict=True):
        its.table["default"].data = mine.table["default"].data.clone()
    assert torch.equal(training.logits(model), training.logits(other))
    assert not torch.allclose(training.logits(model), training.logits(MODELS[kind]()), atol=1e-3)
    training.disturb(model, 0.1)
    for mine, its in zip(prompts(model), prompts(other), strict=True):
        its.table["default"].data = mine.table["default"].data.clone()
    assert not torch.allclose(training.logits(model), training.logits(other), atol=1e-3)


@pytest.mark.parametrize("kind", MODELS)
def test_mam_trains_both_and_saves_both_in_one_file_without_the_mlp(kind, tmp_path):
    model = parallel(MODELS[kind](), **MAM)
    before = training.weights(model)
    training.train(model, tmp_path)
    after = training.weights(model)
    learns = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in after if not torch.equal(after[n], before[n])} == learns
    assert any("parallel_prompt" in n for n in learns)
    assert any("parallel_delta" in n for n in learns)
    expected = training.logits(model)
    save_adapter(model, tmp_path / "folded")
    model.save_pretrained(tmp_path / "whole")
    for folder in ("folded", "whole"):
        loaded = PeftModel.from_pretrained(MODELS[kind](), tmp_path / folder)
        assert torch.allclose(training.logits(loaded), expected, atol=1e-5)
    names = load_file(tmp_path / "folded" / "adapter_model.safetensors")
    assert not any(".head." in n or ".shared." in n for n in names)
    assert sum("parallel_prompt.table" in n for n in names) == len(prompts(model))
    assert any(".shared." in n for n in get_peft_model_state_dict(model))


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_mam_rows_padded_on_the_left_generate_what_they_do_alone(kind):
    model = training.disturb(parallel(MODELS[kind](), **MAM), 0.1).eval()
    rows = [torch.arange(5, 5 + n) for n in (3, 8)]
    ids = torch.stack([torch.nn.functional.pad(row, (8 - len(row), 0)) for row in rows])
    length = {"do_sample": False, "min_new_tokens": 4, "max_new_tokens": 4}
    together = model.generate(input_ids=ids, attention_mask=(ids != tiny.PAD).long(), **length)
    uncached = model.generate(
        input_ids=ids, attention_mask=(ids != tiny.PAD).long(), use_cache=False, **length
    )
    assert torch.equal(together, uncached)
    for row, found in zip(rows, together, strict=True):
        alone = model.generate(input_ids=row[None], attention_mask=torch.ones_like(row[None]), **length)
        assert torch.equal(found[-4:], alone[0, -4:])


def test_mam_and_a_plain_adapter_live_side_by_side():
    base = training.logits(tiny.llama())
    model = training.disturb(parallel(tiny.llama()), 0.2)
    first = training.logits(model)
    model.add_adapter("mam", method("parallel")(bottleneck_dim=8, dropout=0.0, **MAM))
    assert torch.equal(training.logits(model), first)
    model.set_adapter("mam")
    assert not torch.allclose(training.logits(model), first, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(training.logits(model), base)
    model.set_adapter("default")
    assert torch.equal(training.logits(model), first)
    model.delete_adapter("mam")
    assert torch.equal(training.logits(model), first)
    assert not any("mam" in name for name in model.state_dict())
    assert torch.equal(training.logits(model.unload()), base)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_mam_checkpoints_change_nothing_and_resume(kind, tmp_path):
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = training.train(parallel(MODELS[kind](), **MAM), tmp_path, **saving)
    resumed = parallel(MODELS[kind](), **MAM)
    options = saving | {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    training.trainer(resumed, tmp_path, **options).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    for n, tensor in training.weights(straight).items():
        assert torch.allclose(tensor, resumed.get_parameter(n), rtol=0, atol=1e-5), n


def test_mam_of_chosen_blocks():
    model = parallel(tiny.llama(), layers_to_transform=[1], **MAM)
    assert [prompt.site.layer for prompt in prompts(model)] == [1]
    assert list(adapters(model)) == ["model.layers.1.mlp.down_proj"]
    second = copy.deepcopy(model.peft_config["default"])
    second.layers_to_transform = None
    model.add_adapter("whole", second)
    model.set_adapter("whole")
    assert sum(prompt.has("whole") for prompt in prompts(model)) == 2
    assert any(p.requires_grad for n, p in model.named_parameters() if ".layers.0." in n)
