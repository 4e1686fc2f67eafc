"""LLM-Pruner: take out the neurons, heads or channels that the loss would miss least.

Paper: Ma, Fang and Wang, 2023, "LLM-Pruner: On the Structural Pruning of Large Language Models",
    arXiv 2305.11627.
Pick it when the smaller model must be an ordinary dense one, and there is little data and time; tune it
    afterwards (LoRA), which wins back most of what is lost at a fifth of the parameters.
Cost: one forward and backward pass over some ten sequences, and float32 gradients of the weights that are
scored
    (twice that for the second-order kinds).

A unit is the set of slices that are of no use without each other (`luthier.compression.units`): a neuron
(its rows of gate and up, its column of down), a key-value head with its query heads (rows of q, k, v,
columns of o), or a channel of the stream in every block at once.

Of a weight W with the gradient g of the joint loss over N calibration sequences and F = (1/N) sum_j g_j^2 of
their own losses:

    salience s    taylor first    W g                       s, W, g, F (out, in)
                  taylor second   W^2 F
                  taylor mix      W g - W^2 F / 2
    element       I(unit) = sum |s| over the unit's slice of the matrix
    vector        I(unit) = sum over its rows (or columns) of |sum s|     first order only
    l1, l2        I(unit) = sum |W|, sum W^2          random    I ~ U(0, 1)

and the unit's importance is the sum (`grouping`) of I over its matrices. In each block the lowest units go:
C - floor(C (1 - ratio)) of C rows, in whole units, so that all blocks keep one width and the model one that
transformers loads by itself (`widths: uniform`). Where the class allows only some numbers of heads, the next
larger one is kept. `scope: global` compares the units of all blocks, and `blocks` leaves the first and the
last whole, as the authors do; both need `widths: per_layer`.

Nothing is trained here; the recipe's next stage is. What differs from the authors' code (horseee/LLM-Pruner):
groups come from the structure, not from tracing; the salience with Fisher is that of its description in all
kinds of units (there a comparison chain makes `param_mix` of heads fail); biases are cut but not scored; and
a norm after channels were cut is left as it is, as there.

A record's `after` is what the units that went had given to the output of their reading layer, as a share of
its square on the calibration data; of channels it is their share of the importance.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from luthier.compression import gradients, slicing, units
from luthier.compression.records import Record
from luthier.compression.units import CHANNEL, Part, Units
from luthier.errors import MethodError
from luthier.options import option

DATA_FREE = ("l1", "l2", "random")


@dataclass
class Config:
    """Options of LLM-Pruner."""

    ratio: float = option(0.25, "share of the units that is taken out", ge=0, lt=1)
    units: list[str] | None = option(None, "mlp, attention, or channel alone; default: mlp and attention")
    importance: str = option(
        "element",
        "what makes a slice important: element and vector by taylor, or a baseline",
        choices=("element", "vector", "l1", "l2", "random"),
    )
    taylor: str = option(
        "first", "terms of the loss's series that are used", choices=("first", "second", "mix")
    )
    grouping: str = option(
        "sum",
        "how the matrices of a unit count together",
        choices=("sum", "mean", "max", "prod", "first", "last"),
    )
    widths: str = option(
        "uniform",
        "whether blocks may differ; then only luthier loads the model",
        choices=("uniform", "per_layer"),
    )
    scope: str = option("layer", "among which units the lowest are looked for", choices=("layer", "global"))
    blocks: list[int] | None = option(None, "[start, end): blocks that lose units; default: all")
    steps: int = option(1, "rounds in which the ratio is reached, each with new scores", ge=1)
    seed: int = option(0, "of importance: random")

    def __post_init__(self) -> None:
        kinds = set(self.kinds)
        if not kinds or not (kinds <= {units.MLP, units.ATTENTION} or kinds == {CHANNEL}):
            raise MethodError(
                f"units: {self.units} are not units of one kind of model.",
                fix="Write [mlp], [attention], both, or [channel] alone.",
            )
        if self.importance == "vector" and self.taylor != "first":
            raise MethodError(
                f"importance: vector adds signed terms, which taylor: {self.taylor} has not.",
                fix="Write taylor: first, or importance: element.",
            )
        if self.widths == "uniform" and (self.scope == "global" or self.blocks is not None):
            field = "scope: global" if self.scope == "global" else f"blocks: {self.blocks}"
            raise MethodError(
                f"{field} makes blocks of different widths.", fix="Write widths: per_layer, or leave it out."
            )
        if kinds == {CHANNEL} and self.widths == "per_layer":
            raise MethodError("The stream has one width in all blocks.", fix="Write widths: uniform.")

    @property
    def kinds(self) -> list[str]:
        return [units.MLP, units.ATTENTION] if self.units is None else list(self.units)

    @property
    def wants_data(self) -> bool:
        """Whether the importance is taken from a loss."""
        return self.importance not in DATA_FREE

    def compress(self, model: nn.Module, batches: Iterable[gradients.Batch]) -> list[Record]:
        """Take the units out of a model in place.

        Args:
            batches: {input_ids, attention_mask} (batch, seq), and labels for a model that is not causal. The
                baselines need none.

        Raises:
            MethodError: the model has no such units, its class cannot have such widths, or it is quantised.
            DataError: there are no data.
            CheckError: the smaller model does not compute what the one with the units at zero did.
        """
        batches = list(batches)
        first = self._chosen(model)
        targets = slicing.targets(model, first, self.ratio, self.widths)
        if all(count == u.count for u, count in targets.items()):
            return slicing.records({u: torch.arange(u.count) for u in first}, {}, 0.0)
        found: list[Record] = []
        for step in range(1, self.steps + 1):
            start = time.perf_counter()
            now = self._chosen(model)
            counts = self._counts(model, now, targets, step)
            scores = self.scores(model, now, batches)
            kept = self.keep(scores, counts)
            errors = slicing.output_errors(model, kept, batches)
            for u, indices in kept.items():
                if u.kind == CHANNEL:
                    errors[u] = 1 - float(scores[u][indices].sum() / scores[u].sum().clamp_min(1e-30))
            slicing.cut(model, kept, widths=self.widths)
            found += slicing.records(kept, errors, time.perf_counter() - start)
        return found

    def _counts(
        self, model: nn.Module, now: list[Units], targets: dict[Units, int], step: int
    ) -> dict[str, int]:
        """How many units each place, by its name, keeps in a round: as many more as rounds are left."""
        counts = {u.name: u.count - (u.count - kept) * step // self.steps for u, kept in targets.items()}
        for kind in self.kinds if self.widths == "uniform" and step < self.steps else ():
            group = [u for u in now if u.kind == kind]
            number = slicing.valid_count(model, group, counts[group[0].name])
            counts |= {u.name: number for u in group}
        return counts

    def scores(
        self, model: nn.Module, found: list[Units], batches: Iterable[gradients.Batch]
    ) -> dict[Units, Tensor]:
        """The importance (count,) of the units."""
        if self.importance == "random":
            generator = torch.Generator().manual_seed(self.seed)
            return {u: torch.rand(u.count, generator=generator) for u in found}
        parameters = dict(model.named_parameters())
        names = {part.name for u in found for part in u.weights}
        joint: dict[str, Tensor] = {}
        fisher: dict[str, Tensor] = {}
        if self.wants_data:
            second = self.taylor != "first"
            joint, fisher = gradients.gradients(model, batches, names, squares=second)
        scores = {}
        for u in found:
            locals_ = []
            for part in u.weights:
                weight = parameters[part.name].detach().float()
                s = salience(weight, joint.get(part.name), fisher.get(part.name), self._kind)
                locals_.append(local(s, part, self.importance))
            scores[u] = grouped(locals_, self.grouping)
        return scores

    def keep(self, scores: dict[Units, Tensor], counts: dict[str, int]) -> dict[Units, Tensor]:
        """Indices of the units that stay, those of highest importance."""
        if self.scope == "layer":
            return {u: units.best(s, counts[u.name]) for u, s in scores.items()}
        kept: dict[Units, Tensor] = {}
        for kind in self.kinds:
            group = {u: s for u, s in scores.items() if u.kind == kind}
            kept |= units.best_of_all(group, sum(counts[u.name] for u in group))
        return kept

    @property
    def _kind(self) -> str:
        return self.importance if self.importance in DATA_FREE else self.taylor

    def _chosen(self, model: nn.Module) -> list[Units]:
        found = units.find(model, self.kinds)
        if self.blocks is None:
            return found
        start, end = self.blocks if len(self.blocks) == 2 else (0, -1)
        inside = [u for u in found if start <= u.block < end]
        last = max(u.block for u in found) + 1
        if not 0 <= start < end <= last:
            raise MethodError(
                f"blocks: {self.blocks} are no [start, end) among {last} blocks.",
                fix=f"Write two numbers with 0 <= start < end <= {last}.",
            )
        return inside


def salience(weight: Tensor, gradient: Tensor | None, fisher: Tensor | None, kind: str) -> Tensor:
    """s of a weight, all of its shape; `kind` is first, second, mix, l1 or l2."""
    if kind in ("l1", "l2"):
        return weight.abs() if kind == "l1" else weight.square()
    assert gradient is not None
    if kind == "first":
        return weight * gradient
    assert fisher is not None
    second = weight.square() * fisher
    return second if kind == "second" else weight * gradient - 0.5 * second


def local(s: Tensor, part: Part, importance: str) -> Tensor:
    """Importance (count,) of each unit by one matrix."""
    vector = importance == "vector"
    return units.by_unit(s if vector else s.abs(), part, vector=vector)


def grouped(scores: list[Tensor], grouping: str) -> Tensor:
    """Importance (count,) of each unit by all its matrices."""
    together = torch.stack(scores)  # (matrices, count)
    ways: dict[str, Any] = {
        "sum": lambda: together.sum(0),
        "mean": lambda: together.mean(0),
        "max": lambda: together.amax(0),
        "prod": lambda: together.prod(0),
        "first": lambda: together[0],
        "last": lambda: together[-1],
    }
    return ways[grouping]()
