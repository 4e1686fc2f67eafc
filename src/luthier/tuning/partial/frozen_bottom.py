"""Frozen bottom: all but the lowest n blocks learn.

Paper: Howard & Ruder, 2018, "Universal Language Model Fine-tuning for Text Classification", arXiv
1801.06146; Lee et al., 2019, "What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning", arXiv
1911.03090.
Pick it when full fine-tuning nearly fits: the lowest blocks are the most general and lose least by staying.
Cost: (L - n)/L of full fine-tuning's gradients and optimiser state.

    theta = (theta^1 ... theta^L), lowest first; frozen: embeddings and the first n blocks; learning: the rest

The complement of `top_layers`, counted from below: n here is L - k there. The same holds: frozen weights
stay bit-identical, the trunk runs without dropout, `cache_trunk` computes it once, a tied head stays with
the embeddings.
"""

from dataclasses import dataclass

from torch import nn

from luthier.errors import MethodError
from luthier.models import structure
from luthier.options import option
from luthier.tuning import groups
from luthier.tuning.subset import Subset


@dataclass
class Config(Subset):
    """Options of frozen bottom."""

    n: int = option(4, "number of lowest blocks that stay frozen", ge=0)
    train_embeddings: bool = option(False, "train the embeddings too; gradients then run through all blocks")
    untie_head: bool = option(False, "give a tied head a weight of its own, which learns")
    trunk_dropout: bool = option(False, "keep dropout on in the frozen blocks")
    cache_trunk: bool = option(False, "keep the frozen blocks' output on disk and compute it once")

    def trained(self, model: nn.Module) -> set[str]:
        depth = len(structure.blocks(model))
        if self.n > depth:
            raise MethodError(
                f"n: {self.n} blocks cannot stay frozen, {type(model).__name__} has {depth}.",
                fix=f"Write a number between 0 and {depth}.",
            )
        return groups.top_names(model, depth - self.n, embeddings=self.train_embeddings, final_norm=True)
