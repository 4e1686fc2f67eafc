"""What callbacks share that compute losses before training begins: EVA's start, AutoLoRA's search."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

Loss = Callable[[dict[str, Any]], Tensor]


class LossCallback(TrainerCallback):
    """A callback that knows the loss of a batch.

    Attributes:
        loss_of: a trainer of ours puts its objective's here, else it is the model's own.
    """

    def __init__(self, model: nn.Module):
        self.model: Any = model
        self.loss_of: Loss = self._own_loss

    def _own_loss(self, batch: dict[str, Any]) -> Tensor:
        device = self.model.device
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        loss: Tensor = self.model(**inputs).loss
        return loss
