"""`evaluate` on data files: metrics with intervals and one prediction a row."""

import json
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import peft
import pytest
import torch

from luthier.data.load import load
from luthier.data.tokenize import encode
from luthier.errors import DataError, MethodError
from luthier.evaluation import evaluate as module
from luthier.evaluation.evaluate import evaluate
from luthier.evaluation.generation import Answer
from luthier.evaluation.names import METRICS


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"Count to {i}.", "completion": json.dumps({"n": i, "m": None})} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def answers(monkeypatch):
    """Lets a test say what the model writes, by row."""

    def say(texts):
        made = [Answer(text, finished, 3) for text, finished in texts]
        monkeypatch.setattr(module, "generate", lambda *a, **k: made)

    return say


def test_perplexity_weighs_tokens_of_the_answers(tiny_llama, tiny_tokenizer, records):
    found = evaluate(tiny_llama, records, ["perplexity"], tokenizer=tiny_tokenizer).metrics["perplexity"]
    total, count = 0.0, 0
    for row in encode(load(records), tiny_tokenizer, max_length=None).dataset:
        ids, labels = torch.tensor(row["input_ids"]).long(), torch.tensor(row["labels"]).long()
        with torch.no_grad():
            logs = torch.log_softmax(tiny_llama(ids[None]).logits[0].double(), -1)
        for position in range(1, len(ids)):
            if labels[position] != -100:
                total, count = total - logs[position - 1, ids[position]].item(), count + 1
    assert found.value == pytest.approx(np.exp(total / count), rel=1e-5)
    assert found.low < found.value < found.high
    assert found.n == 6


def test_answers_are_scored_and_kept(tiny_llama, tiny_tokenizer, records, answers):
    said = ['{"m": null, "n": 0}', '{"n": 9}', "", '{"n": 3}', '{"n": 4, "m": null}', "{"]
    answers([(text, text.endswith("}")) for text in said])
    metrics = ["rougeL", "field_f1", "exact_match"]
    found = evaluate(tiny_llama, records, metrics, tokenizer=tiny_tokenizer)
    assert list(found.metrics) == [*metrics, "ended"]
    assert found.metrics["exact_match"].value == pytest.approx(2 / 6)
    assert found.metrics["ended"].value == pytest.approx(4 / 6)
    # right 3 (rows 0, 3, 4), predicted 4, wanted 6
    assert found.metrics["field_f1"].value == pytest.approx(2 * 3 / (4 + 6))
    assert found.details["field_f1"] == {"n": pytest.approx(0.6), "m": 1.0}
    assert [p["scores"]["exact_match"] for p in found.predictions] == [1, 0, 0, 0, 1, 0]
    assert found.predictions[2] == {
        "index": 2,
        "prompt": "Count to 2.",
        "gold": '{"n": 2, "m": null}',
        "prediction": "",
        "finished": False,
        "scores": {"rougeL": 0.0, "field_f1": 0.0, "exact_match": 0.0},
    }


def test_an_adapter_is_measured_fused_and_left_as_it_was(tiny_llama, tiny_tokenizer, records, monkeypatch):
    """The numbers are those of PEFT's own forward; afterwards the layers are PEFT's again."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(tiny_llama, config)
    found = evaluate(model, records, ["perplexity"], tokenizer=tiny_tokenizer)
    assert not any("forward" in module.__dict__ for module in model.modules())
    calls = []
    monkeypatch.setattr(module, "fused", lambda model: nullcontext(calls.append(model)))
    plain = evaluate(model, records, ["perplexity"], tokenizer=tiny_tokenizer)
    assert calls == [model]
    assert found.metrics["perplexity"].value == pytest.approx(plain.metrics["perplexity"].value, rel=1e-5)
    with model.disable_adapter():
        base = evaluate(model, records, ["perplexity"], tokenizer=tiny_tokenizer)
    assert base.metrics["perplexity"].value != pytest.approx(plain.metrics["perplexity"].value, rel=1e-3)


def test_rows_are_drawn_by_seed_and_know_their_place(tiny_llama, tiny_tokenizer, records):
    def run(seed):
        return evaluate(
            tiny_llama,
            records,
            ["exact_match"],
            tokenizer=tiny_tokenizer,
            generation={"max_new_tokens": 2},
            samples=3,
            seed=seed,
        ).predictions

    assert run(0) == run(0)
    for prediction in run(0):
        assert prediction["gold"] == json.dumps({"n": prediction["index"], "m": None})
    assert len({tuple(p["index"] for p in run(seed)) for seed in range(6)}) > 1


def test_the_limit_of_new_tokens_follows_the_references(tiny_llama, tiny_tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "data.jsonl"
    long = "word " * 60
    path.write_text(json.dumps({"prompt": "Say.", "completion": long}) + "\n")
    seen = {}
    monkeypatch.setattr(module, "generate", lambda *a, **k: seen.update(k) or [Answer("", True, 0)])
    evaluate(tiny_llama, path, ["exact_match"], tokenizer=tiny_tokenizer)
    tokens = len(tiny_tokenizer(long.strip(), add_special_tokens=False)["input_ids"])
    assert seen["options"] == {"max_new_tokens": tokens * 3 // 2}
    evaluate(tiny_llama, path, ["exact_match"], tokenizer=tiny_tokenizer, generation={"max_new_tokens": 5})
    assert seen["options"] == {"max_new_tokens": 5}


def test_an_encoder_decoder_writes_answers(tiny_t5, tiny_tokenizer, records):
    found = evaluate(tiny_t5, records, ["rouge1"], tokenizer=tiny_tokenizer, generation={"max_new_tokens": 3})
    assert found.metrics["rouge1"].n == 6


def test_choices_are_scored_both_ways(tiny_llama, tiny_tokenizer, tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [
        {"prompt": f"Is {i} odd?", "choices": ["yes", "no, not at all"], "label": i % 2} for i in range(5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = ["multiple_choice", "multiple_choice_norm"]
    found = evaluate(tiny_llama, path, metrics, tokenizer=tiny_tokenizer)
    for name in metrics:
        assert found.metrics[name].value == np.mean([p["scores"][name] for p in found.predictions])
    for prediction, row in zip(found.predictions, rows, strict=True):
        best = int(np.argmax(prediction["log_likelihoods"]))
        assert prediction["prediction"] == row["choices"][best]
        assert prediction["scores"]["multiple_choice"] == (best == row["label"])


def test_a_classifier_is_measured_by_accuracy_and_f1(tiny_bert, tiny_tokenizer, tmp_path):
    path = tmp_path / "data.jsonl"
    texts = [("good " * (i + 1), "abc"[i % 3]) for i in range(9)]
    path.write_text("".join(json.dumps({"text": t, "label": c}) + "\n" for t, c in texts))
    tiny_bert.config.id2label = dict(enumerate("abc"))
    found = evaluate(tiny_bert, path, ["accuracy", "f1"], tokenizer=tiny_tokenizer, batch_size=4)
    right = [p["prediction"] == p["gold"] for p in found.predictions]
    assert [p["gold"] for p in found.predictions] == [c for _, c in texts]
    assert found.metrics["accuracy"].value == pytest.approx(np.mean(right))
    with pytest.raises(DataError, match="two classes"):
        evaluate(tiny_bert, path, ["binary_f1"], tokenizer=tiny_tokenizer)


@pytest.mark.parametrize(
    ("metric", "error", "says"),
    [
        ("exact_macth", MethodError, "Did you mean 'exact_match'"),
        ("accuracy", MethodError, "cannot be measured"),
        ("multiple_choice", DataError, "needs rows of multiple_choice"),
    ],
)
def test_metrics_that_do_not_fit_are_refused(tiny_llama, tiny_tokenizer, records, metric, error, says):
    with pytest.raises(error, match=says):
        evaluate(tiny_llama, records, [metric], tokenizer=tiny_tokenizer)


def test_a_row_without_answer_or_record_is_named(tiny_llama, tiny_tokenizer, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "gold": "x"}\n{"prompt": "b"}\n')
    with pytest.raises(DataError, match=r"data\.jsonl:2: .*no reference answer"):
        evaluate(tiny_llama, path, ["exact_match"], tokenizer=tiny_tokenizer)
    path.write_text('{"prompt": "a", "completion": "{}"}\n{"prompt": "b", "completion": "text"}\n')
    with pytest.raises(DataError, match=r"data\.jsonl:2 is none"):
        evaluate(tiny_llama, path, ["field_f1"], tokenizer=tiny_tokenizer, generation={"max_new_tokens": 1})


def test_names_are_read_without_torch_and_each_says_what_it_needs():
    code = "import sys, luthier.evaluation.names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    for name, metric in METRICS.items():
        assert name == metric.name
        assert metric.tasks
        assert metric.rows
        assert metric.help.endswith(".")
