"""LLM-QAT: text of the model's own, what is trained, and that it beats rounding to the nearest."""

import copy

import pruned_models
import pytest
import small_compression as small
import tiny
import torch

import luthier
from luthier import checks, method
from luthier.alignment.defaults import arguments
from luthier.compression.compress import compress
from luthier.compression.linear import quantized_layers
from luthier.compression.own_words import starts, windows, write
from luthier.compression.qat import Distilling
from luthier.data.packing import PaddedCollator
from luthier.errors import DataError, MethodError
from luthier.models.saving import verify_export
from luthier.tuning.probe import probe_logits

SMALL = {"texts": 16, "max_length": 16, "learning_rate": 1e-3, "batch_size": 4}


def qat(**options):
    return method("llm_qat")(**SMALL | options)


# Text ------------------------------------------------------------------------------------------------------


def test_texts_start_with_other_tokens_and_go_on_as_the_likeliest_do():
    model = tiny.llama()
    one, other = (write(model, 12, 20, seed=0) for _ in range(2))
    assert one == other
    assert write(model, 12, 20, seed=1) != one
    assert len({text[0] for text in one}) == 12
    assert all(len(text) <= 20 for text in one)
    special = {tiny.PAD, tiny.IM_END}
    assert not special & {token for text in one for token in text}
    # The same start under another seed of the drawing: the first tokens are those of greedy text.
    again = write(model, 12, 5, seed=0, sound=(5,))
    greedy = {text[0]: text for text in again}
    for text in one:
        assert text[:3] == greedy[text[0]][:3]
    assert any(text[5:] != greedy[text[0]][5:] for text in one if len(text) > 5)


def test_drawn_text_is_drawn_from_the_whole_distribution():
    model = pruned_models.trained()
    texts = write(model, 300, 6, seed=0, sound=(1,))
    seconds = [text[1] for text in texts if len(text) > 1 and text[0] >= pruned_models.FIRST]
    assert len(set(seconds)) > 24  # of 48 states that all occur; greedy text has fewer after few starts


def test_every_token_of_the_vocabulary_starts_a_text_before_one_does_twice():
    model = tiny.llama()
    known = tiny.VOCAB - 2  # without those that end or fill a text
    found = starts(model, 3 * known, 0, (3, 4, 5))
    assert len({first for first, _ in found[:known]}) == known
    assert len(set(found)) == 3 * known  # each with each number of likeliest tokens


def test_texts_are_joined_and_cut_without_padding():
    assert windows([[1, 2, 3], [4, 5], [6, 7, 8]], 3) == [[1, 2, 3], [4, 5, 6]]
    assert windows([[1, 2]], 5) == [[1, 2]]


# Training --------------------------------------------------------------------------------------------------


def distilling(student, teacher, folder, rows, **options):
    given = {"output_dir": str(folder), "max_steps": 1, "per_device_train_batch_size": 2, "bf16": False}
    args = arguments(given, student)
    args.remove_unused_columns = False
    return Distilling(
        model=student,
        args=args,
        teacher=teacher,
        data_collator=PaddedCollator(),
        train_dataset=rows,
        **options,
    )


@torch.no_grad()
def test_the_loss_is_a_mean_over_positions_or_over_rows(tmp_path):
    student, teacher = tiny.llama(seed=1), tiny.llama(seed=0)
    ids = small.batches(1, rows=2, length=10)[0]["input_ids"]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    rows = [{"input_ids": row, "labels": row} for row in ids.tolist()]
    found = [
        distilling(student, teacher, tmp_path, rows, per_row=per).compute_loss(student, dict(batch)).item()
        for per in (False, True)
    ]
    p, log_q = teacher(ids).logits.softmax(-1), student(ids).logits.log_softmax(-1)
    expected = (p * (p.log() - log_q)).sum(-1).mean()
    assert found[0] == pytest.approx(float(expected), rel=1e-4)
    assert found[1] == pytest.approx(10 * found[0], rel=1e-5)
    same = distilling(teacher, copy.deepcopy(teacher), tmp_path, rows).compute_loss(teacher, dict(batch))
    assert float(same) == pytest.approx(0, abs=1e-5)


def test_padding_does_not_count_and_the_teacher_is_no_part_of_what_learns(tmp_path):
    student, teacher = tiny.llama(seed=1), tiny.llama(seed=0)
    rows = [{"input_ids": [7, 8, 9, 10], "labels": [7, 8, 9, 10]}, {"input_ids": [11], "labels": [11]}]
    made = distilling(student, teacher, tmp_path, rows)
    alone = [
        float(made.compute_loss(student, made.data_collator([row]))) * len(row["labels"]) for row in rows
    ]
    both = float(made.compute_loss(student, made.data_collator(rows)))
    assert both == pytest.approx(sum(alone) / 5, rel=1e-4)
    before = copy.deepcopy(teacher.state_dict())
    made.train()
    assert not any("teacher" in name for name in made.model.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_it_beats_rounding_to_the_nearest_on_text_that_was_not_trained(kv_bits):
    nearest, model = pruned_models.trained(), pruned_models.trained()
    full = pruned_models.loss(model)
    compress(nearest, method("rtn")(bits=3, group_size=None, activation_bits=8))
    with checks.collect() as lines:
        size = {"texts": 512, "max_length": 24, "batch_size": 8, "epochs": 3.0}
        records = compress(model, qat(bits=3, kv_bits=kv_bits, **size))
    lost, left = pruned_models.loss(nearest) - full, pruned_models.loss(model) - full
    assert left < 0.5 * lost
    line = next(line for line in lines if line.name.startswith("nearer to the full model"))
    assert line.passed
    assert line.value < 0.5 * line.tolerance
    assert sum(r.after for r in records) < sum(r.before for r in records)


def test_given_text_is_trained_on_instead_of_the_models_own(monkeypatch):
    monkeypatch.setattr(
        "luthier.compression.quantization.llm_qat.write", lambda *a, **k: pytest.fail("written")
    )
    model = pruned_models.trained()
    before = model.model.embed_tokens.weight.detach().clone()
    records = compress(model, qat(activation_bits=None), calibration=pruned_models.batches())
    assert {r.name for r in records} == set(quantized_layers(model))
    assert not torch.equal(model.model.embed_tokens.weight, before)
    assert {layer.scheme.bits for layer in quantized_layers(model).values()} == {4}


def test_the_same_seed_gives_the_same_codes_and_the_callers_random_numbers_stay():
    models = []
    for seed in (0, 0, 1):
        model = tiny.llama()
        compress(model, qat(seed=seed))
        models.append({n: layer.codes for n, layer in quantized_layers(model).items()})
    assert all(torch.equal(models[0][n], models[1][n]) for n in models[0])
    assert not all(torch.equal(models[0][n], models[2][n]) for n in models[0])


def test_layers_that_are_left_out_stay_plain_and_learn():
    model = tiny.llama()
    before = copy.deepcopy(model.state_dict())
    compress(model, qat(exclude=["down_proj"]))
    assert not any(n.endswith("down_proj") for n in quantized_layers(model))
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(model.state_dict()[name], before[name])


def test_half_precision_is_trained_in_float32_and_given_back():
    model = tiny.llama().bfloat16()
    compress(model, qat(kv_bits=8))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {layer.scale.dtype for layer in quantized_layers(model).values()} == {torch.bfloat16}
    assert torch.isfinite(probe_logits(model)).all()


# What is left ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"kv_bits": 4}, {"activation_bits": None, "kv_bits": 8}], ids=str)
def test_it_is_saved_as_transformers_loads_it_with_inputs_and_cache_rounded(options, tmp_path):
    model = tiny.llama()
    compress(model, qat(**options))
    luthier.save(model, tmp_path / "saved", tiny.tokenizer())
    verify_export(tmp_path / "saved", model, tiny.tokenizer())
    loaded, _ = luthier.load(tmp_path / "saved", dtype="float32", device="cpu")
    assert torch.equal(probe_logits(loaded), probe_logits(model))
    assert {n: type(m) for n, m in quantized_layers(loaded).items()} == {
        n: type(m) for n, m in quantized_layers(model).items()
    }


def test_models_that_it_cannot_train_are_refused_before_anything_is_changed():
    with pytest.raises(MethodError, match="no next tokens"):
        compress(tiny.bert(), qat())
    with pytest.raises(MethodError, match="does not divide"):
        compress(tiny.llama(), qat(group_size=24))
    rounded = tiny.llama()
    compress(rounded, method("rtn")(group_size=16))
    with pytest.raises(MethodError, match="quantised already"):
        compress(rounded, qat())
    one = {"input_ids": torch.arange(5, 13)[None], "attention_mask": torch.ones(1, 8, dtype=torch.long)}
    with pytest.raises(DataError, match="least"):
        compress(tiny.llama(), qat(), calibration=[one])
    with pytest.raises(MethodError, match="kv_bits: null"):
        compress(tiny.gpt2(), qat(kv_bits=8))
