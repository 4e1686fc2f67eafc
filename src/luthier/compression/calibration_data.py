"""Rows of a data set as batches of token ids for a calibration pass."""

import random
from itertools import pairwise
from typing import Any

import torch

from luthier.compression.calibration import Batch
from luthier.data.load import Loaded
from luthier.data.masking import plain_ids
from luthier.data.tokenize import encode, encode_classification
from luthier.errors import DataError

TOKENS = 1024  # of a batch: enough for products at full speed, little memory


def batches(
    loaded: Loaded,
    tokenizer: Any,
    *,
    samples: int,
    max_length: int,
    seed: int = 0,
    classes: bool = False,
) -> list[Batch]:
    """Windows of texts and conversations that follow one another, or rows of a classifier.

    Texts are joined and cut into windows of `max_length` tokens without padding; conversations go through the
    chat template first. Of the windows `samples` are drawn, spread evenly over the data.

    Args:
        classes: give rows of texts and labels the number of their class, for a model that classifies.

    Returns:
        `{"input_ids": (batch, seq), "attention_mask": (batch, seq)}`, int64; with `classes` also
        `"labels": (batch,)`.

    Raises:
        DataError: the data do not fill one window, or are of a type that holds no text.
    """
    if loaded.type == "classification":
        found = encode_classification(loaded, tokenizer, max_length=max_length).dataset
        pairs = list(zip(map(list, found["input_ids"]), found["labels"], strict=True))
        made = _padded(_spread(pairs, samples, seed), tokenizer, max_length)
        return made if classes else [{k: v for k, v in batch.items() if k != "labels"} for batch in made]
    rows = _rows(loaded, tokenizer)
    ids = [token for row in rows for token in row]
    windows = [ids[i : i + max_length] for i in range(0, len(ids) - max_length + 1, max_length)]
    if not windows:
        raise DataError(
            f"{loaded.spec.path} has {len(ids)} tokens: not one window of {max_length}.",
            fix=f"Give more text, or write max_length: {max(8, len(ids) // 2)}.",
        )
    chosen = torch.tensor(_spread(windows, samples, seed))
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part)}
        for part in chosen.split(max(1, TOKENS // max_length))
    ]


def _rows(loaded: Loaded, tokenizer: Any) -> list[list[int]]:
    if loaded.type == "text":
        return [plain_ids(tokenizer, row["text"]) for row in loaded.records]
    if loaded.type in ("messages", "prompt_completion"):
        encoded = encode(loaded, tokenizer, max_length=None, use_cache=False)
    else:
        raise DataError(
            f"{loaded.spec.path} holds rows of type {loaded.type}, which are no texts to calibrate on.",
            fix="Use rows of text, of messages, of prompt and completion, or of a text and its label.",
        )
    return [list(row) for row in encoded.dataset["input_ids"]]


def _spread(items: list[Any], count: int, seed: int) -> list[Any]:
    """So many of the items, one drawn from each of `count` equal parts, in order."""
    if len(items) <= count:
        return items
    lot = random.Random(seed)
    bounds = [len(items) * i // count for i in range(count + 1)]
    return [items[lot.randrange(low, high)] for low, high in pairwise(bounds)]


def _padded(rows: list[tuple[list[int], int]], tokenizer: Any, max_length: int) -> list[Batch]:
    """Rows of like length together, padded on the right, each with the number of its class."""
    rows = sorted(rows, key=lambda row: len(row[0]))
    size = max(1, TOKENS // max_length)
    found = []
    for start in range(0, len(rows), size):
        part = [torch.tensor(row) for row, _ in rows[start : start + size]]
        masks = [torch.ones_like(row) for row in part]
        pad = torch.nn.utils.rnn.pad_sequence
        found.append(
            {
                "input_ids": pad(part, batch_first=True, padding_value=tokenizer.pad_token_id or 0),
                "attention_mask": pad(masks, batch_first=True),
                "labels": torch.tensor([int(label) for _, label in rows[start : start + size]]),
            }
        )
    return found
