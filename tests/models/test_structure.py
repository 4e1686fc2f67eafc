"""The parts of a model are found by structure: the same functions on four families, adapted and on meta."""

import peft
import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BartConfig, LlamaModel, OPTConfig

from luthier.errors import MethodError, ModelError
from luthier.models import structure

BUILDERS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert, "t5": tiny.t5}


def opt():
    config = OPTConfig(
        vocab_size=99,
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        word_embed_proj_dim=16,
    )
    return AutoModelForCausalLM.from_config(config)


def bart():
    config = BartConfig(
        vocab_size=99,
        d_model=16,
        encoder_layers=2,
        decoder_layers=3,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
    )
    return AutoModelForSeq2SeqLM.from_config(config)


@pytest.fixture(params=[*BUILDERS, "opt", "bart"])
def model(request):
    return (BUILDERS | {"opt": opt, "bart": bart})[request.param]()


def names(model):
    return {title: [name for name, _ in members] for title, members in structure.groups(model)}


def test_groups_hold_every_parameter_once(model):
    listed = [name for members in names(model).values() for name in members]
    assert sorted(listed) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, tiny.bert, opt])
def test_groups_are_ordered_by_when_they_are_used(build):
    """The oracle is the gradient: with the output of block i cut off, what lies below gets none and what
    lies above does."""
    model = build()
    grouped = structure.groups(model)
    chain = structure.blocks(model)
    assert [title for title, _ in grouped] == [
        "embeddings",
        *(f"block {i}" for i in range(len(chain))),
        "head",
    ]
    tied = {name for group in structure.tie_groups(model) for name in group}
    for index, block in enumerate(chain):

        def cut(_, __, output):
            return (output[0].detach(), *output[1:]) if isinstance(output, tuple) else output.detach()

        handle = block.register_forward_hook(cut)
        model.zero_grad()
        model(torch.tensor([[5, 6, 7]])).logits.float().pow(2).sum().backward()
        handle.remove()
        for position, (title, members) in enumerate(grouped):
            for name, parameter in members:
                if name not in tied:
                    above = position > index + 1
                    assert (parameter.grad is not None) == above, f"{name} of {title}, block {index} cut"


def test_llama_parts(tiny_llama):
    assert structure.blocks(tiny_llama) is tiny_llama.model.layers
    assert structure.embeddings(tiny_llama) is tiny_llama.model.embed_tokens
    assert structure.final_norm(tiny_llama) is tiny_llama.model.norm
    assert structure.head(tiny_llama) is tiny_llama.lm_head
    assert names(tiny_llama)["embeddings"] == ["model.embed_tokens.weight"]
    assert names(tiny_llama)["head"] == ["model.norm.weight"]
    untied = tiny.llama(tie_word_embeddings=False)
    assert names(untied)["head"] == ["model.norm.weight", "lm_head.weight"]


def test_gpt2_parts(tiny_gpt2):
    assert structure.final_norm(tiny_gpt2) is tiny_gpt2.transformer.ln_f
    assert names(tiny_gpt2)["embeddings"] == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert set(structure.linears(tiny_gpt2)) == {
        f"transformer.h.{i}.{part}"
        for i in range(2)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


def test_bert_parts(tiny_bert):
    assert structure.final_norm(tiny_bert) is None
    assert structure.head(tiny_bert) is tiny_bert.classifier
    assert "bert.embeddings.LayerNorm.weight" in names(tiny_bert)["embeddings"]
    assert names(tiny_bert)["head"] == [
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    ]


def test_t5_parts(tiny_t5):
    assert list(structure.blocks(tiny_t5)) == [*tiny_t5.encoder.block, *tiny_t5.decoder.block]
    assert structure.final_norm(tiny_t5) is tiny_t5.decoder.final_layer_norm
    assert "encoder.final_layer_norm.weight" in names(tiny_t5)["block 1"]
    assert "decoder.final_layer_norm.weight" in names(tiny_t5)["head"]


def test_norm_of_embeddings_defined_after_the_blocks_is_still_low():
    grouped = names(bart())
    assert "model.decoder.layernorm_embedding.weight" in grouped["embeddings"]
    assert "model.encoder.embed_positions.weight" in grouped["embeddings"]
    assert structure.final_norm(opt()).weight.shape == (16,)


def test_tied_weights_are_one_group(tiny_llama, tiny_t5):
    assert structure.tie_groups(tiny_llama) == [["lm_head.weight", "model.embed_tokens.weight"]]
    assert structure.tie_groups(tiny.llama(tie_word_embeddings=False)) == []
    assert {"shared.weight", "lm_head.weight"} <= set(structure.tie_groups(tiny_t5)[0])


def test_adapted_model_groups_the_adapter_with_its_block(tiny_llama):
    adapted = peft.get_peft_model(tiny_llama, peft.LoraConfig(target_modules="all-linear", r=2))
    grouped = structure.groups(adapted)
    for title, members in grouped[1:-1]:
        assert sum("lora_" in name for name, _ in members) == 14, title
    assert len(structure.linears(adapted)) == 14
    assert structure.head(adapted) is tiny_llama.lm_head


def test_all_linear_is_what_peft_adapts(model):
    expected = set(structure.linears(model))
    task = "SEQ_CLS" if structure.head(model) is getattr(model, "classifier", 0) else None
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type=task))
    assert expected == set(adapted.targeted_module_names)


def test_works_without_weights():
    with torch.device("meta"):
        model = tiny.llama()
    assert len(structure.groups(model)) == 4
    assert structure.tie_groups(model) == [["lm_head.weight", "model.embed_tokens.weight"]]


def test_trunk_without_head(tiny_llama):
    trunk = LlamaModel(tiny_llama.config)
    assert structure.head(trunk) is None
    assert len(structure.blocks(trunk)) == 2


def test_model_without_blocks_is_refused(tiny_llama):
    tiny_llama.model.layers = nn.Identity()
    with pytest.raises(ModelError, match="no list of blocks"):
        structure.blocks(tiny_llama)


def test_patterns_match_whole_parts_of_names(tiny_llama):
    found = structure.match_targets(tiny_llama, ["q_proj", "layers.1.mlp.up_proj", "lm_head"])
    assert found["q_proj"] == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert found["layers.1.mlp.up_proj"] == ["model.layers.1.mlp.up_proj"]
    assert found["lm_head"] == ["lm_head"]


def test_pattern_that_matches_nothing_names_the_nearest(tiny_llama):
    with pytest.raises(MethodError, match=r"'vproj' matches no layer.*'v_proj'"):
        structure.match_targets(tiny_llama, ["q_proj", "vproj"])
    with pytest.raises(MethodError, match=r"holds layers but is none.*down_proj, gate_proj, up_proj"):
        structure.match_targets(tiny_llama, ["mlp"])
