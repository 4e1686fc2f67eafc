"""A GGUF file becomes an ordinary model folder, once, with the weights and tokens of the original."""

import inspect
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from tokenizers import pre_tokenizers
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import modeling_gguf_pytorch_utils as reading

import luthier
from luthier.errors import ModelError
from luthier.models import gguf, sources

writer = pytest.importorskip("gguf", reason="the package gguf is not installed")

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q and k as llama.cpp orders them: the halves of a head's rotary pairs alternate."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(path, model, tokenizer, pre="smollm"):
    """The model as llama.cpp's converter writes it, weights in float32."""
    config = model.config
    out = writer.GGUFWriter(str(path), "llama")
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_rope_dimension_count(config.head_dim)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_vocab_size(config.vocab_size)
    core = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    words = sorted(core["vocab"], key=core["vocab"].get)
    words += [f"<unused{i}>" for i in range(config.vocab_size - len(words))]
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(pre)
    out.add_token_list(words)
    out.add_token_types([3 if word in tiny.SPECIALS else 1 for word in words])
    out.add_token_merges([" ".join(pair) for pair in core["merges"]])
    out.add_bos_token_id(tiny.IM_START)
    out.add_eos_token_id(tiny.IM_END)
    out.add_unk_token_id(tiny.END_OF_TEXT)
    out.add_pad_token_id(tiny.PAD)
    out.add_chat_template(tiny.CHATML)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    out.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    out.add_tensor("output_norm.weight", state["model.norm.weight"])
    for layer in range(config.num_hidden_layers):
        for ours, theirs in NAMES.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            if theirs == "attn_q":
                weight = interleaved(weight, config.num_attention_heads)
            elif theirs == "attn_k":
                weight = interleaved(weight, config.num_key_value_heads)
            out.add_tensor(f"blk.{layer}.{theirs}.weight", weight)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


@pytest.fixture
def file(tmp_path, tiny_llama, tiny_tokenizer, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    return write(tmp_path / "tiny.gguf", tiny_llama, tiny_tokenizer)


def test_header_gives_the_sizes_without_converting(file, tiny_llama):
    found = sources.config(sources.locate(file))
    assert not (file.parent / "cache").exists()
    for key in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size", "intermediate_size"):
        assert found[key] == getattr(tiny_llama.config, key)
    assert found["tie_word_embeddings"] is True
    assert found["model_type"] == "llama"


def test_converted_model_is_the_original(file, tiny_llama):
    model, tokenizer = luthier.load(file, dtype="float32")
    expected = tiny_llama.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(model(ids).logits, tiny_llama(ids).logits, rtol=1e-5, atol=1e-5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == tiny.IM_END
    assert tokenizer.chat_template == tiny.CHATML
    assert tokenizer.model_max_length == 256
    assert model.dtype == torch.float32


def test_converted_folder_is_ordinary(file):
    """transformers alone loads it, the weights can learn and be saved: nothing of GGUF is left in it."""
    folder = gguf.converted(sources.locate(file))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert getattr(model.config, "quantization_config", None) is None
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert sources.config(sources.locate(file))["architectures"] == ["LlamaForCausalLM"]


def test_a_conversion_says_what_it_does_in_one_line(file, capfd, caplog):
    caplog.set_level("INFO", logger="luthier.models.gguf")
    folder = gguf.converted(sources.locate(file))
    assert caplog.messages[0] == f"converting tiny.gguf to safetensors, once; it is kept in {folder}"
    assert capfd.readouterr().err == ""
    AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    assert "Converting" in capfd.readouterr().err  # what it would be without us


@pytest.mark.parametrize(
    "called", ["bar(reader.tensors)", "tqdm(iterable=iter(reader.tensors), disable=True)"]
)
def test_a_conversion_goes_on_without_our_bar_where_transformers_reads_otherwise(file, monkeypatch, called):
    """The bar stands in the place of a name inside transformers, which its next version may rename."""
    source = inspect.getsource(reading.load_gguf_checkpoint)
    changed = re.sub(r"tqdm\(reader\.tensors,[^)]*\)", called, source)
    assert changed != source
    monkeypatch.setattr(reading, "bar", iter, raising=False)
    if called.startswith("bar"):
        monkeypatch.delattr(reading, "tqdm")
    monkeypatch.setattr(reading, "load_gguf_checkpoint", None)
    exec(changed, vars(reading))
    luthier.load(file)
    assert vars(reading).get("tqdm") is (None if called.startswith("bar") else tqdm)


def test_a_conversion_needs_no_module_of_transformers_for_its_bar(monkeypatch):
    monkeypatch.setitem(sys.modules, reading.__name__, None)
    with gguf._bar_of_ours():
        pass


def test_digits_stand_alone_as_in_the_models_own_tokenizer(file, tiny_tokenizer):
    """The oracle splits as the header says; transformers takes GPT-2's splitting for every model."""
    core = tiny_tokenizer.backend_tokenizer
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    _, tokenizer = luthier.load(file)
    plain = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    text = "x   12 and 4711  Monday\n\n  30<|im_end|>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer(text).input_ids == core.encode(text).ids
    assert isinstance(plain.backend_tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel)


def test_unknown_pre_tokeniser_is_refused(tmp_path, tiny_llama, tiny_tokenizer, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path / "other.gguf", tiny_llama, tiny_tokenizer, pre="deepseek-coder")
    with pytest.raises(ModelError, match="pre-tokeniser 'deepseek-coder' is not known"):
        luthier.load(path)
    assert [p.suffix for p in (tmp_path / "cache" / "models").iterdir()] == [".lock"]


def test_two_processes_convert_once(file, tmp_path):
    code = (
        "import sys, logging; logging.basicConfig(level='INFO', stream=sys.stdout)\n"
        "from luthier.models import gguf, sources\n"
        "print(gguf.converted(sources.locate(sys.argv[1])))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(file)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    printed = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert sum("converting" in text for text in printed) == 1
    assert len({text.splitlines()[-1] for text in printed}) == 1
    folders = [p for p in (tmp_path / "cache" / "models").iterdir() if p.is_dir()]
    assert len(folders) == 1
    luthier.load(file)


def test_what_a_killed_conversion_left_is_cleared(file):
    folder = gguf.target(sources.locate(file))
    left = folder.with_name(f".{folder.name}.1.partial")
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    luthier.load(file)
    assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name, f"{folder.name}.lock"]


def test_changed_file_is_converted_anew(file, tiny_tokenizer):
    first = gguf.target(sources.locate(file))
    write(file, tiny.llama(seed=1), tiny_tokenizer)
    assert gguf.target(sources.locate(file)) != first


@pytest.mark.parametrize("keep", [0, 10, 300, 3000])
def test_damaged_header_is_named(file, keep):
    whole = file.read_bytes()
    assert len(whole) > 10 * keep
    file.write_bytes(whole[:keep])
    with pytest.raises(ModelError, match=r"tiny\.gguf is (damaged|no GGUF file)"):
        sources.config(sources.locate(file))


def test_file_cut_in_its_weights_is_refused(file):
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"tiny\.gguf"):
        luthier.load(file)


@pytest.mark.model
def test_smollm2_ends_its_turn(smollm2):
    """The real model: answers, and stops by itself at the token that ends a turn."""
    model, tokenizer = luthier.load("smollm2-135m")
    assert tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id) == "<|im_end|>"
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    made = model.generate(**inputs, do_sample=False, max_new_tokens=40)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(made)
    assert made[-1] == model.generation_config.eos_token_id
    assert len(made) < 40
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (smollm2 / "model.safetensors").is_file()
