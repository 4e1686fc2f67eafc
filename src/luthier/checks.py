"""Proofs that run by default. Each leaves one line (when, name, pass, number, tolerance) in the terminal
and the report.

A proof is recorded with `record(...)` from wherever it is made (loading, training, merging, export); the
innermost `collect()` around it keeps the lines. A failed proof raises `CheckError`: a wrong result is
refused, never only warned about. The functions that compute the numbers live with what they prove.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any, Literal

from luthier.errors import CheckError

When = Literal["validate", "data", "before", "step1", "checkpoint", "merge", "export", "end"]

log = logging.getLogger("luthier.checks")


@dataclass(frozen=True)
class Check:
    """One line of proof. `value` is the number found and `tolerance` what it is held against."""

    when: When
    name: str
    passed: bool
    value: float | int | str | None = None
    tolerance: float | int | str | None = None
    detail: str = ""

    def line(self) -> str:
        mark = "✓" if self.passed else "✗"
        parts = [f"{mark} {self.when:<10} {self.name}"]
        if self.value is not None:
            parts.append(f"= {_show(self.value)}")
        if self.tolerance is not None:
            parts.append(f"(held to {_show(self.tolerance)})")
        if self.detail:
            parts.append(f"· {self.detail}")
        return " ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _show(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


_ledger: ContextVar[list[Check] | None] = ContextVar("luthier_ledger", default=None)


@contextmanager
def collect() -> Iterator[list[Check]]:
    """Keep the lines recorded inside; an outer `collect()` gets them too."""
    outer = _ledger.get()
    lines: list[Check] = []
    token = _ledger.set(lines)
    try:
        yield lines
    finally:
        _ledger.reset(token)
        if outer is not None:
            outer.extend(lines)


def record(
    when: When,
    name: str,
    passed: bool,
    value: float | int | str | None = None,
    tolerance: float | int | str | None = None,
    detail: str = "",
    *,
    fix: str | None = None,
    refuse: bool = True,
) -> Check:
    """Leave one line of proof.

    Args:
        fix: what the user can do where the proof fails.
        refuse: raise where the proof fails. False only for a statement that leaves the result right
            (an estimate that was off, say).

    Raises:
        CheckError: the proof failed and `refuse` is True.
    """
    check = Check(when, name, bool(passed), value, tolerance, detail)
    ledger = _ledger.get()
    if ledger is not None:
        ledger.append(check)
    if not passed and refuse:  # the error says it, once
        raise CheckError(f"Check failed: {check.line()}.", fix=fix)
    log.log(logging.INFO if passed else logging.WARNING, "%s", check.line())
    return check
