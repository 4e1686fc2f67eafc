"""KronA: a change that is the Kronecker product of two small matrices.

Paper: Edalati et al., 2022, "KronA: Parameter Efficient Tuning with Kronecker Adapter", arXiv 2212.10650.
Pick it when an adapter must be tiny: it has the parameters of a LoRA of rank 1, and a rank of hundreds.
Cost: a1 a2 + b1 b2 parameters a layer, balanced about 2 sqrt(in out); 2 min(in b1 + out a2, in a1 + out b2)
more operations a token until merged.

A frozen weight W (out, in) gets the change s (A ⊗ B), whose block (i, j) is s A_ij B:

    y = W x + b + s (A ⊗ B) D(x),    A (a1, a2), B (b1, b2),    a1 b1 = out, a2 b2 = in

The change has rank(A) rank(B) and is never built: with x written row by row as X (a2, b2), (A ⊗ B) x is
A X B^T (a1, b1) read row by row; of the two orders of products the cheaper is taken. D is dropout.

`variant`:

    krona        on the layers named in target_modules; can be merged
    krona_b      beside the FFN of each block:   FFN(h) + s (A ⊗ B) D(h)
    krona_b_res  with a learnt share of the input besides:   FFN(h) + s (A ⊗ B) D(h) + s_res h

h (..., width) is what the FFN's first layer reads: normalised in pre-norm models (Llama, GPT-2, T5), the
attention's output in post-norm ones (BERT, BART). The change is added before the FFN's dropout. Beside an FFN
nothing can be merged, for no weight computes what passes by a non-linearity.

`a_shape: balanced` takes of all divisors those with the fewest parameters, at a1 a2 = sqrt(in out), and of
these the squarest: 32 x 24 and 24 x 32 for a layer of 768 x 768.

Start: A = 0, B ~ U(-1/sqrt(b2), 1/sqrt(b2)), s_res = res_init. Trained: A, B, s_res. Frozen: all else.
With `res_init: 0` the model starts as the base; third-party code uses 1, which changes the model at once.

The authors released no code. What their text leaves open (start, dropout, s_res) is chosen as said here.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from luthier.errors import MethodError
from luthier.options import option
from luthier.tuning.registration import register
from luthier.tuning.tuner import Delta, DeltaConfig, DeltaTuner


@dataclass
class Config(DeltaConfig):
    """Options of KronA."""

    variant: str = option(
        "krona",
        "on linear layers, beside each FFN, or that with a learnt residual",
        choices=("krona", "krona_b", "krona_b_res"),
    )
    target_modules: list[str] | str | None = option(
        None,
        "for krona: names of layers, a regular expression, or all-linear (all but the head), the default",
    )
    a_shape: list[int] | str = option("balanced", "rows and columns of A, such as [32, 24], or balanced")
    scale: float = option(1.0, "s, by which the change is multiplied", gt=0)
    dropout: float = option(0.0, "dropout on the input of the change", ge=0, lt=1)
    res_init: float = option(0.0, "start of s_res, for krona_b_res")

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = isinstance(self.a_shape, list | tuple) and len(self.a_shape) == 2 and min(self.a_shape) > 0
        if not fits and self.a_shape != "balanced":
            raise MethodError(
                f"a_shape: {self.a_shape} is no shape.", fix="Write balanced, or [rows, columns]."
            )

    @property
    def beside_ffn(self) -> bool:
        return self.variant != "krona"

    @property
    def starts_as_base(self) -> bool:
        return self.variant != "krona_b_res" or self.res_init == 0


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def balanced(out_features: int, in_features: int) -> tuple[int, int]:
    """(a1, a2) with the fewest parameters a1 a2 + b1 b2; of equal ones the squarest A and B."""

    def cost(a1: int, a2: int) -> tuple[int, float, int]:
        b1, b2 = out_features // a1, in_features // a2
        return a1 * a2 + b1 * b2, abs(math.log(a1 / a2)) + abs(math.log(b1 / b2)), -a1

    return min(
        ((a1, a2) for a1 in divisors(out_features) for a2 in divisors(in_features)), key=lambda a: cost(*a)
    )


def shapes(
    a_shape: list[int] | str, out_features: int, in_features: int, name: str
) -> tuple[int, int, int, int]:
    """(a1, a2, b1, b2) for a layer of (out, in).

    Raises:
        MethodError: A's shape does not divide the layer's; names the numbers that do.
    """
    a1, a2 = balanced(out_features, in_features) if isinstance(a_shape, str) else a_shape
    if out_features % a1 or in_features % a2:
        rows, columns = divisors(out_features), divisors(in_features)
        nearest = [min(rows, key=lambda d: abs(d - a1)), min(columns, key=lambda d: abs(d - a2))]
        raise MethodError(
            f"a_shape: {[a1, a2]} does not divide '{name}', which is {out_features} x {in_features}: rows "
            f"must be one of {rows}, columns one of {columns}.",
            fix=f"Write a_shape: {nearest}, or balanced, which fits every layer.",
        )
    return a1, a2, out_features // a1, in_features // a2


def kron_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(A ⊗ B) x for x (..., a2 b2), A (a1, a2), B (b1, b2): (..., a1 b1)."""
    (a1, a2), (b1, b2) = a.shape, b.shape
    rows = x.reshape(-1, a2, b2)
    # One product over the batch of rows: broadcasting would copy them, and autocast each copy of A.
    left = a.to(x.dtype).expand(len(rows), a1, a2)
    if a2 * b2 * b1 + a1 * a2 * b1 <= a1 * a2 * b2 + a1 * b2 * b1:
        made = torch.bmm(left, rows @ b.T)
    else:
        made = torch.bmm(left, rows) @ b.T
    return made.reshape(*x.shape[:-1], a1 * b1)


class Krona(Delta):
    """s (A ⊗ B), and s_res where the variant has it."""

    def __init__(self, config: Config, out_features: int, in_features: int, name: str):
        super().__init__(config, out_features, in_features, name)
        a1, a2, b1, b2 = shapes(config.a_shape, out_features, in_features, name)
        self.A = nn.Parameter(torch.zeros(a1, a2))
        self.B = nn.Parameter(torch.empty(b1, b2))
        nn.init.kaiming_uniform_(self.B, a=math.sqrt(5))
        self.scale = config.scale
        self.dropout = nn.Dropout(config.dropout)
        self.residual: nn.Parameter | None = None
        if config.variant == "krona_b_res":
            self.residual = nn.Parameter(torch.tensor(float(config.res_init)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        change = kron_product(self.dropout(x), self.A * self.scale, self.B)
        return change if self.residual is None else change + self.residual * x

    def weight(self) -> Tensor:
        return self.scale * torch.kron(self.A, self.B)


class Tuner(DeltaTuner):
    """Puts `Krona` on a model."""

    prefix = "krona_"
    delta = Krona


register("krona", Config, Tuner)
