"""What a tuning method wants with each row besides its tokens, on the way from the data to the model."""

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from luthier.data.load import Loaded
from luthier.data.tokenize import Encoded
from luthier.tuning import hooks


def add(model: nn.Module, loaded: Loaded, encoded: Encoded) -> Encoded:
    """`encoded` with a column for each input that the model's method wants of the rows.

    Raises:
        DataError: rows that lack what the method needs.
    """
    for name, values in hooks.row_inputs(model, loaded.records).items():
        column: Any = [values[i] for i in encoded.source]
        encoded.dataset = encoded.dataset.add_column(name, column)
    return encoded


def names(model: nn.Module, dataset: Any) -> list[str]:
    """The columns of `dataset` that hold such inputs; rows that were given encoded may have none."""
    columns = dataset.column_names if isinstance(dataset, Dataset) else []
    return [name for name in hooks.row_inputs(model, []) if name in columns]


class WithRowInputs:
    """A collator for rows with such columns: the inner one's batch, and a tensor (batch,) for each."""

    def __init__(self, inner: Callable[[list[dict[str, Any]]], Any], names: list[str]):
        self.inner = inner
        self.names = names

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        batch = self.inner([{k: v for k, v in row.items() if k not in self.names} for row in rows])
        for name in self.names:
            batch[name] = torch.tensor([row[name] for row in rows])
        return batch
