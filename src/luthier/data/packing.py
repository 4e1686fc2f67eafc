"""Packing of short examples into full rows, exactly, and the two collators.

A packed row holds several documents: `position_ids` restart at 0 with each, and from that restart
transformers builds a block-diagonal causal mask (`find_packed_sequence_indices` of its masking utilities),
as long as `attention_mask` and the cache are None. The label of a document's first token is -100, for it
would be predicted from the document before. So the packed loss is the unpacked loss; `prove_isolated`
shows it on the model at hand, because a model with another kind of mixing (a state space, a sliding
convolution) does not read positions.
"""

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from trl import pack_dataset

from luthier import checks
from luthier.data import cache
from luthier.data.tokenize import IGNORED, as_dataset
from luthier.errors import DataError

# Kernels may round differently from run to run; real leaks are hundreds of times larger.
_LEAK = 1e-4


def pack(dataset: Dataset, length: int) -> Dataset:
    """Rows of at most `length` tokens by best-fit decreasing: {input_ids, labels, position_ids}.

    Documents are never cut or split: each is one run of `position_ids` from 0.

    Source: Ding et al., 2024, "Fewer Truncations Improve Language Modeling", arXiv 2404.10830.

    Raises:
        DataError: a document is longer than `length`.
    """
    longest = max((len(ids) for ids in dataset["input_ids"]), default=0)
    if longest > length:
        raise DataError(
            f"A document of {longest} tokens does not fit into packed rows of {length}.",
            fix=f"Encode with max_length {length}, or pack to {longest}.",
        )
    with cache.quiet():
        # One batch: packed by thousands, each batch would leave rows half empty.
        packed = pack_dataset(
            dataset.select_columns(["input_ids", "labels"]),
            length,
            "bfd",
            map_kwargs={
                "batch_size": max(len(dataset), 1),
                "keep_in_memory": True,
                "new_fingerprint": "packed",
            },
        )
    columns: dict[str, list[np.ndarray]] = {"input_ids": [], "labels": [], "position_ids": []}
    for row in packed.with_format("numpy"):
        positions = np.concatenate([np.arange(n) for n in row["seq_lengths"]])
        columns["input_ids"].append(row["input_ids"])
        columns["labels"].append(np.where(positions == 0, IGNORED, row["labels"]))
        columns["position_ids"].append(positions)
    return as_dataset(columns)


class PackedCollator:
    """A batch of packed rows: {input_ids, labels, position_ids} (batch, seq) int64, no attention mask.

    The filling at the end of a row is a document of its own, without labels, so that no real token sees it
    and every query has a key. Use the model with `use_cache=False`.

    Args:
        multiple_of: round the length up to a multiple, so that batches have few different shapes.
    """

    def __init__(self, pad_token_id: int | None = None, multiple_of: int = 1):
        self.pad = pad_token_id or 0  # never looked at, so any id will do
        self.multiple_of = multiple_of

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        longest += -longest % self.multiple_of
        batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
        for row in rows:
            gap = longest - len(row["input_ids"])
            batch["input_ids"].append([*row["input_ids"], *[self.pad] * gap])
            batch["labels"].append([*row["labels"], *[IGNORED] * gap])
            batch["position_ids"].append([*row["position_ids"], *range(gap)])
        return {name: torch.tensor(values) for name, values in batch.items()}


class PaddedCollator:
    """A batch padded on the right; the mask comes from the lengths, so that pad = eos hides no end token.

    {input_ids, attention_mask, labels} (batch, seq) int64; labels that are numbers (classes) become (batch,),
    and `token_type_ids` are padded with 0 where rows have them.

    Args:
        multiple_of: round the length up to a multiple, for kernels that like it.
    """

    def __init__(self, pad_token_id: int | None = None, multiple_of: int = 1):
        self.pad = pad_token_id or 0
        self.multiple_of = multiple_of

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {
            "input_ids": self._padded([row["input_ids"] for row in rows], self.pad),
            "attention_mask": self._padded([[1] * len(row["input_ids"]) for row in rows], 0),
        }
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = self._padded([row["token_type_ids"] for row in rows], 0)
        labels = [row["labels"] for row in rows if "labels" in row]
        if labels and isinstance(labels[0], int):
            batch["labels"] = torch.tensor(labels)
        elif labels:
            batch["labels"] = self._padded(labels, IGNORED)
        return batch

    def _padded(self, rows: list[list[int]], fill: int) -> torch.Tensor:
        longest = max(len(row) for row in rows)
        longest += -longest % self.multiple_of
        return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])


def isolates(model: Any) -> bool:
    """Whether the model keeps packed documents apart, for who has to choose; nothing is recorded."""
    return _moved(model) <= _LEAK


def prove_isolated(model: Any) -> None:
    """Change the first document of a packed row: no logit of the second may move.

    Raises:
        CheckError: the model mixes packed documents.
    """
    moved = _moved(model)
    checks.record(
        "step1", "packed documents isolated", moved <= _LEAK, moved, _LEAK,
        "largest change of a logit of document 2 when document 1 changes",
        fix="This model does not keep packed documents apart: set packing: false.",
    )  # fmt: skip


@torch.no_grad()
def _moved(model: Any, length: int = 16) -> float:
    """The largest change of a logit of document 2 when document 1 changes."""
    vocabulary = model.get_input_embeddings().num_embeddings
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(0)
    one, other, second = torch.randint(vocabulary, (3, length), generator=generator)
    positions = torch.cat([torch.arange(length)] * 2)[None].to(device)
    training = model.training
    model.eval()
    try:
        logits = [
            model(
                input_ids=torch.cat([first, second])[None].to(device), position_ids=positions, use_cache=False
            ).logits[0, length:]
            for first in (one, other)
        ]
    finally:
        model.train(training)
    return float((logits[0] - logits[1]).abs().max().item())
