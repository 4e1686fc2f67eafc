"""Quantised linear layers on torch's integer kernels for CPUs; each gives what the plain layer gives.

They serve where the kernels of `luthier.acceleration.native_linear` do not run.

A layer with codes q, scales s and zeros z stands for the weight W = (q - z) s. Which kernel can multiply by
it without making W:

    Int4Linear     up to 4 bits, in groups      y = x W^T in bfloat16, codes packed two to a byte
    Int8Linear     up to 8 bits, symmetric,     y = (x q^T) s in bfloat16
                   one scale a row
    IntegerLinear  inputs rounded too, one      y = (p q^T - z sum(p)) t s, with p the codes of the input and
                   scale a row                  t its step; p q^T in whole numbers, exact

The first two read fewer bytes, which is what one token waits for. For many tokens at once the products
themselves are the work, and there they lose to a plain bfloat16 product: above a number of rows that was
measured (`MANY_4`, `MANY_8`), the weight is made a part at a time and multiplied as usual. They round their
inputs to bfloat16 whatever the model's dtype (2^-9 of each number, less than what rounding the weight did):
in float32 these kernels are 3 to 20 times slower than no quantisation at all. `IntegerLinear` is exact in
every dtype.

What needs a gradient, lies on another device or is empty takes the plain path of `QuantizedLinear`.
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from luthier.compression.grid import Grid, activation_step
from luthier.compression.linear import QuantizedLinear

GROUPS = (256, 128, 64, 32)  # that the int4 kernel takes
MANY_4, MANY_8 = 64, 16  # rows of input at which both ways took as long (Zen 4, one thread)
PART = 1 << 20  # numbers of the weight that are made at once: 2 MB, which the processor's cache holds
BF16 = torch.bfloat16
_int4_pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
_int4_product = torch.ops.aten._weight_int4pack_mm_for_cpu


class FastLinear(QuantizedLinear):
    """Base: the attributes of the plain layer, whose forward is taken where `product` cannot be.

    Attributes:
        joint: a layer that holds this one's rows and its siblings', which read the same input (see `join`).
            It is no submodule: whoever walks through the model finds each weight once.
        passed_over: better kernels that this machine does not run, and why; empty if none.
    """

    title: str  # in the log
    passed_over = ""
    multiple = 1  # a part of a joint layer has such a number of rows, or twice it, ...
    joint: "FastLinear | None"

    def __init__(self, layer: QuantizedLinear):
        zero = torch.zeros_like(layer.scale, dtype=torch.int8) if layer.zero is None else layer.zero
        super().__init__(
            layer.codes, Grid(layer.scheme, layer.scale, zero), dtype=layer.dtype,
            input_scale=layer.input_scale, transposed=layer.transposed,
        )  # fmt: skip
        self.bias = layer.bias
        self._belong(None)
        self.train(layer.training)

    @staticmethod
    def why_not(layer: QuantizedLinear) -> str | None:
        """Why the kernel does not take this layer, or None."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """x (rows, in) to (rows, out), in x's dtype and without the bias."""
        raise NotImplementedError

    def adopt(self, joint: "FastLinear", start: int) -> None:
        """Hold nothing of one's own: views of the joint layer's tensors, from row `start` on."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        learns = input.requires_grad and torch.is_grad_enabled()
        if learns or input.device.type != "cpu" or self.scale.device.type != "cpu" or not input.numel():
            return super().forward(input)
        y = self.product(input.reshape(-1, self.in_features))
        if self.bias is not None:
            y = y + self.bias
        return y.view(*input.shape[:-1], self.out_features)

    def _belong(self, joint: "FastLinear | None") -> None:
        object.__setattr__(self, "joint", joint)

    def _apply(self, fn, recurse=True):
        self._belong(None)  # the tensors may become others, no longer views of the joint layer's
        return super()._apply(fn, recurse)

    def plain(self) -> QuantizedLinear:
        """The layer that this one was made from."""
        made = QuantizedLinear(
            self.codes.clone(), self.grid, dtype=self.dtype, input_scale=self.input_scale,
            transposed=self.transposed,
        )  # fmt: skip
        made.bias = self.bias
        return made.train(self.training)


class Int4Linear(FastLinear):
    """Up to 4 bits. The codes are held packed, and unpacked when asked for."""

    title = "int4 of torch"
    packed: Tensor  # uint8 (out, in / 2), in an order that the kernel chooses
    scale_shift: Tensor  # bfloat16 (groups, out, 2): W = (code - 8) scale + shift, codes from 0 to 15

    def __init__(self, layer: QuantizedLinear):
        super().__init__(layer)
        codes = self._buffers.pop("codes")
        assert codes is not None
        self.register_buffer("packed", _int4_pack(codes.int() + 8, 1), persistent=False)
        self.block = _block(self.packed, codes)
        self.multiple = self.block
        self.group = _group(layer)
        spread = self.in_features // self.group // self.scale.shape[1]
        scale = self.scale.to(BF16).expand(self.out_features, -1).repeat_interleave(spread, 1)
        shift = torch.zeros_like(scale)
        if self.zero is not None:
            shift = -self.zero.expand(self.out_features, -1).repeat_interleave(spread, 1) * scale
        both = torch.stack((scale.T, shift.T), -1).contiguous()
        self.register_buffer("scale_shift", both, persistent=False)

    @staticmethod
    def why_not(layer: QuantizedLinear) -> str | None:
        if layer.scheme.bits > 4:
            return f"{layer.scheme.bits} bits"
        if not _group(layer):
            return f"groups of {layer.in_features // layer.scale.shape[1]}, not a multiple of 32"
        return f"{layer.out_features} outputs, not a multiple of 16" if layer.out_features % 16 else None

    @property
    def codes(self) -> Tensor:
        """int8 (out, in), signed."""
        return _unpack(self.packed, self.block).T.contiguous()

    def product(self, x: Tensor) -> Tensor:
        halved = self.quantize_input(x).to(BF16)
        if len(x) < MANY_4:
            return _int4_product(halved.contiguous(), self.packed, self.group, self.scale_shift).to(x.dtype)
        wide = _many_dtype(x)
        y = x.new_empty(len(x), self.out_features)
        rows = max(PART // self.in_features // self.block, 1) * self.block
        for start in range(0, self.out_features, rows):
            end = min(start + rows, self.out_features)
            scale, shift = (t.contiguous() for t in self.scale_shift[:, None, start:end].to(wide).unbind(-1))
            codes = _unpack(self.packed[start:end], self.block).to(wide)  # (in, rows)
            weight = codes.view(-1, self.group, end - start).mul_(scale)  # scale (groups, 1, rows)
            if self.zero is not None:
                weight.add_(shift)
            y[:, start:end] = halved.to(wide) @ weight.view(self.in_features, end - start)
        return y

    def adopt(self, joint: FastLinear, start: int) -> None:
        assert isinstance(joint, Int4Linear)
        self.packed = joint.packed[start : start + self.out_features]
        self._belong(joint)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}codes"] = self.codes

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.scale_shift = self.scale_shift.to(BF16)  # the kernel's, whatever the model is cast to
        return self


class Int8Linear(FastLinear):
    """Up to 8 bits with one scale a row."""

    title = "int8 of torch"
    scale_row: Tensor  # bfloat16 (out,)

    def __init__(self, layer: QuantizedLinear):
        super().__init__(layer)
        row = self.scale.to(BF16).expand(self.out_features, 1)[:, 0].contiguous()
        self.register_buffer("scale_row", row, persistent=False)

    @staticmethod
    def why_not(layer: QuantizedLinear) -> str | None:
        if layer.scale.shape[1] != 1:
            return f"{layer.scheme.bits} bits in groups"
        if layer.zero is not None:
            return "a zero point"
        if layer.in_features % 16:  # torch's kernel reads beyond the end of the row
            return f"{layer.in_features} inputs, not a multiple of 16"
        return None

    def product(self, x: Tensor) -> Tensor:
        halved = self.quantize_input(x).to(BF16)
        if len(x) < MANY_8:
            return torch._weight_int8pack_mm(halved.contiguous(), self.codes, self.scale_row).to(x.dtype)
        wide = _many_dtype(x)
        halved = halved.to(wide)
        parts = self.codes.split(max(4 * PART // self.in_features, 1))
        y = torch.cat([functional.linear(halved, part.to(wide)) for part in parts], 1)
        return y.mul_(self.scale_row).to(x.dtype)

    def adopt(self, joint: FastLinear, start: int) -> None:
        self.codes = joint.codes[start : start + self.out_features]
        self._belong(joint)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.scale_row = self.scale_row.to(BF16)
        return self


class IntegerLinear(FastLinear):
    """Weights and inputs in up to 8 bits: a product of whole numbers."""

    title = "whole numbers of torch"
    LONGEST: ClassVar[int] = 1 << 17  # inputs whose sum of products of 8 bits fits in 32 bits

    @staticmethod
    def why_not(layer: QuantizedLinear) -> str | None:
        bits = layer.scheme.activation_bits
        if bits is None or bits > 8:
            return "inputs in floating point"
        if layer.scale.shape[1] != 1:
            return "groups that each have a scale"
        if layer.in_features > IntegerLinear.LONGEST:
            return f"{layer.in_features} inputs, whose sum overflows"
        return None

    def product(self, x: Tensor) -> Tensor:
        bits = self.scheme.activation_bits
        assert bits is not None
        step = self.input_scale
        values = x.float()
        if step is None:
            step = activation_step(values, bits, self.scheme.activation_per)
        values = torch.div(values, step.float()).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        codes = values.to(torch.int8)
        sums = torch._int_mm(codes, self.codes.T)  # int32 (rows, out)
        if self.zero is not None:
            sums -= codes.sum(1, dtype=torch.int32, keepdim=True) * self.zero.T
        return sums.float().mul_(step.float()).mul_(self.scale.T.float()).to(x.dtype)

    def adopt(self, joint: FastLinear, start: int) -> None:
        self.codes = joint.codes[start : start + self.out_features]
        self._belong(joint)


def _group(layer: QuantizedLinear) -> int:
    """The largest group of the int4 kernel that divides the layer's, 0 if none does."""
    width, left = divmod(layer.in_features, layer.scale.shape[1])
    return 0 if left else next((g for g in GROUPS if width % g == 0), 0)


def _many_dtype(x: Tensor) -> torch.dtype:
    """In which many rows are multiplied: float32 where the CPU is slower in bfloat16."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return BF16 if fast or x.dtype == BF16 else torch.float32


def _unpack(packed: Tensor, block: int) -> Tensor:
    """Codes as int8 (in, out) from what the int4 kernel packed, uint8 (out, in / 2).

    The kernel takes blocks of rows. In a block each input has its bytes together; a byte has row j and row
    j + block / 2. In the rest, where the rows do not fill a block, a byte has two neighbours.
    """
    rows, inputs = len(packed), 2 * packed.shape[1]
    full = rows // block * block
    bytes_ = (
        packed[:full].view(-1, inputs, block // 2).transpose(0, 1).contiguous()
    )  # (in, blocks, block / 2)
    codes = torch.cat((bytes_ & 15, bytes_ >> 4), -1).view(inputs, full)
    if full == rows:
        return codes.view(torch.int8).sub_(8)
    bytes_ = packed[full:].reshape(inputs, (rows - full) // 2)
    rest = torch.stack((bytes_ & 15, bytes_ >> 4), -1).view(inputs, rows - full)
    return torch.cat((codes, rest), 1).view(torch.int8).sub_(8)


def _block(packed: Tensor, codes: Tensor) -> int:
    """Rows of a block of the int4 kernel, which depends on the CPU: the size that gives back the codes.

    Raises:
        NotImplementedError: none does.
    """
    for block in (64, 32, 16):
        if torch.equal(_unpack(packed, block).T, codes):
            return block
    raise NotImplementedError("torch packs the codes in an order that is not known here")
