"""A saved folder appears whole, stands on its own, and is proven to be the model."""

import json
import os
import signal
import subprocess
import sys
import time

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import luthier
from luthier import checks
from luthier.errors import CheckError, ModelError, ResourceError
from luthier.models.saving import _clearly_worse, fingerprint, verify_export

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def lora(model, **options):
    defaults = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}
    return peft.get_peft_model(model, peft.LoraConfig(**defaults | options)).eval()


def test_only_safetensors_and_text_are_written(tmp_path, tiny_llama, tiny_tokenizer):
    path = luthier.save(tiny_llama, tmp_path / "m", tiny_tokenizer)
    kinds = {file.suffix for file in path.iterdir()}
    assert kinds == {".safetensors", ".json", ".jinja"}
    listed = json.loads((path / "luthier.json").read_text())["files"]
    assert set(listed) == {file.name for file in path.iterdir()} - {"luthier.json"}


def test_transformers_alone_loads_it(tmp_path, tiny_llama, tiny_tokenizer):
    tiny_llama.generation_config.max_new_tokens = 77
    path = luthier.save(tiny_llama, tmp_path / "m", tiny_tokenizer)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert torch.equal(model(IDS).logits, tiny_llama(IDS).logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.max_new_tokens == 77
    assert AutoTokenizer.from_pretrained(path).chat_template == tiny.CHATML
    assert "lm_head.weight" not in load_file(path / "model.safetensors")


def test_invalid_generation_config_is_refused_before_anything_is_there(tmp_path, tiny_llama):
    tiny_llama.generation_config.temperature = 0.1
    with pytest.raises(ModelError, match="temperature"):
        luthier.save(tiny_llama, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_own_folder_is_replaced_and_another_refused(tmp_path, tiny_llama, tiny_tokenizer):
    path = luthier.save(tiny_llama, tmp_path / "m", tiny_tokenizer)
    other = tiny.llama(seed=1)
    luthier.save(other, path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(path)(IDS).logits, other(IDS).logits)
    assert not (path / "tokenizer.json").exists()
    (path / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match=r"notes\.txt"):
        luthier.save(other, path)
    assert (path / "notes.txt").read_text() == "mine"
    with pytest.raises(ModelError, match="is a file"):
        luthier.save(other, path / "notes.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_folder_that_cannot_be_written_is_said(tmp_path, tiny_llama):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="Cannot write"):
        luthier.save(tiny_llama, tmp_path / "file" / "m")


def test_kill_during_saving_leaves_the_former_folder(tmp_path, tiny_llama, tiny_tokenizer):
    """Real kills, spread over the saving: the folder is the old model or the new one, never a mixture."""
    path = luthier.save(tiny_llama, tmp_path / "m", tiny_tokenizer)
    code = (
        "import sys, tiny, luthier, torch\n"
        "from luthier.models import saving\n"
        "model, tokenizer = tiny.llama(seed=1, intermediate_size=4096), tiny.tokenizer()\n"
        "print('ready', flush=True)\n"
        "while True: luthier.save(model, sys.argv[1], tokenizer)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.path.dirname(tiny.__file__), "OMP_NUM_THREADS": "1"}
    for delay in (0.01, 0.03, 0.07):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], env=environment, stdout=subprocess.PIPE, text=True
        )
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if path.is_dir():
            luthier.load(path)
        else:  # killed between the two renames: the former folder is beside, whole
            former = next(p for p in tmp_path.iterdir() if p.name.endswith(".former"))
            luthier.load(former)
            former.rename(path)


class TestFingerprint:
    def test_is_the_same_in_every_dtype_and_under_an_adapter(self, tiny_llama):
        expected = fingerprint(tiny_llama)
        assert fingerprint(tiny.llama().to(torch.bfloat16)) == expected
        assert fingerprint(lora(tiny.llama())) == expected
        assert fingerprint(lora(tiny.llama(), modules_to_save=["lm_head"])) == expected

    def test_tells_models_apart(self, tiny_llama):
        expected = fingerprint(tiny_llama)
        assert fingerprint(tiny.llama(seed=1)) != expected
        assert fingerprint(tiny.llama(num_hidden_layers=3)).split("-")[0] != expected.split("-")[0]
        with torch.no_grad():
            tiny_llama.model.layers[1].mlp.up_proj.weight.mul_(1.01)
        assert fingerprint(tiny_llama) != expected


class TestBaseOfAdapter:
    @pytest.fixture
    def base(self, tmp_path, tiny_tokenizer):
        model, _ = luthier.load(
            luthier.save(tiny.llama(), tmp_path / "base", tiny_tokenizer), dtype="float32"
        )
        return model

    def test_base_that_was_trained_before_is_refused(self, base, tmp_path):
        """Saved alone, the adapter would be put on the weights from before that training."""
        with torch.no_grad():
            base.model.layers[0].mlp.up_proj.weight.add_(0.1)
        with pytest.raises(ModelError, match=r"no longer .*its weights have changed"):
            luthier.save(lora(base), tmp_path / "adapter")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]

    @pytest.mark.parametrize(
        "options",
        [
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            {"target_modules": ["embed_tokens", "v_proj"]},
            {"trainable_token_indices": [3, 5]},
            {"use_dora": True},
            {"bias": "all"},
        ],
    )
    def test_base_is_recognised_under_every_wrapper(self, base, tmp_path, options):
        adapted = lora(base, **options)
        path = luthier.save(adapted, tmp_path / "adapter")
        loaded, _ = luthier.load(path, dtype="float32")
        assert torch.equal(loaded(IDS).logits, adapted(IDS).logits)

    def test_prompt_tuning_has_an_untouched_base(self, base, tmp_path):
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        adapted = peft.get_peft_model(base, config).eval()
        loaded, _ = luthier.load(luthier.save(adapted, tmp_path / "adapter"), dtype="float32")
        text = adapted(IDS).logits[:, 3:]  # ours are the text's alone
        torch.testing.assert_close(loaded(IDS).logits, text, rtol=1e-5, atol=1e-5)

    def test_initialisation_that_changes_the_base_fits_the_original(self, base, tmp_path):
        config = luthier.method("lora")(r=2, init_lora_weights="pissa", task_type="CAUSAL_LM")
        adapted = luthier.attach(base, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.05)
        adapted.eval()
        loaded, _ = luthier.load(luthier.save(adapted, tmp_path / "adapter"), dtype="float32")
        torch.testing.assert_close(loaded(IDS).logits, adapted(IDS).logits, rtol=1e-4, atol=1e-4)


class TestExport:
    @pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
    def test_whole_model_is_proven(self, name, tmp_path, tiny_tokenizer):
        model = getattr(tiny, name)()
        path = luthier.save(model, tmp_path / "m", tiny_tokenizer)
        with checks.collect() as lines:
            verify_export(path, model, tiny_tokenizer, IDS)
        found = {line.name: line.value for line in lines}
        assert found["logits after reload"] == 0
        assert found["token ids after reload"] == 4
        assert ("generated tokens after reload" in found) == (name != "bert")

    def test_adapter_is_proven_on_its_base(self, tmp_path, tiny_tokenizer):
        base = luthier.save(tiny.llama(), tmp_path / "base", tiny_tokenizer)
        model, tokenizer = luthier.load(base)
        adapted = lora(model, task_type="CAUSAL_LM")
        path = luthier.save(adapted, tmp_path / "adapter", tokenizer)
        with checks.collect() as lines:
            verify_export(path, adapted, tokenizer, IDS)
        assert all(line.passed for line in lines)
        assert len(lines) == 4

    def test_where_inputs_are_coarse_a_token_counts_only_if_another_is_clearly_likelier(self, tiny_llama):
        with torch.no_grad():
            tiny_llama.lm_head.weight.mul_(50)  # clear preferences
        made = tiny_llama.generate(IDS, do_sample=False, min_new_tokens=4, max_new_tokens=4)
        logits = tiny_llama(made).logits[:, IDS.shape[1] - 1 : -1].detach()
        other = made.clone()
        other[0, -1] = logits[0, -1].argmin()
        tie = made.clone()
        tie[0, -1] = logits[0, -1].topk(2).indices[1]
        room = 2 * logits[0, -1].square().mean().sqrt()
        gap = logits[0, -1].topk(2).values.diff().abs()
        start = IDS.shape[1]
        assert _clearly_worse(tiny_llama, made, start, 1e-4) == 0
        assert _clearly_worse(tiny_llama, other, start, 0.1) == 1
        assert _clearly_worse(tiny_llama, tie, start, 1.1 * float(gap / room)) == 0
        assert _clearly_worse(tiny_llama, tie, start, 0.9 * float(gap / room)) == 1

    def test_weights_that_do_not_load_are_found(self, tmp_path, tiny_llama, tiny_tokenizer):
        path = luthier.save(tiny_llama, tmp_path / "m", tiny_tokenizer)
        tensors = load_file(path / "model.safetensors")
        save_file({f"x.{k}": v for k, v in tensors.items()}, path / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckError, match="logits after reload"):
            verify_export(path, tiny_llama, tiny_tokenizer, IDS)

    def test_folder_that_needs_luthier_is_found(self, tmp_path, tiny_llama, tiny_tokenizer):
        path = luthier.save(tiny_llama, tmp_path / "m", tiny_tokenizer)
        config = json.loads((path / "config.json").read_text()) | {"model_type": "of-luthier-only"}
        (path / "config.json").write_text(json.dumps(config))
        (path / "tokenizer.json").unlink()
        with pytest.raises(ModelError, match="cannot be loaded in a fresh process"):
            verify_export(path, tiny_llama, tiny_tokenizer, IDS)
