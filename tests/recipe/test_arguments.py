"""What is read from transformers' source is what the imported classes have."""

import dataclasses

import pytest

from luthier.recipe.arguments import OWNED, generation_arguments, training_arguments, training_fault


@pytest.mark.parametrize("seq2seq", [False, True])
def test_the_fields_are_those_of_the_class(seq2seq):
    from transformers import Seq2SeqTrainingArguments, TrainingArguments

    cls = Seq2SeqTrainingArguments if seq2seq else TrainingArguments
    fields = {f.name for f in dataclasses.fields(cls) if f.init}
    found = training_arguments(seq2seq=seq2seq)
    assert set(found) == fields
    assert set(OWNED) <= set(training_arguments(seq2seq=True))


def test_every_default_is_accepted():
    from transformers import TrainingArguments

    for field in dataclasses.fields(TrainingArguments):
        default = field.default
        if field.init and default is not dataclasses.MISSING:
            value = getattr(default, "value", default)  # enumerations are written as their values
            assert training_arguments()[field.name].fault(value) is None, field.name


def test_choices_are_those_of_the_enumerations():
    from transformers import SchedulerType
    from transformers.training_args import OptimizerNames

    assert set(training_arguments()["lr_scheduler_type"].choices) == {s.value for s in SchedulerType}
    assert set(training_arguments()["optim"].choices) == {s.value for s in OptimizerNames}


def test_generation_keys_are_taken_by_the_class():
    from transformers import GenerationConfig

    known = generation_arguments()
    assert {"max_new_tokens", "do_sample", "temperature"} <= known
    assert known <= set(vars(GenerationConfig())) | set(GenerationConfig().to_dict()) | {"compile_config"}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("learning_rate", 1, None),
        ("learning_rate", True, "must be float"),
        ("bf16", 1, "must be bool"),
        ("report_to", ["wandb"], None),
        ("max_steps", 1.5, "must be int"),
        ("predict_with_generate", True, "unknown key"),
        ("seed", 1, "not set under training"),
    ],
)
def test_types_are_checked(name, value, expected):
    found = training_fault(name, value, "sft", set())
    assert (found is None) if expected is None else (expected in found[0])


def test_seq2seq_has_its_own_keys():
    assert training_fault("predict_with_generate", True, "seq2seq", set()) is None


def test_defaults_are_those_of_the_class_negative_ones_too():
    known = training_arguments()
    assert known["max_steps"].default == -1
    assert known["num_train_epochs"].default == 3.0
