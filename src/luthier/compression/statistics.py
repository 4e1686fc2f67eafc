"""What is gathered of a layer's inputs, token by token, without keeping them.

Each statistic takes inputs (tokens, features) through `add` as often as they come; its result does not depend
on how they were cut into batches.
"""

from typing import Protocol

import torch
from torch import Tensor


class Statistic(Protocol):
    """Something that sees inputs (tokens, features), padding left out."""

    def add(self, x: Tensor) -> None: ...


class Hessian:
    """H = (2 / tokens) sum x x^T, float32 (features, features): the curvature of the layer's error."""

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        self._sum = torch.zeros(features, features, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        x = x.float()
        self._sum.addmm_(x.T, x)
        self.tokens += len(x)

    @property
    def value(self) -> Tensor:
        return self._sum * (2 / max(1, self.tokens))


class Moments:
    """Of each feature: root of the sum of squares, mean and largest magnitude, least and greatest value."""

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        self._squares = torch.zeros(features, dtype=torch.float64, device=device)
        self._magnitudes = torch.zeros(features, dtype=torch.float64, device=device)
        self.peak = torch.zeros(features, device=device)
        self.low = torch.full((features,), torch.inf, device=device)
        self.high = torch.full((features,), -torch.inf, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        if not len(x):
            return
        x = x.float()
        size = x.abs()
        self._squares += x.square().sum(0, dtype=torch.float64)
        self._magnitudes += size.sum(0, dtype=torch.float64)
        self.peak = torch.maximum(self.peak, size.amax(0))
        self.low, self.high = torch.minimum(self.low, x.amin(0)), torch.maximum(self.high, x.amax(0))
        self.tokens += len(x)

    @property
    def norm(self) -> Tensor:
        return self._squares.sqrt().float()

    @property
    def mean(self) -> Tensor:
        return (self._magnitudes / max(1, self.tokens)).float()


class Samples:
    """Up to `count` inputs, evenly spread over all tokens that are announced: (count, features)."""

    def __init__(self, count: int, total: int):
        self.count, self._seen = min(count, total), 0
        self._wanted = torch.arange(self.count) * total // max(1, self.count)  # positions, ascending
        self._kept: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        places = self._wanted - self._seen
        places = places[(places >= 0) & (places < len(x))]
        self._kept.append(x[places.to(x.device)].float())
        self._seen += len(x)

    @property
    def value(self) -> Tensor:
        return torch.cat(self._kept)
