"""GUM: prune the neurons that move towards zero and that others make up for, over all blocks together.

Paper: Santacroce, Wen, Shen and Li, 2023, "What Matters In The Structured Pruning of Generative Language
    Models?", arXiv 2302.03773.
Pick it when a model is tuned for one task and its feed-forward layers may shrink to a half or less of it.
Cost: all weights are trained; a number a neuron more, and for each block the similarities of its f neurons
    (f^2 floats, and f^2 operations a token). A teacher, where there is one, doubles the forward pass.

Every feed-forward network has hidden h (f) and one score S_i a neuron, 0 at the start. The mask

    m_i = 1 where S_i is among the int(v n) highest scores of all n neurons of the model, else 0

lies on the neuron's rows (gate, up, or fc) and on its column (down): without bias z = m_i W_i x, and y = W
(m h). The gradient of m_i is taken for that of S_i (straight through): to first order S_i collects -sum_t
(dL/dW W) over the neuron's weights, so that weights which shrink lose score. The share v that is kept falls
with the cube,

    v_t = v + (1 - v) (1 - progress)^3            progress 0 for the first `hold` of the steps, 1 for the last
                                                  `settle`

With H (tokens, f), the hidden states of a batch without padding and without masked neurons, and b = `memory`:

    C <- (1 - b) C + b H^T H,    n_i = C_ii,    R_ij = |C_ij| / (sqrt(n_i n_j) + 1e-6),  R_ii = 0
    u_i = sum_j R_ij / (f v_t)                                    how redundant neuron i is
    L = L_task + (l v_t / v) mean over blocks of (1/f) sum_i sigmoid(S_i) (1 + g u_i)

with l = `penalty` and g = `uniqueness`; g = 0 is movement pruning. With a teacher, which is the model before,
L_task = (1 - a) CE + a T^2 KL(teacher || student), a = `distill`, T = `temperature`. Trained: all weights
and S.

At the end the masked neurons are cut out, and blocks have different widths. `widths: uniform` compares the
neurons of each block alone (the paper's "per layer" variant), and leaves a model that transformers loads by
itself.

What differs from the authors' code (santacml/nn_pruning_uniqueness): equal scores go by index, so that the
number kept is exact; masked neurons do not count as redundant ones' partners; the penalty is a mean over
blocks (theirs is a third of that, for they count masked layers too); a block keeps one neuron at least; for
gated networks h is act(gate) up. The tuning is `steps` steps on the calibration batches, every token of
which is learnt.

A record's `after` is the share of the output (squared) of a block's last layer that the neurons it lost would
still give with the weights as trained.
"""

import copy
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import TrainerCallback

from luthier.compression import slicing, units
from luthier.compression.gradients import Batch
from luthier.compression.records import Course, Record
from luthier.compression.short_tuning import cubic, progress_at, require_causal, tune
from luthier.compression.units import Units
from luthier.errors import MethodError
from luthier.options import option

SLOT = "gum_scores"  # the scores' name in the model, while it is tuned


@dataclass
class Config:
    """Options of GUM."""

    ratio: float = option(0.5, "share of the neurons that is taken out", ge=0, lt=1)
    widths: str = option(
        "per_layer",
        "per_layer compares the neurons of all blocks; uniform those of each block, and keeps one width",
        choices=("per_layer", "uniform"),
    )
    uniqueness: float = option(1.0, "weight of redundancy in the penalty; 0 is movement pruning", ge=0)
    penalty: float = option(2.0, "weight of the penalty on scores", ge=0)
    memory: float = option(0.999, "share of the newest batch in the similarities", gt=0, le=1)
    distill: float = option(0.0, "share of the loss that is the distance to the model before", ge=0, le=1)
    temperature: float = option(2.0, "of the distributions that are compared with the model before", gt=0)
    hold: float = option(0.1, "share of the steps at the start without masks", ge=0, lt=1)
    settle: float = option(0.3, "share of the steps at the end with all masks", ge=0, lt=1)
    steps: int = option(200, "steps of the tuning", ge=1)
    batch_size: int = option(4, "sequences of a step", ge=1)
    learning_rate: float = option(5e-5, "highest learning rate of the weights", gt=0)
    score_rate: float = option(1e-2, "highest learning rate of the scores", gt=0)
    weight_decay: float = option(0.1, "decay of the weights, not of the scores", ge=0)
    seed: int = option(0, "of the order of the data")

    def __post_init__(self) -> None:
        if self.hold + self.settle >= 1:
            raise MethodError(
                f"hold: {self.hold:g} and settle: {self.settle:g} leave no steps to prune in.",
                fix="Lower them.",
            )

    def course(self, length: int | None) -> Course:
        return Course(self.steps, self.batch_size, length or 0)

    def compress(self, model: nn.Module, batches: Iterable[Batch]) -> list[Record]:
        """Tune and prune a model in place; its weights are then the tuned ones.

        Args:
            batches: {input_ids, attention_mask} (batch, seq), of which each row is a sequence to learn.

        Raises:
            MethodError: the model is no causal one with such units, or it is quantised.
            DataError: there are no data. TrainingError: the loss is not finite, or explodes.
        """
        start, batches = time.perf_counter(), list(batches)
        require_causal(model)
        found = units.find(model, [units.MLP])
        targets = slicing.targets(model, found, self.ratio, self.widths)
        before = {name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()}
        _set_weights(
            model, {name: (torch.promote_types(d, torch.float32), True) for name, (d, _) in before.items()}
        )
        teacher = copy.deepcopy(model).eval().requires_grad_(False) if self.distill else None
        neurons = Neurons(self, model, targets)
        try:
            tune(
                model,
                batches,
                steps=self.steps,
                batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                seed=self.seed,
                callbacks=[neurons],
                parameter_groups=self.parameter_groups(model),
                loss_with=lambda loss, outputs, inputs: neurons.whole_loss(loss, outputs, inputs, teacher),
            )
        except BaseException:
            _set_weights(model, before)
            raise
        finally:
            neurons.remove()
        kept = neurons.kept()
        errors = slicing.output_errors(model, kept, batches)
        slicing.cut(model, kept, widths=self.widths)
        _set_weights(model, before)
        return slicing.records(kept, errors, time.perf_counter() - start)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Matrices decay, norms and biases do not; the scores neither, and they have a rate of their own."""
        named = dict(model.named_parameters())
        scores = [p for n, p in named.items() if n.startswith(f"{SLOT}.")]
        own = [p for n, p in named.items() if not n.startswith(f"{SLOT}.")]
        return [
            _group([p for p in own if p.dim() > 1], self.learning_rate, self.weight_decay),
            _group([p for p in own if p.dim() < 2], self.learning_rate, 0.0),
            _group(scores, self.score_rate, 0.0),
        ]


def _set_weights(model: nn.Module, states: dict[str, tuple[torch.dtype, bool]]) -> None:
    """Give parameters, by name, a dtype and whether they learn. Buffers (angles of positions) keep theirs."""
    for name, parameter in model.named_parameters():
        if name in states:
            dtype, learns = states[name]
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(learns)


def _group(parameters: list[nn.Parameter], rate: float, decay: float) -> dict[str, Any]:
    return {"params": parameters, "lr": rate, "weight_decay": decay}


def redundancy(similar: Tensor, share: float) -> Tensor:
    """u (f) from C (f, f): the mean similarity of each neuron to those that are kept."""
    norms = similar.diagonal().clamp_min(0).sqrt()
    cosine = similar.abs() / (norms[:, None] * norms + 1e-6)
    return (cosine.sum(1) - cosine.diagonal()) / (len(similar) * share)


def penalty(scores: list[Tensor], redundant: list[Tensor], uniqueness: float) -> Tensor:
    """Mean over blocks of the mean of sigmoid(S) (1 + g u)."""
    parts = [(s.sigmoid() * (1 + uniqueness * u)).mean() for s, u in zip(scores, redundant, strict=True)]
    return torch.stack(parts).mean()


def divergence(student: Tensor, teacher: Tensor, real: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of logits (batch, seq, vocab), mean over the tokens `real` (batch, seq)."""
    ours, theirs = (t[real].float().div(temperature).log_softmax(-1) for t in (student, teacher))
    return temperature**2 * functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")


class Neurons(TrainerCallback):
    """Scores, masks and similarities of a model's neurons while it is trained.

    Args:
        targets: how many neurons each block keeps alone; the model keeps the sum of them.
    """

    def __init__(self, config: Config, model: Any, targets: dict[Units, int]):
        self.config, self.model, self.targets = config, model, targets
        self.places = list(targets)
        self.scores = nn.ParameterList(nn.Parameter(torch.zeros(u.count)) for u in self.places)
        model.add_module(SLOT, self.scores.to(model.device))
        self.masks = [torch.ones(u.count, device=model.device) for u in self.places]
        self.similar: list[Tensor | None] = [None] * len(self.places)
        self.redundant = [torch.zeros(u.count, device=model.device) for u in self.places]
        self.share = 1.0
        self.real: Tensor | None = None  # tokens of the batch that are no padding
        self._hooks = [model.register_forward_pre_hook(self._see, with_kwargs=True)]
        for index, u in enumerate(self.places):
            for name in u.makers:
                self._hooks.append(model.get_submodule(name).register_forward_hook(self._mask_rows(index)))
            self._hooks.append(
                model.get_submodule(u.name).register_forward_pre_hook(self._mask_column(index))
            )

    @property
    def final_share(self) -> float:
        """v: of all neurons those that are kept in the end."""
        return sum(self.targets.values()) / sum(u.count for u in self.places)

    def remove(self) -> None:
        """Take scores and masks off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        delattr(self.model, SLOT)

    def kept(self) -> dict[Units, Tensor]:
        """Indices of the neurons that are not masked."""
        return {u: m.nonzero().flatten().cpu() for u, m in zip(self.places, self.masks, strict=True)}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = progress_at(state.global_step, state.max_steps, self.config.hold, self.config.settle)
        self.prune(done)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.prune(1.0)

    @torch.no_grad()
    def prune(self, done: float) -> None:
        """Set the masks for a point of the schedule, from the scores as they are."""
        self.share = cubic(done, 1.0, self.final_share)
        if self.config.widths == "uniform":
            share = (self.share - self.final_share) / max(1 - self.final_share, 1e-12)
            counts = {u: int(kept + share * (u.count - kept) + 1e-9) for u, kept in self.targets.items()}
            kept = {
                u: units.best(s.detach(), counts[u]) for u, s in zip(self.places, self.scores, strict=True)
            }
        else:
            number = int(self.share * sum(u.count for u in self.places) + 1e-9)
            kept = units.best_of_all(dict(zip(self.places, self.scores, strict=True)), number)
        for u, mask in zip(self.places, self.masks, strict=True):
            mask.zero_()
            mask[kept[u].to(mask.device)] = 1.0

    def whole_loss(self, loss: Tensor, outputs: Any, inputs: dict[str, Tensor], teacher: Any) -> Tensor:
        """The loss of the task, with that of the teacher and the penalty; renews the redundancies after."""
        if teacher is not None:
            with torch.no_grad():
                logits = teacher(**inputs).logits
            real = inputs["labels"][:, 1:] != -100
            distance = divergence(outputs.logits[:, :-1], logits[:, :-1], real, self.config.temperature)
            loss = (1 - self.config.distill) * loss + self.config.distill * distance
        strength = self.config.penalty * self.share / self.final_share
        loss = loss + strength * penalty(list(self.scores), self.redundant, self.config.uniqueness)
        for index, similar in enumerate(self.similar):
            if similar is not None and self.config.uniqueness:
                self.redundant[index] = redundancy(similar, self.share)
        return loss

    def _see(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self.real = None if mask is None else mask.bool()

    def _straight(self, index: int, like: Tensor) -> Tensor:
        """The mask, with its gradient led to the scores."""
        score = self.scores[index]
        return (self.masks[index] + score - score.detach()).to(like.dtype)

    def _mask_rows(self, index: int) -> Any:
        def hook(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            mask = self._straight(index, output)
            return output * mask if layer.bias is None else output * mask + layer.bias.to(output) * (1 - mask)

        return hook

    def _mask_column(self, index: int) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if self.config.uniqueness and torch.is_grad_enabled():
                self._gather(index, inputs[0].detach())
            return (inputs[0] * self._straight(index, inputs[0]), *inputs[1:])

        return hook

    @torch.no_grad()
    def _gather(self, index: int, hidden: Tensor) -> None:
        """Take hidden states (batch, seq, f) into the running similarities."""
        rows = hidden.flatten(0, -2)
        if self.real is not None and self.real.numel() == len(rows):
            rows = rows[self.real.flatten()]
        rows = rows.float() * self.masks[index]
        fresh, memory = rows.T @ rows, self.config.memory
        before = self.similar[index]
        self.similar[index] = memory * fresh if before is None else (1 - memory) * before + memory * fresh
