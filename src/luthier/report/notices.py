"""What a training log says in plain words: healthy, or what to look at, each with its numbers."""

import math
from typing import Any

from luthier.report.charts import Point


def series(history: list[dict[str, Any]], name: str) -> list[Point]:
    """(step, value) of one logged number."""
    return [
        (float(entry.get("step", i)), float(entry[name]))
        for i, entry in enumerate(history)
        if isinstance(entry.get(name), int | float)
    ]


def read_curves(history: list[dict[str, Any]]) -> list[tuple[bool, str]]:
    """(needs attention, sentence) about loss, held-out loss and gradients."""
    found: list[tuple[bool, str]] = []
    loss = series(history, "loss")
    if bad := [step for step, value in loss if not math.isfinite(value)]:
        found.append(
            (True, f"The training loss was not finite at step {bad[0]:.0f}: lower the learning rate.")
        )
    loss = [p for p in loss if math.isfinite(p[1])]
    if len(loss) >= 2:
        found.append(_loss(loss))
    held_out = series(history, "eval_loss")
    if len(held_out) >= 2:
        found.append(_held_out(held_out))
    if notice := _gradients(series(history, "grad_norm")):
        found.append(notice)
    return found


def _loss(loss: list[Point]) -> tuple[bool, str]:
    tail = loss[-max(1, len(loss) // 10) :]
    first, last = loss[0][1], sum(value for _, value in tail) / len(tail)
    if last > first:
        return True, (
            f"The training loss rose from {first:.3g} to {last:.3g}: nothing was learned. "
            "Lower the learning rate, or check that the answers are what is trained."
        )
    sentence = f"The training loss fell from {first:.3g} to {last:.3g}"
    if last < 0.01:
        return True, f"{sentence}: the training data is known by heart. Train less, or on more data."
    return False, f"{sentence}."


def _held_out(points: list[Point]) -> tuple[bool, str]:
    best, last = min(points, key=lambda p: p[1]), points[-1]
    if last[1] > best[1] * 1.02:
        return True, (
            f"The held-out loss was lowest ({best[1]:.3g}) at step {best[0]:.0f} and rose to {last[1]:.3g}: "
            "from there on the model memorised. Train less, or on more data."
        )
    return False, f"The held-out loss ended at {last[1]:.3g}, within 2% of its lowest."


def _gradients(points: list[Point]) -> tuple[bool, str] | None:
    values = sorted(value for _, value in points if math.isfinite(value))
    if len(values) < 5:
        return None
    middle = values[len(values) // 2]
    step, top = max(points, key=lambda p: p[1])
    if middle == 0:
        return True, "The gradients are zero: nothing learns."
    if top > 20 * middle and step > points[len(points) // 10][0]:
        return True, (
            f"The gradient norm jumped to {top:.3g} at step {step:.0f}, {top / middle:.0f} times its median: "
            "a bad batch, or too large a learning rate."
        )
    return None
