"""DyLoRA: one LoRA whose every leading part is a LoRA of a lower rank.

Paper: Valipour et al., 2022, "DyLoRA: Parameter-Efficient Tuning of Pre-trained Models using Dynamic
Search-Free Low-Rank Adaptation", arXiv 2210.07558.
Pick it when the rank must be chosen after training, or differ from device to device: one run takes the place
of one run a rank.
Cost: r(in + out) parameters a linear layer; on average (r + 1) / 2r of LoRA's operations in training.

A frozen weight W (out, in), A (r, in), B (out, r). Each step draws one b of r_min ... r for all layers:

    y = W x + b0 + s_b B[:, :b] A[:b] D(x),    s_b = alpha / b, or alpha / sqrt(b) with use_rslora

D is dropout. A starts uniform and B at zero, so the model starts as the base at every b. Trained: A and B,
and the new head of a classifier. Frozen: all else. The loss is the task's at this b. `train_prefix`:

    false    component b alone learns, those before it are used but held (the authors' script)
    true     all b components learn

b follows from the seed and the step alone: it is the same in every process and micro-batch, and a resumed run
draws what the straight one drew. Components that get no gradient in a step still move a little, by AdamW's
momentum and weight decay, as in the authors' code; `strict_freeze` keeps them where they are. With
train_prefix: false and r_min > 1, the components before r_min never learn, nor do they in the authors' code.

After training the model computes with rank `export_rank` (all r by default) and is saved so:

    cut(model, b, folder)             an ordinary LoRA folder of rank b; also of a model loaded again
    with at_rank(model, b): ...       compute with rank b
    evaluate_ranks(model, measure)    {b: measure(model)}

Rank b is written as r = b with alpha as it is, so that PEFT finds s_b by itself. Checkpoints of a training
hold all r components and are ordinary LoRA files too.

Differs from the authors' code (huawei-noah/Efficient-NLP): b counts from 1; a rank above r is refused, not
clamped; nothing merges on `eval()`; initialisations that change the base are refused, as the base would be
right at one rank only.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from luthier.errors import MethodError
from luthier.options import option
from luthier.tuning.attach import tuning_of
from luthier.tuning.lora_factors import (
    FactorConfig,
    Factors,
    FactorVariant,
    adapter_state,
    factor_layers,
    write_lora,
)
from luthier.tuning.peft_options import peft_options


@peft_options
@dataclass
class Config(FactorConfig):
    """Options of DyLoRA; the rarer fields of `peft.LoraConfig` can be given too."""

    r: int = option(8, "highest rank", ge=1)
    r_min: int = option(1, "lowest rank that is drawn", ge=1)
    lora_alpha: int = option(16, "scale: the update of rank b is multiplied by alpha / b", ge=1)
    lora_dropout: float = option(0.0, "dropout on the input of the adapter", ge=0, lt=1)
    target_modules: list[str] | str | None = option(
        "all-linear", "names of the layers to adapt, a regular expression, or all-linear (all but the head)"
    )
    use_rslora: bool = option(False, "scale by alpha / sqrt(b)")
    train_prefix: bool = option(False, "train all components of the rank that is drawn, not its last alone")
    strict_freeze: bool = option(False, "keep components without a gradient from momentum and weight decay")
    distribution: str = option(
        "uniform", "how ranks are drawn; geometric prefers low ones", choices=("uniform", "geometric")
    )
    geometric_p: float = option(0.15, "p of geometric: rank b has weight (1 - p)^(b - r_min)", gt=0, lt=1)
    export_rank: int | None = option(
        None, "rank that the trained model computes with and is saved with; all of r by default", ge=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise MethodError(
                f"init_lora_weights: {self.init_lora_weights} does not start as the base at every rank.",
                fix="Choose from: true, gaussian.",
            )
        for name in ("r_min", "export_rank"):
            if (getattr(self, name) or 1) > self.r:
                raise MethodError(
                    f"{name}: {getattr(self, name)} is more than r: {self.r}.", fix="Raise r, or lower it."
                )
        self.sampled: int | None = None  # in a training step
        self.chosen = self.export_rank or self.r  # outside

    def variant(self) -> FactorVariant:
        return Nested(self)

    def callbacks(self, model: nn.Module) -> list[TrainerCallback]:
        return [SampleRank(self, model)]

    def save_adapter(self, model: peft.PeftModel, folder: Path | str) -> None:
        """Write the rank in use as an ordinary LoRA."""
        cut(model, self.chosen, folder)


def sample_rank(seed: int, step: int, ranks: range, distribution: str = "uniform", p: float = 0.15) -> int:
    """The rank of a step: a function of seed and step alone."""
    weights = [1.0 if distribution == "uniform" else (1 - p) ** i for i in range(len(ranks))]
    return random.Random(f"{seed} {step}").choices(ranks, weights)[0]


def leading(a: Tensor, b: Tensor, rank: int, last_alone: bool = False) -> tuple[Tensor, Tensor]:
    """A[:rank] (rank, in) and B[:, :rank] (out, rank); with `last_alone` only the last component learns."""
    a, b = a[:rank], b[:, :rank]
    if last_alone and rank > 1:
        a = torch.cat([a[:-1].detach(), a[-1:]])
        b = torch.cat([b[:, :-1].detach(), b[:, -1:]], dim=1)
    return a, b


class Nested(FactorVariant):
    """The leading components of an adapter, scaled for their number."""

    def formula(self, layer: Any, name: str) -> Factors:
        config, highest = self.config, layer.r[name]
        drawn = config.sampled if layer.training else None
        rank = min(drawn or config.chosen, highest)
        last_alone = drawn is not None and not config.train_prefix
        a, b = leading(layer.lora_A[name].weight, layer.lora_B[name].weight, rank, last_alone)
        grow = highest / rank
        # PEFT's own scale is alpha / r; it may have been changed since by its `scale_layer`.
        return a, b, layer.scaling[name] * (math.sqrt(grow) if config.use_rslora else grow)


class SampleRank(TrainerCallback):
    """Draws the rank of each optimiser step."""

    def __init__(self, config: Config, model: nn.Module):
        self.config = config
        self.model = model
        self.layers: list[Any] = []
        self.name = ""
        self.kept: list[tuple[Tensor, Tensor]] = []  # views of A and B that must not move, and their values

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model: Any = self.model
        self.name = model.active_adapter
        self.layers = factor_layers(model, self.name)
        self.config.watch.begin()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        config = self.config
        ranks = range(config.r_min, config.r + 1)
        config.sampled = sample_rank(
            args.seed, state.global_step, ranks, config.distribution, config.geometric_p
        )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kept = []
        if not self.config.strict_freeze:
            return
        assert self.config.sampled is not None
        for layer in self.layers:
            rank = min(self.config.sampled, layer.r[self.name])
            learns = slice(0 if self.config.train_prefix else rank - 1, rank)
            a, b = layer.lora_A[self.name].weight.data, layer.lora_B[self.name].weight.data
            for held in (a[: learns.start], a[rank:], b[:, : learns.start], b[:, rank:]):
                self.kept.append((held, held.clone()))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for held, value in self.kept:
            held.copy_(value)
        self.kept = []

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.config.sampled = None
        self.config.watch.end()


def set_rank(model: nn.Module, rank: int) -> None:
    """Let the active adapter compute with its leading `rank` components from now on.

    Raises:
        MethodError: no DyLoRA adapter, a rank that it does not have, or it is merged at another.
    """
    config = tuning_of(model)
    if not isinstance(config, Config):
        raise MethodError(
            f"The model carries no DyLoRA adapter, but {type(config).__module__}.",
            fix="Of one that was saved and loaded again, cut(model, rank, folder) takes any rank out.",
        )
    _require_rank(rank, config.r)
    layers = factor_layers(model, model.active_adapter)
    if rank != config.chosen and any(layer.merged for layer in layers):
        raise MethodError(
            f"The adapter is merged at rank {config.chosen}.", fix="Call model.unmerge_adapter() first."
        )
    config.chosen = rank


@contextmanager
def at_rank(model: nn.Module, rank: int) -> Iterator[None]:
    """Inside, outside of training steps, the active adapter computes with its leading `rank` components."""
    config: Any = tuning_of(model)
    before = getattr(config, "chosen", None)
    set_rank(model, rank)
    try:
        yield
    finally:
        config.chosen = before


def evaluate_ranks(
    model: nn.Module, measure: Callable[[nn.Module], Any], ranks: Iterable[int] | None = None
) -> dict[int, Any]:
    """`measure(model)` at each of `ranks`, by default all from r_min to r."""
    config: Any = tuning_of(model)
    if ranks is None and isinstance(config, Config):
        ranks = range(config.r_min, config.r + 1)
    found = {}
    for rank in ranks or [0]:
        with at_rank(model, rank):
            found[rank] = measure(model)
    return found


def cut(model: peft.PeftModel, rank: int, folder: Path | str) -> None:
    """Write the leading `rank` components of the active adapter as an ordinary LoRA folder.

    The model may be the trained one, or one that was loaded from a folder with more components.

    Raises:
        MethodError: the adapter is no LoRA, or has no such rank.
    """
    config = tuning_of(model)
    if not isinstance(config, peft.LoraConfig):
        raise MethodError(f"A rank can be cut out of a LoRA only, not of {type(config).__name__}.")
    _require_rank(rank, config.r)
    write_lora(model, cut_state(adapter_state(model), rank), folder, rank=lambda r: min(r, rank))


def cut_state(state: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """An adapter's tensors with the leading `rank` rows of each A and columns of each B."""
    found = {}
    for name, tensor in state.items():
        if name.endswith(".lora_A.weight"):
            tensor = tensor[:rank]
        elif name.endswith(".lora_B.weight"):
            tensor = tensor[:, :rank]
        found[name] = tensor
    return found


def _require_rank(rank: int, highest: int) -> None:
    if not 1 <= rank <= highest:
        raise MethodError(
            f"The adapter has no rank {rank}.", fix=f"Choose one from 1 to {highest}; disable_adapter() is 0."
        )
