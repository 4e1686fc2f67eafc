"""What the partial methods share: a config that names the weights which learn, and what follows from that."""

import logging
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainingArguments

from luthier.errors import MethodError
from luthier.tuning import groups, trunk_cache

log = logging.getLogger("luthier.tuning")


class Subset:
    """Base of the configs that train some of the model's own weights; nothing is added to the model.

    A subclass is a dataclass that offers `trained(model)`, and any of the switches below as options.
    """

    untie_head: bool = False  # of a subclass that does not offer it
    trunk_dropout: bool = False
    cache_trunk: bool = False

    def trained(self, model: nn.Module) -> set[str]:
        """Names of the parameters that learn at the start."""
        raise NotImplementedError

    def apply(self, model: nn.Module) -> nn.Module:
        """Freeze and open the model's weights; returns the model.

        Raises:
            MethodError: the model lacks what is to be trained, or the options exclude each other.
        """
        if self.cache_trunk and self.trunk_dropout:
            raise MethodError(
                "cache_trunk needs a trunk that computes the same every time, but trunk_dropout is on.",
                fix="Remove one of the two.",
            )
        groups.release_trunk(model)
        if groups.head_is_tied(model):
            if self.untie_head:
                groups.untie_head(model)
            else:
                log.info("the head is tied to the embeddings and learns only with them")
        groups.set_trainable(model, self.trained(model))
        if not self.trunk_dropout:
            groups.still_trunk(model)
        return model

    def callbacks(self, model: nn.Module) -> list[TrainerCallback]:
        found: list[TrainerCallback] = [groups.UpdatesSurvive()]
        if self.cache_trunk:
            found.append(trunk_cache.CacheTrunk(model))
        return found

    def parameter_groups(self, model: nn.Module, args: TrainingArguments) -> list[dict[str, Any]] | None:
        return None
