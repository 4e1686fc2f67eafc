"""One function makes any objective's trainer: seed first, method attached, data encoded, tokenizer found."""

import json

import pytest
import tiny
import torch
from sft_problems import ARGUMENTS, lora, losses, rows, sft, weights
from transformers import TrainingArguments

import luthier
from luthier.errors import MethodError, ModelError
from luthier.tuning.partial.full import Config as Full

ROWS = [{"prompt": f"What is {i} + 1?", "completion": f"{i + 1}"} for i in range(6)]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_from_a_file_to_a_trained_adapter(path, tmp_path):
    arguments = {**ARGUMENTS, "output_dir": str(tmp_path / "out")}
    trainer = luthier.trainer(
        "sft", tiny.llama(), path, method=lora(), tokenizer=tiny.tokenizer(), args=arguments
    )
    before = weights(trainer.model)
    trainer.train()
    assert any(not torch.equal(before[n], w) for n, w in weights(trainer.model).items())
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_a_given_training_arguments_object_and_a_config_are_taken(path, tmp_path):
    given = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    trainer = luthier.trainer(
        luthier.method("sft")(max_length=64), tiny.llama(), path, method=Full(),
        tokenizer=tiny.tokenizer(), args=given,
    )  # fmt: skip
    assert (trainer.args.output_dir, trainer.args.max_steps) == (given.output_dir, 1)


def test_the_seed_is_set_before_the_method_draws_its_weights(tmp_path):
    one, again, other = (
        weights(sft(tiny.llama(), tmp_path, method=lora(), seed=seed).model) for seed in (3, 3, 4)
    )
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)


def test_the_tokenizer_beside_the_model_is_used(path, tmp_path):
    folder = luthier.save(tiny.llama(), tmp_path / "model", tiny.tokenizer())
    model, _ = luthier.load(folder)
    trainer = luthier.trainer("sft", model, path, args={**ARGUMENTS, "output_dir": str(tmp_path / "o")})
    assert len(trainer.processing_class) == len(tiny.tokenizer())


def test_no_tokenizer_is_said(path):
    with pytest.raises(ModelError, match="no tokenizer"):
        luthier.trainer("sft", tiny.llama(), path)


def test_an_unknown_objective_is_answered_with_the_nearest(path):
    with pytest.raises(MethodError, match="sft"):
        luthier.trainer("sftt", tiny.llama(), path)


def test_a_tuning_method_is_not_an_objective(path):
    with pytest.raises(MethodError, match="not an objective"):
        luthier.trainer(Full(), tiny.llama(), path)


def test_a_model_of_another_task_is_refused(path):
    with pytest.raises(ModelError, match="classification"):
        luthier.trainer("sft", tiny.bert(), path)
    with pytest.raises(ModelError, match="seq2seq"):
        luthier.trainer("seq2seq", tiny.llama(), path)


def test_the_methods_parameter_groups_and_callbacks_are_used(tmp_path):
    method = luthier.method("lora")(r=2, loraplus_lr_ratio=16)
    trainer = sft(tiny.llama(), tmp_path, method=method, max_steps=1, lr_scheduler_type="constant")
    trainer.train()
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {ARGUMENTS["learning_rate"], 16 * ARGUMENTS["learning_rate"]}
    unfreezing = luthier.method("gradual_unfreezing")()
    trainer = sft(tiny.llama(), tmp_path, data=rows(4), method=unfreezing, max_steps=-1, num_train_epochs=4)
    trainer.train()
    assert len(weights(trainer.model)) == len(list(trainer.model.parameters()))
