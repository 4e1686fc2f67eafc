"""SparseGPT: prune column by column, and let later columns make up for what earlier ones lost.

Paper: Frantar and Alistarh, 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
    arXiv 2301.00774.
Pick it when quality at a given sparsity or pattern counts most; 50 to 60 % or 2:4 without training.
Cost: as GPTQ: per layer K^2 floats, T K^2 for the Hessian of T tokens, K^3 + N K^2 for the sweep.

The sweep is GPTQ's (`luthier.compression.sweep`), with H^-1 = U^T U. What is lost by zeroing weight (i, j) at
its turn is W_ij^2 / U_jj^2. The mask is chosen as the sweep goes, on the weights as they then are: of each
`mask_block` columns the lowest share over all rows together, so that rows may differ; or with a `pattern` the
lowest of each group of a row. Errors of the pruned weights are taken from the columns to the right.

A token's squared input counts as 8 medians in H at most (`token_cap`, see gptq; the paper has no limit).
Rounding as well: `[sparsegpt, gptq]` in one pass; GPTQ keeps the zeros. The authors' code prunes one weight a
block more than asked for; ours does not. Their joint sweep rounds while it prunes; ours are two sweeps, each
with the inputs that the pruned layers below really give.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from luthier.compression import masks
from luthier.compression.block import Block
from luthier.compression.linear import matrix, set_matrix
from luthier.compression.method import LayerByLayer, Pruner, output_errors
from luthier.compression.records import Record
from luthier.compression.sweep import sweep
from luthier.options import option


@dataclass
class Config(Pruner, LayerByLayer):
    mask_block: int = option(128, "columns whose mask is chosen together", ge=1)
    damping: float = option(0.01, "share of the mean of H's diagonal that is added to it", ge=0, le=1)

    def change_layer(self, block: Block, name: str, layer: nn.Module, hessian: Tensor) -> Record:
        weight = matrix(layer)
        groups = masks.parse(self.pattern)

        def choose(columns: Tensor, diagonal: Tensor, _: Tensor) -> Tensor:
            losses = (columns / diagonal) ** 2
            if groups is not None:
                return masks.in_groups(losses, *groups)
            return masks.lowest(losses, self.sparsity)

        every = self.mask_block if groups is None else groups[1]
        swept = sweep(weight, hessian, look=choose, look_every=every, damping=self.damping)
        plain = masks.zeroed(weight, swept.weight == 0)
        set_matrix(layer, swept.weight)
        before, after = output_errors([plain - weight, swept.square], weight, hessian)
        note = "" if swept.damping == self.damping else f"damping raised to {swept.damping:g}"
        return Record(name, before, after, sparsity=masks.share_of_zeros(swept.weight), note=note)
