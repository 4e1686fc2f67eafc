"""Perplexity by token, with a window that slides over texts longer than the model's context.

    ppl = exp( sum_t -log p(x_t | x_s .. x_{t-1}) / T )        over all T scored tokens of all texts

Every token but a text's first is scored exactly once. A window of `window` tokens moves on by `stride`; in
each but the first only the last `stride` tokens are scored, so each has at least window - stride before it.
The mean is over tokens, not over texts or batches: a short text does not weigh as much as a long one.
Source: Hugging Face, "Perplexity of fixed-length models" (the strided window).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from luthier.data.load import Loaded
from luthier.data.masking import Prefix, plain_ids
from luthier.data.tokenize import encode
from luthier.errors import DataError
from luthier.evaluation.bootstrap import Metric, interval, ratio
from luthier.evaluation.likelihood import token_log_probs
from luthier.models import structure
from luthier.tuning.attach import tuning_of

WINDOW = 1024  # the longest by default: attention and memory grow with it, perplexity hardly falls


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first scored, end) of each window over a text of `length` tokens."""
    begin, scored = 0, 1
    while scored < length:
        end = min(begin + window, length)
        yield begin, scored, end
        scored, begin = end, begin + stride


def sequences(loaded: Loaded, tokenizer: Any) -> tuple[list[tuple[list[int], np.ndarray]], list[int]]:
    """Ids and scored positions of every text, and the index of its row.

    Of texts every token is scored, of chats those that training would train (the assistant's turns with
    their end tokens). No end token is added to a text.

    Raises:
        DataError: rows of another type.
    """
    if loaded.type == "text":
        found = []
        prefix = Prefix(tokenizer, plain=True)
        for row in loaded.records:
            ids = prefix(row["text"]) + plain_ids(tokenizer, row["text"])
            found.append((ids, np.arange(1, len(ids))))
        return found, list(range(len(found)))
    if loaded.type not in ("messages", "prompt_completion"):
        raise DataError(
            f"{loaded.spec.path} holds rows of type {loaded.type}, which have no perplexity.",
            fix="Use rows of text, of messages, or of prompt and completion.",
        )
    encoded = encode(loaded, tokenizer, max_length=None, use_cache=False)
    rows = encoded.dataset.with_format("numpy")
    texts = [(row["input_ids"].tolist(), np.flatnonzero(row["labels"][1:] != -100) + 1) for row in rows]
    return texts, encoded.source


def perplexity(
    model: nn.Module,
    texts: Sequence[tuple[list[int], np.ndarray]],
    *,
    batch_size: int = 8,
    window: int | None = None,
    stride: int | None = None,
    seed: int = 0,
    inputs: Mapping[str, Sequence[int]] | None = None,
) -> Metric:
    """Perplexity over all scored tokens; the bootstrap draws windows (one a text, for short texts).

    Args:
        texts: (ids, scored positions >= 1), as `sequences` gives them.
        window: tokens that the model sees at once; by default its context, at most 1024.
        stride: how far the window moves; by default half of it.
        inputs: what the model takes with each text (`luthier.tuning.hooks.row_inputs`).

    Raises:
        DataError: a stride or window that would leave tokens unscored, or nothing to score.
    """
    window = window or min(context_length(model) or WINDOW, WINDOW)
    stride = stride or max(window // 2, 1)
    if not 1 <= stride < window:
        raise DataError(
            f"The perplexity's stride is {stride} and its window {window}.",
            fix="The stride is at least 1 and less than the window.",
        )
    parts: list[tuple[list[int], list[int]]] = []
    extra: dict[str, list[int]] = {name: [] for name in inputs or {}}
    for text, (ids, positions) in enumerate(texts):
        for begin, scored, end in windows(len(ids), window, stride):
            mine = positions[(positions >= scored) & (positions < end)]
            if len(mine):
                parts.append((ids[begin:end], (mine - begin).tolist()))
                for name, values in (inputs or {}).items():
                    extra[name].append(values[text])
    if not parts:
        raise DataError("There is no token to score.", fix="Give texts of at least two tokens.")
    found = token_log_probs(model, parts, batch_size=batch_size, inputs=extra)
    rows = np.array([[-float(p.double().sum()), len(p)] for p in found])  # (windows, 2)
    return interval(rows, lambda sums: np.exp(ratio(sums)), seed=seed)


def context_length(model: nn.Module) -> int | None:
    """How many tokens of text the model can take, or None where nothing limits it."""
    config, method = structure.base(model).config, tuning_of(model)
    length: int | None = getattr(config, "max_position_embeddings", None)
    if length is not None:
        length -= getattr(method, "num_virtual_tokens", 0)  # a learnt prompt takes up positions
    known = [n for n in (length, getattr(method, "max_positions", None)) if n is not None]
    return min(known, default=None)
