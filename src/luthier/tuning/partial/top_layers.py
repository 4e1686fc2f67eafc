"""Top layers: the last k blocks and the head learn.

Paper: Houlsby et al., 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv 1902.00751 (its "variable
fine-tuning" baseline); Howard & Ruder, 2018, arXiv 1801.06146.
Pick it when data are few or memory is short, and an ordinary checkpoint must come out.
Cost: k/L of full fine-tuning's gradients and optimiser state; a step of about 1 + 2 k/L forwards instead
of 3.

    theta = (theta^1 ... theta^L), lowest first: embeddings, blocks, final norm and head
    learning: theta^l for l > L - k, and the head; nothing is computed backwards below

Frozen weights stay bit-identical. The frozen trunk runs without dropout (`trunk_dropout` turns it on), so
its output for a row is the same in every epoch: `cache_trunk` computes it once and reads it from disk
afterwards, with the same losses. A head that is tied to the embeddings stays frozen with them, unless
`untie_head` gives it a weight of its own. In an encoder-decoder the blocks run from the encoder's first
to the decoder's last.
"""

from dataclasses import dataclass

from torch import nn

from luthier.options import option
from luthier.tuning import groups
from luthier.tuning.subset import Subset


@dataclass
class Config(Subset):
    """Options of top layers."""

    k: int = option(2, "number of top blocks that learn", ge=0)
    train_final_norm: bool = option(True, "train what stands between blocks and head (final norm, pooler)")
    train_embeddings: bool = option(False, "train the embeddings too; gradients then run through all blocks")
    untie_head: bool = option(False, "give a tied head a weight of its own, which learns")
    trunk_dropout: bool = option(False, "keep dropout on in the frozen blocks")
    cache_trunk: bool = option(False, "keep the frozen blocks' output on disk and compute it once")

    def trained(self, model: nn.Module) -> set[str]:
        return groups.top_names(
            model, self.k, embeddings=self.train_embeddings, final_norm=self.train_final_norm
        )
