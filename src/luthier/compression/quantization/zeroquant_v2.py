"""ZeroQuant-V2: fine groups of weights, and a low-rank matrix that makes up for their rounding (LoRC).

Paper: Yao, Wu, Li, Youn and He, 2023, "ZeroQuant-V2: Exploring Post-training Quantization in LLMs from
    Comprehensive Study to Low Rank Compensation", arXiv 2303.08302.
Pick it when 2 to 4 bits lose too much and a few percent more memory are at hand, but no time to train.
Cost: r (K + N) numbers more for each layer, in 8 bits; one SVD of each layer, K N min(K, N).

A weight W (N, K) is rounded to Q, group after group of `group_size` inputs, to the nearest or by GPTQ. What
the rounding took away is approximated by a product of two skinny matrices:

    E = W - Q = U S V^T,     B = U_r S_r^1/2  (N, r),     A = S_r^1/2 V_r^T  (r, K)
    y = x Q^T + (x A^T) B^T,      |E - B A|^2 = sum_{i > r} s_i^2

No other matrix of rank r leaves less (Eckart and Young): the weight's error never grows, and falls with r. A
and B are held in 8 bits with one scale a row, `factor_bits: null` keeps them as they are. The gain is large
at few bits and wide groups; it is small where the error is all but white noise.

Nothing is trained, and no data is needed but for GPTQ (`token_cap` and `damping` are its options). With
`activation_bits` both parts see the same rounded input. The paper's other half, training layers or blocks
against their former outputs (ZQ-Local, ZQ-Global), is `zeroquant`. The low-rank part is a LoRA adapter of
scaling 1: `luthier.compression.compensated.separate` takes it off as one. Saved as a whole, the layer is
stored as the plain weight that it stands for.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from luthier.compression.block import Block
from luthier.compression.compensated import CompensatedLinear, compensate, low_rank
from luthier.compression.grid import Grid
from luthier.compression.linear import QuantizedLinear, matrix
from luthier.compression.method import LayerByLayer, Quantizer, output_error
from luthier.compression.records import Record
from luthier.compression.sweep import Rounding, sweep
from luthier.options import option


@dataclass
class Config(Quantizer, LayerByLayer):
    rank: int = option(8, "of the matrix that makes up for the rounding; 0: none", ge=0)
    factor_bits: int | None = option(8, "bits of its factors; null: as the model's weights", choices=(8,))
    base: str = option("nearest", "how the weights are rounded before that", choices=("nearest", "gptq"))
    damping: float = option(0.01, "of GPTQ's Hessian: share of the mean of its diagonal", ge=0, le=1)

    needs_data: ClassVar[bool] = False

    @property
    def wants_data(self) -> bool:
        return self.base == "gptq" or super().wants_data

    def change(self, block: Block) -> Iterator[Record]:
        if self.base == "gptq":
            yield from super().change(block)
            return
        for name, layer in block.layers().items():
            start = time.perf_counter()
            record = self.for_layer(name).change_layer(block, name, layer, None)
            record.seconds = time.perf_counter() - start
            yield record

    def change_layer(self, block: Block, name: str, layer: nn.Module, hessian: Tensor | None) -> Record:
        weight = matrix(layer)
        grid = self.fit(layer, weight)
        codes = grid.quantize(self._rounded(weight, grid, hessian))
        self.put(block, name, layer, codes, grid)
        note = "error of the weight" if hessian is None else ""
        lost = weight - grid.dequantize(codes)
        before = output_error(lost, weight, hessian)
        rank = min(self.rank, *weight.shape)
        if not rank:
            return Record(name, before, before, bits=self.bits, note=note)
        placed = block.model.get_submodule(name)
        assert isinstance(placed, QuantizedLinear)
        made = compensate(placed, *low_rank(lost, rank), whole=self.factor_bits is None)
        block.replace(name, made)
        after = output_error(made.weight.float() - weight, weight, hessian)
        return Record(name, before, after, bits=self.bits + _bits_more(made, weight), note=note)

    def _rounded(self, weight: Tensor, grid: Grid, hessian: Tensor | None) -> Tensor:
        """The weight (out, in) that is to become codes."""
        if hessian is None:
            return weight
        order = hessian.diagonal().argsort(descending=True, stable=True)
        return sweep(weight, hessian, settle=Rounding(grid), order=order, damping=self.damping).weight


def _bits_more(layer: CompensatedLinear, weight: Tensor) -> float:
    """What the factors of a layer take for each of its weights."""
    parts = [layer.down, layer.up, layer.down_scale, layer.up_scale]
    return 8 * sum(p.numel() * p.element_size() for p in parts if p is not None) / weight.numel()
