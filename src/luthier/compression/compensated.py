"""A quantised linear layer with a low-rank part that makes up for its rounding: W ~ Q + B A.

Q (out, in) are the codes' weights, A (r, in) and B (out, r) the factors of what the rounding took away. The
product is never formed while the model runs: two skinny products are added, on the very input that Q sees.
With an identity in front this is a LoRA adapter of scaling 1; `separate` takes it off as one.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from luthier.compression.grid import Grid, Scheme, fit
from luthier.compression.linear import QuantizedLinear


class CompensatedLinear(QuantizedLinear):
    """A quantised layer and the factors of a low-rank matrix that is added to its weight.

    Attributes:
        down: A (r, in), and up: B (out, r); int8 codes, or floating point where there are no scales.
        down_scale, up_scale: one a row of each, (r, 1) and (out, 1); None of factors in floating point.
    """

    OWN: ClassVar[tuple[str, ...]] = ("down", "up", "down_scale", "up_scale")

    down: Tensor
    up: Tensor
    down_scale: Tensor | None
    up_scale: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        grid: Grid,
        bias: Tensor | None = None,
        *,
        down: Tensor,
        up: Tensor,
        down_scale: Tensor | None = None,
        up_scale: Tensor | None = None,
        **options: Any,
    ):
        super().__init__(codes, grid, bias, **options)
        for name, tensor in (("down", down), ("up", up), ("down_scale", down_scale), ("up_scale", up_scale)):
            self.register_buffer(name, None if tensor is None else tensor.contiguous())

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r), in the model's dtype."""
        return _whole(self.down, self.down_scale, self.dtype), _whole(self.up, self.up_scale, self.dtype)

    def whole_weight(self) -> Tensor:
        down, up = self.factors
        return super().whole_weight() + up.float() @ down.float()

    def forward(self, input: Tensor) -> Tensor:
        x = self.quantize_input(input)
        down, up = (factor.to(input.dtype) for factor in self.factors)
        coded = self.grid.dequantize(self.codes).to(self.dtype)
        y = functional.linear(x, coded.to(input.dtype), self.bias)
        return y + functional.linear(functional.linear(x, down), up)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


def _whole(factor: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return factor.to(dtype) if scale is None else (factor.float() * scale.float()).to(dtype)


def round_factor(factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Int8 codes of a factor, and one scale a row in the dtype in which it is stored."""
    grid = fit(factor, Scheme(bits=8, group_size=None), dtype)
    return grid.quantize(factor), grid.scale


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) whose product B A is nearest to a matrix (out, in) of all of rank r; float32.

    The singular vectors of the shorter side come from the smaller Gram matrix, in float64, which is several
    times quicker than the whole decomposition; the others follow from them. Singular values are shared
    equally between the two.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    wide = (matrix.T if tall else matrix).double()
    vectors = torch.linalg.eigh(wide @ wide.T).eigenvectors.flip(1)[:, :rank]  # greatest first
    across = vectors.T @ wide  # rows: singular value times the other vector
    root = across.norm(dim=1).sqrt()
    first, second = vectors * root, across / root.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    first, second = first.float(), second.float()
    return (first.T.contiguous(), second.T.contiguous()) if tall else (second, first)


def compensate(layer: QuantizedLinear, down: Tensor, up: Tensor, *, whole: bool = False) -> CompensatedLinear:
    """A quantised layer with the factors A (r, in) and B (out, r) beside its codes.

    Args:
        whole: hold the factors in the layer's dtype, not in 8 bits.
    """
    parts: dict[str, Tensor] = {"down": down.to(layer.dtype), "up": up.to(layer.dtype)}
    if not whole:
        parts["down"], parts["down_scale"] = round_factor(down, layer.scale.dtype)
        parts["up"], parts["up_scale"] = round_factor(up, layer.scale.dtype)
    made = CompensatedLinear(layer.codes, layer.grid, layer.bias, **_options(layer), **parts)
    return made.train(layer.training)


def separate(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Take the low-rank parts off a model, in place; what is left are plain quantised layers.

    Returns:
        A (r, in) and B (out, r) of each layer by name: a LoRA adapter of scaling 1.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, CompensatedLinear)}
    taken = {}
    for name, layer in layers.items():
        taken[name] = layer.factors
        plain = QuantizedLinear(layer.codes, layer.grid, layer.bias, **_options(layer))
        model.set_submodule(name, plain.train(layer.training))
    return taken


def _options(layer: QuantizedLinear) -> dict[str, Any]:
    return {"dtype": layer.dtype, "input_scale": layer.input_scale, "transposed": layer.transposed}
