"""Token-weighted perplexity: exp of the mean negative log-likelihood over all scored tokens of the data.

A text longer than the window is scored by a sliding one: windows overlap, and each token is scored once, in
the first window that holds it, so that all but the first window's tokens see at least `window - stride`
tokens of context.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

IGNORED = -100
# Tokens of a batch: bounds the logits, which are the largest tensor (tokens x vocabulary).
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Piece:
    """A window of one example; `labels` of tokens scored by an earlier window are -100."""

    example: int
    ids: list[int]
    labels: list[int]


def windows(examples: list[tuple[list[int], list[int]]], window: int, stride: int) -> list[Piece]:
    """Cut (ids, labels) into pieces of at most `window` tokens that start `stride` apart.

    Labels are not shifted: `labels[i]` is what the tokens before i should predict.
    """
    pieces = []
    for index, (ids, labels) in enumerate(examples):
        scored = 0
        for start in range(0, max(len(ids), 1), stride):
            end = min(start + window, len(ids))
            fresh = [IGNORED] * (scored - start) + list(labels[max(scored, start) : end])
            pieces.append(Piece(index, list(ids[start:end]), fresh))
            scored = end
            if end == len(ids):
                break
    return pieces


@torch.inference_mode()
def token_losses(
    model: Any,
    examples: list[tuple[list[int], list[int]]],
    *,
    window: int,
    stride: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> np.ndarray:
    """Negative log-likelihood in nats and number of scored tokens of each example, (n, 2) float64.

    Args:
        examples: token ids and unshifted labels (-100 where not scored).
        stride: distance of windows, by default half the window.
    """
    pieces = windows(examples, window, stride or max(window // 2, 1))
    pieces = sorted((p for p in pieces if any(x != IGNORED for x in p.labels[1:])), key=lambda p: -len(p.ids))
    found = np.zeros((len(examples), 2))
    start = 0
    while start < len(pieces):
        size = max(1, batch_tokens // len(pieces[start].ids))  # longest first: the first one sets the width
        batch = pieces[start : start + size]
        losses, counts = _score(model, batch)
        np.add.at(found, [p.example for p in batch], np.stack([losses, counts], axis=1))
        start += size
    return found


def _score(model: Any, batch: list[Piece]) -> tuple[np.ndarray, np.ndarray]:
    width = len(batch[0].ids)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    labels = torch.full((len(batch), width), IGNORED)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    for row, piece in enumerate(batch):
        n = len(piece.ids)
        ids[row, :n], labels[row, :n] = torch.tensor(piece.ids), torch.tensor(piece.labels)
        mask[row, :n] = 1
    device = model.device
    logits = model(
        input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
    ).logits  # (batch, seq, vocabulary)
    targets = labels[:, 1:].to(device)
    keep = targets != IGNORED
    losses = torch.zeros(targets.shape, dtype=torch.float64, device=device)
    losses[keep] = cross_entropy(logits[:, :-1][keep].float(), targets[keep], reduction="none").double()
    return losses.sum(1).cpu().numpy(), keep.sum(1).cpu().numpy()
