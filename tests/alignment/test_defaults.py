"""The defaults fit the model at hand, a given argument wins, and a wrong one is refused by its name."""

import copy

import pytest
import tiny
import torch
from peft import get_peft_model
from sft_problems import lora
from transformers import Seq2SeqTrainingArguments, TrainingArguments

import luthier
from luthier.alignment import defaults, trackers
from luthier.alignment.defaults import arguments
from luthier.errors import RecipeError
from luthier.models.placement import Placement


@pytest.fixture
def fast_bfloat16(monkeypatch):
    """A machine that multiplies bfloat16 fast."""
    found = Placement(torch.float32, "cpu", "sdpa", "", torch.bfloat16)
    monkeypatch.setattr(defaults, "place", lambda **_: found)


def test_own_weights_in_float32_are_multiplied_in_bfloat16_where_that_is_fast(fast_bfloat16):
    assert arguments({}, tiny.llama()).bf16
    assert not arguments({"bf16": False}, tiny.llama()).bf16
    assert not arguments({}, tiny.llama().bfloat16()).bf16


def test_under_an_adapter_the_base_has_its_dtype_already(fast_bfloat16):
    assert not arguments({}, get_peft_model(tiny.llama(), lora())).bf16


def test_where_bfloat16_is_slow_it_is_not_used(monkeypatch):
    monkeypatch.setattr(defaults, "place", lambda **_: Placement(torch.float32, "cpu", "sdpa", ""))
    assert not arguments({}, tiny.llama()).bf16


def test_rates_differ_for_adapters_and_own_weights():
    assert arguments({}, tiny.llama()).learning_rate == defaults.WEIGHTS_RATE
    assert arguments({}, get_peft_model(tiny.llama(), lora())).learning_rate == defaults.ADAPTER_RATE
    assert arguments({"learning_rate": 1.0}, tiny.llama()).learning_rate == 1.0


def test_nobody_is_told_and_last_and_best_are_kept():
    chosen = arguments({}, tiny.llama(), evaluates=True)
    assert chosen.report_to == []
    assert chosen.save_total_limit == 2
    assert chosen.load_best_model_at_end
    assert not chosen.greater_is_better


def test_the_best_is_not_loaded_where_checkpoints_and_evaluations_do_not_meet():
    assert not arguments({"save_steps": 7}, tiny.llama(), evaluates=True).load_best_model_at_end
    assert not arguments({"save_strategy": "no"}, tiny.llama(), evaluates=True).load_best_model_at_end


def test_every_argument_of_transformers_can_be_given():
    chosen = arguments({"neftune_noise_alpha": 5.0, "lr_scheduler_type": "cosine"}, tiny.llama())
    assert chosen.neftune_noise_alpha == 5.0
    kind = Seq2SeqTrainingArguments
    assert arguments({"predict_with_generate": True}, tiny.t5(), kind=kind).predict_with_generate


def test_a_given_object_is_copied_and_its_values_taken():
    given = TrainingArguments(learning_rate=0.5, report_to="none", use_cpu=True, output_dir="x")
    for model, kind in ((tiny.llama(), TrainingArguments), (tiny.t5(), Seq2SeqTrainingArguments)):
        found = arguments(given, model, kind=kind)
        assert found is not given
        assert type(found) is kind
        assert (found.learning_rate, found.use_cpu, found.output_dir) == (0.5, True, "x")


def test_a_trainer_leaves_the_callers_arguments_as_they_were(tmp_path, monkeypatch):
    """The same object may serve several runs, of other trainers too, which want unused columns removed."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    given = TrainingArguments(use_cpu=True, dataloader_pin_memory=True, output_dir=str(tmp_path))
    before = copy.deepcopy(given.to_dict())
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    trainer = luthier.trainer(
        "sft", tiny.llama(), tmp_path / "rows.jsonl", args=given, tokenizer=tiny.tokenizer()
    )
    assert given.to_dict() == before
    assert not trainer.args.remove_unused_columns
    assert not trainer.args.dataloader_pin_memory


def test_an_unknown_argument_is_refused_with_the_nearest():
    with pytest.raises(RecipeError, match=r"'learning_rat'.*learning_rate"):
        arguments({"learning_rat": 1}, tiny.llama())


def test_a_value_that_transformers_refuses_is_explained():
    with pytest.raises(RecipeError, match="transformers refuses"):
        arguments({"lr_scheduler_type": "zigzag"}, tiny.llama())


@pytest.mark.parametrize("report_to", ["wandb", ["tensorboard"]])
def test_a_tracker_that_is_not_installed_is_refused_in_python_too(monkeypatch, report_to):
    monkeypatch.setattr(trackers, "_there", lambda module: False)
    for given in ({"report_to": report_to}, TrainingArguments(report_to=report_to, use_cpu=True)):
        with pytest.raises(
            RecipeError, match=r"The tracker \w+ is not installed. pip install (wandb|tensorb)"
        ):
            arguments(given, tiny.llama())
