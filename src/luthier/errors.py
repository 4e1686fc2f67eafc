"""One hierarchy of errors. Each says what was wrong, where, what was expected and what to write instead.

The command line prints a `LuthierError` as one paragraph without traceback and exits with status 2. Each
class also inherits the standard exception that a Python user would catch.
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


class LuthierError(Exception):
    """A mistake that its user can put right.

    Args:
        message: what is wrong and where (name, file, line, shape), in one sentence.
        fix: what to write or do instead, in one sentence.
    """

    def __init__(self, message: str, *, fix: str | None = None):
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message} {self.fix}" if self.fix else self.message


class RecipeError(LuthierError, ValueError):
    """A recipe (or an override of it) that cannot be run.

    Attributes:
        faults: every fault that was found, in the order of the file (`luthier.recipe.source.Fault`).
    """

    faults: Sequence[Any] = ()


class MethodError(LuthierError, ValueError):
    """An unknown method, a wrong option of a method, or a method on a model that cannot take it."""


class ModelError(LuthierError, ValueError):
    """A model that does not exist, cannot be read, or whose weights do not fit."""


class DataError(LuthierError, ValueError):
    """A data file that is missing, empty, of unknown shape, or that has bad records."""


class ResourceError(LuthierError, OSError):
    """Not enough memory or disk, or a folder that cannot be written."""


class CheckError(LuthierError, AssertionError):
    """A proof that failed: the result would have been wrong (see `luthier.checks`)."""


class TrainingError(LuthierError, RuntimeError):
    """Training that must not go on, such as a loss that is not finite."""


def nearest(name: str, choices: Iterable[str], count: int = 3) -> list[str]:
    """The choices most like `name`, best first; a match inside a longer choice counts too."""
    choices = list(choices)
    close = difflib.get_close_matches(name, choices, n=count, cutoff=0.6)
    inside = [c for c in choices if name and (name.lower() in c.lower()) and c not in close]
    return (close + inside)[:count]


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """A sentence with the nearest choices, or with all of them where none is near."""
    choices = sorted(choices)
    close = nearest(name, choices)
    if close:
        return "Did you mean " + " or ".join(f"'{c}'" for c in close) + "?"
    return "Choose from: " + ", ".join(choices) + "."
