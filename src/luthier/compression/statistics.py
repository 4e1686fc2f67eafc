"""What is gathered of a layer's inputs, token by token, without keeping them.

Each statistic takes inputs (tokens, features) through `add` as often as they come; its result does not depend
on how they were cut into batches.
"""

from typing import Protocol

import torch
from torch import Tensor

from luthier.acceleration import native
from luthier.acceleration.float32 import linear

FIRST = 2048  # tokens whose median says what is usual
LARGE = 256  # features from which on inputs are rounded to bfloat16 before they are multiplied
STRIP = 192  # rows of a Hessian that one product makes; of each only what lies right of the diagonal


class Statistic(Protocol):
    """Something that sees inputs (tokens, features), padding left out."""

    def add(self, x: Tensor) -> None: ...


class Hessian:
    """H = (2 / tokens) sum x x^T, float32 (features, features): the curvature of the layer's error.

    Our kernel rounds the inputs of large layers to bfloat16 before it multiplies them. So H is that of inputs
    that are off by up to 2^-9 of themselves, each its own way, and with it a change D of the weight costs

        tr(D H' D^T) - tr(D H D^T)  ~  10^-6 sum_ij D_ij^2 H_jj,

    a millionth of what it costs where inputs are not correlated.

    Args:
        cap: the most that a token's |x|^2 may count, in medians over the first tokens seen; a larger x is
            scaled down. In many models a text's first token has activations a hundred times those of all
            others; in the layer that ends them that token would decide H alone.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu", cap: float | None = None):
        self._sum = torch.zeros(features, features, device=device)
        self._cap, self._most = cap, torch.inf
        self._first: list[Tensor] = []
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        self.tokens += len(x)
        if self._cap is None or self._most < torch.inf:
            self._count(x)
            return
        self._first.append(x)  # the median does not depend on how inputs are cut
        if self.tokens >= FIRST:
            self._settle()

    @property
    def value(self) -> Tensor:
        if self._first:
            self._settle()
        found = self._sum * (2 / max(1, self.tokens))
        for start in range(0, len(found), STRIP):
            strip = slice(start, start + STRIP)
            found[strip, :start] = found[:start, strip].T
            square = found[strip, strip]
            square.copy_(square.triu() + square.triu(1).T)
        return found

    def _settle(self) -> None:
        """Take the median of what was seen first, and count it."""
        assert self._cap is not None
        squares = torch.cat([_squares(x) for x in self._first])[:FIRST]
        self._most = self._cap * float(squares.median())
        for x in self._first:
            self._count(x)
        self._first.clear()

    def _count(self, x: Tensor) -> None:
        scale: Tensor | None = None
        if self._most < torch.inf:
            scale = (self._most / _squares(x).clamp_min(1e-30)).clamp(max=1).sqrt()  # (tokens,)
        if x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and native.here():
            native.gram(x.contiguous(), self._sum, scale, rounded=x.shape[1] >= LARGE)
            return
        x = x.float() if scale is None else x.float() * scale[:, None]
        columns = x.T.contiguous()  # (features, tokens)
        for start in range(0, len(columns), STRIP):
            strip = slice(start, start + STRIP)
            self._sum[strip, start:] += linear(columns[strip], columns[start:])


def _squares(x: Tensor) -> Tensor:
    """|x|^2 of each token, float32 (tokens,)."""
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).square()


class Moments:
    """Of each feature: root of the sum of squares, mean and largest magnitude."""

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        self._squares = torch.zeros(features, dtype=torch.float64, device=device)
        self._magnitudes = torch.zeros(features, dtype=torch.float64, device=device)
        self.peak = torch.zeros(features, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        if not len(x):
            return
        x = x.float()
        size = x.abs()
        self._squares += x.square().sum(0)
        self._magnitudes += size.sum(0)
        self.peak = torch.maximum(self.peak, size.amax(0))
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
