"""The trainer that `pretrain` and `sft` share: token ids and labels in, a causal language model trained.

It stands on `transformers.Trainer` and not on TRL's `SFTTrainer` (1.16), of which nothing would be left: data
come encoded, and its loss scores every position on a CPU and adds entropy and accuracy of all of them; it
refuses an adapter on the head, sends telemetry, and puts its own pad token into the model's config.

Not computed are: padding (documents of a batch share a row), attention between documents, logits without a
label, float32 copies of adapter inputs. Each saving is tried on the model at hand before it is used, leaves
the numbers as they are, and is said in one line of proof ("before").
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

from luthier import checks
from luthier.acceleration import documents, fused_lora, fused_mlp, fused_norm, label_only
from luthier.alignment import row_inputs
from luthier.alignment.reliable import Reliable
from luthier.data.packing import PackedCollator, PaddedCollator, isolates, pack, prove_isolated
from luthier.data.tokenize import EncodeReport
from luthier.errors import CheckError
from luthier.tuning.attach import tuning_of

log = logging.getLogger("luthier.alignment")

Packing = bool | Literal["auto", "rows"]
# Rows of the batches are filled up to a multiple. torch's CPU kernels (oneDNN) build code for every new shape
# and keep it: with batches of all lengths that takes more time than the filling, and gigabytes of memory.
ROUND = 64


class FlatCollator(PackedCollator):
    """The examples of a batch one after another in one row: {input_ids, labels, position_ids} (1, seq).

    The batch is the one that padding would make, with the same gradient. `content` counts its tokens without
    the filling up to `ROUND`.
    """

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
        for example in rows:
            row["input_ids"] += example["input_ids"]
            row["labels"] += [-100, *example["labels"][1:]]  # nothing predicts a document's first token
            row["position_ids"] += range(len(example["input_ids"]))
        return {**super().__call__([row]), "content": len(row["input_ids"])}


class RowsCollator(PackedCollator):
    """Rows that are packed already; `content` counts their tokens without the filling."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {**super().__call__(rows), "content": sum(len(row["input_ids"]) for row in rows)}


class CausalTrainer(Reliable, Trainer):
    """Trains on {input_ids, labels} rows; `packed` says whether rows hold several documents."""

    def __init__(self, *args: Any, packed: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._own_loss_takes_items = self.model_accepts_loss_kwargs
        self._loss_shifts_labels = True
        self._packed = packed
        self._slow_loss: str | None = None
        self._accelerated = False

    @contextmanager
    def accelerated(self) -> Iterator[None]:
        """Inside, the model runs without what need not be computed; afterwards it is as before."""
        if self._accelerated:
            yield
            return
        with ExitStack() as stack:
            self._accelerated = True
            stack.callback(setattr, self, "_accelerated", False)
            fusion = stack.enter_context(fused_lora.fused(self.model))
            stack.enter_context(fused_mlp.fused(self.model))
            stack.enter_context(fused_norm.fused(self.model))
            self._slow_loss = self._why_slow_loss()
            slow_attention = documents.why_not(self.model) if self._packed else "rows hold one document"
            if slow_attention is None:
                stack.enter_context(documents.by_documents(self.model))
            if self._packed:
                prove_isolated(self.model)
            _say("logits only where there is a label", self._slow_loss)
            _say("attention document by document", slow_attention)
            if fusion.fused or fusion.left:
                checks.record("before", "LoRA layers fused", True, fusion.fused, detail=fusion.line())
            yield

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self.accelerated():
            return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with self.accelerated():
            return super().evaluate(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if self._slow_loss is not None or not self._accelerated or self._wants_logits(return_outputs):
            return self._dense_loss(model, inputs, return_outputs, num_items_in_batch)
        # Whoever wraps the forward for mixed precision (accelerate) has its wrapper replaced meanwhile.
        with self.accelerator.autocast(), label_only.label_only(self.model):
            loss = model(**inputs, num_items_in_batch=num_items_in_batch)["loss"]
        loss = self._over_devices(loss, num_items_in_batch)
        return (loss, CausalLMOutput(loss=loss)) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        self._loss_is_enough = prediction_loss_only
        return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)

    def _wants_logits(self, return_outputs: bool) -> bool:
        return return_outputs and not getattr(self, "_loss_is_enough", False)

    def _dense_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, items: Tensor | int | None
    ) -> Any:
        """The same loss from all logits."""
        inputs = {**inputs, "use_cache": False}
        if self._own_loss_takes_items or self.label_smoother is not None:
            return super().compute_loss(model, inputs, return_outputs, items)
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        logits, targets = outputs.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
        count = (targets != -100).sum() if items is None else torch.as_tensor(items, device=loss.device)
        loss = self._over_devices(loss / count.clamp(min=1), items)
        return (loss, outputs) if return_outputs else loss

    def _over_devices(self, loss: Tensor, items: Tensor | int | None) -> Tensor:
        """The items are those of all processes, whose gradients are then averaged: as the Trainer does."""
        if self.args.average_tokens_across_devices and items is not None:
            return loss * (self.accelerator.num_processes // self.get_tp_size())
        return loss

    def _why_slow_loss(self) -> str | None:
        if self.args.label_smoothing_factor:
            return "label smoothing needs all logits"
        if self.args.n_gpu > 1:
            return "DataParallel copies the model; start with accelerate launch"
        return label_only.why_not(self.model)


def _say(name: str, reason: str | None) -> None:
    """A saving that is not used leaves the result right: said, not refused."""
    checks.record("before", name, True, "on" if reason is None else "off", detail=reason or "")


def build(
    model: nn.Module,
    tokenizer: Any,
    dataset: Dataset,
    *,
    args: TrainingArguments,
    max_length: int,
    packing: Packing = "auto",
    eval_dataset: Dataset | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    expected_memory: int | None = None,
    encodings: Sequence[EncodeReport] = (),
) -> CausalTrainer:
    """The trainer for encoded rows {input_ids, labels}.

    Args:
        packing: see `luthier.alignment.sl.sft.Config`.

    Raises:
        CheckError: packing was asked for by name and the model does not keep documents apart.
    """
    packed = _packs(model, packing, row_inputs.names(model, dataset))
    pad = getattr(tokenizer, "pad_token_id", None)
    collator: Any = PaddedCollator(pad)
    if packed and packing == "rows":
        collator = RowsCollator(pad)
        dataset = pack(dataset, max_length)
        eval_dataset = None if eval_dataset is None else pack(eval_dataset, max_length)
    elif packed:
        collator = FlatCollator(pad, multiple_of=ROUND)
    args.remove_unused_columns = False  # all columns are the collator's; the Trainer would drop positions
    return CausalTrainer(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        callbacks=list(callbacks),
        packed=packed,
        expected_memory=expected_memory,
        encodings=encodings,
    )


def _packs(model: nn.Module, packing: Packing, inputs: list[str]) -> bool:
    """Whether documents may share a row; asked for by name, a model that mixes them is refused."""
    if packing is False:
        return False
    reason = None
    if isinstance(model, PeftModel) and getattr(tuning_of(model), "is_prompt_learning", False):
        reason = "a soft prompt stands before a row, not before each document in it"
    elif inputs:
        reason = f"{', '.join(inputs)} is of a row, not of each document in it"
    elif not isolates(model):
        reason = f"{type(model).__name__} mixes packed documents"
    if reason is None:
        return True
    if packing != "auto":
        raise CheckError(f"Rows cannot be packed: {reason}.", fix="Set packing: false.")
    checks.record("before", "packing", True, "off", detail=reason)
    return False
