"""A GGUF file holds the model that it was made from: names, rows, rounding, tokens; what it lacks is said."""

import importlib.util
import json

import numpy as np
import peft
import pytest
import tiny
import torch
from tokenizers import Regex, normalizers, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

import luthier
from luthier import checks
from luthier.compression.grid import Scheme, fit
from luthier.compression.linear import quantize_layer
from luthier.errors import CheckError, ModelError, RecipeError
from luthier.models import gguf_blocks, gguf_writing, sources
from luthier.models.gguf_vocabulary import splitting
from luthier.models.gguf_writing import save_gguf, verify_gguf
from luthier.recipe.planner import plan
from luthier.recipe.runner import run
from luthier.recipe.source import load_recipe

package = pytest.importorskip("gguf", reason="the package gguf is not installed")

SIZES = {"hidden_size": 64, "intermediate_size": 96}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))


def model_of(model_class, config_class, **changes):
    config = tiny.llama().config.to_dict() | SIZES | {"head_dim": 16} | changes
    for key in ("model_type", "architectures", "rope_parameters", "transformers_version", "mlp_bias"):
        if key not in changes:
            config.pop(key, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config_class(**config)).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases start as ones and zeros: all alike
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def split_by(*steps, **options):
    made = tiny.tokenizer(**options)
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    return made


def by_pattern(name, **options):
    pattern = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), "isolated")
    return split_by(pattern, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), **options)


def by_digit(**options):
    digits = pre_tokenizers.Digits(individual_digits=True)
    return split_by(digits, pre_tokenizers.ByteLevel(add_prefix_space=False), **options)


def quantised(model, scheme, dtype):
    for block in model.model.layers:
        for half in (block.self_attn, block.mlp):
            for name, layer in list(half.named_children()):
                if isinstance(layer, nn.Linear):
                    grid = fit(layer.weight.detach(), scheme, dtype)
                    setattr(half, name, quantize_layer(layer, grid.quantize(layer.weight.detach()), grid))
    return model


def held(file):
    """The numbers that each tensor of a file stands for, by the package gguf."""
    return {t.name: package.dequantize(t.data, t.tensor_type) for t in package.GGUFReader(file).tensors}


def metadata(file):
    return {key: field.contents() for key, field in package.GGUFReader(file).fields.items()}


def proven(file, model, tokenizer):
    with checks.collect() as lines:
        verify_gguf(file, model, tokenizer)
    return {line.name: line for line in lines}


# What is written for one architecture each: model, tokenizer, kind.
CASES = {
    "llama": lambda: (tiny.llama(), by_digit(), "F16"),
    "llama, linear RoPE": lambda: (
        tiny.llama(rope_parameters={"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}),
        tiny.tokenizer(bos=True),
        "Q5_0",
    ),
    "llama 3": lambda: (tiny.llama(rope_parameters=LLAMA3), by_pattern("llama-bpe"), "Q4_1"),
    "mistral": lambda: (
        model_of(MistralForCausalLM, MistralConfig, head_dim=32, tie_word_embeddings=False),
        by_pattern("tekken"),
        "BF16",
    ),
    "qwen2": lambda: (model_of(Qwen2ForCausalLM, Qwen2Config), by_pattern("qwen2"), "Q8_0"),
    "qwen3": lambda: (
        model_of(Qwen3ForCausalLM, Qwen3Config, head_dim=128, tie_word_embeddings=False),
        by_pattern("qwen2", eos="<|endoftext|>"),
        "Q5_1",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fresh_process_reads_what_was_written(tmp_path, case):
    """transformers undoes names, order of rows and blocks by code of its own: it is the oracle."""
    model, tokenizer, kind = CASES[case]()
    file = save_gguf(model, tmp_path / "out", tokenizer, kind)
    found = proven(file, model, tokenizer)
    assert found["logits after reload"].value <= 1e-5
    assert found["generated tokens after reload"].value == 0
    assert found["token ids by the header alone"].passed
    assert found["change by rounding"].value > 0


def test_the_proof_sees_rows_in_the_wrong_order(tmp_path, tiny_llama, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(gguf_writing, "_interleave", lambda data, heads: data)
    file = save_gguf(tiny_llama, tmp_path / "out", tiny_tokenizer, "F32")
    with pytest.raises(CheckError, match="logits after reload"):
        verify_gguf(file, tiny_llama, tiny_tokenizer)


def test_transformers_reads_a_header_with_single_digits_otherwise(tmp_path, tiny_llama):
    """The difference is known, and said; the files beside, and `luthier.load`, split as the model's own."""
    tokenizer = by_digit()
    file = save_gguf(tiny_llama, tmp_path / "out", tokenizer, "Q8_0")
    (tmp_path / "alone").mkdir()
    alone = tmp_path / "alone" / file.name
    alone.symlink_to(file)
    text = "x   12, 4711"
    expected = tokenizer(text).input_ids
    assert AutoTokenizer.from_pretrained(alone.parent, gguf_file=file.name)(text).input_ids != expected
    assert AutoTokenizer.from_pretrained(file.parent)(text).input_ids == expected
    assert luthier.load(alone)[1](text).input_ids == expected
    assert luthier.load(file.parent)[1](text).input_ids == expected
    with checks.collect() as lines:
        gguf_writing._prove_header(file, tokenizer)
    assert [line.name for line in lines] == [
        "token ids by the header alone",
        "token ids by the header alone, in transformers",
    ]


def test_a_folder_is_loaded_again(tmp_path, tiny_llama):
    tokenizer = by_digit(eos="<|endoftext|>")  # not what ends a turn: both stop generation
    file = save_gguf(tiny_llama, tmp_path / "out", tokenizer, "F32")
    for name in (file, file.parent):
        model, read = luthier.load(name, dtype="float32")
        assert all(torch.equal(p, tiny_llama.state_dict()[n]) for n, p in model.state_dict().items())
        assert read.get_vocab() == tokenizer.get_vocab()
        assert read.chat_template == tiny.CHATML
        assert (read.eos_token, read.pad_token) == ("<|endoftext|>", "<pad>")
        assert model.generation_config.eos_token_id == [tiny.IM_END, tiny.END_OF_TEXT]
    assert metadata(file)["tokenizer.ggml.eot_token_id"] == tiny.IM_END


@pytest.mark.parametrize("scaling", [LLAMA3, {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}])
def test_scaled_rope_survives_or_is_refused(tmp_path, tiny_tokenizer, scaling):
    """Our record has it. In the file alone, linear scaling can be read, and Llama 3's only by llama.cpp."""
    made = tiny.llama(rope_parameters=scaling)
    file = save_gguf(made, tmp_path / "out", tiny_tokenizer, "F32")
    ids = torch.arange(5, 205)[None]
    model, _ = luthier.load(file, dtype="float32")
    torch.testing.assert_close(model(ids).logits, made(ids).logits)
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(file.read_bytes())
    if scaling["rope_type"] == "linear":
        model, _ = luthier.load(alone, dtype="float32")
        torch.testing.assert_close(model(ids).logits, made(ids).logits)
    else:
        with pytest.raises(ModelError, match="RoPE is scaled by a factor for each frequency"):
            luthier.load(alone)


def test_llama_3s_frequency_factors_run_from_one_to_the_whole_factor(tmp_path, tiny_tokenizer):
    """llama.cpp divides each frequency: fast ones stay, slow ones are divided by the whole factor."""
    config = {"head_dim": 32, "rope_parameters": LLAMA3}
    factors = held(save_gguf(tiny.llama(**config), tmp_path / "out", tiny_tokenizer))["rope_freqs.weight"]
    wavelength = 2 * np.pi * 500000.0 ** (np.arange(0, 32, 2) / 32)
    assert np.allclose(factors[wavelength < 64 / 4], 1)
    assert np.allclose(factors[wavelength > 64], 8)
    assert (np.diff(factors) >= -1e-6).all()


def test_a_sliding_window_bounds_the_context(tmp_path):
    """llama.cpp attends to all of the context; within the window that is the same."""
    model = model_of(MistralForCausalLM, MistralConfig, sliding_window=128)
    with checks.collect() as lines:
        file = save_gguf(model, tmp_path / "out", tiny.tokenizer())
    assert metadata(file)["llama.context_length"] == 128
    assert [line.value for line in lines if line.name == "context length"] == [128]


class TestBlocks:
    @pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0"])
    def test_packed_levels_are_what_the_package_reads(self, kind):
        low, high = gguf_blocks.LEVELS[kind]
        generator = np.random.default_rng(0)
        levels = generator.integers(low, high + 1, (6, 96)).astype(np.int16)
        scale = generator.uniform(0.01, 2, (6, 3)).astype(np.float16).astype(np.float32)
        found = package.dequantize(gguf_blocks.pack(levels, scale, kind), package.GGMLQuantizationType[kind])
        assert np.array_equal(found, levels * scale.repeat(32, 1))

    @pytest.mark.parametrize(
        ("scheme", "kind"),
        [
            (Scheme(bits=4, group_size=32), "Q4_0"),
            (Scheme(bits=8, group_size=32), "Q8_0"),
            (Scheme(bits=4, group_size=64), "Q4_0"),
            (Scheme(bits=3, group_size=None), "Q4_0"),
            (Scheme(bits=8, group_size=0), "Q8_0"),
            (Scheme(bits=4, group_size=32, symmetric=False), "Q5_0"),
            (Scheme(bits=4, group_size=32, symmetric=False), "Q8_0"),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_codes_come_out_exactly(self, tmp_path, tiny_tokenizer, scheme, kind, dtype):
        model = quantised(model_of(Qwen2ForCausalLM, Qwen2Config, intermediate_size=128), scheme, dtype)
        found = held(save_gguf(model, tmp_path / "out", tiny_tokenizer, kind))
        for i, block in enumerate(model.model.layers):
            for name, layer in (("attn_q", block.self_attn.q_proj), ("ffn_down", block.mlp.down_proj)):
                expected = layer.grid.dequantize(layer.codes).numpy()
                assert np.array_equal(found[f"blk.{i}.{name}.weight"], expected)

    def test_rounding_anew_would_not_give_the_codes_back(self):
        """Why codes are kept: the package's Q4_0 of these very weights is another grid."""
        layer = nn.Linear(64, 16)
        scheme = Scheme(bits=4, group_size=32)
        grid = fit(layer.weight.detach(), scheme, torch.float16)
        weight = grid.round(layer.weight.detach()).numpy()
        kind = package.GGMLQuantizationType.Q4_0
        assert not np.allclose(package.dequantize(package.quantize(weight, kind), kind), weight, atol=1e-3)

    def test_a_scale_that_float16_lacks_is_rounded_and_the_codes_stay(self):
        layer = nn.Linear(64, 16)
        grid = fit(layer.weight.detach(), Scheme(bits=4, group_size=32), torch.float32)
        made = quantize_layer(layer, grid.quantize(layer.weight.detach()), grid)
        found = gguf_blocks.decode(gguf_blocks.encode("w", made, "weight", "Q4_0"), "Q4_0")
        expected = grid.dequantize(made.codes).numpy()
        assert not np.array_equal(found, expected)
        assert np.allclose(found, expected, rtol=2**-11, atol=0)

    @pytest.mark.parametrize(
        ("scheme", "kind"),
        [
            (Scheme(bits=4, group_size=16), "Q4_0"),  # a block of 32 has two scales
            (Scheme(bits=8, group_size=32, symmetric=False), "Q8_0"),  # levels up to 255
            (Scheme(bits=8, group_size=32), "Q4_0"),
        ],
        ids=str,
    )
    def test_codes_that_do_not_fit_are_rounded_as_weights(self, scheme, kind):
        layer = nn.Linear(64, 16)
        with torch.no_grad():
            layer.weight.abs_()  # an asymmetric grid's zero lies at its end
        grid = fit(layer.weight.detach(), scheme, torch.float16)
        made = quantize_layer(layer, grid.quantize(layer.weight.detach()), grid)
        weight = grid.dequantize(made.codes).numpy()
        found = gguf_blocks.encode("w", made, "weight", kind)
        assert np.array_equal(found, package.quantize(weight, package.GGMLQuantizationType[kind]))

    def test_values_that_a_kind_lacks_are_refused(self):
        layer = nn.Linear(32, 2)
        with torch.no_grad():
            layer.weight[0, 0] = 1e6
        with pytest.raises(ModelError, match=r"blk\.0 has values up to 1e\+06, too large for F16.*BF16"):
            gguf_blocks.encode("blk.0", layer, "weight", "F16")
        gguf_blocks.encode("blk.0", layer, "weight", "BF16")
        with torch.no_grad():
            layer.weight[0, 0] = float("nan")
        with pytest.raises(ModelError, match=r"blk\.0 has values that are not finite"):
            gguf_blocks.encode("blk.0", layer, "weight", "Q8_0")


def test_norms_stay_whole_and_the_head_has_eight_bits(tmp_path, tiny_tokenizer):
    """As in llama.cpp's files of fewer bits; an embedding of its own is of the kind asked for."""
    kinds = {}
    for tied in (True, False):
        made = tiny.llama(tie_word_embeddings=tied)
        file = save_gguf(made, tmp_path / str(tied), tiny_tokenizer, "Q4_0")
        kinds[tied] = {t.name: t.tensor_type.name for t in package.GGUFReader(file).tensors}
        size = sum(t.n_bytes for t in package.GGUFReader(file).tensors)
        assert gguf_writing.file_size(made, "Q4_0") == size
    assert kinds[True]["token_embd.weight"] == "Q8_0"
    assert "output.weight" not in kinds[True]
    assert (kinds[False]["token_embd.weight"], kinds[False]["output.weight"]) == ("Q4_0", "Q8_0")
    assert kinds[True]["blk.1.attn_q.weight"] == "Q4_0"
    assert kinds[True]["blk.1.ffn_norm.weight"] == kinds[True]["output_norm.weight"] == "F32"


def test_rows_that_blocks_do_not_fill_are_in_float16_and_named(tmp_path, tiny_tokenizer):
    made = tiny.llama(intermediate_size=72)
    with checks.collect() as lines:
        file = save_gguf(made, tmp_path / "out", tiny_tokenizer, "Q4_0")
    said = next(line for line in lines if line.name == "matrices in F16, not Q4_0")
    assert said.value == 2
    assert "rows of 72 values" in said.detail
    assert "blk.0.ffn_down.weight, blk.1.ffn_down.weight" in said.detail
    kinds = {t.name: t.tensor_type.name for t in package.GGUFReader(file).tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q4_0")


def test_quantised_layers_are_proven_and_rounded_activations_said(tmp_path):
    """The proof rounds the model's own weights: those of quantised layers are what their codes stand for."""
    scheme = Scheme(bits=4, group_size=32, activation_bits=8)
    model, tokenizer = quantised(tiny.llama(), scheme, torch.float16), by_digit()
    with checks.collect() as lines:
        file = save_gguf(model, tmp_path / "out", tokenizer, "Q4_0")
    assert "activations are not rounded" in [line.name for line in lines]
    assert proven(file, model, tokenizer)["logits after reload"].value <= 1e-5
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
    assert hasattr(model.model.layers[0].mlp.up_proj, "codes")  # the model given is as it was


class TestFolder:
    def test_it_appears_whole_or_not_at_all(self, tmp_path, tiny_llama, tiny_tokenizer, monkeypatch):
        file = save_gguf(tiny_llama, tmp_path / "out", tiny_tokenizer, "F16")
        listed = json.loads((file.parent / "luthier.json").read_text())["files"]
        assert set(listed) == {p.name for p in file.parent.iterdir()} - {"luthier.json"}
        before = file.read_bytes()
        monkeypatch.setattr(gguf_writing._Entry, "encode", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_gguf(tiny.llama(seed=1), tmp_path / "out", tiny_tokenizer, "F16")
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        assert file.read_bytes() == before

    def test_other_files_are_not_replaced(self, tmp_path, tiny_llama, tiny_tokenizer):
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(ModelError, match=r"notes\.txt"):
            save_gguf(tiny_llama, tmp_path, tiny_tokenizer)

    def test_a_changed_file_is_not_loaded(self, tmp_path, tiny_llama, tiny_tokenizer):
        file = save_gguf(tiny_llama, tmp_path / "out", tiny_tokenizer, "F16")
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        with pytest.raises(ModelError, match="checksum is another"):
            luthier.load(file.parent)


class TestRefused:
    def test_another_architecture(self, tmp_path, tiny_gpt2, tiny_bert, tiny_tokenizer):
        for model, name in ((tiny_gpt2, "GPT2LMHeadModel"), (tiny_bert, "BertForSequenceClassification")):
            with pytest.raises(ModelError, match=rf"{name}.*Supported .* llama, mistral, qwen2, qwen3"):
                save_gguf(model, tmp_path / "out", tiny_tokenizer)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"attention_bias": True}, "biases"),
            ({"hidden_act": "gelu"}, "activation is gelu"),
            (
                {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
                "scaled by 'yarn'",
            ),
        ],
    )
    def test_a_structure_that_is_not_read_back(self, tmp_path, tiny_tokenizer, changes, reason):
        with pytest.raises(ModelError, match=f"could not read .* back: .*{reason}"):
            save_gguf(tiny.llama(**changes), tmp_path / "out", tiny_tokenizer)

    def test_heads_of_another_width_than_is_read_back(self, tmp_path, tiny_tokenizer):
        model = model_of(Qwen3ForCausalLM, Qwen3Config, head_dim=64)
        with pytest.raises(ModelError, match="heads have 64 values, and it takes 128"):
            save_gguf(model, tmp_path / "out", tiny_tokenizer)

    def test_an_unknown_kind(self, tmp_path, tiny_llama, tiny_tokenizer):
        with pytest.raises(ModelError, match=r"Unknown GGUF type 'q8'.*'Q8_0'"):
            save_gguf(tiny_llama, tmp_path / "out", tiny_tokenizer, "q8")

    def test_without_the_package(self, tmp_path, tiny_llama, tiny_tokenizer, monkeypatch):
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "gguf" else found(n, *a))
        with pytest.raises(ModelError, match=r"pip install 'luthier\[gguf\]'"):
            save_gguf(tiny_llama, tmp_path / "out", tiny_tokenizer)

    def test_an_adapter(self, tmp_path, tiny_llama, tiny_tokenizer):
        adapted = peft.get_peft_model(tiny_llama, peft.LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(ModelError, match="Merge it first"):
            save_gguf(adapted, tmp_path / "out", tiny_tokenizer)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (
                lambda core: setattr(core, "pre_tokenizer", pre_tokenizers.Whitespace()),
                "no name for: .*Whitespace.*smollm",
            ),
            (lambda core: setattr(core, "normalizer", normalizers.Lowercase()), "changes text .*Lowercase"),
            (lambda core: setattr(core, "decoder", None), "no byte-level BPE"),
        ],
    )
    def test_a_tokenizer_that_gguf_cannot_state(self, tmp_path, tiny_llama, tiny_tokenizer, change, reason):
        change(tiny_tokenizer.backend_tokenizer)
        with pytest.raises(ModelError, match=reason):
            save_gguf(tiny_llama, tmp_path / "out", tiny_tokenizer)
        assert list(tmp_path.iterdir()) == []

    def test_more_tokens_than_rows(self, tmp_path, tiny_tokenizer):
        with pytest.raises(ModelError, match="ids up to 383, but the model's embedding has 320 rows"):
            save_gguf(tiny.llama(vocab_size=320), tmp_path / "out", tiny_tokenizer)


def test_rows_without_a_token_get_names(tmp_path, tiny_tokenizer):
    file = save_gguf(tiny.llama(vocab_size=400), tmp_path / "out", tiny_tokenizer, "F16")
    found = metadata(file)
    assert found["tokenizer.ggml.tokens"][384:386] == ["[PAD384]", "[PAD385]"]
    assert found["tokenizer.ggml.token_type"][382:] == [1, 1] + [5] * 16
    assert len(found["tokenizer.ggml.tokens"]) == found["llama.vocab_size"] == 400


def test_words_that_are_tokens_are_taken_whole_only_where_llama_cpp_does():
    """`ignore_merges` is no key of the file: it comes with the name."""
    for name, fits in (("llama-bpe", True), ("qwen2", False)):
        tokenizer = by_pattern(name)
        tokenizer.backend_tokenizer.model.ignore_merges = True
        core = json.loads(tokenizer.backend_tokenizer.to_str())
        if fits:
            assert splitting(core) == name
        else:
            with pytest.raises(ModelError, match="no name"):
                splitting(core)


TUNE = {"tune": {"data": "rows.jsonl", "method": "lora", "training": {"max_steps": 2}}}


class TestRecipe:
    @pytest.fixture
    def write(self, tmp_path):
        luthier.save(tiny.llama(), tmp_path / "base", by_digit())
        rows = [{"prompt": f"Say {i}.", "completion": f"It is {i}."} for i in range(12)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

        def make(*stages, model="base"):
            path = tmp_path / "recipe.yaml"
            content = {"name": "r", "model": {"name": str(tmp_path / model), "device": "cpu"}}
            content |= {"output": str(tmp_path / "runs"), "stages": list(stages)}
            path.write_text(json.dumps(content))
            return path

        return make

    def test_an_adapter_is_merged_written_proven_and_measured(self, write):
        """A later stage reads the file: what is measured is the model as it was rounded."""
        evaluate = {
            "evaluate": {"data": {"path": "rows.jsonl", "allow_leakage": True}, "metrics": ["perplexity"]}
        }
        path = write(TUNE, {"export": {"format": "gguf", "gguf_type": "Q4_0"}}, evaluate)
        result = run(path)
        export = result.stages[1]
        assert (export.manifest.details["merged"], export.manifest.details["gguf_type"]) == (True, "Q4_0")
        assert {"logits after reload", "change by rounding"} <= {c["name"] for c in export.manifest.checks}
        assert list(export.artefact.glob("*.gguf")) == [export.artefact / "model-Q4_0.gguf"]
        assert sources.locate(result.folder).gguf_file == "model-Q4_0.gguf"
        assert result.metrics["perplexity"]["value"] > 1
        model, _ = luthier.load(result.folder, dtype="float32")
        assert np.array_equal(
            model.model.embed_tokens.weight.detach().numpy(),
            held(export.artefact / "model-Q4_0.gguf")["token_embd.weight"],
        )

    def test_it_is_planned_before_anything_runs(self, write):
        export = plan(load_recipe(write(TUNE, {"export": {"format": "gguf"}}))).stages[1]
        assert export.detail == "merged gguf Q8_0"
        assert export.artefact_bytes == gguf_writing.file_size(tiny.llama(), "Q8_0")

    def test_an_architecture_is_refused_before_it_is_trained(self, write, tmp_path):
        luthier.save(tiny.gpt2(), tmp_path / "other", tiny.tokenizer())
        with pytest.raises(ModelError, match="GPT2LMHeadModel"):
            plan(load_recipe(write(TUNE, {"export": {"format": "gguf"}}, model="other")))

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"format": "gguf", "gguf_type": "Q8"}, "Q8_0"),
            ({"gguf_type": "Q8_0"}, "format: safetensors has no gguf_type"),
            ({"format": "gguf", "dtype": "float16"}, "format: gguf has no dtype"),
            ({"format": "gguf", "merge": False}, "only if it is merged"),
            ({"format": "gguf", "rank": 4}, "has no rank"),
        ],
    )
    def test_faults_are_told_with_what_to_write(self, write, keys, message):
        with pytest.raises(RecipeError, match=message):
            load_recipe(write(TUNE, {"export": keys}))


@pytest.mark.model
def test_the_shipped_file_of_smollm2_is_matched(tmp_path, smollm2):
    """llama.cpp's own file of the model: the same keys, names, shapes, tokens and order of rows."""
    model, tokenizer = luthier.load("smollm2-135m", dtype="float32")
    file = save_gguf(model, tmp_path / "out", tokenizer, "Q8_0")
    source = sources.locate("smollm2-135m")
    ours, theirs = package.GGUFReader(file), package.GGUFReader(source.path / source.gguf_file)
    # What only the model's page says.
    page = {f"general.{key}" for key in ("organization", "basename", "finetune", "languages", "license")}
    assert set(ours.fields) == set(theirs.fields) - page
    own = {"GGUF.kv_count", "general.name", "general.file_type"}
    for key in set(ours.fields) - own:
        assert ours.fields[key].contents() == theirs.fields[key].contents(), key
    tensors = {t.name: t for t in ours.tensors}
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {t.name: tuple(t.shape) for t in theirs.tensors}
    for t in theirs.tensors:
        if t.name in ("blk.3.attn_q.weight", "blk.3.attn_k.weight", "blk.29.ffn_down.weight"):
            expected = package.dequantize(t.data, t.tensor_type)
            found = package.dequantize(tensors[t.name].data, tensors[t.name].tensor_type)
            assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)
    found = proven(file, model, tokenizer)
    assert found["logits after reload"].value <= 1e-5
    assert found["change by rounding"].value < 0.03
    assert "token ids by the header alone, in transformers" in found
    text = "x   12, 4711"
    read = AutoTokenizer.from_pretrained(file.parent)
    assert read(text).input_ids == tokenizer(text).input_ids
    assert AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).config.head_dim == 64
