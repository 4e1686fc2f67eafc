"""Loading is strict. Each test plants a fault that transformers or PEFT pass with a warning."""

import json

import peft
import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertModel

import luthier
from luthier import checks
from luthier.errors import CheckError, ModelError

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def folder(tmp_path, tiny_llama, tiny_tokenizer):
    return luthier.save(tiny_llama, tmp_path / "base", tiny_tokenizer)


@pytest.fixture
def adapter(tmp_path, folder):
    """A LoRA with an effect, on the model in `folder`, as `luthier.save` writes it."""
    model, _ = luthier.load(folder, dtype="float32")
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return luthier.save(peft.get_peft_model(model, config), tmp_path / "adapter")


def rewrite(file, change):
    """Replace the tensors of a safetensors file by `change` of them; our record of it no longer counts."""
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    (file.parent / "luthier.json").unlink(missing_ok=True)


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
def test_causal_model_comes_back_with_its_ties(build, tmp_path, tiny_tokenizer):
    made = build()
    model, tokenizer = luthier.load(luthier.save(made, tmp_path / "m", tiny_tokenizer), dtype="float32")
    assert torch.equal(model(IDS).logits, made(IDS).logits)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tokenizer.chat_template == tiny.CHATML
    assert model.generation_config.eos_token_id == tiny.IM_END


def test_seq2seq_and_classification_come_back(tmp_path, tiny_t5, tiny_bert, tiny_tokenizer):
    t5, _ = luthier.load(luthier.save(tiny_t5, tmp_path / "t5", tiny_tokenizer), task="seq2seq", dtype="fp32")
    assert torch.equal(
        t5(input_ids=IDS, decoder_input_ids=IDS).logits, tiny_t5(input_ids=IDS, decoder_input_ids=IDS).logits
    )
    path = luthier.save(tiny_bert, tmp_path / "bert", tiny_tokenizer)
    with checks.collect() as lines:
        bert, _ = luthier.load(path, task="classification", dtype="fp32")
    assert torch.equal(bert(IDS).logits, tiny_bert(IDS).logits)
    assert not any("head" in line.name for line in lines)


class TestMissingWeights:
    def test_missing_weight_is_refused(self, folder):
        name = "model.layers.1.mlp.up_proj.weight"
        rewrite(folder / "model.safetensors", lambda t: {k: v for k, v in t.items() if k != name})
        AutoModelForCausalLM.from_pretrained(folder)  # goes on, with a random layer
        with pytest.raises(ModelError, match=rf"1 weights are missing in the file: {name}"):
            luthier.load(folder)

    def test_wrong_prefix_is_refused_and_the_right_one_named(self, folder):
        rewrite(folder / "model.safetensors", lambda t: {f"module.{k}": v for k, v in t.items()})
        with pytest.raises(ModelError, match=r"Take the prefix 'module\.' off.*all of them"):
            luthier.load(folder)

    def test_weight_without_place_is_refused(self, folder):
        rewrite(folder / "model.safetensors", lambda t: t | {"model.layers.7.extra.weight": torch.ones(2)})
        with pytest.raises(ModelError, match=r"no place in it: model\.layers\.7\.extra\.weight"):
            luthier.load(folder)

    def test_wrong_shape_is_refused(self, folder):
        def cut(tensors):
            return tensors | {"model.norm.weight": torch.ones(16)}

        rewrite(folder / "model.safetensors", cut)
        with pytest.raises(ModelError, match=r"mismatch|shape"):
            luthier.load(folder)

    def test_classifier_loaded_as_language_model_is_refused(self, tmp_path, tiny_bert, tiny_tokenizer):
        path = luthier.save(tiny_bert, tmp_path / "m", tiny_tokenizer)
        with pytest.raises(ModelError, match="saved as BertForSequenceClassification"):
            luthier.load(path)


class TestDamagedFiles:
    def test_flipped_byte_in_the_weights_is_found(self, folder):
        file = folder / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1000] ^= 1
        file.write_bytes(content)
        AutoModelForCausalLM.from_pretrained(folder)  # nothing can be seen without the checksum
        with pytest.raises(ModelError, match=r"model\.safetensors is not as it was saved"):
            luthier.load(folder)

    def test_flipped_byte_in_the_header_is_found(self, folder):
        file = folder / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[8] ^= 1
        file.write_bytes(content)
        with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
            luthier.load(folder)

    @pytest.mark.parametrize("keep", [0, 4, 0.5, 0.999])
    def test_truncated_file_is_found(self, folder, keep):
        file = folder / "model.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * keep) if keep < 1 else keep])
        with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
            luthier.load(folder)

    def test_flipped_byte_in_an_adapter_is_found(self, adapter):
        file = adapter / "adapter_model.safetensors"
        content = bytearray(file.read_bytes())
        content[-100] ^= 1
        file.write_bytes(content)
        with pytest.raises(ModelError, match=r"adapter_model\.safetensors is not as it was saved"):
            luthier.load(adapter)


class TestAdapter:
    def test_comes_back_on_its_base(self, folder, adapter):
        with checks.collect() as lines:
            model, _ = luthier.load(adapter, dtype="float32")
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = PeftModel.from_pretrained(base, adapter)(IDS).logits
        assert torch.equal(model(IDS).logits, expected)
        assert not any(p.requires_grad for p in model.parameters())
        with model.disable_adapter():
            assert not torch.allclose(model(IDS).logits, expected, atol=1e-2)
        assert {line.name for line in lines} >= {"base of the adapter unchanged", "adapter loaded whole"}
        trained, _ = luthier.load(adapter, train=True)
        assert {n for n, p in trained.named_parameters() if p.requires_grad} == {
            n for n, _ in trained.named_parameters() if "lora_" in n
        }

    def test_missing_factor_is_refused(self, adapter):
        rewrite(adapter / "adapter_model.safetensors", lambda t: dict(list(t.items())[1:]))
        with pytest.raises(ModelError, match="1 weights are missing in the file"):
            luthier.load(adapter)

    def test_other_weights_in_the_base_are_refused(self, folder, adapter, tiny_tokenizer):
        """Same shapes, another model: nothing but the fingerprint can tell."""
        luthier.save(tiny.llama(seed=1), folder, tiny_tokenizer)
        with pytest.raises(CheckError, match="base of the adapter unchanged"):
            luthier.load(adapter)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_base_is_recognised_in_any_dtype(self, adapter, dtype):
        luthier.load(adapter, dtype=dtype)

    def test_wrong_size_of_the_base_is_refused(self, folder, adapter, tiny_tokenizer):
        luthier.save(tiny.llama(intermediate_size=48), folder, tiny_tokenizer)
        (adapter / "luthier.json").unlink()
        with pytest.raises(ModelError, match="does not fit its base"):
            luthier.load(adapter)

    def test_task_that_it_was_not_trained_for_is_refused(self, adapter):
        with pytest.raises(ModelError, match=r"trained for causal.*Write task: causal"):
            luthier.load(adapter, task="classification")

    def test_classifier_head_comes_back(self, tmp_path, folder):
        """PEFT alone makes a head of the wrong size, or a random one."""
        model, tokenizer = luthier.load(folder, task="classification", num_labels=4, dtype="float32")
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS", init_lora_weights=False)
        model.config.id2label = {0: "a", 1: "b", 2: "c", 3: "d"}
        adapted = peft.get_peft_model(model, config).eval()
        path = luthier.save(adapted, tmp_path / "classifier", tokenizer)
        loaded, _ = luthier.load(path, task="classification", dtype="float32")
        assert torch.equal(loaded(IDS).logits, adapted(IDS).logits)
        assert loaded.config.id2label == {0: "a", 1: "b", 2: "c", 3: "d"}


class TestClassification:
    def test_new_head_is_said_and_nothing_else_may_be_new(self, folder):
        with checks.collect() as lines:
            model, _ = luthier.load(folder, task="classification", num_labels=3)
        line = next(line for line in lines if line.name == "new classification head")
        assert "score.weight (3, 32)" in line.detail
        assert model.config.num_labels == 3

    def test_missing_block_is_refused_with_a_new_head_too(self, folder):
        rewrite(
            folder / "model.safetensors",
            lambda t: {
                k: v for k, v in t.items() if "layers.1.input_layernorm" not in k and k != "norm.weight"
            },
        )
        with pytest.raises(ModelError, match=r"missing.*layers\.1\.input_layernorm"):
            luthier.load(folder, task="classification")

    def test_missing_final_norm_is_no_part_of_the_head(self, folder):
        rewrite(
            folder / "model.safetensors", lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"}
        )
        with pytest.raises(ModelError, match=r"missing.*model\.norm\.weight"):
            luthier.load(folder, task="classification")

    def test_untied_language_head_is_left_out_and_said(self, tmp_path, tiny_tokenizer):
        path = luthier.save(tiny.llama(tie_word_embeddings=False), tmp_path / "m", tiny_tokenizer)
        with checks.collect() as lines:
            luthier.load(path, task="classification")
        assert any("not used: lm_head.weight" in line.detail for line in lines)

    def test_trunk_without_prefix_and_pooler_is_taken(self, tmp_path, tiny_bert, tiny_tokenizer):
        """A file of a bare BertModel, as sentence encoders are saved."""
        trunk = BertModel(tiny_bert.config, add_pooling_layer=False)
        path = luthier.save(trunk, tmp_path / "m", tiny_tokenizer)
        with checks.collect() as lines:
            model, _ = luthier.load(path, task="classification", num_labels=2, dtype="float32")
        detail = next(line.detail for line in lines if line.name == "new classification head")
        assert "pooler" in detail
        assert "classifier" in detail
        expected = trunk.encoder.layer[1].output.dense.weight
        assert torch.equal(model.bert.encoder.layer[1].output.dense.weight, expected)

    def test_wrong_number_of_labels_is_refused(self, tmp_path, tiny_bert, tiny_tokenizer):
        path = luthier.save(tiny_bert, tmp_path / "m", tiny_tokenizer)
        with pytest.raises(ModelError, match="num_labels"):
            luthier.load(path, task="classification", num_labels=7)

    @pytest.mark.model
    def test_minilm_gets_a_head(self, minilm):
        model, tokenizer = luthier.load("minilm", task="classification", num_labels=2)
        out = model(**tokenizer(["a fine film", "dull"], padding=True, return_tensors="pt")).logits
        assert out.shape == (2, 2)


class TestTrust:
    def test_code_of_a_model_is_not_run_unless_asked_for(self, folder, tmp_path):
        proof = tmp_path / "ran"
        (folder / "code.py").write_text(
            f"open({str(proof)!r}, 'w').close()\n"
            "from transformers import LlamaConfig, LlamaForCausalLM\n"
            "class MyConfig(LlamaConfig):\n    model_type = 'mine'\n"
            "class MyModel(LlamaForCausalLM):\n    config_class = MyConfig\n"
        )
        config = json.loads((folder / "config.json").read_text())
        config |= {
            "model_type": "mine",
            "auto_map": {"AutoConfig": "code.MyConfig", "AutoModelForCausalLM": "code.MyModel"},
        }
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=r"Python code of its own.*trust_remote_code: true"):
            luthier.load(folder)
        assert not proof.exists()

    def test_pickle_is_not_read(self, folder):
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(ModelError, match=r"pytorch_model\.bin.*can run code"):
            luthier.load(folder)


def test_task_without_head_in_the_architecture_is_refused(folder):
    with pytest.raises(ModelError, match="no seq2seq head"):
        luthier.load(folder, task="seq2seq")
    with pytest.raises(ModelError, match="Did you mean 'causal'"):
        luthier.load(folder, task="causl")


def test_adapter_on_an_adapter_is_refused(adapter, tmp_path, tiny_llama):
    config = peft.LoraConfig(r=2, target_modules="all-linear")
    upper = luthier.save(peft.get_peft_model(tiny_llama, config), tmp_path / "upper")
    record = json.loads((upper / "luthier.json").read_text())
    record["base"]["name"] = str(adapter)
    (upper / "luthier.json").write_text(json.dumps(record))
    with pytest.raises(ModelError, match="stands on another adapter"):
        luthier.load(upper)
