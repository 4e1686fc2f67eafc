"""A tiny model that has learnt something, and batches for the methods that take units out of it."""

import copy
from functools import cache
from typing import Any

import tiny
import torch
from torch import Tensor, nn

from luthier.tuning.probe import evaluating

STATES = 48
FIRST = 10  # the first token id that is used


@cache
def _table() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(STATES, (STATES, STATES), generator=generator)


def chains(rows: int, length: int, seed: int) -> Tensor:
    """Token ids (rows, length): each follows from the two before, but for one in ten, which is drawn."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(STATES, (rows, length), generator=generator)
    noise = torch.rand(rows, length, generator=generator) < 0.1
    for i in range(2, length):
        follows = _table()[drawn[:, i - 2] // 8, drawn[:, i - 1]]
        drawn[:, i] = torch.where(noise[:, i], drawn[:, i], follows)
    return drawn + FIRST


def batches(count: int = 2, rows: int = 8, length: int = 24, seed: int = 1) -> list[dict[str, Tensor]]:
    """Calibration batches; the second row of each is padded on the right."""
    made = []
    for index in range(count):
        ids = chains(rows, length, 1000 * seed + index)
        mask = torch.ones_like(ids)
        mask[1, -5:] = 0
        made.append({"input_ids": ids.where(mask.bool(), torch.tensor(tiny.PAD)), "attention_mask": mask})
    return made


@cache
def _trained(kind: str) -> nn.Module:
    model = {
        "llama": lambda: tiny.llama(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4),
        "gpt2": lambda: tiny.gpt2(n_layer=2),
    }[kind]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    model.train()
    for step in range(300):
        ids = chains(24, 24, step)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def trained(kind: str = "llama") -> Any:
    """A fresh copy of a model that was trained for some seconds, once a process: "llama" or "gpt2"."""
    return copy.deepcopy(_trained(kind))


def loss(model: Any) -> float:
    """Mean loss on chains that were not trained."""
    ids = chains(64, 24, 99_999)
    with evaluating(model):
        return float(model(input_ids=ids, labels=ids).loss)
