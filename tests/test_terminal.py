"""Nothing but our own bar and lines reaches the terminal; the libraries' settings stay as they were."""

import subprocess
import sys
import warnings

import pytest
import tiny
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from peft import LoraConfig
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import luthier
from luthier import terminal
from luthier.alignment.defaults import arguments
from luthier.models.saving import save


@pytest.fixture
def bars():
    """Bars of the libraries are on, whatever ran before."""
    logging.enable_progress_bar()
    yield
    enable_progress_bars()


def test_no_bar_of_transformers_inside_but_those_of_downloads(bars):
    with terminal.no_bars():
        assert not logging.is_progress_bar_enabled()
        assert not are_progress_bars_disabled()
    assert logging.is_progress_bar_enabled()


def test_bars_of_downloads_that_were_off_stay_off(bars):
    disable_progress_bars()
    with terminal.no_bars():
        assert are_progress_bars_disabled()
    assert are_progress_bars_disabled()


def test_no_bar_of_libraries_that_take_tqdm_as_it_is(capfd):
    class Download(tqdm):
        pass

    with terminal.no_bars():
        assert list(tqdm([1])) == [1]
        assert capfd.readouterr().err == ""
        assert list(Download([1])) == [1]
        assert "1/1" in capfd.readouterr().err
    assert list(tqdm([1])) == [1]
    assert "1/1" in capfd.readouterr().err


def test_loading_and_saving_print_nothing(bars, tmp_path, capfd):
    adapted = luthier.attach(tiny.llama(), LoraConfig(target_modules="all-linear"))
    save(tiny.llama(), tmp_path / "base", tiny.tokenizer())
    save(adapted, tmp_path / "adapter", tiny.tokenizer())
    model, _ = luthier.load(tmp_path / "base", dtype="float32")
    capfd.readouterr()
    save(model, tmp_path / "again")
    luthier.compress(model, luthier.method("rtn")(group_size=16))
    luthier.load(save(model, tmp_path / "small", tiny.tokenizer()), dtype="float32")
    assert capfd.readouterr().err == ""
    AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert "Loading weights" in capfd.readouterr().err  # what it would be without us


def test_no_warning_of_a_library_is_left_to_the_user(tmp_path, tiny_tokenizer):
    """The warnings filter of the tests is put aside: every warning is an error here."""
    model = tiny.llama()
    save(model, tmp_path / "base", tiny_tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, tokenizer = luthier.load(tmp_path / "base", dtype="float32")
        (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
        options = {"max_steps": 1, "output_dir": str(tmp_path / "out"), "save_strategy": "no"}
        trainer = luthier.trainer(
            "sft",
            model,
            tmp_path / "rows.jsonl",
            method=luthier.method("lora")(r=2),
            args=options,
            tokenizer=tokenizer,
        )
        trainer.train()
        save(trainer.model, tmp_path / "adapter", tokenizer)
        luthier.load(tmp_path / "adapter", dtype="float32")


def test_arguments_of_a_users_own_do_not_pin_memory_for_nobody(monkeypatch):
    from transformers import TrainingArguments

    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert not arguments(TrainingArguments(use_cpu=True), tiny.llama()).dataloader_pin_memory


def test_the_bar_is_for_terminals_only_and_loads_no_torch():
    code = (
        "import sys\nfrom luthier.terminal import track\n"
        "print(list(track(range(3), 'steps')))\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[0, 1, 2]\n", "")
