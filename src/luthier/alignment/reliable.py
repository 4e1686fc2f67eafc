"""What every trainer of ours does beyond `transformers.Trainer`, as a mixin before it in the bases.

- one mean over all labelled items of an accumulated batch, in training and in evaluation;
- checkpoints that appear whole or not at all, without pickled arguments;
- a loss or gradient that is not finite never reaches the weights;
- Ctrl-C ends with a checkpoint; proofs at the first step; tokens of content are counted;
- the tuning method's parameter groups and callbacks.
"""

import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

from luthier.alignment import checkpoints, row_inputs
from luthier.alignment.callbacks import CleanInterrupt, Divergence, ShowProgress, StepOneProof
from luthier.data.tokenize import EncodeReport
from luthier.errors import DataError, LuthierError, TrainingError
from luthier.evaluation.perplexity import context_length
from luthier.models import structure
from luthier.terminal import no_bars
from luthier.tuning import hooks

log = logging.getLogger("luthier.alignment")

DRAFT = ".saving"  # checkpoints are written in here and moved out when they are whole


class Reliable:
    """Mixin for `transformers.Trainer` and its subclasses.

    Attributes:
        step_loss: loss of the last step, over its whole accumulated batch.
        interrupted: Ctrl-C ended the last `train()`.
        encodings: what became of the rows, of the training data and of the held-out data if there are some.

    Args:
        expected_memory: estimate of the peak in bytes, for the proof at step 1.
    """

    # Our losses are sums over the accumulated batch divided by its number of items.
    loss_is_scaled_for_ga = True

    def __init__(
        self: Any,
        *args: Any,
        expected_memory: int | None = None,
        encodings: Sequence[EncodeReport] = (),
        **kwargs: Any,
    ):
        with _settings_refused("trainer"):
            super().__init__(*args, **kwargs)
        self.encodings = encodings
        if extra := row_inputs.names(self.model, self.train_dataset):
            self.data_collator = row_inputs.WithRowInputs(self.data_collator, extra)
        _require_room(self.model, encodings)
        self.step_loss = math.nan
        self._step_parts: list[Tensor] = []
        self._eval_sums: list[Tensor] | None = None
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # makes the Trainer count the labelled items
        self._proof, self._interrupt = StepOneProof(expected_memory), CleanInterrupt()
        self._progress = ShowProgress(self)
        for callback in (self._proof, Divergence(self), self._interrupt, self._progress):
            self.add_callback(callback)
        for callback in hooks.callbacks(self.model):
            if hasattr(callback, "loss_of"):
                callback.loss_of = self.batch_loss
            self.add_callback(callback)

    # Training ----------------------------------------------------------------------------------------

    def train(self: Any, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As `transformers.Trainer.train`.

        Raises:
            TrainingError: the loss is not finite or explodes, or there is no checkpoint to resume from, or
                it is damaged.
            KeyboardInterrupt: Ctrl-C, after a checkpoint was written.
        """
        folder = Path(self.args.output_dir)
        if self.args.should_save:
            shutil.rmtree(folder / DRAFT, ignore_errors=True)
        last = get_last_checkpoint(str(folder)) if resume_from_checkpoint is True else resume_from_checkpoint
        if resume_from_checkpoint is True and last is None:
            raise TrainingError(
                f"There is no checkpoint in {folder} to resume from.", fix="Start without resuming."
            )
        if last:
            checkpoints.require_whole(Path(last))
        self._started = time.perf_counter()
        self._step_parts = []
        try:
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)  # type: ignore[misc]
        finally:
            for callback in (self._proof, self._interrupt, self._progress):
                callback.close()
        if self.interrupted:
            log.warning("Stopped at step %d. %s", self.state.global_step, self.last_good())
            raise KeyboardInterrupt
        return output

    def batch_loss(self: Any, batch: dict[str, Any]) -> Tensor:
        """The objective's loss on a batch of the collator's, for a method that trains beside the trainer."""
        content_tokens(batch)
        with self.compute_loss_context_manager():
            loss: Tensor = self.compute_loss(self.model, self._prepare_inputs(batch))
        return loss

    @property
    def interrupted(self) -> bool:
        return self._interrupt.interrupted

    @property
    def tokens_before(self) -> int:
        """Tokens of content that were trained before the last `train()`, which resumed."""
        return self._progress.first

    def create_optimizer(self: Any, model: nn.Module | None = None) -> torch.optim.Optimizer:
        with _settings_refused("optimiser"):
            if self.optimizer is None:
                groups = hooks.parameter_groups(self.model, self.args)
                if groups is not None:
                    kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
                    self.optimizer = kind(groups, **options)
            optimizer: torch.optim.Optimizer = super().create_optimizer(model)  # type: ignore[misc]
        return optimizer

    def create_scheduler(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _settings_refused("schedule of the learning rate"):
            return super().create_scheduler(*args, **kwargs)  # type: ignore[misc]

    def get_batch_samples(self: Any, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        batches, items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        if self.args.include_num_input_tokens_seen == "no":
            count = torch.tensor(sum(content_tokens(batch) for batch in batches), device=self.args.device)
            self._new_tokens = int(self.accelerator.gather(count).sum())
        return batches, items

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self._step_parts.append(loss)
        if self.accelerator.sync_gradients:
            self.step_loss = self._whole_step_loss()
            self.state.num_input_tokens_seen += self.__dict__.pop("_new_tokens", 0)
        return loss

    def _whole_step_loss(self: Any) -> float:
        """The step's loss; raises TrainingError where it is not finite (its gradients are dropped)."""
        value = float(torch.stack(self._step_parts).sum())
        self._step_parts = []
        if not math.isfinite(value) and not self.args.fp16:
            raise TrainingError(
                f"The loss of step {self.state.global_step + 1} is {value}; the weights did not take it up. "
                + self.last_good(),
                fix=f"Lower learning_rate (now {self.args.learning_rate:g}), or train in float32.",
            )
        return value

    def _get_grad_norm(self: Any, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
        if norm is not None and not math.isfinite(float(norm)) and not self.args.fp16:
            raise TrainingError(
                f"The gradient of step {self.state.global_step + 1} is not finite; the weights did not take "
                f"it up. {self.last_good()}",
                fix=f"Lower learning_rate (now {self.args.learning_rate:g}), or train in float32.",
            )
        return norm

    def log(self: Any, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["num_tokens"] = self.state.num_input_tokens_seen
        super().log(logs, start_time)  # type: ignore[misc]

    # Evaluation --------------------------------------------------------------------------------------

    def evaluation_loop(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, but the loss is the mean over all labelled items, not over batches."""
        self._eval_sums = []
        try:
            output = super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
            if self._eval_sums:
                total, count = torch.stack(self._eval_sums).sum(0)
                prefix = kwargs.get("metric_key_prefix", "eval")
                output.metrics[f"{prefix}_loss"] = float(total / count.clamp(min=1))
        finally:
            self._eval_sums = None
        return output

    def prediction_step(
        self: Any, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        items = self._labelled_items(inputs)  # before: the Trainer may take the labels out
        result = super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if items is not None and result[0] is not None and self._eval_sums is not None:
            # A batch without any label has a mean of 0 items, which is no number.
            total = torch.where(items > 0, result[0].double() * items, 0.0)
            self._eval_sums.append(self.accelerator.reduce(torch.stack([total, items.double()])))
        return result

    def _labelled_items(self: Any, inputs: dict[str, Any]) -> Tensor | None:
        """Number of labels in a batch, without those that nothing predicts."""
        labels = inputs.get("labels")
        if labels is None:
            return None
        return ((labels[..., 1:] if self._loss_shifts_labels else labels) != -100).sum().to(self.args.device)

    # Checkpoints -------------------------------------------------------------------------------------

    def last_good(self: Any) -> str:
        """Where the last checkpoint lies, in a sentence."""
        last = get_last_checkpoint(self.args.output_dir) if os.path.isdir(self.args.output_dir) else None
        return f"The last checkpoint is {last}." if last else "There is no checkpoint yet."

    def forget_checkpoints(self: Any, after: int) -> None:
        """Remove the checkpoints of steps later than `after`, whose weights have gone astray."""
        if not self.args.should_save:
            return
        for folder in Path(self.args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            number = folder.name.rpartition("-")[2]
            if number.isdigit() and int(number) > after:
                shutil.rmtree(folder)

    def _get_output_dir(self: Any, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)  # type: ignore[misc]
        return os.path.join(folder, DRAFT) if getattr(self, "_drafting", False) else folder

    def _save_checkpoint(self: Any, model: nn.Module, trial: Any) -> None:
        """Written beside its place and moved there when whole: a kill leaves the checkpoint before."""
        folder = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        draft, final = folder / DRAFT / name, folder / name
        if self.args.should_save:
            shutil.rmtree(folder / DRAFT, ignore_errors=True)
        self._drafting = True
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self._drafting = False
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        best = self.state.best_global_step
        if best:  # the path that was noted while drafting
            place = folder / f"{PREFIX_CHECKPOINT_DIR}-{best}"
            self.state.best_model_checkpoint = str(place) if place == final or place.is_dir() else None
            self.state.save_to_json(str(draft / TRAINER_STATE_NAME))
        checkpoints.seal(draft)
        _sync(draft)
        if final.exists():  # of an earlier run that was resumed from before it
            shutil.rmtree(final)
        os.replace(draft, final)
        _sync(folder, files=False)
        shutil.rmtree(folder / DRAFT, ignore_errors=True)
        rotate_checkpoints(
            output_dir=str(folder),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )

    def _save(self: Any, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with no_bars():
            super()._save(output_dir, state_dict)  # type: ignore[misc]
        # Pickled arguments: never read back, and code to whoever loads them.
        (Path(output_dir or self.args.output_dir) / TRAINING_ARGS_NAME).unlink(missing_ok=True)


@contextmanager
def _settings_refused(what: str) -> Iterator[None]:
    """What torch or transformers refuse here are training arguments that only they can judge."""
    try:
        yield
    except LuthierError:
        raise
    except (ValueError, TypeError, ImportError, ConnectionError) as error:
        reason = str(error).rstrip(". ")
        raise TrainingError(f"The {what} cannot be made of these training arguments: {reason}.") from error


def _require_room(model: nn.Module, encodings: Sequence[EncodeReport]) -> None:
    """Examples longer than the model's context end in a traceback, or are learnt at positions never seen."""
    room = context_length(model)
    longest = max((min(r.longest, r.max_length or r.longest) for r in encodings), default=0)
    if room is not None and longest > room:
        name = type(structure.base(model)).__name__
        raise DataError(
            f"The longest example has {longest} tokens, and {name} takes {room}.",
            fix=f"Write max_length: {room} in the objective: longer examples are then cut, and counted.",
        )


def content_tokens(batch: dict[str, Any]) -> int:
    """Tokens of a batch that are content, not filling; a collator may have counted them (`content`)."""
    if "content" in batch:
        return int(batch.pop("content"))
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    return int(batch["input_ids"].numel())


def _sync(folder: Path, *, files: bool = True) -> None:
    """Have the disk hold what was written: a rename may otherwise outlive the contents in a power cut."""
    paths = [path for path in folder.rglob("*") if path.is_file()] if files else []
    for path in [*paths, folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
