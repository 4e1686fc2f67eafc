"""Laplace-LoRA: a Gaussian posterior over the weights of a trained LoRA.

Paper: Yang et al., 2023, "Bayesian Low-rank Adaptation for Large Language Models", arXiv 2308.13111.
Pick it when a classifier, or a choice among fixed answers, must say how sure it is after training on little
data. It hardly changes which answer comes first.
Cost: LoRA's training, and one pass over the training data with a backward per class; a prediction takes a
backward per class. Stored are k d + r^2 numbers a matrix beside the adapter.

Training is LoRA's; it ends at the most probable weights theta. Each A (r, in) and B (out, r) is then given a
Kronecker-factored Fisher, written with its long side d first (`luthier.tuning.curvature`):

    F = sum z z^T ⊗ sum w w^T / count  ~  U diag(p) U^T ⊗ Q diag(q) Q^T,    lambda_ij = p_i q_j

z (d) and w (r) are the input and the output's gradient at a position of an example (for B the other way
round). Of the long factor the k leading eigenvectors U (d, k) are kept. With the prior N(0, s2 I) the
posterior's precision is F + I / s2, diagonal in the basis u_i ⊗ q_j:

    evidence(s2) = log p(y | theta) - |theta|^2 / (2 s2) - 1/2 sum_ij log(1 + s2 lambda_ij)
    V(x) = sum over matrices of s2 J J^T - s2 sum_ij (s2 lambda_ij / (1 + s2 lambda_ij)) J_ij J_ij^T

J (classes, d r) is the Jacobian of the logits, J_ij (classes) = J (u_i ⊗ q_j). The logits are linearised,
f ~ N(f_theta(x), V(x)), and p(y | x) is the mean of softmax(f): over samples, or, with `link: probit`,
softmax(f_c / sqrt(1 + pi V_cc / 8)).

The evidence is concave in log s2, for each term of its slope falls: its one maximum is found by bisection.
`prior` gives one s2 to all matrices, one to all A and one to all B, or one to each matrix. Only LoRA's
weights are uncertain; the head of a classifier is taken as it was trained.

The callback fits the posterior when training ends, on the training data, where its batches have labels; for
a language model every labelled token is an observation. By hand:

    posterior = fit(model, batches)                  batches of model inputs with labels
    posterior.predict(model, batch)                  probabilities (batch, classes)
    posterior.predict(model, batch, answers(ids))    a language model's, among these next tokens
    Posterior.load(folder)                           from beside the adapter that luthier.save wrote

`answers` is in `luthier.tuning.curvature`. A merged model has no posterior: the adapter must stay separate.

Differs from the authors' code (adamxyang/laplace-lora, MaximeRobeyns/bayesian_lora): the loss is summed, so F
grows with the data whatever the batch; all positions with a gradient count, not the last alone; a long factor
is summed whole up to 512 and then cut, above that kept as a root with directions to spare; eigenvectors take
the place of a solve with M = I + s2 (..), whose determinant is prod(1 + s2 lambda_ij); probabilities are
averaged, not logits; the prior is not tuned on validation data.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from luthier import checks
from luthier.errors import MethodError, ModelError
from luthier.evaluation.calibration import calibration_error, negative_log_likelihood
from luthier.options import option
from luthier.tuning import curvature
from luthier.tuning.attach import tuning_of
from luthier.tuning.curvature import Batch, Block, Rows
from luthier.tuning.lora_factors import FactorConfig, factor_layers
from luthier.tuning.peft_options import peft_options

FILE = "laplace.safetensors"
WIDEST = 30.0  # bound of |log s2|


@peft_options
@dataclass
class Config(FactorConfig):
    """Options of Laplace-LoRA; the rarer fields of `peft.LoraConfig` can be given too."""

    r: int = option(8, "rank of the update", ge=1)
    lora_alpha: int = option(16, "scale: the update is multiplied by alpha / r", ge=1)
    lora_dropout: float = option(0.0, "dropout on the input of the adapter, in training", ge=0, lt=1)
    target_modules: list[str] | str | None = option(
        "all-linear", "names of the layers to adapt, a regular expression, or all-linear (all but the head)"
    )
    use_rslora: bool = option(False, "scale by alpha / sqrt(r)")
    kfac_rank: int = option(10, "k: eigenvectors kept of each long factor", ge=1)
    prior: str = option(
        "one",
        "weights that share a prior variance: all, all A and all B, or each matrix",
        choices=("one", "sides", "each"),
    )
    link: str = option("samples", "from logits to probabilities", choices=("samples", "probit"))
    samples: int = option(4000, "samples of the logits in a prediction", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.posterior: Posterior | None = None

    def callbacks(self, model: nn.Module) -> list[TrainerCallback]:
        return [FitAtEnd(self, model)]

    def save_adapter(self, model: peft.PeftModel, folder: Path | str) -> None:
        """Write an ordinary LoRA, and the posterior beside it."""
        if self.posterior is not None:
            self.posterior.require_fits(model)
        model.save_pretrained(str(folder))
        if self.posterior is not None:
            self.posterior.save(folder)


# Mathematics ---------------------------------------------------------------------------------------------


def evidence(log_variance: float, norm: float, eigenvalues: Tensor) -> float:
    """The part of log p(D | s2) that depends on s2, for weights of squared norm `norm`."""
    grown = torch.log1p(math.exp(log_variance) * eigenvalues)
    return -norm / (2 * math.exp(log_variance)) - 0.5 * float(grown.sum())


def best_log_variance(norm: float, eigenvalues: Tensor) -> float:
    """The log s2 of the highest evidence: where its slope, which falls, crosses zero.

    Raises:
        MethodError: no curvature, so that the evidence grows with s2 for ever.
    """
    if not (eigenvalues > 0).any():
        raise MethodError(
            "The curvature is zero: the data say nothing about the weights.",
            fix="Train first, and fit on batches with labels.",
        )

    def slope(s: float) -> float:
        grown = math.exp(s) * eigenvalues
        return norm / (2 * math.exp(s)) - 0.5 * float((grown / (1 + grown)).sum())

    low, high = -WIDEST, WIDEST
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return (low + high) / 2


def logit_variance(jacobian: Tensor, block: Block, variance: float) -> Tensor:
    """V (n, classes, classes) of one matrix from its Jacobian (n, classes, d, r)."""
    projected = torch.einsum("dk,ncdr,rj->nckj", block.u, jacobian, block.q_vectors)
    grown = variance * block.eigenvalues()
    whole = torch.einsum("ncdr,nedr->nce", jacobian, jacobian)
    known = torch.einsum("nckj,kj,nekj->nce", projected, grown / (1 + grown), projected)
    return variance * (whole - known)


def probabilities(
    logits: Tensor, variance: Tensor, link: str = "samples", samples: int = 4000, seed: int = 0
) -> Tensor:
    """Mean of softmax(f), f ~ N(logits, variance), for (n, classes) and (n, classes, classes)."""
    if link == "probit":
        spread = variance.diagonal(dim1=-2, dim2=-1)
        return (logits / (1 + math.pi / 8 * spread).sqrt()).softmax(-1)
    values, vectors = torch.linalg.eigh(variance)
    root = vectors * values.clamp_min(0).sqrt()[:, None]  # (n, classes, classes)
    noise = torch.randn(samples, logits.shape[-1], generator=torch.Generator().manual_seed(seed))
    total = torch.zeros_like(logits)
    for part in noise.to(logits).split(500):
        drawn = logits + torch.einsum("nce,se->snc", root, part)
        total += drawn.softmax(-1).sum(0)
    return total / samples


# The posterior -------------------------------------------------------------------------------------------


@dataclass
class Posterior:
    """The posterior of one adapter.

    Attributes:
        blocks: of each matrix, by its layer's name and `.lora_A` or `.lora_B`.
        norms: their squared norms.
        variances: s2 of each, after `tune_prior`.
        log_likelihood: of the data that it was fitted on.
        bits: a hash of the adapter's weights.
    """

    blocks: dict[str, Block]
    norms: dict[str, float]
    log_likelihood: float
    bits: int
    variances: dict[str, float]
    link: str = "samples"
    samples: int = 4000

    def tune_prior(self, prior: str = "one") -> float:
        """Set the prior variances to those of the highest evidence, which is returned."""
        groups: dict[str, list[str]] = {}
        for name in self.blocks:
            key = {"one": "", "sides": name.rpartition(".")[2], "each": name}[prior]
            groups.setdefault(key, []).append(name)
        best = self.log_likelihood
        for names in groups.values():
            norm = sum(self.norms[name] for name in names)
            eigenvalues = torch.cat([self.blocks[name].eigenvalues().flatten() for name in names]).cpu()
            log_variance = best_log_variance(norm, eigenvalues)
            best += evidence(log_variance, norm, eigenvalues)
            self.variances |= dict.fromkeys(names, math.exp(log_variance))
        return best

    def logits(self, model: nn.Module, batch: Batch, rows: Rows | None = None) -> tuple[Tensor, Tensor]:
        """Logits (n, classes) at the most probable weights, and their covariance (n, classes, classes)."""
        self.require_fits(model)
        logits, jacobians = curvature.jacobians(model, batch, rows)
        classes = logits.shape[-1]
        total = torch.zeros(len(logits), classes, classes, dtype=torch.float64, device=logits.device)
        for name, jacobian in jacobians:
            if name in self.blocks:  # a matrix that no example of the fit has reached is taken as it is
                total += logit_variance(jacobian, self.blocks[name], self.variances[name])
        return logits.double(), total

    def predict(self, model: nn.Module, batch: Batch, rows: Rows | None = None, seed: int = 0) -> Tensor:
        """Probabilities (n, classes) of each row of `batch`, averaged over the posterior.

        Args:
            rows: where the logits stand; by default a classifier's. See `answers`.

        Raises:
            MethodError: a model without the adapter that the posterior is of, or no classifier.
        """
        return probabilities(*self.logits(model, batch, rows), self.link, self.samples, seed)

    def require_fits(self, model: Any) -> None:
        """Raise MethodError where the model does not carry the adapter, as it was when this was fitted."""
        if not isinstance(model, peft.PeftModel) or curvature.bits(model) != self.bits:
            raise MethodError(
                "The posterior is not of the model's adapter: its weights are others, or it was merged.",
                fix="Load the adapter that lies beside the posterior, or fit(model, batches) anew.",
            )

    def save(self, folder: Path | str) -> None:
        """Write `laplace.safetensors` into the adapter's folder."""
        tensors = {
            f"{name}/{field}": getattr(block, field).cpu().contiguous()
            for name, block in self.blocks.items()
            for field in Block.__dataclass_fields__
        }
        numbers = {n: getattr(self, n) for n in type(self).__dataclass_fields__ if n != "blocks"}
        save_file(tensors, Path(folder) / FILE, {"posterior": json.dumps(numbers)})

    @classmethod
    def load(cls, folder: Path | str, device: str = "cpu") -> "Posterior":
        """The posterior that lies in an adapter's folder.

        Raises:
            ModelError: there is none.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise ModelError(f"There is no posterior in {folder}.", fix="Fit one: fit(model, batches).")
        with safe_open(path, framework="pt", device=device) as file:
            numbers = json.loads(file.metadata()["posterior"])
            found: dict[str, dict[str, Tensor]] = {}
            for key in file.keys():  # noqa: SIM118
                name, _, field = key.rpartition("/")
                found.setdefault(name, {})[field] = file.get_tensor(key)
        return cls(blocks={name: Block(**fields) for name, fields in found.items()}, **numbers)


def fit(
    model: Any,
    batches: Iterable[Batch],
    rows: Rows | None = None,
    config: Config | None = None,
    seed: int = 0,
) -> Posterior:
    """The posterior of the active adapter, which keeps it; its prior is tuned by the evidence.

    Args:
        batches: model inputs with labels, such as a data loader gives.
        rows: where logits and labels stand, one row an example; by default a classifier's, or the labelled
            positions of a language model.
        config: options; by default those of the adapter, or the defaults for one that was loaded.
        seed: of the labels drawn for the Fisher where there are many classes.
    """
    own = tuning_of(model)
    config = config or (own if isinstance(own, Config) else Config())
    sums, log_likelihood = curvature.kronecker(model, batches, config.kfac_rank, rows, seed)
    weights = curvature.weights(model)
    found = Posterior(
        blocks={name: factors.block() for name, factors in sums.items()},
        norms={name: float(weights[name].double().square().sum()) for name in sums},
        log_likelihood=log_likelihood,
        bits=curvature.bits(model),
        variances={},
        link=config.link,
        samples=config.samples,
    )
    found.tune_prior(config.prior)
    if isinstance(own, Config):
        own.posterior = found
        own.watch.missed = False  # whoever trained it: now it has what it is saved with
    return found


class FitAtEnd(TrainerCallback):
    """Fits the posterior on the training data when training ends, and says what it does on held-out data."""

    def __init__(self, config: Config, model: nn.Module):
        self.config = config
        self.model: Any = model

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        factor_layers(self.model, self.model.active_adapter)
        self.config.watch.begin()
        self.config.posterior = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.config.watch.end()
        loader, held_out = kwargs["train_dataloader"], kwargs.get("eval_dataloader")
        # In the order of the data: the trainer's loader would shuffle, and the labels drawn would change.
        size = args.per_device_train_batch_size
        batches = DataLoader(loader.dataset, batch_size=size, collate_fn=loader.collate_fn)
        if not curvature.has_labels(next(iter(batches))):
            detail = "the objective's batches have no labels: fit it on such with fit(model, batches)"
            checks.record("end", "posterior fitted", False, detail=detail, refuse=False)
            return
        posterior = fit(self.model, batches, seed=args.seed)
        variances = sorted(posterior.variances.values())
        middle = variances[len(variances) // 2]
        checks.record("end", "posterior fitted", math.isfinite(middle), middle, detail="prior variance")
        if held_out is not None and curvature.classifies(self.model):
            self._measure(posterior, held_out)

    def _measure(self, posterior: Posterior, batches: Iterable[Batch]) -> None:
        found: dict[str, list[Tensor]] = {"labels": [], "map": [], "laplace": []}
        for batch in batches:
            logits, variance = posterior.logits(self.model, batch)
            found["labels"].append(batch["labels"].to(logits.device))
            found["map"].append(logits.softmax(-1))
            found["laplace"].append(probabilities(logits, variance, posterior.link, posterior.samples))
        labels, plain, averaged = (torch.cat(parts) for parts in found.values())
        before, after = (negative_log_likelihood(p, labels) for p in (plain, averaged))
        detail = f"from {before:.4g} to {after:.4g} by the posterior"
        checks.record("end", "held-out NLL", after <= before, after, before, detail, refuse=False)
        # Told and not held to: it moves by hundredths with the edges of its bins; the likelihood does not.
        before, after = (calibration_error(p, labels) for p in (plain, averaged))
        sure, less = (p.amax(-1).mean().item() for p in (plain, averaged))
        detail = f"from {before:.4g} to {after:.4g}, mean confidence from {sure:.2f} to {less:.2f}"
        checks.record("end", "held-out ECE", True, after, detail=detail)
