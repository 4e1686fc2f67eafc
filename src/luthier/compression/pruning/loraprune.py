"""LoRAPrune: structured pruning while a LoRA is trained, judged by the gradients of its factors alone.

Paper: Zhang et al., 2023, "LoRAPrune: Structured Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning",
    arXiv 2305.18403.
Pick it when a smaller, tuned dense model is wanted on the memory of LoRA: the base has no gradients.
Cost: r(in + out) trained numbers a linear layer; each step one product (out, r) x (r, in) a layer more, and a
    buffer of that layer's size.

Every linear layer of the blocks is W = W0 + s B A, with W0 (out, in) frozen, A (r, in) and B (out, r)
trained, s = alpha / r. Before each step of the optimiser, with the gradients dA and dB (clipped as the
trainer does):

    G = dB A + B dA - dB dA                       how far one step on both factors moves B A, (out, in)
    I = |G * W|                                   (I^2 as in the paper with p: 2)
    score of a unit = sum over its layers of  (sum of I over its slice) / (norm of all units' sums + 1e-8)
    S <- 0.9 S + 0.1 score

A unit is a neuron (row of gate and up, column of down) or a key-value head with its query heads (rows of q,
k, v, columns of o). The share of units that are masked grows with the cube

    r_t = ratio (1 - (1 - progress)^3)            progress 0 for the first `hold` of the steps, 1 for the last
                                                  `settle`

and every `every` steps the lowest of each sub-layer are masked: what its last layer reads of them is zero. A
masked unit stays masked. At the end LoRA is merged and the masked units are cut out.

What differs from the authors' code (aim-uofa/LoRAPrune): heads are pruned by key-value group, so that grouped
attention keeps its shape; the last update is made at the full ratio, not one update before it; the mask lies
on the input of the last layer, which is the same function; all blocks are pruned alike, so that transformers
loads the model by itself. `widths: per_layer` leaves the first tenth of the blocks and the last whole, as
there. `metric: magnitude` takes |W| for I; their `grad`, with the true gradient, is left out: it needs what
the method saves. The tuning is `steps` steps on the calibration batches, every token of which is learnt.

A record's `after` is the share of the output (squared) of a sub-layer's last layer that the units it lost
would still give with the weights as trained.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from luthier.compression import slicing, units
from luthier.compression.gradients import Batch
from luthier.compression.records import Course, Record
from luthier.compression.short_tuning import cubic, progress_at, require_causal, tune
from luthier.compression.units import Part, Units
from luthier.errors import MethodError
from luthier.options import option
from luthier.tuning.attach import attach
from luthier.tuning.merge import merge

SMOOTHING = 0.9


@dataclass
class Config:
    """Options of LoRAPrune."""

    ratio: float = option(0.5, "share of the units that is taken out", ge=0, lt=1)
    units: list[str] | None = option(None, "mlp, attention or both; default: both")
    widths: str = option(
        "uniform",
        "uniform, or per_layer to leave the first tenth of the blocks and the last whole",
        choices=("uniform", "per_layer"),
    )
    metric: str = option("lora", "what makes a weight important", choices=("lora", "magnitude"))
    p: int = option(1, "power of a weight's importance before it is summed", ge=1, le=2)
    cross_term: bool = option(True, "whether G has the term dB dA")
    every: int = option(10, "steps from one update of the masks to the next", ge=1)
    hold: float = option(0.1, "share of the steps at the start without masks", ge=0, lt=1)
    settle: float = option(0.1, "share of the steps at the end with all masks", ge=0, lt=1)
    r: int = option(8, "rank of the LoRA", ge=1)
    lora_alpha: int = option(16, "scale of the LoRA: its update is multiplied by alpha / r", ge=1)
    lora_dropout: float = option(0.05, "dropout on the input of the LoRA", ge=0, lt=1)
    steps: int = option(200, "steps of the tuning", ge=1)
    batch_size: int = option(4, "sequences of a step", ge=1)
    learning_rate: float = option(3e-4, "highest learning rate", gt=0)
    seed: int = option(0, "of the LoRA's start and the order of the data")

    def __post_init__(self) -> None:
        if not self.kinds or not set(self.kinds) <= {units.MLP, units.ATTENTION}:
            raise MethodError(
                f"units: {self.units} are not those of LoRAPrune.", fix="Write mlp, attention or both."
            )
        if self.hold + self.settle >= 1:
            raise MethodError(
                f"hold: {self.hold:g} and settle: {self.settle:g} leave no steps to prune in.",
                fix="Lower them.",
            )

    @property
    def kinds(self) -> list[str]:
        return [units.MLP, units.ATTENTION] if self.units is None else list(self.units)

    def course(self, length: int | None) -> Course:
        return Course(self.steps, self.batch_size, length or 0, learns=0.02)  # LoRA's few percent

    def compress(self, model: nn.Module, batches: Iterable[Batch]) -> list[Record]:
        """Tune and prune a model in place; its weights are then those of the tuned one.

        Args:
            batches: {input_ids, attention_mask} (batch, seq), of which each row is a sequence to learn.

        Raises:
            MethodError: the model is no causal one with such units, or it is quantised.
            DataError: there are no data. TrainingError: the loss is not finite, or explodes.
        """
        start, batches = time.perf_counter(), list(batches)
        require_causal(model)
        targets = slicing.targets(model, self.find(model), self.ratio, self.widths)
        learns = {name: p.requires_grad for name, p in model.named_parameters()}
        torch.manual_seed(self.seed)
        tuned = attach(model, self.lora(units.find(model, self.kinds)))
        masks = PruneUnits(self, tuned, targets)
        try:
            tune(
                tuned,
                batches,
                steps=self.steps,
                batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                seed=self.seed,
                callbacks=[masks],
            )
        except BaseException:
            tuned.unload()
            raise
        finally:
            masks.remove()
        merged = merge(tuned)
        for name, parameter in merged.named_parameters():
            parameter.requires_grad_(learns[name])
        kept = masks.kept()
        errors = slicing.output_errors(merged, kept, batches)
        slicing.cut(merged, kept, widths=self.widths)
        return slicing.records(kept, errors, time.perf_counter() - start)

    def find(self, model: nn.Module) -> list[Units]:
        """The units that may go."""
        found = units.find(model, self.kinds)
        if self.widths == "uniform":
            return found
        blocks = max(u.block for u in found) + 1
        return [u for u in found if blocks // 10 <= u.block < blocks - 1]

    def lora(self, found: list[Units]) -> peft.LoraConfig:
        """The LoRA on all layers that hold units."""
        names = [part.name.removesuffix(".weight") for u in found for part in u.weights]
        return peft.LoraConfig(
            r=self.r, lora_alpha=self.lora_alpha, lora_dropout=self.lora_dropout, target_modules=names
        )


def movement(a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, *, cross_term: bool = True) -> Tensor:
    """G (out, in) from A (r, in), B (out, r) and their gradients."""
    moved = grad_b @ a + b @ grad_a
    return moved - grad_b @ grad_a if cross_term else moved


def normalised(sums: Tensor) -> Tensor:
    """Sums (count,) of a layer's units over their norm: no layer counts more for its scale."""
    return sums / (torch.linalg.vector_norm(sums) + 1e-8)


class PruneUnits(TrainerCallback):
    """Scores the units from a LoRA's gradients, and masks them on schedule, in any trainer.

    Args:
        model: with the LoRA on it (`Config.lora`).
        targets: how many of each are kept in the end.
    """

    def __init__(self, config: Config, model: Any, targets: dict[Units, int]):
        self.config, self.targets = config, targets
        self.layers = dict(model.get_base_model().named_modules())
        device = model.device
        self.scores = {u: torch.zeros(u.count, device=device) for u in targets}
        self.masks = {u: torch.ones(u.count, device=device) for u in targets}
        self.ratio = 0.0  # share of the way from all units to the targets
        self._hooks = [self.layers[u.name].register_forward_pre_hook(self._masking(u)) for u in targets]

    def remove(self) -> None:
        """Take the masks off the model."""
        for hook in self._hooks:
            hook.remove()

    def kept(self) -> dict[Units, Tensor]:
        """Indices of the units that are not masked."""
        return {u: mask.nonzero().flatten().cpu() for u, mask in self.masks.items()}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.observe()
        step = state.global_step + 1  # that which is being made
        done = progress_at(step, state.max_steps, self.config.hold, self.config.settle)
        if self.ratio < 1 and (done == 1 or (done > 0 and step % self.config.every == 0)):
            self.mask(1 - cubic(done, 1.0, 0.0))

    @torch.no_grad()
    def observe(self) -> None:
        """Take the gradients of this step into the scores; all or, where one is not finite, none."""
        found = {u: sum(self.module_scores(u)) for u in self.targets}
        if all(torch.isfinite(score).all() for score in found.values()):
            for u, score in found.items():
                self.scores[u].lerp_(score, 1 - SMOOTHING)

    @torch.no_grad()
    def module_scores(self, u: Units) -> list[Tensor]:
        """Normalised sums (count,) of each layer of the units."""
        scores = []
        for part in u.weights:
            layer: Any = self.layers[part.name.removesuffix(".weight")]
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            base = layer.get_base_layer()
            transposed = isinstance(base, Conv1D)
            plain = base.weight.T if transposed else base.weight
            weight = plain.float() + layer.scaling["default"] * (b.float() @ a.float())
            if self.config.metric == "lora":
                if a.grad is None or b.grad is None:
                    raise MethodError(
                        f"The LoRA of '{part.name}' has no gradient before the step.",
                        fix="Use a trainer that calls on_pre_optimizer_step with gradients in place.",
                    )
                factors = (t.float() for t in (a, b, a.grad, b.grad))
                weight = weight * movement(*factors, cross_term=self.config.cross_term)
            rows = Part(part.name, 1 - part.dim if transposed else part.dim, part.size)
            scores.append(normalised(units.by_unit(weight.abs() ** self.config.p, rows)))
        return scores

    def mask(self, ratio: float) -> None:
        """Mask units, those of lowest score, up to `ratio` of the number that goes in the end."""
        self.ratio = ratio
        for u, target in self.targets.items():
            gone = u.count - target
            # Of what the schedule asks for whole units, and never one back.
            number = gone if ratio == 1 else min(gone, units.removed(u, ratio * self.config.ratio))
            number = max(number, int(u.count - self.masks[u].sum()))
            scores = torch.where(self.masks[u].bool(), self.scores[u], -1.0)
            self.masks[u].zero_()
            self.masks[u][units.best(scores, u.count - number)] = 1.0

    def _masking(self, u: Units) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            mask = self.masks[u].repeat_interleave(u.reads).to(inputs[0])
            return (inputs[0] * mask, *inputs[1:])

        return hook
