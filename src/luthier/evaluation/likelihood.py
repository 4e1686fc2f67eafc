"""Log-likelihood of given tokens, in batches, without ever holding the logits of whole texts."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from luthier.acceleration.last_column import last_column
from luthier.models import structure
from luthier.terminal import track
from luthier.tuning.hooks import of_batch
from luthier.tuning.probe import evaluating

log = logging.getLogger("luthier.evaluation")

BLOCK = 512  # rows of logits held at once: 100 MB of float32 for 49152 tokens


def token_log_probs(
    model: nn.Module,
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int,
    inputs: Mapping[str, Sequence[int]] | None = None,
) -> list[Tensor]:
    """log p(token | tokens before it) in float32 for chosen positions of each sequence.

    Args:
        model: a causal language model; evaluated without dropout.
        sequences: (ids, positions) pairs; every position is >= 1, for nothing predicts the first token.
        inputs: what the model takes with each sequence (`luthier.tuning.hooks.row_inputs`).

    Returns:
        For each sequence a tensor (positions,), in the order given.
    """
    found: list[Tensor] = [torch.empty(0)] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]), reverse=True)
    with evaluating(model), last_column(model):
        for start in track(range(0, len(order), batch_size), "likelihood"):
            batch = order[start : start + batch_size]
            extra = of_batch(inputs or {}, batch, structure.base(model).device)
            values = _batch(model, [sequences[i] for i in batch], extra)
            for i, part in zip(batch, values, strict=True):
                found[i] = part
    return found


def _batch(
    model: nn.Module, batch: list[tuple[Sequence[int], Sequence[int]]], extra: dict[str, Tensor]
) -> Iterator[Tensor]:
    device = structure.base(model).device
    longest = max(len(ids) for ids, _ in batch)
    # Padding stands on the right: a causal model's real tokens then see the same as alone.
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (tokens, _) in enumerate(batch):
        ids[row, : len(tokens)] = torch.as_tensor(tokens)
        mask[row, : len(tokens)] = 1
    counts = [len(positions) for _, positions in batch]
    rows = torch.repeat_interleave(torch.arange(len(batch)), torch.tensor(counts))  # (labels,)
    columns = torch.tensor([p for _, positions in batch for p in positions], dtype=torch.long)
    targets = ids[rows, columns].to(device)
    logits = _Logits(model, ids.to(device), mask.to(device), extra)
    parts = [
        logits(rows[at : at + BLOCK], columns[at : at + BLOCK] - 1)
        .log_softmax(-1)
        .gather(1, targets[at : at + BLOCK, None])[:, 0]
        for at in range(0, len(columns), BLOCK)
    ]
    values = torch.cat(parts).cpu() if parts else torch.empty(0)
    return iter(values.split(counts))


class _Logits:
    """Logits (rows, vocab) at chosen places of a batch, from its hidden states.

    The forward pass is the model's own and yields the logits of the last column. Where head(hidden) is the
    same there, the head is all that stands between hidden states and logits, and others are made from it
    as they are needed. A model that does more (scales or caps its logits) gives all of them at once.
    """

    def __init__(self, model: nn.Module, ids: Tensor, mask: Tensor, extra: dict[str, Tensor]):
        base = structure.base(model)
        self.head = structure.head(model)
        self.all: Tensor | None = None
        hidden: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            hidden.append(output[0] if isinstance(output, tuple) else output.last_hidden_state)

        handle = base.base_model.register_forward_hook(keep)
        options: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False} | extra
        try:
            last = model(**options, logits_to_keep=1).logits[:, -1]
        finally:
            handle.remove()
        # A learnt prompt stands before the tokens; the last columns are theirs.
        self.hidden = hidden[-1][:, -ids.shape[1] :]  # (batch, seq, hidden)
        if self.head is None or not _equal(self.head(self.hidden[:, -1]), last):
            log.info("%s changes its logits after the head: they are held whole", type(base).__name__)
            self.all = model(**options).logits[:, -ids.shape[1] :]

    def __call__(self, rows: Tensor, columns: Tensor) -> Tensor:
        if self.all is not None:
            return self.all[rows, columns].float()
        assert self.head is not None
        logits: Tensor = self.head(self.hidden[rows, columns]).float()
        return logits


def _equal(found: Tensor, expected: Tensor) -> bool:
    """Equal but for rounding: products of other shapes may add up in another order."""
    tolerance = 8 * torch.finfo(expected.dtype).eps
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
