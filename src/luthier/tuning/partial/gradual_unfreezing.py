"""Gradual unfreezing: the top learns first, lower groups join one after another.

Paper: Howard & Ruder, 2018, "Universal Language Model Fine-tuning for Text Classification" (ULMFiT),
arXiv 1801.06146, section 3.3.
Pick it when a few hundred examples must adapt a whole encoder without losing what it knows.
Cost: full fine-tuning's in the last stage, less before.

    stage s:  the top s groups learn (embeddings, blocks ..., final norm and head); none is frozen again
    rates:    lr_l = lr xi^(L-l)                               (discriminative; the paper's xi is 1/2.6)
    schedule: lr_l stlr(t),  cut = max(1, floor(T cut_frac)),  p = t / cut, then 1 - (t - cut) / (T - cut),
              stlr = (1 + p (ratio - 1)) / ratio               (slanted triangular)

`schedule: stlr_per_stage` starts a triangle in every stage, the last one over all that remains; `stlr`
draws one over the run; `trainer` leaves the schedule to `training.lr_scheduler_type`.

All groups are in the optimiser from the start; a frozen one has no gradient, so neither Adam nor weight
decay touches it, and its Adam state begins when it opens. The stage follows from the step alone: a
resumed run opens what the straight one had open. xi defaults to 0.95: 2.6 a block over twelve blocks is
1e-5 and freezes the bottom in effect. The authors' script opens all after two epochs: `stages: [1, 2,
all]`.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainingArguments

from luthier import checks
from luthier.errors import MethodError
from luthier.models import structure
from luthier.options import option
from luthier.tuning import groups
from luthier.tuning.subset import Subset


@dataclass
class Config(Subset):
    """Options of gradual unfreezing."""

    stages: list | None = option(None, "numbers of open groups, one a stage, such as [1, 2, all]")
    groups_per_stage: int = option(1, "groups that each stage opens, where stages is not given", ge=1)
    unfreeze_every: int = option(1, "length of a stage", ge=1)
    unit: Literal["epoch", "step"] = option("epoch", "what unfreeze_every counts", choices=("epoch", "step"))
    layer_lr_decay: float = option(0.95, "rate of a group over that of the group above it", gt=0, le=1)
    schedule: Literal["stlr_per_stage", "stlr", "trainer"] = option(
        "stlr_per_stage", "learning-rate schedule", choices=("stlr_per_stage", "stlr", "trainer")
    )
    cut_frac: float = option(0.1, "share of a triangle in which the rate rises", ge=0, lt=1)
    ratio: float = option(32.0, "highest rate over the lowest", ge=1)
    train_embeddings: bool = option(True, "open the embeddings last; false keeps them frozen")
    untie_head: bool = option(False, "give a tied head a weight of its own, so that it opens first")
    trunk_dropout: bool = option(False, "keep dropout on in the frozen blocks")

    def groups(self, model: nn.Module) -> list[tuple[str, groups.Named]]:
        """The groups that will learn, highest first."""
        ordered = structure.groups(model)[0 if self.train_embeddings else 1 :]
        return [group for group in reversed(ordered) if group[1]]

    def open_groups(self, model: nn.Module) -> list[int]:
        """Number of open groups in each stage.

        Raises:
            MethodError: `stages` is not a growing list of numbers of groups.
        """
        total = len(self.groups(model))
        if self.stages is None:
            return [*range(self.groups_per_stage, total, self.groups_per_stage), total]
        counts = [total if entry == "all" else entry for entry in self.stages]
        if (
            not counts
            or any(not isinstance(c, int) or not 1 <= c <= total for c in counts)
            or counts != sorted(set(counts))
        ):
            raise MethodError(
                f"stages: {self.stages} is not a growing list of numbers of groups.",
                fix=f"Write numbers from 1 to {total} or all, such as [1, 2, all].",
            )
        return counts

    def trained(self, model: nn.Module, stage: int = 0) -> set[str]:
        count = self.open_groups(model)[stage]
        return {name for _, members in self.groups(model)[:count] for name, _ in members}

    def callbacks(self, model: nn.Module) -> list[TrainerCallback]:
        return [*super().callbacks(model), Unfreeze(self, model)]

    def parameter_groups(self, model: nn.Module, args: TrainingArguments) -> list[dict[str, Any]]:
        ever = {name for _, members in self.groups(model) for name, _ in members}
        return groups.layered_groups(model, args, self.layer_lr_decay, ever)


class Unfreeze(TrainerCallback):
    """Opens the groups of the stage that the step belongs to, and sets the schedule."""

    def __init__(self, config: Config, model: nn.Module):
        self.config = config
        self.model = model
        self.counts = config.open_groups(model)
        self.stage = -1
        self.length = 1  # of a stage, in steps

    def stage_at(self, step: int) -> int:
        return min(step // self.length, len(self.counts) - 1)

    def rate_at(self, step: int, total: int) -> float:
        """The schedule's factor at `step` of `total`."""
        start = 0
        if self.config.schedule == "stlr_per_stage":
            stage = self.stage_at(min(step, total - 1))
            start = stage * self.length
            last = stage == len(self.counts) - 1
            total = total if last else min(total, start + self.length)
        return groups.slanted_triangle(step - start, total - start, self.config.cut_frac, self.config.ratio)

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        self._require_all_groups(args, optimizer)
        steps = max(1, math.ceil(len(train_dataloader) / args.gradient_accumulation_steps))
        self.length = self.config.unfreeze_every * (steps if self.config.unit == "epoch" else 1)
        reached = self.stage_at(max(0, state.max_steps - 1)) + 1
        checks.record(
            "before",
            "every stage of unfreezing is reached",
            reached == len(self.counts),
            reached,
            len(self.counts),
            f"a stage has {self.length} of {state.max_steps} steps",
            fix="Train longer, or open more groups in a stage.",
            refuse=False,
        )
        if self.config.schedule != "trainer":
            self._set_schedule(lr_scheduler, optimizer, state.max_steps)
        self.stage = -1
        self._open(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._open(state.global_step)

    def _open(self, step: int) -> None:
        stage = self.stage_at(step)
        if stage != self.stage:
            self.stage = stage
            groups.set_trainable(self.model, self.config.trained(self.model, stage))
            if not self.config.trunk_dropout:
                groups.still_trunk(self.model)

    def _require_all_groups(self, args: TrainingArguments, optimizer: Any) -> None:
        if args.world_size > 1:
            raise MethodError(
                "gradual_unfreezing runs in one process: data parallelism would leave the gradients of "
                "groups that open later unsynchronised.",
                fix="Take top_layers or full.",
            )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [
            name for _, members in self.config.groups(self.model) for name, p in members if id(p) not in held
        ]
        if missing:
            raise MethodError(
                f"{len(missing)} weights that open later are not in the optimiser, such as {missing[0]}: "
                "they would never learn.",
                fix="Make the optimiser from luthier.tuning.hooks.parameter_groups(model, args), as "
                "luthier.trainer does.",
            )

    def _set_schedule(self, scheduler: Any, optimizer: Any, total: int) -> None:
        """Put the triangle in the place of the trainer's own factor, so that its logs show the true rate."""
        if not isinstance(scheduler, LambdaLR):
            raise MethodError(
                f"schedule: {self.config.schedule} cannot take the place of {type(scheduler).__name__}.",
                fix="Write training lr_scheduler_type: constant, or schedule: trainer.",
            )
        scheduler.lr_lambdas = [lambda step: self.rate_at(step, total)] * len(scheduler.base_lrs)
        rate = self.rate_at(scheduler.last_epoch, total)
        for group, base in zip(optimizer.param_groups, scheduler.base_lrs, strict=True):
            group["lr"] = base * rate
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
