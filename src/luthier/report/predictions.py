"""Predictions before and after, side by side with the reference, with the differences marked."""

import difflib
import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from markupsafe import Markup, escape

from luthier.report.read import Stage

Change = Literal["fixed", "broken", "right", "wrong"]
CHANGES: tuple[Change, ...] = ("broken", "fixed", "wrong", "right")
SHOWN = 30  # examples of each change that are put into the page
_LONGEST = 4000  # letters of one text
_TOKEN = re.compile(r"\w+|\s+|[^\w\s]")


@dataclass(frozen=True)
class Example:
    """One held-out example. `before` is None where there is only one evaluation.

    Attributes:
        change: fixed (better than before), broken (worse), or unchanged: right, wrong.
    """

    index: int
    prompt: str
    gold: str
    before: Markup | None
    after: Markup
    change: Change
    scores: str


@dataclass(frozen=True)
class Predictions:
    """The examples that are shown, and how many there are of each change in all."""

    examples: list[Example]
    counts: dict[Change, int]
    before: str
    after: str

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def paired(self) -> bool:
        return bool(self.before)


def compare_predictions(before: Stage | None, after: Stage) -> Predictions | None:
    """The examples of `after`, each with its twin of `before` (same index and prompt) where there is one."""
    twins = {_key(i, record): record for i, record in enumerate(before.predictions)} if before else {}
    records = [(i, record) for i, record in enumerate(after.predictions) if "prediction" in record]
    if twins:
        records = [(i, record) for i, record in records if _key(i, record) in twins]
    if not records:
        return None
    sorted_in: dict[Change, list[Example]] = {change: [] for change in CHANGES}
    counts: dict[Change, int] = dict.fromkeys(CHANGES, 0)
    for i, record in records:
        twin = twins.get(_key(i, record))
        change = _change(twin, record)
        counts[change] += 1
        if len(sorted_in[change]) < SHOWN:
            sorted_in[change].append(_example(i, twin, record, change))
    return Predictions(
        examples=_interleave(sorted_in),
        counts=counts,
        before=before.name if before and twins else "",
        after=after.name,
    )


def text_of(value: Any) -> str:
    """A prompt or answer as text: a string, a list of messages, or a structured value."""
    if isinstance(value, list) and value and all(isinstance(m, dict) and "content" in m for m in value):
        return "\n\n".join(f"{m.get('role', '')}: {m['content']}" for m in value)
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def mark_differences(gold: str, answer: str) -> Markup:
    """`answer` with what the reference has not as <mark>, and what it lacks as <del>.

    Nothing is marked where the two have less than a third in common: a page full of marks says nothing.
    """
    a, b = _TOKEN.findall(gold), _TOKEN.findall(answer)
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    if gold == answer or matcher.quick_ratio() < 0.34 or matcher.ratio() < 0.34:
        return escape(answer)
    parts: list[str] = []
    for kind, i, j, k, m in matcher.get_opcodes():
        missing, extra = escape("".join(a[i:j])), escape("".join(b[k:m]))
        if kind == "equal":
            parts.append(extra)
            continue
        if missing.strip():
            parts.append(f"<del>{missing}</del>")
        if extra:
            parts.append(f"<mark>{extra}</mark>" if extra.strip() else extra)
    return Markup("".join(parts))


def scores_of(record: dict[str, Any]) -> dict[str, float]:
    """The scores of one prediction: its `scores`, or its numeric fields."""
    found = record["scores"] if isinstance(record.get("scores"), dict) else record
    return {
        key: float(value)
        for key, value in found.items()
        if isinstance(value, int | float) and key not in ("index", "tokens", "new_tokens")
    }


def _score(record: dict[str, Any]) -> float:
    """What decides right or wrong: exact match, else the first score, else equality with the reference."""
    scores = scores_of(record)
    for name in ("exact_match", "accuracy", "correct", *scores):
        if name in scores:
            return scores[name]
    return float(text_of(record.get("prediction")).strip() == text_of(record.get("gold")).strip())


def _change(before: dict[str, Any] | None, after: dict[str, Any]) -> Change:
    score = _score(after)
    if before is not None and _score(before) != score:
        return "fixed" if score > _score(before) else "broken"
    return "right" if score >= 1 else "wrong"


def _example(index: int, before: dict[str, Any] | None, after: dict[str, Any], change: Change) -> Example:
    gold = _short(text_of(after.get("gold")))
    return Example(
        index=int(after.get("index", index)),
        prompt=_short(text_of(after.get("prompt"))),
        gold=gold,
        before=None if before is None else _answer(gold, before),
        after=_answer(gold, after),
        change=change,
        scores=_scores_text(before, after),
    )


def _answer(gold: str, record: dict[str, Any]) -> Markup:
    answer = _short(text_of(record.get("prediction")))
    return mark_differences(gold, answer) if answer else Markup('<span class="faint">(empty)</span>')


def _scores_text(before: dict[str, Any] | None, after: dict[str, Any]) -> str:
    old, new = scores_of(before) if before else {}, scores_of(after)
    parts = []
    for name, value in new.items():
        change = f"{old[name]:g} → " if name in old and old[name] != value else ""
        parts.append(f"{name.replace('_', ' ')} {change}{round(value, 3):g}")
    return ", ".join(parts[:4])


def _interleave(groups: dict[Change, list[Example]]) -> list[Example]:
    """One of each change in turn, so that the first screen shows all that happened."""
    found: list[Example] = []
    for turn in range(SHOWN):
        found.extend(group[turn] for group in groups.values() if turn < len(group))
    return found


def _key(position: int, record: dict[str, Any]) -> tuple[Any, str]:
    return record.get("index", position), text_of(record.get("prompt"))


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " … (cut for this page)"
