"""The training inside a compression method: some steps on calibration data, with a callback that prunes.

Every sequence of the batches is seen once before any is seen again, in an order that the seed decides. The
trainer is that of every tuning here (`luthier.alignment.reliable`): its proofs, progress and refusals hold.
"""

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from luthier.alignment.defaults import arguments
from luthier.alignment.reliable import Reliable
from luthier.compression.gradients import Batch, sequences
from luthier.data.packing import PaddedCollator
from luthier.errors import MethodError
from luthier.models import structure

Loss = Callable[[Tensor, Any, dict[str, Tensor]], Tensor]


class ShortTrainer(Reliable, Trainer):
    """A trainer whose loss a method may add to: `loss_with(loss, outputs, inputs)` gives the whole."""

    loss_with: Loss | None = None
    _loss_shifts_labels = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        inputs = {**inputs, "use_cache": False}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.loss_with is not None:
            loss = self.loss_with(loss, outputs, inputs)
        return (loss, outputs) if return_outputs else loss


def tune(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    callbacks: Sequence[TrainerCallback],
    parameter_groups: list[dict[str, Any]] | None = None,
    loss_with: Loss | None = None,
    **training: Any,
) -> None:
    """Train what requires grad in the model for `steps` steps; linear warm-up over a tenth and linear decay.

    Args:
        batches: {input_ids, attention_mask} (batch, seq), labels where they are not the tokens.
        parameter_groups: those of an AdamW, where rates differ.
        loss_with: see `ShortTrainer`.
        training: further training arguments.

    Raises:
        DataError: there are no data. TrainingError: the loss is not finite, or explodes.
        MethodError: the model is none of language.
    """
    require_causal(model)
    rows = [
        {key: value[0].tolist() for key, value in row.items()}
        for row in sequences(structure.base(model), batches)
    ]
    config: Any = structure.base(model).config
    caches = config.use_cache
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder,
            "max_steps": steps,
            "per_device_train_batch_size": min(batch_size, len(rows)),
            "learning_rate": learning_rate,
            "seed": seed,
            "warmup_steps": 0.1,
            "save_strategy": "no",
            "remove_unused_columns": False,
        }
        trainer = ShortTrainer(
            model=model,
            args=arguments(settings | training, model),
            data_collator=PaddedCollator(getattr(config, "pad_token_id", None)),
            train_dataset=rows,
            callbacks=list(callbacks),
            optimizers=(torch.optim.AdamW(parameter_groups) if parameter_groups else None, None),
        )
        trainer.loss_with = loss_with
        try:
            trainer.train()
        finally:
            config.use_cache = caches  # the Trainer turns it off
            # Else its forward would go on computing under autocast.
            trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            model.zero_grad(set_to_none=True)
            model.eval()


def require_causal(model: nn.Module) -> None:
    """Raise MethodError where the model is not one that learns from its own tokens."""
    if structure.task(model) != "causal":
        raise MethodError(
            f"{type(structure.base(model)).__name__} is not a causal language model: this method tunes one.",
            fix="Load it with task: causal, or take llm_pruner and tune it afterwards.",
        )


def cubic(progress: float, first: float, last: float) -> float:
    """From `first` at progress 0 to `last` at 1, fast at the start (Zhu and Gupta, 2017)."""
    progress = min(max(progress, 0.0), 1.0)
    return last + (first - last) * (1 - progress) ** 3


def progress_at(step: int, steps: int, before: float, after: float) -> float:
    """How far a schedule is at `step` that stands still for shares of the steps at both ends."""
    start, end = before * steps, (1 - after) * steps
    if step >= end:
        return 1.0
    return max(0.0, (step - start) / (end - start))
