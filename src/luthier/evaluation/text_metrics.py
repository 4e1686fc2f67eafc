"""Scores of a written answer against its reference: pure functions on strings.

JSON is compared as what it means: spacing and the order of keys do not matter, types do. Text is compared
after Unicode normalisation (NFC) and with runs of white space as one space; letters' case counts.
"""

import json
import re
import unicodedata
from collections.abc import Iterable
from decimal import Decimal, InvalidOperation
from functools import cache
from typing import Any

import numpy as np

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")
_MISSING = object()


def normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def parsed(text: str) -> Any:
    """The value of a JSON text, or a marker that equals nothing where it is none (or has a key twice)."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _MISSING


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def equal(a: Any, b: Any) -> bool:
    """Whether two JSON values are the same; 1 equals 1.0 but not true."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, str) and isinstance(b, str):
        return normalised(a) == normalised(b)
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    return bool(a == b)


def exact_match(prediction: str, gold: str) -> float:
    """1 where the answer is the reference: as JSON values if both are JSON, else as normalised text."""
    found, wanted = parsed(prediction), parsed(gold)
    if found is not _MISSING and wanted is not _MISSING:
        return float(equal(found, wanted))
    return float(normalised(prediction) == normalised(gold))


def fields(value: Any) -> dict[str, Any]:
    """The fields of a JSON record, nested ones as `outer.inner`. A null says that there is none."""
    found: dict[str, Any] = {}
    if not isinstance(value, dict):
        return found
    for key, item in value.items():
        if isinstance(item, dict):
            found |= {f"{key}.{inner}": x for inner, x in fields(item).items()}
        elif item is not None:
            found[key] = item
    return found


def field_counts(prediction: str, gold: str) -> dict[str, np.ndarray]:
    """(right, predicted, wanted) of every field that the answer or the reference has.

    A text that is no JSON object has no field. F1 = 2 right / (predicted + wanted); fields that are null in
    both do not count, so that an answer of nulls earns nothing.
    """
    found, wanted = fields(parsed(prediction)), fields(parsed(gold))
    return {
        key: np.array(
            [key in found and key in wanted and equal(found[key], wanted[key]), key in found, key in wanted],
            dtype=float,
        )
        for key in dict.fromkeys([*wanted, *found])
    }


def total(counts: Iterable[np.ndarray]) -> np.ndarray:
    """The sum of (right, predicted, wanted) triples."""
    return sum(counts, np.zeros(3))


def f1(sums: np.ndarray) -> np.ndarray:
    """2 right / (predicted + wanted) of (..., 3); 1 where nothing was wanted and nothing predicted."""
    below = sums[..., 1] + sums[..., 2]
    return np.divide(2 * sums[..., 0], below, out=np.ones(sums.shape[:-1]), where=below != 0)


def final_number(text: str) -> Decimal | None:
    """The number behind the last `####` (GSM8K's mark of the answer), else the last number of the text."""
    marked = text.rpartition("####")[2] if "####" in text else text
    numbers = _NUMBER.findall(marked)
    if not numbers:
        return None
    number = numbers[0] if "####" in text else numbers[-1]
    try:
        return Decimal(number.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


def number_match(prediction: str, gold: str) -> float:
    """1 where both end in the same number (Cobbe et al., 2021, GSM8K)."""
    wanted = final_number(gold)
    return float(wanted is not None and final_number(prediction) == wanted)


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)


def rouge(prediction: str, gold: str) -> dict[str, float]:
    """F1 of ROUGE-1, -2 and -L (Lin, 2004) by the package rouge-score, without stemming."""
    return {name: float(score.fmeasure) for name, score in _rouge().score(gold, prediction).items()}
