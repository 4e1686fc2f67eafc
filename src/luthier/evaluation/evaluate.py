"""Measure a model on data: metrics with confidence intervals, and what it answered to each example."""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from rich.progress import track
from transformers import set_seed

from luthier.data.load import Loaded, load
from luthier.data.spec import DataSpec
from luthier.data.tokenize import encode, encode_classification, gold, prompt_ids
from luthier.errors import DataError, MethodError, did_you_mean
from luthier.evaluation import classification, text_metrics
from luthier.evaluation.bootstrap import Metric, bootstrap, mean
from luthier.evaluation.generation import generate
from luthier.evaluation.names import METRICS
from luthier.evaluation.perplexity import token_losses
from luthier.models.structure import task

# Longest window that is scored at once; models that take less have it in their config.
WINDOW = 2048


@dataclass
class Evaluation:
    """`metrics` by name; `predictions` has {index, prompt, gold, prediction, scores, ended} an example."""

    metrics: dict[str, Metric] = field(default_factory=dict)
    predictions: list[dict[str, Any]] = field(default_factory=list)


def evaluate(
    model: Any,
    data: Loaded | DataSpec | str | Path,
    metrics: tuple[str, ...] | list[str] = ("perplexity",),
    *,
    tokenizer: Any,
    batch_size: int = 16,
    generation: dict[str, Any] | None = None,
    samples: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """Evaluate a causal model, an encoder-decoder or a classifier.

    Args:
        data: rows with a reference: messages, prompt and completion, text (perplexity), or text and label.
        metrics: names from `luthier.evaluation.names.METRICS`.
        generation: options of transformers' `GenerationConfig`; greedy by default.
        samples: draw this many rows with `seed`, the same ones for every model; None takes all.

    Raises:
        MethodError: an unknown metric, or one that this kind of model cannot be measured by.
        DataError: the rows do not have what a metric needs.
    """
    kind = task(model) or "causal"
    _require(metrics, kind)
    loaded = data if isinstance(data, Loaded) else load(data)
    rows = _drawn(loaded, samples, seed)
    training = model.training
    model.eval()
    set_seed(seed)  # sampled answers are the same in every run
    found = Evaluation()
    try:
        if kind == "classification":
            _classify(found, model, rows, tokenizer, metrics, batch_size, seed)
        if "perplexity" in metrics:
            found.metrics["perplexity"] = _perplexity(model, rows, tokenizer, seed)
        if any(METRICS[name].generates for name in metrics):
            _answer(found, model, rows, tokenizer, metrics, batch_size, generation or {}, seed)
    finally:
        model.train(training)
    return found


def _require(metrics: tuple[str, ...] | list[str], kind: str) -> None:
    for name in metrics:
        if name not in METRICS:
            raise MethodError(f"There is no metric '{name}'.", fix=did_you_mean(name, METRICS))
        if kind not in METRICS[name].tasks:
            fitting = ", ".join(metric.name for metric in METRICS.values() if kind in metric.tasks)
            raise MethodError(
                f"'{name}' cannot be measured on a {kind} model.", fix=f"Choose from: {fitting}."
            )


def _drawn(loaded: Loaded, samples: int | None, seed: int) -> Loaded:
    if samples is None or samples >= len(loaded):
        return loaded
    chosen = sorted(random.Random(seed).sample(range(len(loaded)), samples))
    return Loaded([loaded.records[i] for i in chosen], loaded.type, loaded.report, loaded.spec)


def _perplexity(model: Any, rows: Loaded, tokenizer: Any, seed: int) -> Metric:
    """Of the tokens that training would train: the answers of conversations, all of plain text."""
    encoded = encode(rows, tokenizer, max_length=None)
    examples = [(row["input_ids"], row["labels"]) for row in encoded.dataset.with_format(None)]
    window = min(getattr(model.config, "max_position_embeddings", WINDOW), WINDOW)
    counts = token_losses(model, examples, window=window)
    return bootstrap(counts, lambda s: np.exp(s[:, 0] / np.maximum(s[:, 1], 1)), seed=seed)


def _answer(
    found: Evaluation,
    model: Any,
    rows: Loaded,
    tokenizer: Any,
    metrics: tuple[str, ...] | list[str],
    batch_size: int,
    generation: dict[str, Any],
    seed: int,
) -> None:
    references = [gold(row) for row in rows.records]
    if task(model) == "seq2seq":
        prompts = [tokenizer(_source(row))["input_ids"] for row in rows.records]
    else:
        prompts = [prompt_ids(row, tokenizer) for row in rows.records]
    # Prompts of like length are taken together, some batches at a time: one bar shows how far it is.
    step = batch_size * 8
    answers: dict[int, Any] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in track(range(0, len(order), step), description="answers", transient=True):
        part = order[start : start + step]
        made = generate(model, tokenizer, [prompts[i] for i in part], batch_size=batch_size, **generation)
        answers |= dict(zip(part, made, strict=True))
    pairs = [(answers[i].text, reference) for i, reference in enumerate(references)]
    scores: dict[str, np.ndarray] = {}
    if "exact_match" in metrics:
        scores["exact_match"] = np.array([text_metrics.exact_match(*pair) for pair in pairs])
    if "rougeL" in metrics:
        scores["rougeL"] = np.array([text_metrics.rouge_l(*pair) for pair in pairs])
    if "field_f1" in metrics:
        counts = np.array([text_metrics.field_counts(*pair) for pair in pairs], dtype=np.float64)
        scores["field_f1"] = text_metrics.f1_of_counts(counts)
        found.metrics["field_f1"] = bootstrap(counts, text_metrics.f1_of_counts, seed=seed)
    for name in ("exact_match", "rougeL"):
        if name in scores:
            found.metrics[name] = mean(scores[name], seed=seed)
    ended = np.array([float(answers[i].ended) for i in range(len(references))])
    found.metrics["ended"] = mean(ended, seed=seed)
    for i, row in enumerate(rows.records):
        found.predictions.append(
            {
                "index": i,
                "prompt": _source(row),
                "gold": references[i],
                "prediction": answers[i].text,
                "ended": answers[i].ended,
                "scores": {name: float(values[i]) for name, values in scores.items()},
            }
        )


def _source(row: dict[str, Any]) -> str:
    """What was asked, as one text."""
    prompt = row["messages"][:-1] if "messages" in row else row.get("prompt")
    if prompt is None:
        raise DataError(
            "Rows without prompt cannot be answered.", fix="Give prompt and completion, or messages."
        )
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def _classify(
    found: Evaluation,
    model: Any,
    rows: Loaded,
    tokenizer: Any,
    metrics: tuple[str, ...] | list[str],
    batch_size: int,
    seed: int,
) -> None:
    names = _class_names(model, rows)
    limit = getattr(model.config, "max_position_embeddings", None)
    encoded = encode_classification(rows, tokenizer, max_length=limit, labels=names)
    reference = np.array(encoded.dataset["labels"])
    logits = classification.predict(model, encoded.dataset, tokenizer.pad_token_id, batch_size=batch_size)
    predicted = logits.argmax(1)
    right = (predicted == reference).astype(np.float64)
    if "accuracy" in metrics:
        found.metrics["accuracy"] = mean(right, seed=seed)
    if "f1" in metrics:
        counts = classification.confusion(predicted, reference, logits.shape[1])
        found.metrics["f1"] = bootstrap(counts, classification.macro_f1, seed=seed)
    label_names = encoded.label_names or [str(i) for i in range(logits.shape[1])]
    found.predictions = [
        {
            "index": i,
            "prompt": row["text"],
            "gold": label_names[reference[i]],
            "prediction": label_names[predicted[i]],
            "scores": {"accuracy": float(right[i])},
        }
        for i, row in enumerate(rows.records)
    ]


def _class_names(model: Any, rows: Loaded) -> list[str] | None:
    """The names that the model was trained with, unless they are transformers' LABEL_0, LABEL_1, ..."""
    config = model.get_base_model().config if isinstance(model, PeftModel) else model.config
    names = [config.id2label[i] for i in range(config.num_labels)]
    return rows.spec.labels if all(name.startswith("LABEL_") for name in names) else names
