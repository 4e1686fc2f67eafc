"""One quantised linear layer, whatever method chose its codes; and how a model's layers become such.

The weight is held as int8 codes with a scale (and a zero point) for each group, and is made anew for each
product: this is the plain path, against which the fast ones of `luthier.acceleration` are tested. The layer
is an `nn.Linear` for whoever asks (PEFT puts adapters on it), but its `weight` is computed and cannot be
set.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from luthier.compression.grid import Grid, round_activations
from luthier.errors import MethodError


class QuantizedLinear(nn.Linear):
    """A linear layer with codes for weights.

    Attributes:
        codes: int8 (out, in), signed.
        scale: (out, groups), in the dtype in which it is stored; (1, 1) where the whole tensor shares one.
        zero: int8 (out, groups), the code that stands for 0; None of a symmetric scheme.
        input_scale: float32 scalar, the step of the inputs under a static scheme; else None.
        scheme: what the codes mean.
        transposed: it stands for a `Conv1D`, whose weight a model's files hold as (in, out).
    """

    OWN: ClassVar[tuple[str, ...]] = ()  # what a subclass holds and takes beside: buffers and plain values

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    input_scale: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        grid: Grid,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype,
        input_scale: Tensor | None = None,
        transposed: bool = False,
    ):
        nn.Module.__init__(self)
        self._held: list[Tensor] | None = None  # the weight, once it was asked for, inside `held_weights`
        self.out_features, self.in_features = codes.shape
        self.scheme, self.dtype, self.transposed = grid.scheme, dtype, transposed
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scale", grid.scale.contiguous())
        self.register_buffer("zero", None if grid.scheme.symmetric else grid.zero.contiguous())
        self.register_buffer("input_scale", input_scale)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @property
    def grid(self) -> Grid:
        zero = torch.zeros_like(self.scale, dtype=torch.int8) if self.zero is None else self.zero
        return Grid(self.scheme, self.scale, zero)

    def whole_weight(self) -> Tensor:
        """The weight (out, in) that the layer stands for, float32, before it is cast to the model's dtype."""
        return self.grid.dequantize(self.codes)

    @property
    def weight(self) -> Tensor:
        """The weight (out, in) that the layer stands for, in the model's dtype; made when asked for."""
        if self._held is None:
            return self.whole_weight().to(self.dtype)
        if not self._held:
            self._held.append(self.whole_weight().to(self.dtype))
        return self._held[0]

    def quantize_input(self, x: Tensor) -> Tensor:
        """What the layer makes of its input before the product."""
        if self.scheme.activation_bits is None:
            return x
        return round_activations(x, self.scheme.activation_bits, self.scheme.activation_per, self.input_scale)

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(self.quantize_input(input), self.weight.to(input.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme}"


def matrix(layer: nn.Module) -> Tensor:
    """The weight of a linear layer as (out, in), float32: a copy. GPT-2's `Conv1D` stores it transposed."""
    weight: Any = layer.weight
    return (weight.detach().T if isinstance(layer, Conv1D) else weight.detach()).to(torch.float32, copy=True)


def set_matrix(layer: nn.Module, weight: Tensor) -> None:
    """Give a plain linear layer another weight (out, in), in the layer's own dtype and layout."""
    set_values(layer.weight, weight.T if isinstance(layer, Conv1D) else weight)


def set_values(parameter: Any, values: Tensor) -> None:
    """Let a parameter hold other values, in its own dtype; nobody may change them afterwards.

    They are not written into its memory: that may be pages of a mapped checkpoint, which would become a copy
    that stays as long as the file is mapped; and a copy of the module may read it.
    """
    parameter.data = values.to(parameter.dtype).contiguous()


def dimensions(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer."""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[1], layer.weight.shape[0]
    assert isinstance(layer, nn.Linear)
    return layer.out_features, layer.in_features


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantised layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def quantize_layer(
    layer: nn.Module,
    codes: Tensor,
    grid: Grid,
    input_scale: Tensor | None = None,
    *,
    kind: type[QuantizedLinear] = QuantizedLinear,
    **own: Any,
) -> QuantizedLinear:
    """The quantised layer that stands for a plain one: its bias and dtype, these codes.

    Args:
        kind: class of the layer, which takes `own` beside.
    """
    weight: Any = layer.weight
    bias: Any = layer.bias
    transposed = isinstance(layer, Conv1D)
    made = kind(codes, grid, bias, dtype=weight.dtype, input_scale=input_scale, transposed=transposed, **own)
    return made.train(layer.training)


@contextmanager
def held_weights(model: nn.Module) -> Iterator[None]:
    """Inside, quantised layers make their weight once: no codes and no scales may change."""
    layers = quantized_layers(model).values()
    for layer in layers:
        layer._held = []
    try:
        yield
    finally:
        for layer in layers:
            layer._held = None


def dequantize(model: nn.Module) -> nn.Module:
    """Give a model plain layers in place of quantised ones, in place; the same weights.

    What is lost: the rounding of activations, which plain layers do not do.
    """
    for name, layer in quantized_layers(model).items():
        model.set_submodule(name, plain_layer(layer))
    return model


def plain_layer(layer: QuantizedLinear) -> nn.Module:
    """The `nn.Linear` or `Conv1D` with the weight that a quantised layer stands for."""
    weight = layer.weight
    with torch.device("meta"):
        plain: Any = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        if layer.transposed:
            plain, weight = Conv1D(layer.out_features, layer.in_features), weight.T.contiguous()
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = layer.bias
    return plain.train(layer.training)


def require_plain(name: str, layer: nn.Module) -> None:
    """Raise MethodError where a layer cannot be compressed: quantised already, or not finite."""
    weight: Any = layer.weight
    if isinstance(layer, QuantizedLinear) or not weight.dtype.is_floating_point:
        raise MethodError(
            f"{name} is quantised already.",
            fix="Start from the model in its original precision, or dequantize it.",
        )
    if not weight.is_meta and not weight.sum(dtype=torch.float32).isfinite():  # of any number, without a copy
        raise MethodError(
            f"The weight of {name} has values that are not finite.", fix="Load the model again, or repair it."
        )
