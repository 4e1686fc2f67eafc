"""What methods of the calibration pass share: which layers they work on, the options of a quantiser, errors.

A method file states its options as a subclass of `OneShot` (or of `Quantizer`, `Pruner`) named `Config`, and
how a block is changed: `change(block)`. Those that work layer by layer state `change_layer` only. What a
method does before it rounds (SmoothQuant's and AWQ's scaling) is its `prepare`: in a list of methods in which
a later one rounds, an earlier one only prepares.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from luthier.acceleration import native
from luthier.acceleration.float32 import linear
from luthier.compression import masks
from luthier.compression.block import Block
from luthier.compression.grid import Grid, Scheme, activation_step, fit, require_divides
from luthier.compression.linear import dimensions, matrix, quantize_layer, require_plain, set_matrix
from luthier.compression.records import Record
from luthier.compression.statistics import Hessian, Moments
from luthier.errors import MethodError
from luthier.options import option

LARGE = 2**12  # numbers of a weight whose error may be computed from their first eight bits


@dataclass
class OneShot:
    """A method that changes one block after the other, from what goes into its layers."""

    targets: list = option([], "linear layers to compress, by name or end of name; empty: all of the blocks")
    exclude: list = option([], "linear layers that stay as they are, by name or end of name")

    quantizes: ClassVar[bool] = False
    needs_data: ClassVar[bool] = True
    propagates: ClassVar[bool] = True  # the blocks above a changed one see what it gives now

    @property
    def wants_data(self) -> bool:
        """Whether the method, with these options, must see inputs."""
        return self.needs_data

    def check(self, name: str, layer: nn.Module) -> None:
        """Refuse a layer that cannot be compressed so, before anything is changed.

        Raises:
            MethodError: it is quantised, not finite, or of a shape that does not do.
        """
        require_plain(name, layer)

    def for_layer(self, name: str) -> Self:
        """The options that hold for one layer."""
        return self

    def prepare(self, block: Block) -> None:
        """Change the block without rounding or masking anything; it computes the same after it."""

    def change(self, block: Block) -> Iterable[Record]:
        """Change the block in place; a record of each layer."""
        raise NotImplementedError


@dataclass
class LayerByLayer(OneShot):
    """A method that settles one linear layer after the other, from the Hessian of its inputs.

    Layers that read the same input are one step. Between two steps the inputs are gathered anew, so that
    later layers see what earlier ones became (true-sequential).
    """

    token_cap: float | None = option(
        8.0,
        "most that a token may count in the Hessian, in medians; null: no limit, as the papers have it",
        gt=0,
    )

    def change(self, block: Block) -> Iterator[Record]:
        for names in block.groups():
            layers = block.layers()
            hessian = Hessian(dimensions(layers[names[0]])[1], block.device, self.token_cap)
            block.observe({names[0]: hessian})
            value = hessian.value
            del hessian  # as large as the value
            for name in names:
                start = time.perf_counter()
                record = self.for_layer(name).change_layer(block, name, layers[name], value)
                record.seconds = time.perf_counter() - start
                yield record
            block.settle(names)

    def change_layer(self, block: Block, name: str, layer: nn.Module, hessian: Tensor) -> Record:
        """Change one layer in place, or put another in its place (`block.replace`).

        Args:
            hessian: of the layer's inputs, (in, in).
        """
        raise NotImplementedError


@dataclass
class Quantizer(OneShot):
    """The options of every method that rounds weights to an integer grid."""

    bits: int = option(4, "bits of a weight", ge=2, le=8)
    group_size: int | None = option(64, "neighbours along the input that share a scale; null: the row", ge=0)
    symmetric: bool = option(True, "no zero point; every format and engine loads such weights")
    activation_bits: int | None = option(None, "bits of a layer's inputs; null: floating point", ge=2, le=8)
    activation_per: str = option(
        "token", "what shares a scale of inputs", choices=("token", "tensor", "static")
    )
    layer_bits: dict = option({}, "bits of single layers, by name or end of name; the others have `bits`")

    quantizes: ClassVar[bool] = True

    @property
    def scheme(self) -> Scheme:
        per: Any = self.activation_per
        return Scheme(self.bits, self.group_size, self.symmetric, self.activation_bits, per)

    @property
    def wants_data(self) -> bool:
        return self.needs_data or (self.activation_bits is not None and self.activation_per == "static")

    def check(self, name: str, layer: nn.Module) -> None:
        super().check(name, layer)
        for bits in self.layer_bits.values():
            if not isinstance(bits, int) or not 2 <= bits <= 8:
                raise MethodError(f"layer_bits: {bits} are no bits of a weight.", fix="Give 2 to 8.")
        require_divides(self.scheme, dimensions(layer)[1], name)

    def for_layer(self, name: str) -> Self:
        """With the bits of the longest of the names in `layer_bits` that is the layer's, or the end of it."""
        fitting = [n for n in self.layer_bits if name == n or name.endswith(f".{n}")]
        bits = self.layer_bits[max(fitting, key=len)] if fitting else self.bits
        return replace(self, bits=bits, layer_bits={})

    def fit(self, layer: nn.Module, weight: Tensor, shrink: Any = 1.0) -> Grid:
        """The grid of a weight (out, in), its scale in the layer's dtype."""
        own: Any = layer.weight
        return fit(weight, self.scheme, own.dtype, shrink)

    def put(
        self,
        block: Block,
        name: str,
        layer: nn.Module,
        codes: Tensor,
        grid: Grid,
        peak: Tensor | None = None,
    ) -> None:
        """Put the quantised layer in the place of the plain one.

        Args:
            peak: largest magnitude of each input (in,), where it is known; else a static step looks for it.
        """
        scale = None
        if self.activation_bits is not None and self.activation_per == "static":
            if peak is None:
                moments = Moments(dimensions(layer)[1], block.device)
                block.observe({name: moments})
                peak = moments.peak
            scale = activation_step(peak, self.activation_bits, "tensor")
        block.replace(name, quantize_layer(layer, codes, grid, scale))

    def round_layers(self, block: Block, peaks: Mapping[str, Tensor] | None = None) -> Iterator[Record]:
        """Round every layer of the block to the nearest: the last step of methods that only prepare.

        Args:
            peaks: largest magnitude of each input of a layer, where it was seen.
        """
        for name, layer in block.layers().items():
            start, own = time.perf_counter(), self.for_layer(name)
            weight = matrix(layer)
            grid = own.fit(layer, weight)
            codes = grid.quantize(weight)
            error = weight_error(grid.dequantize(codes) - weight, weight)
            own.put(block, name, layer, codes, grid, (peaks or {}).get(name))
            seconds = time.perf_counter() - start
            yield Record(name, error, error, bits=own.bits, seconds=seconds, note="error of the weight")


@dataclass
class Pruner(OneShot):
    """The options of every method that sets weights to zero."""

    sparsity: float = option(0.5, "share of weights that become zero", ge=0, le=1)
    pattern: str | None = option(None, "zeros:group along the input, such as 2:4; in place of sparsity")

    def check(self, name: str, layer: nn.Module) -> None:
        super().check(name, layer)
        if (found := masks.parse(self.pattern)) is not None:
            masks.require_divides(dimensions(layer)[1], found[1], name)

    def mask(self, scores: Tensor, scope: str) -> Tensor:
        """The mask of the lowest scores (out, in): by the pattern, or the share within a scope."""
        found = masks.parse(self.pattern)
        return (
            masks.lowest(scores, self.sparsity, scope) if found is None else masks.in_groups(scores, *found)
        )


def prune_layer(name: str, layer: nn.Module, mask: Tensor, hessian: Tensor | None = None) -> Record:
    """Set the masked weights of a layer to zero; its record. Weights that stay are not touched.

    Args:
        mask: bool (out, in).
        hessian: of the inputs, for the error of the output, or its diagonal alone (in,); without it the
            error is the weight's.
    """
    weight = matrix(layer)
    pruned = masks.zeroed(weight, mask)
    set_matrix(layer, pruned)
    error = output_error(pruned - weight, weight, hessian)
    return Record(name, error, error, sparsity=masks.share_of_zeros(pruned))


def output_error(change: Tensor, weight: Tensor, hessian: Tensor | None) -> float:
    """Squared error of a layer's output on the calibration inputs, relative to the output's own square."""
    return weight_error(change, weight) if hessian is None else output_errors([change], weight, hessian)[0]


def output_errors(changes: Sequence[Tensor | float], weight: Tensor, hessian: Tensor) -> list[float]:
    """The same of several changes of one weight.

    Args:
        changes: (out, in), or tr(C H C^T) of a change C where it is known.
    """
    own = max(_square(weight, hessian), torch.finfo().tiny)
    return [(c if isinstance(c, float) else _square(c, hessian)) / own for c in changes]


def weight_error(change: Tensor, weight: Tensor) -> float:
    """Squared error of a weight relative to its own square."""
    return float(change.square().sum() / weight.square().sum().clamp_min(torch.finfo().tiny))


def _square(weight: Tensor, hessian: Tensor) -> float:
    """tr(W H W^T): the squared output, up to the factor of H. Of a vector as if H were diagonal."""
    if hessian.dim() == 1:
        return float((weight * hessian * weight).sum())
    here = weight.device.type == "cpu" and weight.dtype == hessian.dtype == torch.float32 and native.here()
    if here and weight.numel() >= LARGE:
        return native.square(weight.contiguous(), hessian.contiguous())
    return float((linear(weight, hessian) * weight).sum())
