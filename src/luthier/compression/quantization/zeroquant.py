"""ZeroQuant: groups of weights, tokens of inputs, and blocks that learn from what they were.

Paper: Yao, Yazdani Aminabadi, Zhang, Wu, Li and He, 2022, "ZeroQuant: Efficient and Affordable Post-Training
    Quantization for Large-Scale Transformers", arXiv 2206.01861.
Pick it when weights of 4 bits and inputs of 8 are wanted and there is some text, even an unrelated one.
Cost: of one block at a time four copies of its weights, and `steps` batches through it forth and back.

A weight W (N, K) is cut into groups, an input X (T, K) into its tokens, each with its step:

    S = 2 max|W_g| / 2^b,     Q = clamp(round(W_g / S), -2^(b-1), 2^(b-1) - 1) S
    asymmetric:  S = (max - min) / 2^b,  with a code for zero

so that the largest weight of a group moves to (2^(b-1) - 1) / 2^(b-1) of itself: the steps are a little
coarser than those of `rtn`, which divides by 2^b - 1. Groups are neighbours along the input (`group_size`),
or, as in the paper, equal parts of the whole matrix in row-major order (`groups`): as many as rows are one
a row, fewer are bands of whole rows.

Layer-by-layer distillation (LKD) then trains the blocks L_k one after the other, each against itself in full
precision on the inputs h that it will have, over what is not padding:

    min |Lq_k(h) - L_k(h)|^2     over weights, biases and norms of the block, by Adam

where Lq_k computes with the rounded weights and inputs, and the gradient passes the rounding as if it were
not there. Of the weights that were found the rounded ones stay. A block that learnt nothing (its error on the
calibration data did not fall) keeps the plain rounding. `steps: 0` is ZeroQuant without LKD: no data at all.

The paper's W4/8, with 8 bits for the attention, is `layer_bits: {q_proj: 8, ...}`; its embeddings in 8 bits
are not made. Its steps are 100 of 32 rows of 128 tokens at a rate of 5e-6; with less text a higher rate does
more, and one that is too high is seen in the log (errors before and after).

Differences: the paper takes h from the blocks before in full precision, here it is what the quantised ones
give, as for every method of this pass. Its script trains each block with a run of the whole model a step and
reads padding too. Inputs are rounded as everywhere in this package, to steps of max|x| / 127.5.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from luthier.compression.block import Block
from luthier.compression.grid import Grid, Scheme, activation_step, round_activations, stored
from luthier.compression.linear import dimensions, matrix, quantize_layer
from luthier.compression.method import Quantizer, weight_error
from luthier.compression.reconstruction import Student, in_rows
from luthier.compression.records import Course, Record
from luthier.compression.statistics import Moments
from luthier.errors import MethodError
from luthier.options import option


@dataclass
class Config(Quantizer):
    activation_bits: int | None = option(8, "bits of a layer's inputs; null: floating point", ge=2, le=8)
    groups: int | None = option(None, "groups of a whole matrix, in place of group_size", ge=1)
    steps: int = option(50, "steps of distillation a block; 0: rounding alone, without data", ge=0)
    learning_rate: float = option(1e-4, "of the distillation", gt=0)
    batch_size: int = option(2, "rows of calibration data in a step", ge=1)

    @property
    def wants_data(self) -> bool:
        return self.steps > 0 or (self.activation_bits is not None and self.activation_per == "static")

    def course(self, length: int | None) -> Course | None:
        if not self.steps:
            return None
        return Course(self.steps, self.batch_size, length or 0, at_once=1)

    def check(self, name: str, layer: nn.Module) -> None:
        if self.groups is None:
            super().check(name, layer)
            return
        super(Quantizer, self).check(name, layer)
        rows, columns = dimensions(layer)
        if not _fills(self.groups, rows, columns):
            fitting = [g for g in range(1, rows + 1) if rows % g == 0]
            fitting += [rows * parts for parts in range(2, columns + 1) if columns % parts == 0]
            nearest = min(fitting, key=lambda g: abs(g - (self.groups or 0)))
            raise MethodError(
                f"groups: {self.groups} groups of {name} ({rows} x {columns}) are neither whole rows "
                "nor equal parts of rows.",
                fix=f"Write {nearest}, or leave the layer out (exclude).",
            )

    def change(self, block: Block) -> Iterator[Record]:
        start = time.perf_counter()
        layers, inputs = block.layers(), self._input_steps(block)
        bits = {name: self.for_layer(name).bits for name in layers}

        def grid(name: str, weight: Tensor) -> Grid:
            scheme = replace(self.scheme, bits=bits[name])
            own: Any = layers[name].weight
            return fit_groups(weight, scheme, self.groups, own.dtype)

        def round_input(name: str, x: Tensor) -> Tensor:
            if self.activation_bits is None:
                return x
            return round_activations(x, self.activation_bits, self.activation_per, inputs.get(name))

        weights = {name: matrix(layer) for name, layer in layers.items()}
        errors, note = None, "error of the weight"
        if self.steps:
            student = Student(
                in_rows(block, self.batch_size), lambda name, w: grid(name, w).round(w), round_input
            )
            errors = self._distil(student)
            note = "error of the block's output"
            if errors[1] < errors[0]:
                student.hand_over()
                weights = student.weights()
            else:
                errors, note = (errors[0], errors[0]), f"{note}, nothing learnt"
        for name, layer in layers.items():
            found = grid(name, weights[name])
            codes = found.quantize(weights[name])
            lost = weight_error(found.dequantize(codes) - weights[name], weights[name])
            before, after = errors or (lost, lost)
            block.replace(name, quantize_layer(layer, codes, found, inputs.get(name)))
            seconds = (time.perf_counter() - start) / len(layers)
            yield Record(name, before, after, bits=bits[name], seconds=seconds, note=note)

    def _distil(self, student: Student) -> tuple[float, float]:
        """Train a block; its error before and after."""
        targets = [student.block.run(index) for index in range(len(student.block.hidden))]
        before = student.error(targets)
        student.learn(targets, self.steps, self.learning_rate)
        return before, student.error(targets)

    def _input_steps(self, block: Block) -> dict[str, Tensor]:
        """The step of each layer's inputs where it is fixed at calibration, by name."""
        if self.activation_bits is None or self.activation_per != "static":
            return {}
        moments = {n: Moments(dimensions(m)[1], block.device) for n, m in block.layers().items()}
        block.observe(moments)
        return {n: activation_step(m.peak, self.activation_bits, "tensor") for n, m in moments.items()}


def fit_groups(weight: Tensor, scheme: Scheme, groups: int | None, dtype: torch.dtype) -> Grid:
    """The grid of a weight (out, in) whose steps are 2 max / 2^b.

    Args:
        groups: of the whole matrix, in row-major order; None: those of the scheme.
        dtype: in which the scale is stored.
    """
    rows, columns = weight.shape
    if groups is not None:
        scheme = replace(scheme, group_size=rows * columns // groups if groups > rows else None)
        shape = (min(groups, rows), max(1, groups // rows), -1)
    else:
        shape = (1, 1, -1) if scheme.group_size == 0 else (rows, -1, scheme.width(columns))
    grouped = weight.float().reshape(shape)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    spread = 2 * torch.maximum(-low, high) if scheme.symmetric else high - low
    scale = stored(spread / 2**scheme.bits, dtype)
    zero = torch.zeros_like(scale, dtype=torch.int8)
    if not scheme.symmetric:
        codes = scheme.low - torch.round(low / scale.float())
        zero = codes.clamp(scheme.low, scheme.high).to(torch.int8)
    if groups is not None:
        again = rows // scale.shape[0]
        scale, zero = scale.repeat_interleave(again, 0), zero.repeat_interleave(again, 0)
    return Grid(scheme, scale, zero)


def _fills(groups: int, rows: int, columns: int) -> bool:
    """Whether so many equal groups of a matrix are whole rows, or equal parts of rows."""
    return rows % groups == 0 or (groups % rows == 0 and columns % (groups // rows) == 0)
