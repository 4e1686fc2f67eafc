"""Metrics of a model on held-out data, each with its confidence interval, and what the model answered."""

import dataclasses
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from luthier.acceleration.fused_lora import fused
from luthier.data.load import Loaded, load
from luthier.data.rows import Row
from luthier.data.spec import DataSpec
from luthier.data.tokenize import conversation, gold, prompt_ids, prompt_text
from luthier.errors import DataError, MethodError, did_you_mean
from luthier.evaluation import text_metrics
from luthier.evaluation.bootstrap import Metric, interval, mean
from luthier.evaluation.choices import rank
from luthier.evaluation.classification import binary_f1, class_counts, classify, macro_f1
from luthier.evaluation.generation import Answer, generate
from luthier.evaluation.names import METRICS
from luthier.evaluation.perplexity import perplexity, sequences
from luthier.evaluation.text_prompt import TextPrompt
from luthier.models import structure
from luthier.tuning.hooks import row_inputs

log = logging.getLogger("luthier.evaluation")

ROUGE = ("rouge1", "rouge2", "rougeL")
SHORTEST_LIMIT = 32  # new tokens


@dataclass
class Evaluation:
    """What was measured.

    Attributes:
        metrics: by name as asked for, and "ended": the share of answers that ended by themselves.
        predictions: one a row: {index, prompt, gold, prediction, scores, ...}; none for perplexity alone.
        details: numbers behind a metric, such as the F1 of each field.
    """

    metrics: dict[str, Metric] = field(default_factory=dict)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


def evaluate(
    model: nn.Module,
    data: DataSpec | Loaded | str | Path,
    metrics: Sequence[str] = ("perplexity",),
    *,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 16,
    generation: dict[str, Any] | None = None,
    samples: int | None = None,
    seed: int = 0,
    window: int | None = None,
    stride: int | None = None,
    prompt: TextPrompt | str | Path | None = None,
) -> Evaluation:
    """Measure a model.

    Args:
        data: a file, a data specification, or rows that are loaded already.
        metrics: names of `luthier.evaluation.names.METRICS`; those that generate share the answers.
        batch_size: rows that go through the model at once.
        generation: fields of `transformers.GenerationConfig`. Answers are greedy; where no limit is given
            they may be one and a half times as long as the longest reference answer.
        samples: use so many rows only, drawn with the seed.
        seed: of the rows drawn, of sampling and of the bootstrap.
        window, stride: of the perplexity of texts longer than the window, see `perplexity`.
        prompt: a text prompt, or its file or folder; a language model classifies with it.

    Raises:
        MethodError: an unknown metric, or one that cannot be measured on this kind of model.
        DataError: rows that a metric cannot be measured on.
    """
    loaded = _sampled(data if isinstance(data, Loaded) else load(data), samples, seed)
    if isinstance(prompt, str | Path):
        prompt = TextPrompt.load(prompt)
    _require_measurable("classification" if prompt is not None else structure.task(model), loaded, metrics)
    with fused(model):  # PEFT would copy every input of an adapter in bfloat16 to float32
        found = _measured(
            model, loaded, metrics, tokenizer, batch_size, generation or {}, seed, window, stride, prompt
        )
    for prediction, row in zip(found.predictions, loaded.records, strict=False):
        prediction["index"] = row["index"]
    found.metrics = {name: found.metrics[name] for name in [*metrics, "ended"] if name in found.metrics}
    for name, metric in found.metrics.items():
        log.info("%s = %.4g (%.4g to %.4g, n = %d)", name, metric.value, metric.low, metric.high, metric.n)
    return found


def _measured(
    model: nn.Module,
    loaded: Loaded,
    metrics: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    generation: dict[str, Any],
    seed: int,
    window: int | None,
    stride: int | None,
    prompt: TextPrompt | None,
) -> Evaluation:
    found = Evaluation()
    if "perplexity" in metrics:
        texts, of_rows = sequences(loaded, tokenizer)
        inputs = row_inputs(model, [loaded.records[i] for i in of_rows])
        found.metrics["perplexity"] = perplexity(
            model, texts, batch_size=batch_size, window=window, stride=stride, seed=seed, inputs=inputs
        )
    written = [name for name in metrics if METRICS[name].generates]
    if written:
        answers, wanted = _answers(model, tokenizer, loaded, batch_size, generation, seed)
        _score_answers(found, loaded, answers, wanted, written, seed)
    if chosen := [name for name in metrics if name.startswith("multiple_choice")]:
        _score_choices(found, model, tokenizer, loaded, chosen, batch_size, seed)
    if classes := [name for name in metrics if METRICS[name].tasks == ("classification",)]:
        if prompt is not None:
            classified = prompt.classify(model, tokenizer, loaded, batch_size=batch_size)
        else:
            classified = classify(model, tokenizer, loaded, batch_size=batch_size)
        _score_classes(found, loaded, classified, classes, seed)
    return found


def _sampled(loaded: Loaded, samples: int | None, seed: int) -> Loaded:
    """The rows drawn, in the order of the file; each knows its place there as `index`."""
    order = list(range(len(loaded)))
    if samples is not None and samples < len(loaded):
        order = sorted(random.Random(seed).sample(order, samples))
    return dataclasses.replace(loaded, records=[loaded.records[i] | {"index": i} for i in order])


def _require_measurable(task: str | None, loaded: Loaded, metrics: Sequence[str]) -> None:
    for name in metrics:
        if name not in METRICS:
            raise MethodError(f"There is no metric '{name}'.", fix=did_you_mean(name, METRICS))
        known = METRICS[name]
        if task is not None and task not in known.tasks:
            fitting = [other for other, m in METRICS.items() if task in m.tasks]
            raise MethodError(
                f"{name} cannot be measured on a {task} model.", fix=f"Metrics for it: {', '.join(fitting)}."
            )
        if loaded.type not in known.rows:
            fitting = [other for other, m in METRICS.items() if loaded.type in m.rows]
            raise DataError(
                f"{name} needs rows of {' or '.join(known.rows)}; {loaded.spec.path} holds {loaded.type}.",
                fix=f"Metrics for such rows: {', '.join(fitting) or 'none'}.",
            )


# Written answers ----------------------------------------------------------------------------------------


def _answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    loaded: Loaded,
    batch_size: int,
    generation: dict[str, Any],
    seed: int,
) -> tuple[list[Answer], list[str]]:
    wanted = [_gold(loaded, i) for i in range(len(loaded))]
    if structure.base(model).config.is_encoder_decoder:
        prompts = [
            tokenizer(prompt_text(row, tokenizer), verbose=False)["input_ids"] for row in loaded.records
        ]
    else:
        prompts = [prompt_ids(row, tokenizer) for row in loaded.records]
    if not {"max_new_tokens", "max_length"} & generation.keys():
        longest = max(
            len(ids) for ids in tokenizer(wanted, add_special_tokens=False, verbose=False)["input_ids"]
        )
        generation = generation | {"max_new_tokens": max(SHORTEST_LIMIT, longest * 3 // 2)}
    answers = generate(
        model,
        tokenizer,
        prompts,
        batch_size=batch_size,
        options=generation,
        seed=seed,
        where=loaded.where,
        inputs=row_inputs(model, loaded.records),
    )
    return answers, wanted


def _gold(loaded: Loaded, index: int) -> str:
    try:
        return gold(loaded.records[index])
    except DataError as error:
        raise DataError(f"{loaded.where(index)}: {error.message}", fix=error.fix) from error


def _score_answers(
    found: Evaluation,
    loaded: Loaded,
    answers: list[Answer],
    wanted: list[str],
    metrics: list[str],
    seed: int,
) -> None:
    pairs = [(answer.text, reference) for answer, reference in zip(answers, wanted, strict=True)]
    scores: dict[str, list[float]] = {}
    if "exact_match" in metrics:
        scores["exact_match"] = [text_metrics.exact_match(*pair) for pair in pairs]
    if "final_number" in metrics:
        scores["final_number"] = [text_metrics.number_match(*pair) for pair in pairs]
    if rouges := [name for name in ROUGE if name in metrics]:
        each = [text_metrics.rouge(*pair) for pair in pairs]
        scores |= {name: [row[name] for row in each] for name in rouges}
    scores["ended"] = [float(answer.finished) for answer in answers]
    for name, values in scores.items():
        found.metrics[name] = interval(mean(np.array(values)), seed=seed)
    if "field_f1" in metrics:
        scores["field_f1"] = _score_fields(found, loaded, pairs, seed)
    names = [name for name in metrics if name in scores]
    for i, (answer, reference) in enumerate(zip(answers, wanted, strict=True)):
        found.predictions.append(
            {
                "prompt": _shown_prompt(loaded.records[i]),
                "gold": reference,
                "prediction": answer.text,
                "finished": answer.finished,
                "scores": {name: scores[name][i] for name in names},
            }
        )


def _score_fields(found: Evaluation, loaded: Loaded, pairs: list[tuple[str, str]], seed: int) -> list[float]:
    """Micro F1 over all fields; that of each field goes into the details. The F1 of each row."""
    bare = [
        i for i, (_, reference) in enumerate(pairs) if not isinstance(text_metrics.parsed(reference), dict)
    ]
    if bare:
        raise DataError(
            f"field_f1 compares JSON records, but the reference of {loaded.where(bare[0])} is none: "
            f"{pairs[bare[0]][1][:80]!r}.",
            fix="Use exact_match or a rouge metric.",
        )
    counts = [text_metrics.field_counts(*pair) for pair in pairs]
    rows = np.array([text_metrics.total(row.values()) for row in counts])  # (n, 3)
    found.metrics["field_f1"] = interval(rows, text_metrics.f1, seed=seed)
    names = dict.fromkeys(name for _, reference in pairs for name in text_metrics.parsed(reference))
    found.details["field_f1"] = {
        name: float(text_metrics.f1(text_metrics.total(row[name] for row in counts if name in row)))
        for name in names
    }
    return [float(value) for value in text_metrics.f1(rows)]


def _shown_prompt(row: Row) -> Any:
    if isinstance(row.get("prompt"), str):
        return row["prompt"]
    messages, asked = conversation(row)
    return [{"role": m["role"], "content": m["content"]} for m in messages[:asked]]


# Choices and classes ------------------------------------------------------------------------------------


def _score_choices(
    found: Evaluation,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    loaded: Loaded,
    metrics: list[str],
    batch_size: int,
    seed: int,
) -> None:
    ranked = rank(model, tokenizer, loaded, batch_size=batch_size)
    scores = {name: [question.right(name.endswith("_norm")) for question in ranked] for name in metrics}
    for name, values in scores.items():
        found.metrics[name] = interval(mean(np.array(values)), seed=seed)
    for i, (row, question) in enumerate(zip(loaded.records, ranked, strict=True)):
        order = question.norm if metrics == ["multiple_choice_norm"] else question.raw
        found.predictions.append(
            {
                "prompt": row["prompt"],
                "gold": row["choices"][row["label"]],
                "prediction": row["choices"][int(np.argmax(order))],
                "log_likelihoods": question.raw.tolist(),
                "scores": {name: scores[name][i] for name in metrics},
            }
        )


_OF_CLASSES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"f1": macro_f1, "binary_f1": binary_f1}


def _score_classes(
    found: Evaluation,
    loaded: Loaded,
    classified: tuple[np.ndarray, np.ndarray, list[str]],
    metrics: list[str],
    seed: int,
) -> None:
    predicted, wanted, names = classified
    right = (predicted == wanted).astype(float)
    counts = class_counts(predicted, wanted, len(names))
    if "binary_f1" in metrics and len(names) != 2:
        raise DataError(f"binary_f1 needs two classes, not {len(names)}.", fix="Use f1.")
    for name in metrics:
        rows, statistic = (counts, _OF_CLASSES[name]) if name in _OF_CLASSES else (mean(right), None)
        found.metrics[name] = interval(rows, statistic, seed=seed) if statistic else interval(rows, seed=seed)
    for i, row in enumerate(loaded.records):
        text = f"{row['text']}\n{row['text_pair']}" if row.get("text_pair") else row["text"]
        found.predictions.append(
            {
                "prompt": text,
                "gold": names[wanted[i]],
                "prediction": names[predicted[i]],
                "scores": {"accuracy": right[i]},
            }
        )
