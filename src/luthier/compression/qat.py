"""Training with the rounding in the loop: layers that round as they compute, and the loss that teaches them.

A `RoundingLinear` keeps its weight in floating point and computes as the quantised layer that will be made of
it. It is an `nn.Linear` with a weight that learns: any trainer and any objective take the model.

    y = round_kv( round_a(x) round_w(W)^T + b ),     gradients pass each rounding as if it were not there

The weight's grid is symmetric and covers the largest magnitude of each group with the greatest code: levels
-(2^(b-1) - 1) to 2^(b-1) - 1, none clipped. Inputs, and outputs that a cache holds, take a scale each token.

`bake` puts quantised layers in their place, which give the same numbers.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import Trainer
from transformers.modeling_outputs import CausalLMOutput
from transformers.pytorch_utils import Conv1D

from luthier.alignment.reliable import Reliable
from luthier.compression.cached import CachedLinear
from luthier.compression.grid import Grid, Scheme, fit, round_activations, straight_through
from luthier.compression.linear import QuantizedLinear, matrix
from luthier.errors import MethodError

ROWS = 64  # of logits whose softmax is taken at once
# What models call the layers that make keys and values.
KEYS_VALUES = ("k_proj", "v_proj", "key", "value", "k_lin", "v_lin", "k", "v")


@dataclass(frozen=True)
class Rounding:
    """What is rounded in training.

    Attributes:
        scheme: of weights and inputs.
        kv_bits: of keys and values, as their layers give them (before positions are turned into them).
        clip: inputs and weights of this size and above get no gradient; None: all do.
        dtype: of the model that comes out: in it the scales are stored.
    """

    scheme: Scheme
    kv_bits: int | None = None
    clip: float | None = None
    dtype: torch.dtype = torch.float32


def covering(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> Grid:
    """The symmetric grid whose greatest code stands for the largest magnitude of each group."""
    return fit(weight, scheme, dtype, shrink=(2**scheme.bits - 1) / 2 / scheme.high)


def passed(x: Tensor, rounded: Tensor, clip: float | None) -> Tensor:
    """`rounded`, whose gradient goes to x: everywhere, or where |x| < clip."""
    return straight_through(x, rounded) if clip is None else _Clipped.apply(x, rounded, clip)


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor, clip: float) -> Tensor:
        ctx.save_for_backward(x.abs() < clip)
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None


class RoundingLinear(nn.Linear):
    """A linear layer that computes with what its weight, its inputs and its outputs will be rounded to."""

    def __init__(self, layer: nn.Module, rounding: Rounding, output_bits: int | None):
        nn.Module.__init__(self)
        weight, bias = matrix(layer), layer.bias
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.contiguous())  # of a `Conv1D` it comes transposed
        self.bias = nn.Parameter(bias.detach().float()) if isinstance(bias, Tensor) else None
        self.rounding, self.output_bits = rounding, output_bits
        self.transposed = isinstance(layer, Conv1D)
        self.train(layer.training)

    @property
    def grid(self) -> Grid:
        """The grid of the weight as it now is."""
        return covering(self.weight.detach(), self.rounding.scheme, self.rounding.dtype)

    def forward(self, input: Tensor) -> Tensor:
        weight = passed(self.weight, self.grid.round(self.weight.detach()), self.rounding.clip)
        y = functional.linear(self._rounded(input, self.rounding.scheme.activation_bits), weight, self.bias)
        return self._rounded(y, self.output_bits)

    def _rounded(self, x: Tensor, bits: int | None) -> Tensor:
        if bits is None:
            return x
        return passed(x, round_activations(x.detach(), bits, "token"), self.rounding.clip)

    def bake(self) -> QuantizedLinear:
        """The quantised layer that computes the same."""
        grid, dtype = self.grid, self.rounding.dtype
        codes = grid.quantize(self.weight.detach())
        bias = None if self.bias is None else self.bias.to(dtype)
        options: dict[str, Any] = {"dtype": dtype, "transposed": self.transposed}
        if self.output_bits is None:
            made = QuantizedLinear(codes, grid, bias, **options)
        else:
            made = CachedLinear(codes, grid, bias, output_bits=self.output_bits, **options)
        return made.train(self.training)


def insert(model: nn.Module, names: Iterable[str], rounding: Rounding) -> nn.Module:
    """Put rounding layers in the place of linear ones, in place; all weights are then float32 and learn.

    Raises:
        MethodError: keys and values are to be rounded, and no layers of their own make them.
    """
    names = list(names)
    cached = {n for n in names if n.rpartition(".")[2] in KEYS_VALUES} if rounding.kv_bits else set()
    if rounding.kv_bits and not cached:
        raise MethodError(
            f"{type(model).__name__} has no layers that make keys and values alone: they cannot be rounded.",
            fix="Write kv_bits: null.",
        )
    for name in names:
        bits = rounding.kv_bits if name in cached else None
        model.set_submodule(name, RoundingLinear(model.get_submodule(name), rounding, bits))
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return model.requires_grad_(True)


@torch.no_grad()
def bake(model: nn.Module) -> nn.Module:
    """Put quantised layers in the place of rounding ones, in place; other weights take the model's dtype."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, RoundingLinear)}
    for name, layer in layers.items():
        model.set_submodule(name, layer.bake())
    for dtype in {layer.rounding.dtype for layer in layers.values()}:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    return model


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over rows of KL(softmax(teacher) || softmax(student)), a float32 scalar.

    Its gradient is that of the cross-entropy with the teacher's distribution as labels.

    Args:
        student, teacher: logits (rows, vocab); the teacher's take no gradient.
    """
    found: Tensor = _Divergence.apply(student, teacher)
    return found


class _Divergence(torch.autograd.Function):
    """The gradient softmax(student) - softmax(teacher) is made along with the loss, a few rows at a time."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        total = torch.zeros((), device=student.device)
        grad = torch.empty_like(student)
        for start in range(0, len(student), ROWS):
            rows = slice(start, start + ROWS)
            log_s, log_t = (logits[rows].float().log_softmax(-1) for logits in (student, teacher))
            p = log_t.exp()
            total += (p * (log_t - log_s)).sum()
            grad[rows] = log_s.exp_().sub_(p)
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return grad * upstream.to(grad.dtype), None


class Distilling(Reliable, Trainer):
    """Trains a model to predict as another does, at every position of {input_ids, labels} rows.

    The loss is the divergence summed over positions, divided by their number, or by that of the rows
    (`per_row`). Labels only say which positions count (-100: not).

    Attributes:
        teacher: the other model; it is no part of the one that is trained, nor of what is saved.
    """

    def __init__(self, *args: Any, teacher: nn.Module, per_row: bool = False, **kwargs: Any):
        self.teacher, self.per_row = teacher.eval(), per_row
        super().__init__(*args, **kwargs)
        self._loss_shifts_labels = False  # the distribution at a position is compared with that at the same

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels = inputs["labels"]
        given = {k: v for k, v in inputs.items() if k != "labels"} | {"use_cache": False}
        counted = labels != -100  # (batch, seq)
        student = model(**given).logits
        with torch.no_grad():
            teacher = self.teacher(**given).logits
        loss = divergence(student[counted], teacher[counted])
        items = counted.sum() if num_items_in_batch is None else num_items_in_batch
        loss = loss / torch.as_tensor(items, device=loss.device).clamp(min=1)
        if self.per_row:
            loss = loss * labels.shape[1]
        return (loss, CausalLMOutput(loss=loss, logits=student)) if return_outputs else loss
