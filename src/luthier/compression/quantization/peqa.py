"""PEQA: the weights become integers once, and what learns is their scales.

Paper: Kim et al., 2023, "Memory-Efficient Fine-Tuning of Compressed Large Language Models via sub-4-bit
    Integer Quantization", arXiv 2305.14152.
Pick it when the tuned model must be an ordinary quantised one, without an adapter beside it, and several
    tasks shall share one set of integers.
Cost: a parameter for each row of a layer, or for each group of a row; no data to quantise. Every product
    makes the weights anew, once forward and once backward; none are kept for the gradients.
Also: tuning

A weight W (out, in) is rounded once, to the grid with the least squared error of all ranges tried (`steps` of
them, each narrower than the one before):

    q = clamp(round(W / s0) + z, low, high),    W0 = s0 (q - z)        s0, z (out, groups)

Codes q and zero points z are frozen, the scales learn:

    y = x W'^T + b,    W' = (s0 + ds) (q - z),    dL/ds = sum over the group of dL/dW' (q - z)

Start: ds = 0, the quantised model bit for bit. No straight-through estimate is needed, as nothing is rounded
in training. `parametrization: relative` learns d of W' = s0 (1 + d) (q - z), for one learning rate whatever
the size of the weights: 1e-3 to 1e-2. Scales themselves are small numbers (about 1e-2), which AdamW moves by
the learning rate at each step: 1e-5 to 5e-4.

As a tuning method it stands on the codes that the base has, of any method (compress: gptq, then tune: peqa);
a base that is not quantised is rounded as said above. As a compression method it does that rounding alone.
Saved are the ds of a task, and a number that tells whether they belong to the codes at hand; tasks are
swapped by `set_adapter`. Merging writes s0 + ds into the scale.

The authors released no code. What their text leaves open (the ranges tried, biases frozen) is chosen as said.
"""

import hashlib
import re
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from luthier import checks
from luthier.compression.grid import Grid, Scheme, fit, require_divides
from luthier.compression.linear import QuantizedLinear, matrix, quantize_layer, require_plain
from luthier.compression.method import weight_error
from luthier.compression.records import Record
from luthier.errors import MethodError
from luthier.models import structure
from luthier.options import option
from luthier.tuning.feed_forward import features
from luthier.tuning.probe import distance, probe_logits
from luthier.tuning.registration import register
from luthier.tuning.tuner import Delta, DeltaConfig, DeltaLayer, DeltaLinear, DeltaTuner

NARROWEST = 0.2  # of the ranges tried, as a share of the whole one
OF_WEIGHT = "error of the weight; before: with the whole range"
SAMPLES = 4096  # integers of a layer that tell it from others


@dataclass
class Config(DeltaConfig):
    """Options of PEQA."""

    bits: int = option(4, "bits of a weight, of a base that is not quantised yet", ge=2, le=8)
    group_size: int | None = option(
        None, "of such a base: neighbours along the input that share a scale; null: the row", ge=0
    )
    symmetric: bool = option(False, "of such a base: no zero point")
    steps: int = option(
        40, "of such a base: ranges tried; 1 takes that of the least and greatest weight", ge=1
    )
    parametrization: str = option(
        "absolute",
        "what learns: the change of a scale, or that relative to it",
        choices=("absolute", "relative"),
    )
    target_modules: list[str] | str | None = option(
        None, "names of layers, a regular expression, or all-linear (all but the head), the default"
    )

    needs_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rounded = 0  # layers that were plain when the adapter was put on them

    @property
    def wants_data(self) -> bool:
        return self.needs_data

    @property
    def scheme(self) -> Scheme:
        return Scheme(self.bits, self.group_size, self.symmetric)

    @property
    def starts_as_base(self) -> bool:
        """A base that was rounded on the way is not what it was; `attached` proves the rest."""
        return not self.rounded

    def attached(self, model: Any) -> None:
        """Prove that scales that have not learnt yet change nothing, where the base was rounded for them."""
        if not self.rounded:
            return
        with model.disable_adapter():
            expected = probe_logits(model)
        error = distance(probe_logits(model), expected)
        detail = f"{self.rounded} layers rounded to {self.scheme}"
        checks.record("before", "identity at step 0", error == 0, error, 0, detail)

    @torch.no_grad()
    def compress(self, model: nn.Module, batches: Any = ()) -> list[Record]:
        """Round the layers in place; needs no batches.

        Raises:
            MethodError: a layer that is quantised already, not finite, or whose rows no groups fill.
        """
        layers = {name: model.get_submodule(name) for name in _targets(model, self.target_modules)}
        for name, layer in layers.items():
            _require(name, layer, self.scheme)
        records = []
        for name, layer in layers.items():
            start = time.perf_counter()
            weight, made = matrix(layer), round_layer(layer, self)
            covered = fit(weight, self.scheme, made.scale.dtype)
            before, after = (weight_error(g.round(weight) - weight, weight) for g in (covered, made.grid))
            model.set_submodule(name, made)
            seconds = time.perf_counter() - start
            records.append(Record(name, before, after, bits=self.bits, seconds=seconds, note=OF_WEIGHT))
        return records


def _targets(model: nn.Module, wanted: list[str] | str | None) -> list[str]:
    """Names of the linear layers below the head that are meant."""
    linears = structure.linears(model)
    if wanted is None or wanted == "all-linear":
        return list(linears)
    if isinstance(wanted, str):
        names = [name for name in linears if re.fullmatch(wanted, name)]
    else:
        meant = {name for names in structure.match_targets(model, sorted(wanted)).values() for name in names}
        names = [name for name in linears if name in meant]
    if not names:
        raise MethodError(
            f"target_modules {wanted} matches no linear layer below the head.",
            fix="Write target_modules: all-linear.",
        )
    return names


def _require(name: str, layer: nn.Module, scheme: Scheme) -> None:
    require_plain(name, layer)
    require_divides(scheme, features(layer, name)[1], name)


def least_error(weight: Tensor, scheme: Scheme, dtype: torch.dtype, steps: int = 40) -> Grid:
    """The grid with the least squared error, group by group, of `steps` ranges from the whole one down.

    Args:
        weight: (out, in).
        dtype: in which the scale is stored.
    """
    best = fit(weight, scheme, dtype)
    least = _error(weight, best)
    for step in range(1, steps):
        tried = fit(weight, scheme, dtype, shrink=1 - (1 - NARROWEST) * step / steps)
        error = _error(weight, tried)
        better = error < least
        least = torch.where(better, error, least)
        best = Grid(
            scheme,
            torch.where(better, tried.scale, best.scale),
            torch.where(better, tried.zero, best.zero),
        )
    return best


def _error(weight: Tensor, grid: Grid) -> Tensor:
    """Squared error of the rounding, of each group: shaped as the scale."""
    return by_group((grid.round(weight) - weight.float()).square_(), grid.scale)


def by_group(values: Tensor, scale: Tensor) -> Tensor:
    """Sum of values (out, in) over those that share a scale: (out, groups), or (1, 1)."""
    rows, groups = scale.shape
    return values.reshape(rows, groups, -1).sum(-1)


def round_layer(layer: nn.Module, config: Config) -> QuantizedLinear:
    """The quantised layer for a plain one."""
    weight, own = matrix(layer), layer.weight
    assert isinstance(own, Tensor)
    grid = least_error(weight, config.scheme, own.dtype, config.steps)
    return quantize_layer(layer, grid.quantize(weight), grid)


def whole_numbers(codes: Tensor, zero: Tensor | None, scale: Tensor) -> Tensor:
    """q - z of codes (out, in), float32, group by group as the scale has them: (*scale.shape, width)."""
    whole = codes.view(*scale.shape, -1).float()
    return whole if zero is None else whole.sub_(zero[..., None])


def integers(layer: QuantizedLinear) -> Tensor:
    """q - z (out, in) of a layer, float32."""
    return whole_numbers(layer.codes, layer.zero, layer.scale).view_as(layer.codes)


def digest(layer: QuantizedLinear) -> int:
    """A number that tells the integers q - z of a layer from others, however they are stored."""
    if layer.codes.is_meta:
        return 0
    flat = integers(layer).flatten()
    sample = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].to("cpu", torch.int16)
    found = hashlib.sha256(f"{tuple(layer.codes.shape)}".encode() + sample.numpy().tobytes()).digest()
    return int.from_bytes(found[:8], "big", signed=True)


class ScaledProduct(torch.autograd.Function):
    """x W^T + b with W = scale (q - z); W is made again for the gradients of x and scale, not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, *frozen: Any) -> Tensor:
        codes, zero, bias, dtype = frozen
        ctx.save_for_backward(x, scale, codes, zero)
        ctx.dtype = dtype
        weight = whole_numbers(codes, zero, scale).mul_(scale[..., None]).view_as(codes)
        return functional.linear(x, weight.to(dtype).to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, codes, zero = ctx.saved_tensors
        whole = whole_numbers(codes, zero, scale)
        dx = dscale = None
        if ctx.needs_input_grad[1]:
            dweight = grad.flatten(0, -2).T @ x.flatten(0, -2)  # (out, in)
            dscale = (whole * dweight.view_as(whole)).sum(-1)
        if ctx.needs_input_grad[0]:
            weight = whole.mul_(scale[..., None]).view_as(codes)
            dx = grad @ weight.to(ctx.dtype).to(grad.dtype)
        return dx, dscale, None, None, None, None


class Scales(Delta):
    """The change of a layer's scales for one task."""

    base: Tensor

    def __init__(self, config: Config, layer: QuantizedLinear, name: str):
        super().__init__(config, layer.out_features, layer.in_features, name)
        self.name, self.relative = name, config.parametrization == "relative"
        self.learnt = nn.Parameter(torch.zeros(layer.scale.shape))
        self.register_buffer("base", torch.tensor(digest(layer)))

    def change(self, scale: Tensor) -> Tensor:
        """ds (out, groups)."""
        return scale.float() * self.learnt if self.relative else self.learnt

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        known = state_dict.get(f"{prefix}base")
        if known is not None and not known.is_meta and not self.base.is_meta and int(known) != int(self.base):
            raise MethodError(
                f"The scales belong to other integers than those of '{self.name}'.",
                fix="Load them on the base, quantised as it was, that they were trained on.",
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


class ScaledLinear(DeltaLinear):
    """A quantised layer and the scales of each task."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [self.deltas[name] for name in self.active_adapters if name in self.deltas]
        if self.disable_adapters or self.merged or not active:
            return super().forward(x, *args, **kwargs)
        base: Any = self.get_base_layer()
        if torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        scale = base.scale.float() + sum(delta.change(base.scale) for delta in active)
        read, bias = base.quantize_input(x), base.bias
        bias = None if bias is None else bias.to(read.dtype)
        y: Tensor = ScaledProduct.apply(read, scale, base.codes, base.zero, bias, base.dtype)
        return y

    def why_unmergeable(self, adapter: str) -> str:
        return ""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the scales of a task change of the weight, (out, in)."""
        base: Any = self.get_base_layer()
        change = self.deltas[adapter].change(base.scale)
        return whole_numbers(base.codes, base.zero, change).mul_(change[..., None]).view_as(base.codes)

    @torch.no_grad()
    def _add(self, names: list[str], sign: int, safe: bool) -> None:
        """Write s0 + ds into the layer's scale, in float32; taking it off puts back what was there."""
        base: Any = self.get_base_layer()
        if sign < 0:
            if names:
                base.scale = self._unmerged
            return
        if not names:
            return
        if not self.merged_adapters:
            self._unmerged: Tensor = base.scale
        scale = base.scale.float() + sum(self.deltas[name].change(self._unmerged) for name in names)
        if safe and not torch.isfinite(scale).all():
            raise ValueError(f"the scales merged with {', '.join(names)} are not finite")
        base.scale = scale


class Tuner(DeltaTuner):
    """Puts `Scales` on the quantised layers of a model, and quantises those that are not."""

    prefix = "peqa_"

    def make_layer(self, config: Config, base_layer: nn.Module, name: str) -> DeltaLayer:
        features(base_layer, name)
        if not isinstance(base_layer, QuantizedLinear):
            _require(name, base_layer, config.scheme)
            base_layer = round_layer(base_layer, config)
            config.rounded += 1
        if type(base_layer) is not QuantizedLinear:
            raise MethodError(
                f"{name} ({type(base_layer).__name__}) computes more than a product with its codes.",
                fix="Stand peqa on codes of another method (rtn, gptq), or tune an adapter (lora).",
            )
        out_features, in_features = base_layer.out_features, base_layer.in_features
        return ScaledLinear(base_layer, f"{self.prefix}delta", out_features, in_features)

    def make_delta(self, config: Config, layer: DeltaLayer, name: str, adapter: str) -> Delta:
        base = layer.get_base_layer()
        assert isinstance(base, QuantizedLinear)
        return Scales(config, base, name)


register("peqa", Config, Tuner)
