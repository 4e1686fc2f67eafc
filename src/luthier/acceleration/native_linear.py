"""Quantised linear layers on our own kernels (`kernels.cpp`), for CPUs with AVX-512 BF16 and VNNI.

    NativeLinear         up to 8 bits, in groups or not,    y = x W^T in bfloat16, codes packed to 4 or 8
                         with a zero point or not           bits
    NativeIntegerLinear  inputs rounded too, one scale      y = (p q^T - z sum(p)) t s, in whole numbers
                         a row

At one token they wait for the memory, where torch's int4 kernel waits for its arithmetic. Several tokens
share a weight's unpacking, and many share its expansion to bfloat16, which stays in the processor's cache:
there the product is as fast as a plain one. `NativeIntegerLinear` rounds the inputs in the same call.
"""

import torch
from torch import Tensor
from torch.nn import functional

from luthier.acceleration import native
from luthier.acceleration.fast_linear import BF16, FastLinear, IntegerLinear
from luthier.compression.grid import activation_step
from luthier.compression.linear import QuantizedLinear

LANES = 16
BLOCK = 32  # rows: two tiles, which the kernels take at once


class TiledLinear(FastLinear):
    """Base: codes packed into tiles of 16 rows, whose lanes are 32 bits of a row."""

    multiple = BLOCK
    align = 1  # inputs that the kernel takes at once
    packed: Tensor  # int32 (tiles, inputs / a lane's, lane)

    def __init__(self, layer: QuantizedLinear):
        native.library()
        super().__init__(layer)
        codes = self._buffers.pop("codes")
        assert codes is not None
        self.register_buffer("packed", pack(codes, self.shifts(), self.align), persistent=False)
        self._arrange()

    def shifts(self) -> list[int]:
        """How far up its lane each of a lane's codes stands."""
        raise NotImplementedError

    def _arrange(self) -> None:
        """Set the buffers that the kernel reads beside the codes, from scale and zero point."""
        raise NotImplementedError

    @property
    def codes(self) -> Tensor:
        """int8 (out, in), signed."""
        return unpack(self.packed, self.shifts())[: self.out_features, : self.in_features].contiguous()

    def adopt(self, joint: FastLinear, start: int) -> None:
        assert isinstance(joint, TiledLinear)
        self.packed = joint.packed[start // LANES :][: len(self.packed)]
        self._belong(joint)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}codes"] = self.codes

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._arrange()  # in the kernel's dtypes, whatever the model is cast to
        return self


class NativeLinear(TiledLinear):
    """Up to 8 bits; the inputs in bfloat16."""

    title = "our kernel"
    scales: Tensor  # bfloat16 (tiles, groups, lane)
    zeros: Tensor | None  # likewise

    @staticmethod
    def why_not(layer: QuantizedLinear) -> str | None:
        width, left = divmod(layer.in_features, layer.scale.shape[1])
        step = 8 if layer.scheme.bits <= 4 else 4
        return f"groups of {width}, not a multiple of {step}" if left or width % step else None

    @property
    def held_bits(self) -> int:
        return 4 if self.scheme.bits <= 4 else 8

    def shifts(self) -> list[int]:
        # Even inputs in the lower half of the lane, odd ones in the upper: a pair comes down in one shift.
        return [self.held_bits * (i // 2) + 16 * (i % 2) for i in range(32 // self.held_bits)]

    def _arrange(self) -> None:
        self.title = f"int{self.held_bits} on our kernel"
        self.register_buffer("scales", self._tiled(self.scale), persistent=False)
        self.register_buffer("zeros", None if self.zero is None else self._tiled(self.zero), persistent=False)

    def _tiled(self, values: Tensor) -> Tensor:
        rows = values.to(BF16).expand(self.out_features, -1)
        padded = functional.pad(rows, (0, 0, 0, -self.out_features % BLOCK))
        return padded.view(-1, LANES, rows.shape[1]).transpose(1, 2).contiguous()

    def product(self, x: Tensor) -> Tensor:
        halved = self.quantize_input(x).to(BF16).contiguous()
        y = x.new_empty(len(x), self.out_features, dtype=BF16 if x.dtype == BF16 else torch.float32)
        native.library().luthier_weight_only(
            self.held_bits, self.packed.data_ptr(), self.scales.data_ptr(),
            None if self.zeros is None else self.zeros.data_ptr(), halved.data_ptr(), y.data_ptr(),
            y.dtype != BF16, len(x), self.in_features, self.out_features,
            self.in_features // self.scales.shape[1], torch.get_num_threads(),
        )  # fmt: skip
        return y.to(x.dtype)


class NativeIntegerLinear(TiledLinear):
    """Weights and inputs in up to 8 bits: a product of whole numbers."""

    title = "whole numbers on our kernel"
    align = 16
    offsets: Tensor  # int32 (out,)
    scales: Tensor  # float32 (out,)

    @staticmethod
    def why_not(layer: QuantizedLinear) -> str | None:
        return IntegerLinear.why_not(layer)

    def shifts(self) -> list[int]:
        return [0, 8, 16, 24]

    def _arrange(self) -> None:
        offsets = torch.full_like(self.scale, 128, dtype=torch.int32)
        if self.zero is not None:
            offsets = offsets + self.zero
        for name, values in (("offsets", offsets), ("scales", self.scale.float())):
            rows = values.expand(self.out_features, 1)[:, 0].contiguous()
            self.register_buffer(name, rows, persistent=False)

    def product(self, x: Tensor) -> Tensor:
        bits, per, step = self.scheme.activation_bits, self.scheme.activation_per, 0.0
        assert bits is not None
        read = (x if x.dtype == BF16 else x.float()).contiguous()
        if self.input_scale is not None:
            step = float(self.input_scale)
        elif per != "token":
            step = float(activation_step(read.float(), bits, per))
        y = torch.empty(len(x), self.out_features, dtype=read.dtype)
        native.library().luthier_whole_numbers(
            self.packed.data_ptr(), self.offsets.data_ptr(), self.scales.data_ptr(), read.data_ptr(),
            y.data_ptr(), y.dtype != BF16, step, bits, len(x), self.in_features,
            self.packed.shape[1] * 4, self.out_features, torch.get_num_threads(),
        )  # fmt: skip
        return y.to(x.dtype)


def pack(codes: Tensor, shifts: list[int], align: int) -> Tensor:
    """int32 (tiles, inputs / a lane's, lane) from int8 (out, in); what is padded has code 0."""
    count = len(shifts)
    half = 1 << 32 // count - 1
    rows, inputs = codes.shape
    padded = functional.pad(codes, (0, -inputs % align, 0, -rows % BLOCK))
    lanes = padded.view(-1, LANES, padded.shape[1] // count, count)
    words = torch.zeros(lanes.shape[:3], dtype=torch.int32, device=codes.device)
    for i, shift in enumerate(shifts):
        words |= (lanes[..., i].int() + half) << shift
    return words.transpose(1, 2).contiguous()


def unpack(packed: Tensor, shifts: list[int]) -> Tensor:
    """int8 (out, in), padding included, from what `pack` made."""
    bits = 32 // len(shifts)
    words = packed.transpose(1, 2)
    codes = [((words >> shift & (1 << bits) - 1) - (1 << bits - 1)).to(torch.int8) for shift in shifts]
    return torch.stack(codes, -1).reshape(-1, packed.shape[1] * len(shifts))
