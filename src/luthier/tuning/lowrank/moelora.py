"""MOELoRA: a LoRA for many tasks, its rank split over experts that a gate mixes by the task.

Paper: Liu et al., 2023, "When MOE Meets LLMs: Parameter Efficient Fine-tuning for Multi-task Medical
Applications", arXiv 2310.18339.
Pick it when one adapter must serve several known tasks that help each other and disagree in parts.
Cost: r(in + out) parameters a linear layer, as LoRA, and (tasks + 1) d + experts d once, d = task_dim;
2r(in + out) more operations a token. One task, cut out or merged, costs what a LoRA costs.

A frozen weight W (out, in) gets an update from N experts of rank r / N each, for a row of task j:

    y = W x + b + s sum_i w_ji B_i A_i D(x),    A_i (r/N, in), B_i (out, r/N),    s = alpha / r
    w_j = softmax(W_T e_j),    e_j (d) the embedding of task j, W_T (N, d)

All layers share the one gate. It sees the task and not the tokens, so the update of a task is a plain LoRA,
A = [A_1; ...; A_N] and B = [w_j1 B_1, ..., w_jN B_N]. A row of several tasks has the mean of their e_j.

Start: A_i ~ N(0, 0.01^2), B_i = 0, e_j ~ N(0, 1), W_T ~ U(-1/sqrt(d), 1/sqrt(d)). Trained: A_i, B_i, e_j,
W_T. Frozen: all else. The loss is the objective's: all experts are used, and none has to be balanced.

The rows' field `task` names the task, and `tasks` lists the names. Objectives and evaluation carry it to the
model as `moe_task_ids`, whole numbers (batch,) from 1, or (batch, several) filled up with 0; so may any
trainer, with forward and with generate. Rows of a batch then do not share one packed row. In training a
batch without it is refused; else it is of the task in `task`, or of the first.

    set_task(model, "sums")                          what names no task is of this one, and it can be merged
    cut(model, "sums", folder)                       an ordinary LoRA of this task, which any PEFT loads

`task: sums` in `method` does the former from the start, so that a recipe's export merges it.

Differs from the authors' code (liuqidong07/MOELoRA-peft): it is for hidden states with the batch in the
second place, and read literally would mix the tasks of a batch-first model by position; it trains gates in
every layer that nothing uses; its merging reads one of those.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.errors import DataError, MethodError, did_you_mean
from luthier.options import option
from luthier.tuning.attach import tuning_of
from luthier.tuning.lora_factors import unit_config
from luthier.tuning.registration import register
from luthier.tuning.shared import Held, SharedTuner
from luthier.tuning.tuner import Delta, DeltaConfig, DeltaLayer

INPUT = "moe_task_ids"


@dataclass
class Config(DeltaConfig):
    """Options of MOELoRA."""

    r: int = option(16, "rank of the update, of all experts together", ge=1)
    experts: int = option(8, "N: experts that share the rank", ge=1)
    alpha: float = option(32.0, "scale: the update is multiplied by alpha / r", gt=0)
    dropout: float = option(0.0, "dropout on the input of the update", ge=0, lt=1)
    tasks: list[str] | None = option(None, "names in the rows' field `task`; default: all rows are one task")
    task: str | None = option(None, "task of batches that name none, and the one that merging folds in")
    task_dim: int = option(64, "d: width of a task's embedding", ge=1)
    target_modules: list[str] | str | None = option(
        None, "names of layers, a regular expression, or all-linear (all but the head), the default"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r % self.experts:
            fitting = [n for n in range(1, self.r + 1) if self.r % n == 0]
            raise MethodError(
                f"experts: {self.experts} does not divide the rank r: {self.r}.",
                fix=f"Write one of {fitting}, or another r.",
            )
        if self.tasks is not None and len(set(self.tasks)) != len(self.tasks):
            raise MethodError(f"tasks: {self.tasks} names one twice.", fix="Name each once.")
        if self.task is not None:
            self.number(self.task)

    @property
    def count(self) -> int:
        return len(self.tasks) if self.tasks else 1

    @property
    def settled(self) -> bool:
        """Whether it is known which task a batch is of that names none."""
        return self.count == 1 or self.task is not None

    @property
    def chosen(self) -> int:
        """The number of that task; where it is not known, of the first."""
        return 1 if self.task is None else self.number(self.task)

    def number(self, name: Any, where: str = "") -> int:
        """The number of a task, from 1.

        Raises:
            MethodError: there is none of that name; DataError where `where` names a row.
        """
        known = self.tasks or []
        if name in known:
            return known.index(name) + 1
        kind = DataError if where else MethodError
        raise kind(f"{where}There is no task '{name}' in tasks.", fix=did_you_mean(str(name), known))

    def row_inputs(self, rows: list[dict[str, Any]]) -> dict[str, list[int]]:
        """What rows bring to the model besides tokens: the number of their task.

        Raises:
            DataError: a row of an unknown task, or of none where several are possible.
        """
        if self.count == 1:
            return {}
        found = []
        for row in rows:
            origin = row.get("origin", {})
            where = f"{origin.get('file', 'a row')}:{origin.get('line', '')}: "
            if row.get("task") is None and self.task is None:
                raise DataError(
                    f"{where}The row names no task.",
                    fix="Give it a field task (columns: {task: THEIRS}), or write method: {task: ...}.",
                )
            name = row.get("task")
            found.append(self.chosen if name is None else self.number(name, where))
        return {INPUT: found}


class Gate(nn.Module):
    """The experts' weights for each row of a batch.

    Attributes:
        ids: tasks of the batch that is in the model now; None where it names none.
        last: tasks of the last batch in training: its layers are run again in the backward pass where
            activations are checkpointed.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.count + 1, config.task_dim, padding_idx=0)
        self.W = nn.Linear(config.task_dim, config.experts, bias=False)
        self.ids: Tensor | None = None
        self.last: Tensor | None = None

    def of(self, ids: Tensor) -> Tensor:
        """w (batch, N) of tasks (batch,), or (batch, several) filled up with 0."""
        with torch.autocast(ids.device.type, enabled=False):
            found = self.embedding(ids)
            if ids.dim() == 2:
                named = (ids != 0)[..., None]
                found = (found * named).sum(1) / named.sum(1)
            return self.W(found).softmax(-1)

    def chosen(self) -> Tensor:
        """w (1, N) of the task of batches that name none."""
        return self.of(torch.tensor([self.config.chosen], device=self.W.weight.device))

    def forward(self, rows: int, training: bool) -> Tensor:
        """w (rows, N), or (1, N) for all of them; what beam search or a layer has multiplied is repeated."""
        ids = self.ids
        if ids is None and training and torch.is_grad_enabled():
            ids = self.last
        if ids is None:
            return self.chosen()
        if rows % len(ids):
            raise MethodError(f"{INPUT} has {len(ids)} rows, and the batch {rows}.")
        return self.of(ids).repeat_interleave(rows // len(ids), 0)


class MoeLora(Delta):
    """s sum_i w_i B_i A_i, with the factors of all experts in one A and one B."""

    def __init__(self, config: Config, out_features: int, in_features: int, name: str, gate: Gate):
        super().__init__(config, out_features, in_features, name)
        self.A = nn.Parameter(0.01 * torch.randn(config.r, in_features))
        self.B = nn.Parameter(torch.zeros(out_features, config.r))
        self.gate = Held(gate)
        self.experts, self.scale = config.experts, config.alpha / config.r
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        w = self.gate.module(len(x), self.training)  # (batch, N)
        h = F.linear(self.dropout(x), self.A).unflatten(-1, (self.experts, -1))  # (batch, ..., N, r / N)
        w = w.view(len(w), *[1] * (x.dim() - 2), self.experts, 1).to(h.dtype)
        return F.linear((h * w).flatten(-2), self.B) * self.scale

    def factors(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """A and B of the plain LoRA of scale 1 for the experts' weights w (N)."""
        return self.A, self.B * (self.scale * w.repeat_interleave(self.B.shape[1] // self.experts))

    def weight(self) -> Tensor:
        gate: Any = self.gate.module
        a, b = self.factors(gate.chosen()[0])
        return b @ a


class Tuner(SharedTuner):
    """Puts `MoeLora` on a model, keeps the gates, and hands them the tasks of each batch."""

    prefix = "moelora_"

    def make_delta(self, config: Config, layer: DeltaLayer, name: str, adapter: str) -> Delta:
        gate = self.shared(adapter, "gate", lambda: Gate(config))
        return MoeLora(config, layer.out_features, layer.in_features, name, gate)

    def gates(self) -> list[Gate]:
        """Those of the active adapters."""
        return [self.pools[name]["gate"] for name in self.active_adapters if name in self.pools]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop(INPUT, None)
        return self.model.forward(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop(INPUT, None)
        return self.model.generate(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        ids = kwargs.get(INPUT)
        learns = self.training and torch.is_grad_enabled()
        disabled = next(self.layers())[1].disable_adapters
        for gate in () if disabled else self.gates():
            if ids is not None:
                _require_tasks(ids, gate.config)
            elif learns and not gate.config.settled:
                raise MethodError(
                    f"The batch names no task, and the adapter has {gate.config.count}.",
                    fix=f"Give the model {INPUT}=; luthier.trainer does it for rows with a field task.",
                )
            gate.ids = ids
            gate.last = ids if learns else gate.last
        try:
            with super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
        finally:
            for gate in self.gates():
                gate.ids = None

    def require_mergeable(self) -> None:
        super().require_mergeable()
        for gate in self.gates():
            if not gate.config.settled:
                raise MethodError(
                    f"The adapter has {gate.config.count} tasks, and one can be merged.",
                    fix=f"Write method: {{task: ...}}, or call set_task(model, name): {gate.config.tasks}.",
                )


register("moelora", Config, Tuner)


def _require_tasks(ids: Tensor, config: Config) -> None:
    if torch.compiler.is_compiling():
        return
    known = ((ids >= 0) & (ids <= config.count)).all()
    named = (ids if ids.dim() == 1 else ids.amax(1)) > 0
    if not known or not named.all():
        raise MethodError(
            f"{INPUT} holds {ids.tolist()}; the adapter's tasks are numbered from 1 to {config.count}, and 0 "
            "only fills up rows of several.",
            fix=f"In this order: {config.tasks}.",
        )


def _config(model: nn.Module) -> Config:
    config = tuning_of(model)
    if not isinstance(config, Config):
        raise MethodError(f"The model carries no MOELoRA adapter, but {type(config).__module__}.")
    return config


def set_task(model: nn.Module, task: str) -> None:
    """From now on batches that name no task are of `task`, and merging folds it in.

    Raises:
        MethodError: no MOELoRA adapter, no such task, or one is merged.
    """
    config = _config(model)
    config.number(task)
    tuner: Any = model.base_model
    if any(layer.merged for _, layer in tuner.layers()):
        raise MethodError("A task of the adapter is merged.", fix="Call model.unmerge_adapter() first.")
    config.task = task


@torch.no_grad()
def cut(model: PeftModel, task: str, folder: Path | str) -> None:
    """Write the active adapter for one task as an ordinary LoRA folder.

    Raises:
        MethodError: no MOELoRA adapter, or no such task.
    """
    config, tuner, name = _config(model), model.base_model, model.active_adapter
    gate: Gate = tuner.pools[name]["gate"]
    w = gate.of(torch.tensor([config.number(task)], device=gate.W.weight.device))[0]
    state = {k: v for k, v in get_peft_model_state_dict(model).items() if f".{tuner.prefix}" not in k}
    ranks, transposed = {}, False
    for path, layer in tuner.layers():
        a, b = layer.deltas[name].factors(w)
        ranks[path], transposed = config.r, isinstance(layer.get_base_layer(), Conv1D)
        state[f"base_model.model.{path}.lora_A.weight"] = a
        state[f"base_model.model.{path}.lora_B.weight"] = b
    plain = unit_config(ranks, config, fan_in_fan_out=transposed)
    plain.inference_mode = True
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    save_file(tensors, Path(folder) / "adapter_model.safetensors", {"format": "pt"})
    plain.save_pretrained(str(folder))
