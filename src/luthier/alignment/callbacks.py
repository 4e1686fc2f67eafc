"""What watches every training: proofs at the first step, divergence, Ctrl-C, progress."""

import logging
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Collection, Mapping
from functools import partial
from types import FrameType
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from rich.progress import Progress
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from luthier import checks
from luthier.errors import TrainingError
from luthier.models.bits import digest
from luthier.resources import PeakMemory, show_bytes
from luthier.terminal import progress

log = logging.getLogger("luthier.alignment")

WINDOW = 10  # steps whose mean is held against the lowest such mean
EXPLODED, MARGIN = 3.0, 2.0
MEMORY_MARGIN = 1.3


class StepOneProof(TrainerCallback):
    """Proves on the first step of a run that the right weights learn, and what it costs in memory.

    - every gradient is finite, and each module that learns gets one that is not zero;
    - frozen weights are what they were, bit by bit, after the first step and at the end;
    - the peak of memory, against the estimate where there is one.

    Args:
        expected_memory: estimate of the peak in bytes.
    """

    def __init__(self, expected_memory: int | None = None):
        self.expected_memory = expected_memory
        self._frozen: dict[str, str] = {}
        self._seen: dict[str, float] = {}
        self._watches: list[Any] = []
        self._memory: PeakMemory | None = None
        self._due = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._due = True
        if not (args.fp16 or args.deepspeed or args.fsdp):
            self._watch(kwargs["model"])
        # Sharded weights are not whole in one process.
        self._frozen = {} if args.fsdp or args.deepspeed else frozen_bits(kwargs["model"])
        self._memory = PeakMemory()
        self._memory.__enter__()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Under a gradient scaler the first steps may overflow by design; sharded gradients are not whole.
        if self._due and not (args.fp16 or args.deepspeed or args.fsdp):
            prove_gradients(kwargs["model"], self._seen)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._due:
            self._due = False
            self._unwatch()
            self._prove_frozen(kwargs["model"], "step1")
            self._prove_memory()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._prove_frozen(kwargs["model"], "end")
        self.close()

    def close(self) -> None:
        """End the measurement of memory, also where training was cut off."""
        if self._memory is not None:
            self._memory.__exit__()
            self._memory = None
        self._frozen = {}
        self._unwatch()

    def _watch(self, model: nn.Module) -> None:
        """Note each gradient's largest entry as it comes: a fused backward frees them before the step."""

        def note(name: str, parameter: nn.Parameter) -> None:
            assert parameter.grad is not None
            self._seen[name] = parameter.grad.detach().abs().max().item()

        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.numel():
                self._watches.append(parameter.register_post_accumulate_grad_hook(partial(note, name)))

    def _unwatch(self) -> None:
        for handle in self._watches:
            handle.remove()
        self._watches, self._seen = [], {}

    def _prove_frozen(self, model: nn.Module, when: checks.When) -> None:
        if not self._frozen:
            return
        # What a method opened meanwhile (gradual unfreezing) may move.
        still = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        now = frozen_bits(model, still & set(self._frozen))
        moved = [name for name, bits in now.items() if bits != self._frozen[name]]
        checks.record(
            when,
            "frozen weights unchanged",
            not moved,
            len(moved),
            0,
            f"of {len(now)}" + (f", such as {moved[0]}" if moved else ""),
            fix="Something other than the optimiser writes into them; report this as a fault of the method.",
        )

    def _prove_memory(self) -> None:
        assert self._memory is not None
        peak = self._memory.now()
        peak = self._memory.cuda_bytes or peak
        limit = None
        detail = show_bytes(peak)
        if self.expected_memory is not None:
            # A notebook's process may hold more than all of this before; that is not the training's.
            others = max(0, self._memory.start_bytes - self.expected_memory)
            limit = int(MEMORY_MARGIN * self.expected_memory) + others
            detail += f", {show_bytes(self.expected_memory)} were expected"
        checks.record(
            "step1", "peak memory", limit is None or peak <= limit, peak, limit, detail, refuse=False
        )


def frozen_bits(model: nn.Module, names: Collection[str] | None = None) -> dict[str, str]:
    """A hash of the bits of each frozen parameter, or of those in `names`."""
    return {
        name: digest(parameter)
        for name, parameter in model.named_parameters()
        if (not parameter.requires_grad if names is None else name in names)
    }


def prove_gradients(model: nn.Module, seen: Mapping[str, float] | None = None) -> None:
    """Finite gradients everywhere, and one that is not zero in every module that learns.

    A module is a tuner's layer or the owner of a parameter: of a LoRA pair one half starts at zero, so the
    other half's first gradient is zero. So may be that of what the layers of a tuner share, which stands
    beside them. Experts that no token was sent to have none.

    Args:
        seen: the largest entry of gradients that are freed already, by the parameter's name.

    Raises:
        CheckError: a gradient is not finite, or a module gets none.
    """
    tuners = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    layers = set(tuners)
    beside = {id(p) for m in model.modules() if isinstance(m, BaseTuner) for p in _beside_layers(m)}
    largest: dict[str, float] = {}
    infinite = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        gradient = parameter.grad
        size = (seen or {}).get(name, 0.0) if gradient is None else gradient.detach().abs().max().item()
        if not math.isfinite(size):
            infinite.append(name)
        if id(parameter) in beside:
            continue
        owner = _owner(name, layers)
        largest[owner] = max(largest.get(owner, 0.0), size)
    checks.record(
        "step1",
        "gradients finite",
        not infinite,
        len(infinite),
        0,
        f"such as {infinite[0]}" if infinite else "",
        fix="Lower the learning rate, or train in float32 (dtype: float32).",
    )
    still = [name for name, size in largest.items() if size == 0 and "expert" not in name]
    checks.record(
        "step1",
        "gradients where declared",
        not still,
        len(largest) - len(still),
        len(largest),
        f"none for {still[0]}" if still else "modules that learn",
        fix="These weights are not used by the loss: leave them out of what learns.",
    )


def _beside_layers(tuner: BaseTuner) -> list[nn.Parameter]:
    """The parameters of a tuner that stand in none of the model's layers."""
    return [p for name, part in tuner.named_children() if name != "model" for p in part.parameters()]


def _owner(name: str, tuners: set[str]) -> str:
    """The innermost tuner's layer that a parameter belongs to, or else its module."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        if path in tuners:
            return path
    return name.rpartition(".")[0]


class Divergence(TrainerCallback):
    """Stops a run whose loss explodes, with the checkpoints from before.

    The mean loss of ten steps is held against the lowest such mean so far, and against the loss of the first
    step, which is the untrained model's: beyond three times that and two nats, nothing useful is left. A loss
    or gradient that is not finite stops the run at once, before the weights take it up
    (`luthier.alignment.reliable`).
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.recent: deque[float] = deque(maxlen=WINDOW)
        self.lowest = math.inf

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.recent.append(self.trainer.step_loss)
        if state.global_step == 1:
            self.lowest = self.trainer.step_loss
        if len(self.recent) < WINDOW:
            return
        mean = sum(self.recent) / WINDOW
        if mean > EXPLODED * self.lowest + MARGIN:
            start = state.global_step - WINDOW
            self.trainer.forget_checkpoints(after=start)
            raise TrainingError(
                f"The loss exploded: {mean:.3g} on average over steps {start + 1} to "
                f"{state.global_step}, after {self.lowest:.3g}. {self.trainer.last_good()}",
                fix=f"Lower learning_rate (now {args.learning_rate:g}), or warm up longer.",
            )
        self.lowest = min(self.lowest, mean)


class CleanInterrupt(TrainerCallback):
    """Ctrl-C ends the run after the step at hand, with a checkpoint; a second one ends it at once."""

    def __init__(self) -> None:
        self.interrupted = False
        self._before: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.interrupted = False
        if threading.current_thread() is threading.main_thread():  # only there can signals be handled
            self._before = signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        log.warning("Stopping after this step, with a checkpoint. Press Ctrl-C again to stop at once.")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def close(self) -> None:
        """Give Ctrl-C back to whoever had it."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None


class ShowProgress(TrainerCallback):
    """A bar with loss, tokens of content per second and time left; without a terminal, lines in the log."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.bar: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.start, self.first = time.perf_counter(), state.num_input_tokens_seen
        bar = progress("training")
        if state.is_world_process_zero and not bar.disable:
            self.bar = bar
            self.bar.start()
            self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step, note="")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step, note=self._note(state))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is None and state.is_world_process_zero and "loss" in state.log_history[-1]:
            log.info("step %d of %d: %s", state.global_step, state.max_steps, self._note(state))

    def _note(self, state: TrainerState) -> str:
        seconds = time.perf_counter() - self.start
        speed = (state.num_input_tokens_seen - self.first) / max(seconds, 1e-9)
        return f"loss {self.trainer.step_loss:.4f}, {speed:,.0f} tokens/s"

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
