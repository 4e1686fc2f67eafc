"""A run survives what happens to it: kills, Ctrl-C, losses that are not finite; a resumed one is the same."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from sft_problems import lora, losses, rows, sft, weights
from transformers import TrainerCallback

from luthier import checks
from luthier.alignment import reliable
from luthier.alignment.callbacks import Divergence
from luthier.errors import CheckError, TrainingError

RESUMABLE = {
    "max_steps": 8, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2,
    "save_total_limit": 5,
}  # fmt: skip


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act(kwargs["model"])


# Resuming ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [lora(dropout=0.3), None], ids=["lora", "full"])
def test_a_resumed_run_is_the_straight_run(tmp_path, method):
    """Dropout on, gradients accumulated, across an epoch's end."""

    def make(folder):
        model = tiny.llama(attention_dropout=0.2)
        return sft(model, folder, method=method, data=rows(10), **RESUMABLE)

    straight = make(tmp_path / "straight")
    straight.train()
    resumed = make(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    assert losses(resumed) == losses(straight)
    assert len(losses(straight)) == 8
    assert_equal(weights(resumed.model), weights(straight.model))
    assert resumed.state.num_input_tokens_seen == straight.state.num_input_tokens_seen


def test_there_must_be_a_checkpoint_to_resume_from(tmp_path):
    with pytest.raises(TrainingError, match="no checkpoint"):
        sft(tiny.llama(), tmp_path).train(resume_from_checkpoint=True)


# Checkpoints ---------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_the_adapter_alone_and_no_pickled_arguments(tmp_path):
    sft(tiny.llama(), tmp_path, method=lora(), **RESUMABLE).train()
    folder = tmp_path / "checkpoint-3"
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "trainer_state.json"} <= names
    assert "model.safetensors" not in names
    assert "training_args.bin" not in names


def test_last_and_best_are_kept_and_the_best_is_loaded_at_the_end(tmp_path):
    """The learning rate is so high that evaluation gets worse after the first steps."""
    trainer = sft(
        tiny.llama(), tmp_path, method=lora(), eval_data=rows(6, seed=9), max_steps=6, learning_rate=0.3,
        save_strategy="steps", save_steps=1, eval_steps=1, save_total_limit=2, load_best_model_at_end=True,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    evaluated = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = min(evaluated, key=evaluated.get)
    assert best < 6
    assert {p.name for p in tmp_path.iterdir()} == {f"checkpoint-{best}", "checkpoint-6"}
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    recorded = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert recorded["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated[best], rel=1e-5)


KILLED = """
import os, signal, sys
import tiny, torch
from luthier.alignment import reliable
from luthier.alignment.callbacks import Divergence
from sft_problems import lora, rows, sft
folder, where = sys.argv[1:]
count = 0
def kill(*a, **k):
    os.kill(os.getpid(), signal.SIGKILL)
def second(name, owner):
    original = getattr(owner, name)
    def wrapped(self, *a, **k):
        global count
        count += 1
        return kill() if count == 2 else original(self, *a, **k)
    setattr(owner, name, wrapped)
import transformers
if where == "optimizer": second("_save_optimizer_and_scheduler", transformers.Trainer)
if where == "rename":
    original = os.replace
    def replace(a, b):
        global count
        count += "checkpoint" in str(b)
        return kill() if count == 2 else original(a, b)
    os.replace = replace
model = tiny.llama(attention_dropout=0.2)
sft(model, folder, method=lora(dropout=0.3), data=rows(10), max_steps=8, save_strategy="steps", save_steps=3,
    gradient_accumulation_steps=2, save_total_limit=5).train()
"""


@pytest.mark.parametrize("where", ["optimizer", "rename"])
def test_killed_while_saving_the_checkpoint_before_is_good_and_the_run_ends_the_same(tmp_path, where):
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "killed"), where],
        cwd=tests, env={**os.environ, "PYTHONPATH": str(tests)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {p.name for p in (tmp_path / "killed").iterdir()} == {"checkpoint-3", reliable.DRAFT}

    def make(folder):
        model = tiny.llama(attention_dropout=0.2)
        return sft(model, folder, method=lora(dropout=0.3), data=rows(10), **RESUMABLE)

    straight, resumed = make(tmp_path / "straight"), make(tmp_path / "killed")
    straight.train()
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(straight)
    assert not (tmp_path / "killed" / reliable.DRAFT).exists()


# Divergence ----------------------------------------------------------------------------------------------


def poisoned(model):
    """From now on the head gives numbers that are not."""
    model.get_output_embeddings().register_forward_hook(lambda m, i, o: o * float("nan"))


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_take_it_up(tmp_path):
    kept = {}

    def act(model):
        poisoned(model)
        kept.update(weights(model))

    trainer = sft(
        tiny.llama(), tmp_path, method=lora(), save_strategy="steps", save_steps=2, callbacks=[At(3, act)]
    )
    with pytest.raises(TrainingError, match=r"step 4 is nan.*checkpoint-2"):
        trainer.train()
    assert_equal(weights(trainer.model), kept)
    assert (tmp_path / "checkpoint-2").is_dir()


def test_a_gradient_that_is_not_finite_stops_the_run_too(tmp_path):
    def act(model):
        parameter = next(p for p in model.parameters() if p.requires_grad)
        parameter.register_hook(lambda g: g * float("inf"))

    trainer = sft(tiny.llama(), tmp_path, callbacks=[At(2, act)])
    with pytest.raises(TrainingError, match="gradient of step 3"):
        trainer.train()
    assert all(torch.isfinite(w).all() for w in weights(trainer.model).values())


def test_a_loss_that_explodes_at_once_is_held_against_the_first_step():
    """Such a run is worse than no training from its second step on, and never gets better."""
    trainer = SimpleNamespace(
        step_loss=2.3, last_good=lambda: "There is no checkpoint.", forget_checkpoints=lambda after: None
    )
    watch, args = Divergence(trainer), SimpleNamespace(learning_rate=50.0)

    def steps():
        for step in range(1, 20):
            watch.on_step_end(args, SimpleNamespace(global_step=step), None)
            trainer.step_loss = 10.8

    with pytest.raises(TrainingError, match=r"exploded: 9.95 .* after 2.3"):
        steps()


def test_an_exploding_loss_stops_the_run(tmp_path):
    trainer = sft(
        tiny.llama(), tmp_path, max_steps=60, learning_rate=50.0, optim="sgd", max_grad_norm=0.0,
        lr_scheduler_type="constant", save_strategy="steps", save_steps=5,
    )  # fmt: skip
    with pytest.raises(TrainingError, match=r"exploded|not finite|nan|inf"):
        trainer.train()
    assert trainer.state.global_step < 60
    kept = [int(folder.name.rpartition("-")[2]) for folder in tmp_path.glob("checkpoint-*")]
    assert max(kept, default=0) <= max(0, trainer.state.global_step - 10)


def test_a_loss_that_falls_and_wavers_goes_on(tmp_path):
    trainer = sft(tiny.llama(), tmp_path, max_steps=30)
    trainer.train()
    assert trainer.state.global_step == 30


# Ctrl-C --------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_with_a_checkpoint_from_which_the_run_goes_on_the_same(tmp_path):
    def make(folder, **options):
        return sft(tiny.llama(), folder, method=lora(dropout=0.3), data=rows(10), **options)

    before = signal.getsignal(signal.SIGINT)
    straight = make(tmp_path / "straight")
    straight.train()
    press = At(4, lambda model: signal.raise_signal(signal.SIGINT))
    stopped = make(tmp_path / "stopped", callbacks=[press])
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert stopped.interrupted
    # The callback that presses may come after the one that stops: then the step after is the last.
    assert [p.name for p in (tmp_path / "stopped").iterdir()] in (["checkpoint-4"], ["checkpoint-5"])
    assert signal.getsignal(signal.SIGINT) is before
    resumed = make(tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(straight)
    assert not resumed.interrupted


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    def twice(model):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    trainer = sft(tiny.llama(), tmp_path, callbacks=[At(2, twice)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 2
    assert not list(tmp_path.iterdir())


# Proofs at step 1 ----------------------------------------------------------------------------------------


def test_the_first_step_is_proven(tmp_path):
    with checks.collect() as lines:
        sft(tiny.llama(), tmp_path, method=lora(), expected_memory=10**12).train()
    found = {(line.when, line.name): line for line in lines}
    assert found["step1", "gradients finite"].passed
    assert found["step1", "gradients where declared"].value == 14
    assert found["step1", "frozen weights unchanged"].value == 0
    assert found["end", "frozen weights unchanged"].passed
    assert found["step1", "peak memory"].value > 10**7
    assert found["step1", "peak memory"].tolerance == int(1.3e12)


def test_memory_above_the_estimate_is_said_and_not_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("luthier.resources.resident_memory", lambda: 0)  # a process that held nothing else
    with checks.collect() as lines:
        sft(tiny.llama(), tmp_path, expected_memory=1000).train()
    assert [line.passed for line in lines if line.name == "peak memory"] == [False]


def test_what_the_process_held_before_is_not_the_trainings(tmp_path, monkeypatch):
    monkeypatch.setattr("luthier.resources.resident_memory", lambda: 10**12)
    with checks.collect() as lines:
        sft(tiny.llama(), tmp_path, expected_memory=1000).train()
    assert [line.passed for line in lines if line.name == "peak memory"] == [True]


def test_a_frozen_weight_that_moves_is_found(tmp_path):
    def move(model):
        next(p for p in model.parameters() if not p.requires_grad).data[3, 1] += 1e-3

    with pytest.raises(CheckError, match="frozen weights unchanged"):
        sft(tiny.llama(), tmp_path, method=lora(), callbacks=[At(4, move)]).train()


def test_a_module_that_learns_nothing_is_found(tmp_path):
    model = tiny.llama()
    model.register_module("spare", torch.nn.Linear(2, 2))
    with pytest.raises(CheckError, match=r"gradients where declared.*spare"):
        sft(model, tmp_path).train()


def test_nothing_is_reported_to_anybody_and_no_bar_of_tqdms_is_shown(tmp_path, capsys, monkeypatch):
    import huggingface_hub.utils

    sent = []
    monkeypatch.setattr(huggingface_hub.utils, "send_telemetry", lambda *a, **k: sent.append(a))
    trainer = sft(tiny.llama(), tmp_path)
    trainer.train()
    assert not sent
    assert trainer.args.report_to == []
    assert "it/s" not in capsys.readouterr().err
