"""AutoLoRA: a search finds a rank for every layer, then a LoRA of these ranks is trained.

Paper: Zhang et al., 2024, "AutoLoRA: Automatically Tuning Matrix Ranks in Low-Rank Adaptation Based on Meta
Learning", arXiv 2403.09113 (NAACL).
Pick it when the adapter must be small, layers differ in what they need, and training time is there to spare.
Cost: a step of the search is five forward and backward passes; then LoRA's training, with the found ranks.

Search. Each of the r components of an update gets a weight pi, from logits a (r) of its layer:

    y = W x + b + s sum_j pi_j B_j A_j x,    pi = softmax(a),    s = alpha / r

theta, all A and B and a classifier's new head, learns on one part of the training rows (L_t), a on the rest
(L_v), such that a is best for the theta that it leads to. A step of the search, from theta and a:

    1. theta' = a step of Adam from theta on L_t(theta, a)
    2. g = dL_v(theta', a) / da - eta (d+ - d-) / (2 e),    v = dL_v(theta', a) / dtheta',    e = radius / |v|
       d+-  = dL_t(theta' +- e v, a) / da                   the second term is eta d2L_t / da dtheta . v
    3. a step of Adam on a with g;  back to theta;  a step of Adam on L_t(theta, new a)

Ranks. A component counts where its logit is at least the mean of its layer's (`threshold_on: logits`), or
where pi >= 1/r (`softmax`, which is stricter). The rank is the number of those: at least 1, at most r.

Training. A and B start anew with their ranks, learn by the trainer's own recipe on all rows, and are saved
as an ordinary LoRA with a `rank_pattern`. alpha stays, so a layer is scaled by alpha / its rank, unless
`keep_scaling`. The search runs before the first step, with the objective's loss, without dropout.

Start: A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0, a = 1. Trained: A and B; in the search a too. Frozen: all else.

Follows the authors' code (ruz048/AutoLoRA, on Betty) where the paper leaves it open: the threshold on logits,
eta = 1 (`hypergrad_lr`) and differences round theta'. Differs: dropout is off in the search, for with it the
two differences see other masks; a new head learns in the search as it does later; ranks go by the layer's
name and not by a counter.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import TrainerCallback

from luthier import checks
from luthier.errors import MethodError
from luthier.options import option
from luthier.tuning.batch_loss import Loss, LossCallback
from luthier.tuning.lora_factors import FactorConfig, Factors, FactorVariant, factor_layers
from luthier.tuning.peft_options import peft_options
from luthier.tuning.probe import evaluating

log = logging.getLogger("luthier.tuning")

ROOT = "base_model.model."


@peft_options
@dataclass
class Config(FactorConfig):
    """Options of AutoLoRA; the rarer fields of `peft.LoraConfig` can be given too."""

    r: int = option(8, "highest rank, that of every layer in the search", ge=1)
    lora_alpha: int = option(16, "scale: the update is multiplied by alpha / rank", ge=1)
    lora_dropout: float = option(0.0, "dropout on the input of the adapter, in training", ge=0, lt=1)
    target_modules: list[str] | str | None = option(
        "all-linear", "names of the layers to adapt, a regular expression, or all-linear (all but the head)"
    )
    use_rslora: bool = option(False, "scale by alpha / sqrt(rank)")
    search_steps: int = option(100, "steps of the search, before training", ge=1)
    search_lr: float = option(3e-4, "learning rate of A and B in the search", gt=0)
    logit_lr: float = option(3e-4, "learning rate of the logits", gt=0)
    held_out: float = option(0.3, "share of the training rows that the logits learn on", gt=0, lt=1)
    threshold_on: str = option("logits", "what decides on a component", choices=("logits", "softmax"))
    hypergrad_lr: float = option(1.0, "eta: weight of how the logits change A and B", ge=0)
    radius: float = option(0.01, "how far A and B are moved for the differences", gt=0)
    keep_scaling: bool = option(False, "scale every layer by alpha / r, whatever its rank")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_lora_weights not in (True, "gaussian"):
            raise MethodError(
                f"init_lora_weights: {self.init_lora_weights} changes the base, or does not start as it.",
                fix="Choose from: true, gaussian.",
            )
        self.logits: dict[Any, Tensor] = {}  # of each layer, while the search runs

    def variant(self) -> FactorVariant:
        return Weighted(self)

    def callbacks(self, model: nn.Module) -> list[TrainerCallback]:
        return [SearchFirst(self, model)]


# Mathematics ---------------------------------------------------------------------------------------------


def kept(logits: Tensor, threshold_on: str) -> int:
    """How many components of a layer with these logits (r) count."""
    values = logits.double() if threshold_on == "logits" else logits.double().softmax(0)
    slack = 1e-9 * float(values.abs().max())  # equal ones are not below their mean
    return int((values >= values.mean() - slack).sum())


def hypergradient(
    train_loss: Callable[[], Tensor],
    held_out_loss: Callable[[], Tensor],
    theta: list[Tensor],
    a: list[Tensor],
    eta: float,
    radius: float,
) -> list[Tensor]:
    """g for the logits `a`, at `theta`, which moves in between and is put back exactly."""
    found = torch.autograd.grad(held_out_loss(), [*a, *theta], allow_unused=True, materialize_grads=True)
    direct, v = found[: len(a)], found[len(a) :]
    norm = float(torch.stack([part.float().square().sum() for part in v]).sum().sqrt())
    if eta == 0 or norm == 0:
        return list(direct)
    e = radius / norm
    start = [part.detach().clone() for part in theta]
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            for part, at, towards in zip(theta, start, v, strict=True):
                part.copy_(at + sign * e * towards)
        sides.append(torch.autograd.grad(train_loss(), a, allow_unused=True, materialize_grads=True))
    with torch.no_grad():
        for part, at in zip(theta, start, strict=True):
            part.copy_(at)
    return [g - eta * (up - down) / (2 * e) for g, up, down in zip(direct, *sides, strict=True)]


def search_step(
    train_loss: Callable[[], Tensor],
    held_out_loss: Callable[[], Tensor],
    theta: list[Tensor],
    a: list[Tensor],
    lower: torch.optim.Optimizer,
    upper: torch.optim.Optimizer,
    config: Config,
) -> None:
    """Steps 1 to 3 of the search."""
    before = [part.detach().clone() for part in theta], copy.deepcopy(lower.state_dict())
    _step(lower, theta, torch.autograd.grad(train_loss(), theta, allow_unused=True))
    found = hypergradient(train_loss, held_out_loss, theta, a, config.hypergrad_lr, config.radius)
    _step(upper, a, found)
    with torch.no_grad():
        for part, value in zip(theta, before[0], strict=True):
            part.copy_(value)
    lower.load_state_dict(before[1])
    _step(lower, theta, torch.autograd.grad(train_loss(), theta, allow_unused=True))


def _step(optimizer: torch.optim.Optimizer, parts: list[Tensor], gradients: Any) -> None:
    for part, gradient in zip(parts, gradients, strict=True):
        part.grad = gradient
    optimizer.step()
    optimizer.zero_grad()


# On the layers -------------------------------------------------------------------------------------------


class Weighted(FactorVariant):
    """LoRA; while the search runs, with its components weighted."""

    def formula(self, layer: Any, name: str) -> Factors:
        a, b, scale = super().formula(layer, name)
        logits = self.config.logits.get(layer)
        return (a, b, scale) if logits is None else (a, b * logits.softmax(0).to(b.dtype), scale)

    def load(self, layer: Any, name: str, state: dict[str, Tensor], prefix: str) -> None:
        rank = len(state[f"{prefix}lora_A.{name}.weight"])
        if rank != layer.r[name]:
            set_rank(layer, name, rank, self.config, prefix.removeprefix(ROOT).removesuffix("."))


def set_rank(layer: Any, name: str, rank: int, config: Config, path: str) -> dict[nn.Parameter, nn.Parameter]:
    """Cut a layer's A and B to their first `rank` components, and say so in the config. Old to new."""
    changed = {}
    for store, side in ((layer.lora_A, 0), (layer.lora_B, 1)):
        old = store[name].weight
        new = nn.Linear(1, 1, bias=False)
        cut = old.detach().narrow(side, 0, rank).clone()
        new.weight = nn.Parameter(cut, requires_grad=old.requires_grad)
        new.out_features, new.in_features = cut.shape
        store[name] = new.train(store[name].training)
        changed[old] = new.weight
    if config.keep_scaling:
        share = math.sqrt(rank / layer.r[name]) if config.use_rslora else rank / layer.r[name]
        layer.lora_alpha[name] *= share
        config.alpha_pattern[path] = layer.lora_alpha[name]
    layer.r[name] = config.rank_pattern[path] = rank
    layer.scaling[name] = layer.lora_alpha[name] / (math.sqrt(rank) if config.use_rslora else rank)
    return changed


class SearchFirst(LossCallback):
    """Searches the ranks before the first step of training."""

    def __init__(self, config: Config, model: nn.Module):
        super().__init__(model)
        self.config = config

    def on_train_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        name = self.model.active_adapter
        factor_layers(self.model, name)
        self.config.watch.begin()
        if state.global_step > 0 or train_dataloader is None:
            return  # goes on from a checkpoint, which has the ranks
        if args.world_size > 1 or args.deepspeed or args.fsdp:
            raise MethodError(
                "autolora searches in one process.",
                fix="Train on one device, or give the ranks that it found there to lora (rank_pattern).",
            )
        layers = {
            path: layer
            for path, layer in self.model.get_base_model().named_modules()
            if name in getattr(layer, "lora_variant", {})
        }
        parts = _two_parts(
            train_dataloader, self.config.held_out, args.per_device_train_batch_size, args.seed
        )
        found = search(self.model, layers, self.config, parts, self.loss_of)
        changed: dict[Any, nn.Parameter] = {}
        for path, rank in found.items():
            if rank != layers[path].r[name]:
                changed |= set_rank(layers[path], name, rank, self.config, path)
        optimizer = kwargs.get("optimizer")
        for group in [] if optimizer is None else optimizer.param_groups:
            group["params"] = [changed.get(p, p) for p in group["params"]]
        ranks = list(found.values())
        shown = ", ".join(f"{path} {rank}" for path, rank in found.items())
        log.info("ranks found: %s", shown)
        detail = f"on average, of {len(ranks)} layers, from {min(ranks)} to {max(ranks)}"
        checks.record("before", "ranks found", True, sum(ranks) / len(ranks), self.config.r, detail)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.config.watch.end()


def search(
    model: nn.Module,
    layers: dict[str, Any],
    config: Config,
    parts: tuple[Iterator[dict[str, Any]], Iterator[dict[str, Any]]],
    loss_of: Loss,
) -> dict[str, int]:
    """The rank of each layer. The model is afterwards as it was.

    Args:
        parts: batches for A and B, and for the logits, without end.
    """
    name = model.active_adapter
    config.logits = {
        layer: torch.ones(layer.r[name], device=layer.lora_A[name].weight.device, requires_grad=True)
        for layer in layers.values()
    }
    theta: list[Any] = [p for p in model.parameters() if p.requires_grad]
    start, a = [p.detach().clone() for p in theta], list(config.logits.values())
    lower = torch.optim.Adam(theta, lr=config.search_lr)
    upper = torch.optim.Adam(a, lr=config.logit_lr, betas=(0.5, 0.999))
    try:
        with evaluating(model), torch.random.fork_rng(), torch.enable_grad():
            for _ in range(config.search_steps):
                train, held_out = (partial(_again, loss_of, next(part)) for part in parts)
                search_step(train, held_out, theta, a, lower, upper, config)
        return {
            path: kept(config.logits[layer].detach(), config.threshold_on) for path, layer in layers.items()
        }
    finally:
        config.logits = {}
        with torch.no_grad():
            for parameter, value in zip(theta, start, strict=True):
                parameter.copy_(value)


def _again(loss_of: Loss, batch: dict[str, Any]) -> Tensor:
    return loss_of(dict(batch))  # a trainer takes out of it what is not the model's


def _two_parts(loader: Any, share: float, size: int, seed: int) -> tuple[Iterator[Any], Iterator[Any]]:
    """Endless batches of two parts of the trainer's rows, drawn with the seed."""
    rows: Dataset = loader.dataset
    if not hasattr(rows, "__len__") or len(rows) < 2:
        raise MethodError(
            "autolora splits the training rows, and there are fewer than two, or they are a stream.",
            fix="Give a data set of known length.",
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(max(round(share * len(rows)), 1), len(rows) - 1)

    def endless(indices: list[int], own: int) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(seed + own)
        batches = DataLoader(
            Subset(rows, indices),
            batch_size=min(size, len(indices)),
            shuffle=True,
            collate_fn=loader.collate_fn,
            generator=generator,
        )
        while True:
            yield from batches

    return endless(order[count:], 1), endless(order[:count], 2)
