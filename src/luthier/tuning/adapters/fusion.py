"""AdapterFusion: adapters of several tasks, frozen, mixed for a new task by an attention over them.

Paper: Pfeiffer et al., 2021, "AdapterFusion: Non-Destructive Task Composition for Transfer Learning", arXiv
2005.00247.
Pick it when a task has few examples and adapters of related tasks are there already, trained one by one; they
stay as they are. With many examples an adapter of its own does as well.
Cost: 3 d^2 (and d, 2 d with dropout) parameters a place of width d, far more than one adapter; N adapters run
for every token, and 6 d^2 + 4 N d operations for the mixture.

First N adapters are trained, each on its task (usually one of them on the new task), by any method that
changes hidden states at places of its own: `serial` (the paper's is placement: pfeiffer), `parallel`,
`krona`, `lora`. All must stand at the same places. Then, at each place, with the x that the adapters read and
z_n the change of adapter n (its output without the skip):

    q = W_Q x + b_Q,    e_n = q . (W_K z_n + b_K),    alpha = softmax(dropout(e))    over n, with no 1/sqrt(d)
    o = W_V sum_n alpha_n z_n

and o takes the place of the one adapter's change. Of this e_n = (W_K^T q) . z_n + q . b_K is what is
computed, so that keys and values cost the same for any N. Without dropout b_K cancels in the softmax and is
left out.

    loss = task loss + lambda sum_places ||I - W_V||_F^2,    lambda = value_regularization

Start: W_Q, W_K ~ N(0, 0.02^2), biases 0, W_V = 1 on the diagonal and 1e-6 beside it: about the mean of the
adapters. Trained: W_Q, b_Q, W_K, b_K, W_V and a new head. Frozen: the base and all N adapters, which are part
of the saved fusion, so that its folder is all that is needed. W_V does not decay, for it is held at I.

Differs from the authors' code: there the gradient of the penalty comes one step late, and not at all in other
training loops. Here it is put in before the batches of each step, as a loss with the penalty in it gives; who
trains in a loop of their own finds it in the model's loss. Fusion beside an FFN adds no second skip.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from luthier.errors import MethodError
from luthier.options import option
from luthier.tuning.bottleneck import Anatomy, Place, PlacedConfig, PlacedTuner
from luthier.tuning.groups import decay_groups
from luthier.tuning.registration import register
from luthier.tuning.trained_adapters import Trained, frozen
from luthier.tuning.tuner import Delta


@dataclass
class Config(PlacedConfig):
    """Options of AdapterFusion."""

    adapters: list[str] = option(
        [], "folders of the trained adapters or of their runs; in a recipe also stages", artefacts=True
    )
    value_regularization: float = option(0.01, "lambda, by which W_V is held at the identity", ge=0)
    fusion_dropout: float | None = option(
        None, "dropout on the scores; default: that of the model's attention", ge=0, lt=1
    )
    sources: list[dict[str, Any]] | None = field(
        default=None, metadata={"help": "records of the adapters, made when they are first read"}
    )

    @property
    def starts_as_base(self) -> bool:
        return False

    def plan_with(self, tuned: dict[str, PeftModel]) -> None:
        """Note adapters that are yet to be trained, each on a model of its own, by their names."""
        found = [Trained.of_model(tuned[n]) if n in tuned else Trained.read(n) for n in self.adapters]
        self.sources = [adapter.record() for adapter in found]

    def why_not_alone(self) -> str:
        return "it is a fusion itself"

    def callbacks(self, model: PeftModel) -> list[TrainerCallback]:
        return [Regularise(model.base_model)]

    def parameter_groups(self, model: nn.Module, args: TrainingArguments) -> list[dict[str, Any]]:
        """All as usual, but without weight decay for W_V."""
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        held = [p for n, p in named if n.endswith(".value.weight")]
        rest = [(n, p) for n, p in named if not n.endswith(".value.weight")]
        values = {"params": held, "weight_decay": 0.0, "lr": args.learning_rate}
        return [*decay_groups(model, rest, args, lr=args.learning_rate), values]


def mixture(scores: Tensor, changes: Tensor) -> Tensor:
    """sum_n softmax(e)_n z_n for e (N, ...) and z (N, ..., d): (..., d)."""
    alpha = torch.softmax(scores.float(), dim=0).to(changes.dtype)
    return (alpha.unsqueeze(-1) * changes).sum(0)


class Fusion(Delta):
    """The attention over N frozen adapters at one place."""

    def __init__(self, place: Place, adapters: list[Delta], dropout: float):
        super().__init__(None, place.width, place.reads, "")
        self.adapters = nn.ModuleList(frozen(adapter) for adapter in adapters)
        d = place.width
        self.query = nn.Linear(place.reads, d)
        self.key = nn.Linear(d, d, bias=dropout > 0)
        self.value = nn.Linear(d, d, bias=False)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.query, self.key):
            nn.init.normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        nn.init.constant_(self.value.weight, 1e-6)
        self.value.weight.data.fill_diagonal_(1.0)

    def train(self, mode: bool = True) -> "Fusion":
        super().train(mode)
        self.adapters.eval()  # without the dropout of their own training
        return self

    def scores(self, x: Tensor, changes: Tensor) -> Tensor:
        """e (N, ...) from x (..., in) and the changes z (N, ..., d)."""
        query = self.query(x)
        found = (changes * nn.functional.linear(query, self.key.weight.T)).sum(-1)
        if self.key.bias is not None:
            found = found + (query * self.key.bias).sum(-1)
        return found

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        changes = torch.stack([adapter(x, y) for adapter in self.adapters])  # (N, ..., d)
        mixed: Tensor = self.value(mixture(self.dropout(self.scores(x, changes)), changes))
        return mixed

    def away(self) -> Tensor:
        """W_V - I."""
        weight = self.value.weight
        return weight - torch.eye(len(weight), dtype=weight.dtype, device=weight.device)


class Tuner(PlacedTuner):
    """Puts the fusion at the places of its adapters."""

    prefix = "fusion_"
    driven = False  # a trainer's callback sees to the penalty

    def __init__(self, model: Any, *args: Any, **kwargs: Any):
        super().__init__(model, *args, **kwargs)
        # Not in `forward`, which a PeftModel without a task type passes by.
        self._hook = model.register_forward_hook(self._penalise)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        self._hook.remove()
        return super()._unload_and_optionally_merge(*args, **kwargs)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        self._trained = self._read(peft_config)
        if peft_config.fusion_dropout is None:
            settings = self.model.config.get_text_config()
            names = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "dropout_rate")
            found = [getattr(settings, name) for name in names if hasattr(settings, name)]
            peft_config.fusion_dropout = float(found[0]) if found else 0.0
        self._places = self.common_places(self.anatomy())
        peft_config.target_modules = set(self._places)
        return peft_config

    def _read(self, config: Config) -> list[Trained]:
        """The adapters; of a saved fusion, which holds their weights, what the records tell."""
        if config.sources is None:
            if not config.adapters:
                raise MethodError(
                    "fusion needs adapters that were trained before.",
                    fix="Train some with method: {name: serial, placement: pfeiffer}, and name their folders "
                    "in adapters.",
                )
            found = [Trained.read(folder) for folder in config.adapters]
            config.sources = [adapter.record() for adapter in found]
            return found
        return [Trained.of_record(record) for record in config.sources]

    def common_places(self, anatomy: Anatomy) -> dict[str, Place]:
        """The places of the adapters.

        Raises:
            MethodError: they differ.
        """
        first, *others = (adapter.places(anatomy) for adapter in self._trained)
        for number, other in enumerate(others, 2):
            if other != first:
                raise MethodError(
                    f"Adapters 1 and {number} stand at different places, or read different states there.",
                    fix="Train all adapters with the same method and placement.",
                )
        return first

    def change(self, config: Config, name: str, place: Place) -> Fusion:
        assert config.fusion_dropout is not None
        changes = [adapter.change(name, place) for adapter in self._trained]
        return Fusion(place, changes, config.fusion_dropout)

    # The penalty --------------------------------------------------------------------------------------------

    def fusions(self) -> Iterator[tuple[Fusion, float]]:
        """Those of the active adapters that learn, with their lambda."""
        for module in self.model.modules():
            for name in self.active_adapters if hasattr(module, f"{self.prefix}delta") else ():
                held: Any = getattr(module, f"{self.prefix}delta")
                if name in held:
                    found = getattr(held[name], "adapter", held[name])
                    yield found, self.peft_config[name].value_regularization

    def penalty(self) -> Tensor:
        """lambda sum_places ||I - W_V||_F^2."""
        terms = [weight * fusion.away().square().sum() for fusion, weight in self.fusions()]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    @torch.no_grad()
    def add_penalty(self, scale: float = 1.0) -> None:
        """Add the gradient of the penalty, 2 lambda (W_V - I), to that of W_V."""
        for fusion, weight in self.fusions():
            value = fusion.value.weight
            gradient = 2 * weight * scale * fusion.away()
            value.grad = gradient if value.grad is None else value.grad + gradient

    def _penalise(self, _: Any, __: Any, outputs: Any) -> Any:
        """Add the penalty to the loss in a training loop that knows nothing of it."""
        in_own_loop = self.training and torch.is_grad_enabled() and not self.driven
        if in_own_loop and getattr(outputs, "loss", None) is not None:
            outputs.loss = outputs.loss + self.penalty()
        return outputs


register("fusion", Config, Tuner)


class Regularise(TrainerCallback):
    """Puts the penalty's gradient in before the batches of each step, however the trainer makes its loss."""

    def __init__(self, tuner: Any):
        self.tuner = tuner

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.deepspeed or args.fsdp:
            raise MethodError("fusion needs whole weights in each process.", fix="Train without sharding.")
        self.tuner.driven = True

    def on_step_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        scaler = getattr(optimizer, "scaler", None)  # of gradients in half precision
        self.tuner.add_penalty(1.0 if scaler is None else scaler.get_scale())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            with torch.no_grad():
                found = {"value_penalty": float(self.tuner.penalty())}
            for entry in (logs, state.log_history[-1]):
                entry.update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tuner.driven = False
