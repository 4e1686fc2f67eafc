"""AWQ: scale up the weights whose inputs are large, clip the others' ranges, then round.

Paper: Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan and Han, 2023, "AWQ: Activation-aware Weight
    Quantization for LLM Compression and Acceleration", arXiv 2306.00978.
Pick it when weights must be 3 or 4 bits and calibration text is short or unlike what the model will see.
Cost: 20 runs of attention and MLP on a share of the calibration data a block; nothing when the model runs.

For layers that read X (T, K), with weights W_i (N_i, K), rounding Q and a_k = mean_t |X_tk|:

    c_k = a_k^r / sqrt(max a^r min a^r),    W_i -> Q(W_i diag(c)),    X -> X diag(c)^-1

The division goes into what made X (`luthier.compression.folding`); with fewer heads for values than for
queries a is the mean over the heads that share one. The ratio r is the best of 0, 1/20, ..., 19/20 by the
squared error of the smallest module that holds all layers of the group: attention for q, k, v, the MLP
for gate and up. For a layer alone that is tr(D H D^T), D = Q(W c) c^-1 - W, H the Gram matrix of all inputs:
exact, no run. r = 0 is plain rounding, so that no group gets worse than it.

Then each range of a row and group, m = max |w|, is shrunk to the best of m, 0.95 m, ..., 0.55 m by the error
of this group's part of the output, D_g H_g D_g^T. Layers whose outputs meet in a product of attention are not
clipped: those in an attention module but for the last and for the values.

All inputs are those of the model as it came, as in the paper: blocks do not see what became of those before.

Different from the authors' code: H in place of 512 sampled tokens in the clip search, v -> o also with shared
heads, and symmetric grids unless `symmetric: false` (they round with zero points).
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from luthier.acceleration.float32 import Float32, linear
from luthier.compression.block import Block, first_rows, real_tokens
from luthier.compression.folding import Row
from luthier.compression.grid import Scheme, fit
from luthier.compression.linear import dimensions, matrix, set_matrix
from luthier.compression.method import output_error
from luthier.compression.scaling import Scaling
from luthier.compression.statistics import Hessian, Moments
from luthier.options import option

LEAST = 1e-4
SHRINKS = 10  # of a range: 1, 0.95, ..., 0.55


class Inputs:
    """What is gathered of a group's inputs: the mean magnitude of each, and their Gram matrix."""

    def __init__(self, features: int, device: torch.device):
        self._moments, self._hessian = Moments(features, device), Hessian(features, device)
        self._divisor = torch.ones(features, device=device)

    def add(self, x: Tensor) -> None:
        self._moments.add(x)
        self._hessian.add(x)

    def divide(self, factors: Tensor) -> None:
        self._divisor = self._divisor * factors

    @property
    def mean(self) -> Tensor:
        return self._moments.mean / self._divisor

    @property
    def peak(self) -> Tensor:
        return self._moments.peak / self._divisor

    @property
    def hessian(self) -> Tensor:
        return self._hessian.value / self._divisor / self._divisor[:, None]


@dataclass
class Config(Scaling):
    ratios: int = option(20, "exponents that are tried, evenly from 0 to just below 1; 1: none but 0", ge=1)
    clip: bool = option(True, "search a smaller range for each group of weights")
    search_tokens: int = option(1024, "tokens of the runs that compare exponents", ge=1)

    propagates: ClassVar[bool] = False

    def gather(self, block: Block, features: int) -> Inputs:
        return Inputs(features, block.device)

    @contextmanager
    def watching(self, block: Block, rows: list[Row]) -> Iterator[None]:
        with ExitStack() as stack:
            around_groups = {around(row.layers) for row in rows if row.maker and len(row.layers) > 1}
            replays = [Replay(block, name, self.search_tokens) for name in sorted(around_groups)]
            self._replays = {replay.name: stack.enter_context(replay) for replay in replays}
            yield

    def error(self, weight: Tensor, final: Tensor, seen: Inputs) -> float:
        return output_error(fit(final, self.scheme).round(final) - weight, weight, seen.hessian)

    def divide(self, seen: Inputs, factors: Tensor) -> None:
        seen.divide(factors)

    def factors(self, block: Block, row: Row, seen: Inputs) -> tuple[Tensor, str]:
        size = row.share(seen.mean, "mean")
        candidates = [scales(size, step / self.ratios) for step in range(self.ratios)]
        with self._loss(block, row, seen) as loss:
            losses = [loss(c) for c in candidates]
        best = losses.index(min(losses))
        return candidates[best], f"ratio {best / self.ratios:g}"

    def finish(self, name: str, weight: Tensor, seen: Inputs) -> Tensor:
        if not self.clip or name in self._multiplied:
            return weight
        limits = clip_limits(weight, seen.hessian, self.scheme)
        return torch.clamp(weight, -limits, limits)

    def prepare(self, block: Block) -> None:
        super().prepare(block)
        self._multiplied = multiplied(block, self._rows)

    @contextmanager
    def _loss(self, block: Block, row: Row, seen: Inputs) -> Iterator[Callable[[Tensor], float]]:
        """The squared error that rounding with given factors makes, in the smallest module around a group."""
        layers = {name: layer for name, layer in block.layers().items() if name in row.layers}
        weights = {name: matrix(layer) for name, layer in layers.items()}

        def rounded(name: str, factors: Tensor) -> Tensor:
            scaled = weights[name] * factors
            return fit(scaled, self.scheme).round(scaled) / factors

        if len(layers) == 1:
            name, hessian = row.layers[0], seen.hessian
            weight = weights[name]

            def alone(factors: Tensor) -> float:
                change = rounded(name, factors) - weight
                return float((linear(change, hessian) * change).sum())

            yield alone
            return
        replay = self._replays[around(row.layers)]
        exact = replay()

        def loss(factors: Tensor) -> float:
            for name, layer in layers.items():
                set_matrix(layer, rounded(name, factors))
            return sum(float((a - b).square().sum()) for a, b in zip(replay(), exact, strict=True))

        try:
            yield loss
        finally:
            for name, layer in layers.items():
                set_matrix(layer, weights[name])


def scales(size: Tensor, ratio: float) -> Tensor:
    """c (in,) of the mean magnitude of each input."""
    raised = (size**ratio).clamp_min(LEAST)
    return raised / (raised.max() * raised.min()).sqrt()


def clip_limits(weight: Tensor, hessian: Tensor, scheme: Scheme) -> Tensor:
    """The largest magnitude that each weight may keep, in the shape of the weight (rows, columns).

    One for each row and group; for the whole tensor where it shares one scale.
    """
    rows, columns = weight.shape
    width = scheme.width(columns)
    grouped = weight.reshape(rows, -1, width)
    parts = [hessian[i : i + width, i : i + width] for i in range(0, columns, width)]
    grams = torch.stack(parts)  # (groups, width, width)
    whole = scheme.group_size == 0
    peak = grouped.abs().amax() if whole else grouped.abs().amax(-1, keepdim=True)
    best = torch.full_like(grouped[..., :1], torch.inf)
    limits = torch.ones_like(best) * peak
    for step in range(SHRINKS):
        limit = peak * (1 - step / (2 * SHRINKS))
        clipped = grouped.clamp(-limit, limit).reshape(rows, columns)
        change = fit(clipped, scheme).round(clipped).reshape_as(grouped) - grouped
        by_group = change.transpose(0, 1)  # (groups, rows, width)
        error = ((by_group @ grams) * by_group).sum(-1).T[..., None]
        error = error.sum().expand_as(best) if whole else error
        better = error < best
        best, limits = torch.where(better, error, best), torch.where(better, limit, limits)
    return limits.expand_as(grouped).reshape(rows, columns)


def multiplied(block: Block, rows: list[Row]) -> set[str]:
    """Full names of the layers whose outputs meet in a product of attention: queries and keys.

    All in an attention module, but for those that read last and those that are proven to give the values.
    """
    modules = dict(block.module.named_modules())
    holders = [n for n, m in modules.items() if n and "attention" in type(m).__name__.lower()]
    inside = [row for row in rows if any(row.layers[0].startswith(f"{block.name}.{n}.") for n in holders)]
    values = {
        f"{block.name}.{row.maker}"
        for row in inside
        if row.maker and not row.by_norm and len(row.outputs.unique()) == dimensions(modules[row.maker])[0]
    }
    return {name for row in inside[:-1] for name in row.layers} - values


def around(names: list[str]) -> str:
    """Full name of the smallest module that holds all of several layers."""
    parts = [name.split(".") for name in names]
    common = 0
    while len({tuple(p[: common + 1]) for p in parts}) == 1:
        common += 1
    return ".".join(parts[0][:common])


class Replay:
    """Runs one module inside a block again and again on what it is handed inside `with replay:`, where the
    block runs once on each of its batches; its outputs, a batch each.

    Rows for `tokens` tokens are taken, evenly from all batches.
    """

    def __init__(self, block: Block, name: str, tokens: int):
        self.name, self._block, self._module = name, block, block.model.get_submodule(name)
        self._calls: dict[int, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = {}  # by batch
        length, count = max(hidden.shape[1] for hidden in block.hidden), len(block.hidden)
        wanted = -(-min(tokens, block.tokens) // length)  # rows
        batches = min(count, wanted)
        self._rows = {i * count // batches: -(-wanted // batches) for i in range(batches)}

    def __enter__(self) -> "Replay":
        runs = itertools.count()
        batch = 0

        def begin(*_: Any) -> None:
            nonlocal batch
            batch = next(runs)

        def keep(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            if batch in self._rows and batch not in self._calls:
                mask = self._block.masks[batch]
                self._calls[batch] = first_rows((arguments, options, mask), len(mask), self._rows[batch])

        self._handles = [
            self._block.module.register_forward_pre_hook(begin),
            self._module.register_forward_pre_hook(keep, with_kwargs=True),
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def __call__(self) -> list[Tensor]:
        """Outputs (tokens, features) without padding, float32."""
        found = []
        for arguments, options, mask in self._calls.values():
            with Float32():
                made = self._module(*arguments, **options)
            found.append(real_tokens(made[0] if isinstance(made, tuple) else made, mask).float())
        return found
