"""Scores of one answer against its reference: exact match, fields of a record, ROUGE."""

import json
from typing import Any

import numpy as np


def parsed(text: str) -> Any:
    """The JSON value in `text`, or None where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def exact_match(answer: str, gold: str) -> float:
    """1.0 where the answer is the reference: as JSON values if both are objects or lists, else as text
    without white space at the ends."""
    mine, theirs = parsed(answer), parsed(gold)
    if isinstance(theirs, dict | list):
        return float(mine == theirs)
    return float(answer.strip() == gold.strip())


def field_counts(answer: str, gold: str) -> tuple[int, int, int]:
    """Fields right, given and wanted: F1 = 2 right / (given + wanted).

    A field counts where its value is not null; it is right where name and value agree. An answer that is no
    JSON object gives no field.
    """
    mine, theirs = parsed(answer), parsed(gold)
    given = {k: v for k, v in mine.items() if v is not None} if isinstance(mine, dict) else {}
    wanted = {k: v for k, v in theirs.items() if v is not None} if isinstance(theirs, dict) else {}
    right = sum(key in wanted and wanted[key] == value for key, value in given.items())
    return right, len(given), len(wanted)


def f1_of_counts(sums: np.ndarray) -> np.ndarray:
    """Micro F1 of summed (right, given, wanted), (b, 3) to (b,); 0 where there is no field at all."""
    return 2 * sums[:, 0] / np.maximum(sums[:, 1] + sums[:, 2], 1)


def rouge_l(answer: str, gold: str) -> float:
    """ROUGE-L F1 (Lin, 2004) by the rouge-score package, with stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer(["rougeL"], use_stemmer=True).score(gold, answer)["rougeL"].fmeasure)
