"""Linear probe: only the head learns, on features that stay as they are.

Paper: Alain & Bengio, 2016, "Understanding intermediate layers using linear classifier probes", arXiv
1610.01644.
Pick it when data are very few, as a measure of what the features already hold, or before fine-tuning
(head first).
Cost: the head's parameters; one forward pass of the data in total with `cache_trunk`.

    y = W f(x) + b,    f frozen,    W (labels, hidden) and b (labels) learn

With cross-entropy the problem is convex. A language model's head is often its embeddings: it can only be
probed with `untie_head`, which gives it a weight of its own. The frozen trunk runs without dropout;
dropout between the features and the head, where the model has it, stays.
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
    """Options of the linear probe."""

    untie_head: bool = option(False, "give a tied head a weight of its own")
    trunk_dropout: bool = option(False, "keep dropout on in the frozen blocks")
    cache_trunk: bool = option(False, "keep the frozen blocks' output on disk and compute it once")

    def trained(self, model: nn.Module) -> set[str]:
        head = structure.head(model)
        if head is None:
            raise MethodError(
                f"{type(model).__name__} has no head to train.",
                fix="Load the model for a task: task: classification.",
            )
        if groups.head_is_tied(model):
            raise MethodError(
                f"The head of {type(model).__name__} is its embeddings: training it alone is not possible.",
                fix="Write untie_head: true, or take top_layers.",
            )
        return groups.module_names(model, head)
