"""GPTQ: round column by column, and let later columns make up for what earlier ones lost.

Paper: Frantar, Ashkboos, Hoefler and Alistarh, 2022, "GPTQ: Accurate Post-Training Quantization for
    Generative Pre-trained Transformers", arXiv 2210.17323.
Pick it when weights must be 3 or 4 bits and there is some calibration text (8,000 tokens and more).
Cost: for K inputs and N outputs K^2 floats, T K^2 for the Hessian of T tokens, K^3 + N K^2 for the sweep.

For the weight W (N, K) of a layer with inputs X (K, T) the codes that minimise |W X - Q X|^2 are looked for.
With H = 2/T X X^T, damped, and H^-1 = U^T U, column j is rounded to q_j, and its error e_j = (w_j - q_j) /
U_jj is taken from all later columns: W_:,k -= e_j U_jk (`luthier.compression.sweep`).

    act_order   columns in the order of falling H_jj: where the inputs are large, errors are made up for best.
                The grids are then fitted once, on the weight as it was, so that groups stay neighbours and
                the saved format is the usual one ("static groups").
    otherwise   the grid of a group is fitted when its first column is reached, on the columns as they are.

    token_cap   a token's squared input counts as 8 medians at most. The paper has no such limit (null). In
                many models the first token of a text is huge in a few channels: in the layer that ends this
                it would decide H alone, and all other tokens would pay.

Zeros of a pruned layer (a quarter of it or more) stay zeros. The authors' code fits the grids of groups that
are smaller than its block on columns that miss the block's updates; ours sees them. Its symmetric grid leaves
rows without negative values unsigned; ours does not.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from luthier.compression.block import Block
from luthier.compression.grid import Grid
from luthier.compression.linear import matrix
from luthier.compression.masks import SPARSE, share_of_zeros
from luthier.compression.method import LayerByLayer, Quantizer, output_errors
from luthier.compression.records import Record
from luthier.compression.sweep import Rounding, Swept, sweep
from luthier.options import option


@dataclass
class Config(Quantizer, LayerByLayer):
    act_order: bool = option(True, "settle the columns with the largest inputs first")
    damping: float = option(0.01, "share of the mean of H's diagonal that is added to it", ge=0, le=1)
    block_size: int = option(128, "columns between two updates of all later ones: speed, not result", ge=1)

    def change_layer(self, block: Block, name: str, layer: nn.Module, hessian: Tensor) -> Record:
        weight = matrix(layer)
        nearest = self.fit(layer, weight)
        grid, swept = self.settle(layer, weight, nearest, hessian)
        before, after = output_errors([nearest.round(weight) - weight, swept.square], weight, hessian)
        self.put(block, name, layer, grid.quantize(swept.weight), grid)
        note = "" if swept.damping == self.damping else f"damping raised to {swept.damping:g}"
        return Record(name, before, after, bits=self.bits, note=note)

    def settle(self, layer: nn.Module, weight: Tensor, nearest: Grid, hessian: Tensor) -> tuple[Grid, Swept]:
        """The grid and the swept weight (out, in)."""
        zeros = weight == 0 if share_of_zeros(weight) >= SPARSE else None
        options: dict[str, Any] = {"damping": self.damping, "block": self.block_size}
        if self.act_order or not self.group_size:
            order = hessian.diagonal().argsort(descending=True, stable=True) if self.act_order else None
            look = None if zeros is None else lambda _, __, indices: zeros[:, indices]
            return nearest, sweep(
                weight, hessian, settle=Rounding(nearest), look=look, order=order, **options
            )
        return self._with_moving_grids(layer, weight, hessian, zeros, options)

    def _with_moving_grids(
        self, layer: nn.Module, weight: Tensor, hessian: Tensor, zeros: Tensor | None, options: dict
    ) -> tuple[Grid, Swept]:
        grids: list[Grid] = []

        def fit_group(columns: Tensor, _: Tensor, indices: Tensor) -> Tensor | None:
            kept = columns if zeros is None else columns.masked_fill(zeros[:, indices], 0)
            grids.append(self.fit(layer, kept))
            return None if zeros is None else zeros[:, indices]

        def settle(column: Tensor, _: int) -> Tensor:
            return grids[-1].round(column[:, None])[:, 0]

        width = self.scheme.width(weight.shape[1])
        swept = sweep(weight, hessian, settle=settle, look=fit_group, look_every=width, **options)
        scale, zero = torch.cat([g.scale for g in grids], 1), torch.cat([g.zero for g in grids], 1)
        return Grid(self.scheme, scale, zero), swept
