"""AdaLoRA: LoRA whose rank goes where it is needed, under one budget for all layers.

Paper: Zhang et al., 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
arXiv 2303.10512.
Pick it when the parameter budget is small and layers differ in importance; where they do not, it ties with
LoRA of the same budget.
Cost: r(in + out + 1) parameters a linear layer at the start, r_k(in + out + 1) kept at the end; in training
two float32 numbers more for each. No memory is given back before the export.

Of each of n frozen weights W (out, in), with r = init_r and s = alpha / (r + 1e-5):

    y = W x + b + s P (l * (Q D(x))),    P (out, r), Q (r, in) ~ N(0, 0.02^2),    l (r) = 0
    L = L_task + g / (2n) sum_k (||P_k^T P_k - I||_F + ||Q_k Q_k^T - I||_F)        g = orth_reg_weight

so P and Q stay near singular vectors, and l holds the singular values. Trained: P, l, Q. Frozen: W, b.

After each optimiser step t (from 0), with I = |w dL/dw| for every entry w of P, l and Q:

    M <- beta1 M + (1 - beta1) I,    U <- beta2 U + (1 - beta2) |I - M|
    S_i = (M U)(l_i) + mean_j (M U)(P_ji) + mean_j (M U)(Q_ij)             score of triplet i of a layer
    b(t) = b_T + (b_0 - b_T) (1 - (t - t_i) / (t_f - t_i))^3,    b_0 = n init_r,    b_T = n target_r

From t_i = tinit, every deltaT steps, l is set to 0 but for the b(t) best triplets of all layers. P and Q go
on learning, and l may grow back until the next allocation; that at t_f, `tfinal` steps before the end, is the
last.

The schedule runs in a callback, which knows the length of the run from the trainer. `luthier.trainer` asks
for it; another trainer (TRL's too) takes `callbacks=config.callbacks()`. A loop of one's own gives
`total_step` and calls `model.base_model.update_and_allocate(t)` after each step of the optimiser.

`luthier.save` writes an ordinary LoRA of the kept triplets, A = sqrt(s |l|) Q and B = sign(l) sqrt(s |l|) P.
`model.save_pretrained`, as for checkpoints, writes all that training goes on with.

The layers are PEFT's; the numbers are those of PEFT and of the authors' code (QingruZhang/AdaLoRA): the norms
in L are not squared, as they are in the paper, and I takes the new weights with the old gradients. Mended,
against PEFT 0.21:

- A plain Trainer never runs PEFT's schedule, and nothing says so (huggingface/peft#1327). Ours raises.
- PEFT adds the regulariser to what the model returns as loss: in evaluation too, once for each accumulated
  batch, and never where the trainer makes the loss (DPO). Here its gradient is put in before each step.
- PEFT's checkpoints lack M, U and the triplets left out: training cannot go on from them.
- target_r = init_r, tfinal = 0, equal scores, a parameter without gradient, labels on a loaded adapter: PEFT
  raises, or prunes what it should not. On a bfloat16 base it trains the constant r in s, and does not save
  it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from luthier import checks
from luthier.errors import MethodError
from luthier.options import option
from luthier.tuning.peft_options import Where, peft_options
from luthier.tuning.registration import register, registered_type
from luthier.tuning.svd_lora import FACTORS, SvdTuner, to_lora


@peft_options
@dataclass
class Config(Where, peft.AdaLoraConfig):
    """Options of AdaLoRA; the rarer fields of `peft.AdaLoraConfig` can be given too."""

    init_r: int = option(12, "rank of every layer at the start", ge=1)
    target_r: int = option(8, "rank at the end, on average over the layers", ge=1)
    lora_alpha: int = option(32, "scale: the update is multiplied by alpha / init_r", ge=1)
    lora_dropout: float = option(0.0, "dropout on the input of the adapter", ge=0, lt=1)
    target_modules: list[str] | str | None = option(
        "all-linear", "names of the layers to adapt, a regular expression, or all-linear (all but the head)"
    )
    tinit: float = option(0.1, "steps before ranks begin to fall; below 1 a share of the run", ge=0)
    tfinal: float = option(0.5, "steps at the end with ranks fixed; below 1 a share of the run", ge=0)
    deltaT: int = option(1, "steps from one allocation to the next", ge=1)
    beta1: float = option(0.85, "smoothing of the importance", gt=0, lt=1)
    beta2: float = option(0.85, "smoothing of its uncertainty", gt=0, lt=1)
    orth_reg_weight: float = option(0.1, "weight of the orthogonality of P and Q in the loss", ge=0)
    total_step: int | None = None  # of a loop of one's own

    def __post_init__(self) -> None:
        if self.r != peft.LoraConfig.r:
            raise MethodError(f"r: {self.r} means nothing to adalora.", fix="Write init_r and target_r.")
        self.require_where(self.target_modules)
        given = self.total_step, self.tinit, self.tfinal
        self.total_step, self.tinit, self.tfinal = 1, 0, 0  # PEFT asks now for what the trainer knows later
        super().__post_init__()
        self.total_step, self.tinit, self.tfinal = given
        self.peft_type = registered_type(type(self))
        if self.target_r > self.init_r:
            raise MethodError(
                f"target_r: {self.target_r} is more than init_r: {self.init_r}; ranks only fall.",
                fix="Raise init_r: the paper takes one and a half times target_r.",
            )

    def callbacks(self, model: nn.Module | None = None) -> list[TrainerCallback]:
        return [Allocate()]

    def save_adapter(self, model: peft.PeftModel, folder: Path | str) -> None:
        """Write the kept triplets as an ordinary LoRA."""
        config, tensors = to_lora(model)
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(tensors, Path(folder) / "adapter_model.safetensors", {"format": "pt"})
        config.save_pretrained(str(folder))

    def phases(self, total: int) -> tuple[int, int]:
        """t_i and t_f of a run of `total` steps.

        Raises:
            MethodError: they leave no step to allocate in.
        """
        start, last = (int(v * total) if v < 1 else int(v) for v in (self.tinit, self.tfinal))
        finish = total - max(last, 1)
        if finish < start:
            raise MethodError(
                f"tinit: {self.tinit:g} and tfinal: {self.tfinal:g} leave no step of {total} to allocate in.",
                fix="Lower them, or train longer.",
            )
        return start, finish


def budget_at(step: int, start: int, finish: int, first: int, last: int) -> int:
    """b(t), from `first` down to `last`."""
    if step >= finish:
        return last
    if step <= start:
        return first
    return int(last + (first - last) * (1 - (step - start) / (finish - start)) ** 3)


def smooth(scores: Tensor, weight: Tensor, gradient: Tensor, beta1: float, beta2: float) -> None:
    """M and U in `scores` (2, ...) after one step, in place, from w and dL/dw (...)."""
    now = (weight * gradient).abs_()
    scores[0].lerp_(now, 1 - beta1)
    scores[1].lerp_(now.sub_(scores[0]).abs_(), 1 - beta2)


def triplet_scores(scores: Tensor, width: int) -> Tensor:
    """S (r) from M and U of a layer (2, r, in + out + 1), in rows [Q, P^T, l]; `width` is in."""
    entries = scores[0] * scores[1]
    return entries[:, :width].mean(1) + entries[:, width:-1].mean(1) + entries[:, -1]


def highest(scores: Tensor, count: int) -> Tensor:
    """A mask of exactly `count` entries, of equal ones the first: the same in every process."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[torch.sort(scores, descending=True, stable=True).indices[:count]] = True
    return mask


def orthogonality(rows: Tensor) -> tuple[Tensor, Tensor]:
    """||F F^T - I||_F of rows F (r, d), and its gradient (r, d): 0 where the rows are orthonormal."""
    error = rows @ rows.T - torch.eye(len(rows), device=rows.device, dtype=rows.dtype)
    norm = torch.linalg.matrix_norm(error)
    return norm, (2 / norm.clamp_min(1e-30)) * (error @ rows)


class Tuner(SvdTuner):
    """The schedule and the regulariser.

    Attributes:
        driven: a callback runs the schedule and puts in the regulariser's gradient.
        finished: which triplets are kept is final.
    """

    driven = finished = False
    _phases = (0, 0)

    def start(self, total: int, step: int = 0) -> None:
        """Begin the schedule of a run of `total` steps, or go on with it from `step`."""
        name, config = self.adapter, self.peft_config[self.adapter]
        self._phases = config.phases(total)
        self.begin()
        kept = []
        for _, layer in self.layers(name):
            if step == 0:
                layer.lora_scores[name].zero_()
                layer.lora_kept[name].fill_(True)
            kept.append(int(layer.lora_kept[name].sum()))
        self.finished = sum(kept) <= config.target_r * len(kept)

    @torch.no_grad()
    def update_and_allocate(self, global_step: int) -> None:
        """After the step `global_step` (from 0) of the optimiser, before the gradients are dropped."""
        config = self.peft_config[self.adapter]
        if not self.scheduled:
            if not config.total_step:
                raise MethodError("The schedule of adalora has no length.", fix="Give total_step.")
            self.start(config.total_step, global_step)
        (start, finish), name = self._phases, self.adapter
        layers = [layer for _, layer in self.layers(name)]
        for layer in layers if global_step < finish else ():
            parts = [getattr(layer, part)[name] for part in FACTORS]
            # An expert that no token was sent to has no gradient.
            gradients = [torch.zeros_like(part) if part.grad is None else part.grad for part in parts]
            weight, gradient = (torch.cat([q, p.T, value], 1).float() for q, p, value in (parts, gradients))
            smooth(layer.lora_scores[name], weight, gradient, config.beta1, config.beta2)
        due = global_step >= finish or (start < global_step and global_step % config.deltaT == 0)
        if due and not self.finished:
            scores = [triplet_scores(layer.lora_scores[name], layer.in_features) for layer in layers]
            first, last = config.init_r * len(layers), config.target_r * len(layers)
            kept = highest(torch.cat(scores), budget_at(global_step, start, finish, first, last))
            for layer, mask in zip(layers, kept.split([len(s) for s in scores]), strict=True):
                layer.lora_kept[name].copy_(mask)
            self.finished = global_step >= finish
        for layer in layers if due or self.finished else ():
            layer.lora_E[name].masked_fill_(~layer.lora_kept[name][:, None], 0.0)

    def regulariser(self) -> Tensor:
        """Mean over all P and Q of the norm by which they are not orthonormal."""
        return torch.stack([orthogonality(rows)[0] for _, rows in self._rows()]).mean()

    @torch.no_grad()
    def add_regulariser(self, scale: float = 1.0) -> None:
        """Add the gradient of `orth_reg_weight` times the regulariser to the gradients of P and Q.

        It depends on the weights alone: put in before the batches of a step, it is what a loss with the
        regulariser in it gives, however the trainer makes, scales and accumulates its loss.
        """
        weight = self.peft_config[self.adapter].orth_reg_weight
        found = list(self._rows()) if weight else []
        for factor, rows in found:
            gradient = orthogonality(rows)[1] * (weight * scale / len(found))
            gradient = gradient if rows is factor else gradient.T.contiguous()
            factor.grad = gradient if factor.grad is None else factor.grad + gradient

    def _rows(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Each Q and P with the rows that should be orthonormal, of Q itself (r, in) and of P^T (r, out)."""
        both = [
            (layer.lora_A[self.adapter], layer.lora_B[self.adapter]) for _, layer in self.layers(self.adapter)
        ]
        return [pair for q, p in both for pair in ((q, q), (p, p.T))]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        in_own_loop = self.training and torch.is_grad_enabled() and not self.driven
        if in_own_loop and getattr(outputs, "loss", None) is not None:
            outputs.loss = outputs.loss + self.peft_config[self.adapter].orth_reg_weight * self.regulariser()
        return outputs


register("luthier_adalora", Config, Tuner)


class Allocate(TrainerCallback):
    """Runs the schedule of the model that is trained."""

    tuner: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.tuner = next((m for m in model.modules() if isinstance(m, Tuner)), None)
        if self.tuner is None:
            raise MethodError(
                f"The callback of adalora is given to the training of a {type(model).__name__} without it.",
                fix="Attach the method first.",
            )
        if args.deepspeed or args.fsdp:
            raise MethodError("adalora needs whole gradients in each process.", fix="Train without sharding.")
        given = self.tuner.peft_config[self.tuner.adapter].total_step
        if given not in (None, state.max_steps):
            raise MethodError(
                f"total_step: {given}, but the run has {state.max_steps} steps.",
                fix="Leave it out: the trainer knows it.",
            )
        self.tuner.start(state.max_steps, state.global_step)
        self.tuner.driven = True

    def on_step_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        scaler = getattr(optimizer, "scaler", None)  # of gradients in half precision
        self.tuner.add_regulariser(1.0 if scaler is None else scaler.get_scale())

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if getattr(optimizer, "step_was_skipped", False):
            return
        before = self.tuner.finished
        self.tuner.update_and_allocate(state.global_step)
        if self.tuner.finished and not before:  # the best until now had more triplets than the budget
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            ranks = self.tuner.ranks().values()
            with torch.no_grad():
                found = {"rank": sum(ranks) / len(ranks), "orthogonality": float(self.tuner.regulariser())}
            for entry in (logs, state.log_history[-1]):
                entry.update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tuner.driven = False
        self.tuner.end()
        ranks = self.tuner.ranks().values()
        found, budget = sum(ranks), len(ranks) * self.tuner.peft_config[self.tuner.adapter].target_r
        detail = f"{min(ranks)} to {max(ranks)} triplets a layer"
        checks.record("end", "rank budget met", found <= budget, found, budget, detail, refuse=False)
