"""Searches: tuning methods that train no weight, but find something for a model that stays as it is.

What such a method gives is a text prompt (`luthier.evaluation.text_prompt`). Its `Config` has a function
`search`; by that a recipe's tune stage knows it and calls it where another method would be trained, and
evaluations behind it measure the model with the prompt.
"""

import json
import os
import random
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedTokenizerBase

from luthier.data.load import Loaded, load
from luthier.data.rows import Row
from luthier.data.spec import DataSpec
from luthier.errors import DataError
from luthier.evaluation.text_prompt import TextPrompt

HELD_OUT = 0.2  # of the rows, where no held-out data is given


class Search(Protocol):
    """What the config of a search can do."""

    def search(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        data: Loaded | DataSpec | str | Path,
        *,
        eval_data: Loaded | DataSpec | str | Path | None = None,
        seed: int = 0,
        folder: Path | None = None,
    ) -> TextPrompt:
        """Find a prompt. Its `scores` are numbers on the held-out rows.

        Args:
            data: rows of text and label.
            eval_data: rows on which the best is chosen; default: a fifth of `data`, drawn with the seed.
            folder: where the way so far is kept, and taken up again by a search with the same arguments.
        """
        ...

    def rows_scored(self, train: int, held_out: int) -> int:
        """About how many texts go through the model, for an estimate of the time."""
        ...


def split_rows(
    data: Loaded | DataSpec | str | Path, eval_data: Loaded | DataSpec | str | Path | None, seed: int
) -> tuple[list[Row], list[Row]]:
    """The rows to search with and those to choose by.

    Raises:
        DataError: rows of another type than text and label, or too few.
    """
    loaded = _rows(data)
    if eval_data is not None:
        return loaded, _rows(eval_data)
    order = list(range(len(loaded)))
    random.Random(seed).shuffle(order)
    count = round(HELD_OUT * len(order))
    if not count:
        raise DataError(
            f"{len(order)} rows are too few to hold some out.", fix="Give more rows, or eval_data as well."
        )
    held_out = set(order[:count])
    return [row for i, row in enumerate(loaded) if i not in held_out], [loaded[i] for i in sorted(held_out)]


def _rows(data: Loaded | DataSpec | str | Path) -> list[Row]:
    loaded = data if isinstance(data, Loaded) else load(data)
    if loaded.type != "classification":
        raise DataError(
            f"{loaded.spec.path} holds rows of type {loaded.type}, but a search over prompts needs classes.",
            fix="Give rows of text and label; of facts the text is the subject, the label the object.",
        )
    return loaded.records


class State:
    """The way of a search so far, in a file that is written whole or not at all; nowhere without a folder."""

    def __init__(self, folder: Path | None):
        # A recipe's runner knows by this name that there is something to go on from.
        self.folder = None if folder is None else folder / "checkpoint-search"
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def read(self) -> dict[str, Any] | None:
        if self.folder is None or not (self.folder / "state.json").is_file():
            return None
        found: dict[str, Any] = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
        return found

    def write(self, content: dict[str, Any]) -> None:
        if self.folder is not None:
            draft = self.folder / "state.draft"
            draft.write_text(json.dumps(content), encoding="utf-8")
            os.replace(draft, self.folder / "state.json")
