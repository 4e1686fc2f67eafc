"""KAdaptation: a sum of Kronecker products of small matrices, of which one factor is shared by all layers.

Paper: He et al., 2022, "Parameter-efficient Model Adaptation for Vision Transformers", arXiv 2203.16329.
Pick it when adapters must be tiny and a LoRA of rank 1 is too narrow: of as many parameters, the rank is up
to phm_dim times higher.
Cost: k(in + out) parameters a layer, and out for a bias; 2 n^2 for each kind of layer (n^3 with `factorized:
false`); 2 n k(in + out) more operations a token until merged. n is phm_dim, k is phm_rank.

A frozen weight W (out, in) gets the change s dW and a bias:

    y = W x + b0 + s dW D(x) + b,      dW = sum_j S_j ⊗ F_j,      j = 1 ... n
    S_j = P_j Q_j^T (n, n),    F_j = U_j V_j (out/n, in/n),    U_j (out/n, k),    V_j (k, in/n)

The slow S_j are one set for all layers of a kind (all q_proj, say); the fast U_j, V_j are each layer's own.
D is dropout. As (P_j Q_j^T) ⊗ (U_j V_j) = (P_j ⊗ U_j) (Q_j^T ⊗ V_j), the sum is a product of two thin
matrices: the layer computes with it, and dW is never built:

    dW = B A,     B = [P_j ⊗ U_j]_j (out, n k),     A = [Q_j^T ⊗ V_j]_j (n k, in)

`factorized: false` learns whole S_j (n, n) instead. x, row by row X (n, in/n), then goes through
sum_j S_j (X V_j^T) U_j^T, read row by row.

Start: P, Q ~ U(-0.01, 0.01), S the products of such; U ~ U(-c, c) with c = sqrt(2) sqrt(6 / (out/n + k));
V = 0, b = 0. So the model starts as the base, and V has the first gradient. Trained: P, Q (or S), U, V, b.
Frozen: all else. b is learnt where a layer has a bias already (`learn_bias: present`), for only there merging
can fold it; the paper's CLIP has one on every layer.

The paper adapts query and value of every layer: target_modules: [q_proj, v_proj] on a Llama.

Differs from the authors' code (eric-ai-lab/PEViT), which cannot train the method: it starts with U = V = 0, a
point without any gradient, takes the query's fast matrices for the value, and adds the change to reshaped
states. Here it is the paper's formula. Its dropout of entries of dW is dropout of the input here, and its s,
alpha / r of LoRA times five, is `scale`.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.errors import MethodError
from luthier.options import option
from luthier.tuning.registration import register
from luthier.tuning.shared import Held, SharedTuner
from luthier.tuning.tuner import Delta, DeltaConfig, DeltaLayer

SMALL = 0.01  # bound of P and Q at the start


@dataclass
class Config(DeltaConfig):
    """Options of KAdaptation."""

    phm_dim: int = option(32, "n: terms of the sum, and the size of the slow matrices", ge=1)
    phm_rank: int = option(1, "k: rank of the fast matrices", ge=1)
    factorized: bool = option(True, "slow matrices of rank 1")
    scale: float = option(16.0, "s, by which the change is multiplied", gt=0)
    dropout: float = option(0.0, "dropout on the input of the change", ge=0, lt=1)
    learn_bias: str = option(
        "present",
        "layers whose bias learns: those that have one, all (not to be merged), or none",
        choices=("present", "all", "none"),
    )
    target_modules: list[str] | str | None = option(
        None, "names of layers, a regular expression, or all-linear (all but the head), the default"
    )


class Slow(nn.Module):
    """The matrices S_j that all layers of a kind share."""

    def __init__(self, n: int, factorized: bool):
        super().__init__()
        p, q = (torch.empty(n, n).uniform_(-SMALL, SMALL) for _ in range(2))  # rows: P_j, Q_j
        if factorized:
            self.P, self.Q = nn.Parameter(p), nn.Parameter(q)
        else:
            self.S = nn.Parameter(p[:, :, None] * q[:, None, :])

    def matrices(self) -> Tensor:
        """S (n, n, n), the first index j."""
        return self.P[:, :, None] * self.Q[:, None, :] if hasattr(self, "P") else self.S


def thin(p: Tensor, q: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A (n k, in) and B (out, n k) of P, Q (n, n), U (n, out/n, k), V (n, k, in/n)."""
    n, _, k = u.shape
    a = (q[:, None, :, None] * v[:, :, None, :]).reshape(n * k, -1)  # j k, a i
    b = (p[:, :, None, None] * u[:, None, :, :]).permute(1, 2, 0, 3)  # j, b, o, k to b, o, j, k
    return a, b.reshape(-1, n * k)


def summed_product(x: Tensor, s: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """(sum_j S_j ⊗ U_j V_j) x for x (..., in), S (n, n, n), U (n, out/n, k), V (n, k, in/n): (..., out)."""
    n, _, k = u.shape
    inner = x.reshape(-1, n, v.shape[2]) @ v.reshape(n * k, -1).T  # rows, a, j k
    mixed = torch.einsum("rajk,jba->rbjk", inner.view(-1, n, n, k), s)
    made = mixed.reshape(-1, n, n * k) @ u.transpose(1, 2).reshape(n * k, -1)
    return made.reshape(*x.shape[:-1], -1)


class KAdaptation(Delta):
    """s sum_j S_j ⊗ U_j V_j, and a bias."""

    def __init__(
        self, config: Config, out_features: int, in_features: int, name: str, slow: Slow, biased: bool
    ):
        super().__init__(config, out_features, in_features, name)
        n, k = config.phm_dim, config.phm_rank
        common = math.gcd(out_features, in_features)
        if common % n:
            fitting = [d for d in range(1, common + 1) if common % d == 0]
            raise MethodError(
                f"phm_dim: {n} does not divide '{name}', which is {out_features} x {in_features}.",
                fix=f"Write one of {fitting}, or leave the layer out of target_modules.",
            )
        self.slow = Held(slow)
        self.U = nn.Parameter(torch.empty(n, out_features // n, k))
        self.V = nn.Parameter(torch.zeros(n, k, in_features // n))
        bound = math.sqrt(2) * math.sqrt(6 / (out_features // n + k))
        nn.init.uniform_(self.U, -bound, bound)
        self.b = nn.Parameter(torch.zeros(out_features)) if biased else None
        self.scale = config.scale
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        slow: Any = self.slow.module
        x = self.dropout(x)
        if hasattr(slow, "P"):
            a, b = thin(slow.P * self.scale, slow.Q, self.U, self.V)
            change = F.linear(F.linear(x, a), b)
        else:
            change = summed_product(x, slow.S * self.scale, self.U, self.V)
        return change if self.b is None else change + self.b

    def weight(self) -> Tensor:
        slow: Any = self.slow.module
        whole = torch.einsum("jba,jok,jki->boai", slow.matrices() * self.scale, self.U, self.V)
        return whole.reshape(self.U.shape[0] * self.U.shape[1], -1)

    def bias(self) -> Tensor | None:
        return self.b


class Tuner(SharedTuner):
    """Puts `KAdaptation` on a model, and keeps the slow matrices."""

    prefix = "kadaptation_"

    def make_delta(self, config: Config, layer: DeltaLayer, name: str, adapter: str) -> Delta:
        slow = self.shared(adapter, name.rpartition(".")[2], lambda: Slow(config.phm_dim, config.factorized))
        has_bias = getattr(layer.get_base_layer(), "bias", None) is not None
        biased = config.learn_bias == "all" or (config.learn_bias == "present" and has_bias)
        return KAdaptation(config, layer.out_features, layer.in_features, name, slow, biased)


register("kadaptation", Config, Tuner)
