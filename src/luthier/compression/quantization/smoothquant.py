"""SmoothQuant: move outliers of activations into the weights, then round both.

Paper: Xiao, Lin, Seznec, Wu, Demouth and Han, 2022, "SmoothQuant: Accurate and Efficient Post-Training
    Quantization for Large Language Models", arXiv 2211.10438.
Pick it when products are to run in integers, weights and inputs of 8 bits, not only weights stored small.
Cost: one run of the calibration data and a pass over the weights; nothing when the model runs.

A few channels of the inputs X (T, K) are far larger than the others and set the step for all. With factors s,

    X W^T = (X diag(s)^-1) (W diag(s))^T,    s_k = max_t |X_tk|^alpha / max_n |W_nk|^(1 - alpha)

the products stay what they are, and at alpha = 1/2 both sides have the same maximum in each channel. The
division goes into the norm before (`luthier.compression.folding`); the maximum of the weights is taken over
all layers that read the same norm. Rows by default: norm -> layers, as in the authors' code. `all_rows` adds
v -> o and up -> down, one factor for all query heads that share a head of values.

With `alpha: null` the exponent is searched for each group, 0, 0.05, ..., 1, by the squared error of the
group's outputs on sampled inputs, both sides rounded. The authors give one alpha for a model (0.5; 0.8 to 0.9
for Llama). A channel that is zero on all calibration data keeps s = 1; the authors' clamp would make it 1e-5.
Inputs are those of the model as it came, blocks below included, as in the authors' code; in a list with a
method that looks at what it changed (`propagates`), those of the changed blocks.

Groups that no norm feeds alone (BERT, whose norms feed the residual stream too) are rounded as they are: the
paper's explicit factor on that branch is not built.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from luthier.acceleration.float32 import linear
from luthier.compression.block import Block
from luthier.compression.folding import Row
from luthier.compression.grid import Scheme, fit, round_activations
from luthier.compression.linear import matrix
from luthier.compression.scaling import Scaling
from luthier.compression.statistics import Moments, Samples
from luthier.options import option

LEAST = 1e-5
STEPS = 20  # of alpha between 0 and 1, where it is searched


class Inputs:
    """What is gathered of a group's inputs: the peak of each, and a sample of tokens."""

    def __init__(self, block: Block, features: int, count: int):
        self._moments = Moments(features, block.device)
        self._samples = Samples(count, block.tokens)
        self._divisor = torch.ones(features, device=block.device)

    def add(self, x: Tensor) -> None:
        self._moments.add(x)
        self._samples.add(x)

    def divide(self, factors: Tensor) -> None:
        self._divisor = self._divisor * factors

    @property
    def peak(self) -> Tensor:
        return self._moments.peak / self._divisor

    @property
    def sample(self) -> Tensor:
        return self._samples.value / self._divisor


@dataclass
class Config(Scaling):
    alpha: float | None = option(
        0.5, "how much goes into the weights, 0 to 1; null: searched for each group", ge=0, le=1
    )
    all_rows: bool = option(False, "scale the inputs of o and down too, not only those of norms")
    sampled_tokens: int = option(512, "tokens on which errors are measured", ge=1)
    bits: int = option(8, "bits of a weight", ge=2, le=8)
    group_size: int | None = option(
        None, "neighbours along the input that share a scale; null: the row", ge=0
    )
    activation_bits: int | None = option(8, "bits of a layer's inputs; null: floating point", ge=2, le=8)

    propagates: ClassVar[bool] = False

    def only_norms(self) -> bool:
        return not self.all_rows

    def gather(self, block: Block, features: int) -> Inputs:
        return Inputs(block, features, self.sampled_tokens)

    def error(self, weight: Tensor, final: Tensor, seen: Inputs) -> float:
        return scheme_error(seen.sample, [weight], torch.ones_like(seen.peak), self.scheme)

    def divide(self, seen: Inputs, factors: Tensor) -> None:
        seen.divide(factors)

    def factors(self, block: Block, row: Row, seen: Inputs) -> tuple[Tensor, str]:
        layers = block.layers()
        weights = [matrix(layers[name]) for name in row.layers]
        peak = row.share(seen.peak, "amax")
        columns = row.share(torch.stack([w.abs().amax(0) for w in weights]).amax(0), "amax")
        if self.alpha is not None:
            return smoothing(peak, columns, self.alpha), ""
        found: dict[float, float] = {}
        for step in range(STEPS + 1):
            factors = smoothing(peak, columns, step / STEPS)
            found[step / STEPS] = scheme_error(seen.sample, weights, factors, self.scheme)
        alpha = min(found, key=lambda a: found[a])
        return smoothing(peak, columns, alpha), f"alpha {alpha:g}"


def smoothing(peak: Tensor, columns: Tensor, alpha: float) -> Tensor:
    """s (in,) of the largest magnitude of each input and of each column of the weights."""
    factors = peak**alpha / columns.clamp_min(LEAST) ** (1 - alpha)
    return torch.where(peak > 0, factors.clamp_min(LEAST), torch.ones_like(factors))


def scheme_error(x: Tensor, weights: list[Tensor], factors: Tensor, scheme: Scheme) -> float:
    """Squared error of the outputs of layers, relative to the outputs' own, when both sides are rounded.

    Args:
        x: inputs (tokens, in). Where they share one step, it is taken over these.
        weights: each (out, in).
        factors: (in,), by which inputs are divided and columns multiplied before they are rounded.
    """
    divided = x / factors
    if scheme.activation_bits is not None:
        per = "token" if scheme.activation_per == "token" else "tensor"
        divided = round_activations(divided, scheme.activation_bits, per)
    lost, whole = 0.0, 0.0
    for weight in weights:
        exact = linear(x, weight)
        scaled = weight * factors
        lost += float((linear(divided, fit(scaled, scheme).round(scaled)) - exact).square().sum())
        whole += float(exact.square().sum())
    return lost / max(whole, torch.finfo().tiny)
