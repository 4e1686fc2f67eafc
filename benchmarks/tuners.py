"""What does a training step cost under each tuning method, against PEFT's own class of it?

    python benchmarks/tuners.py [--methods krona prefix] [--steps 5]
    OMP_NUM_THREADS=1 python benchmarks/tuners.py --clock processor        # beside other work
    python benchmarks/tuners.py --methods krona --profile --side ours      # where its time goes

SmolLM2-135M, 4 rows of 160 tokens, forward, backward and AdamW; the head runs on the last column only, so
that the trunk, where the tuners are, is what is measured. Where PEFT has no class of a method, the peer is
PEFT's LoRA of about as many parameters. Ours runs as in a trainer of ours: fused where it has LoRA layers.

Seconds are the median of steps that the two sides take in turn, so that what else the machine does meets
both. Each side is a process of its own, forked from one that has loaded the model; its memory is the peak of
that process. 17 methods take about 15 minutes on two cores. Result: benchmarks/README.md.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

ROWS, LENGTH = 4, 160
WARM_UP = 1
STEPS = 5
EACH = 305_280  # parameters of a LoRA of rank 1 on all linear layers of SmolLM2-135M


def peers() -> dict[str, Callable[[], Any]]:
    """PEFT's config of the same method and size, by our name."""
    import peft

    every = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    prompt = {"num_virtual_tokens": 20, "task_type": "CAUSAL_LM"}
    projection = {"prefix_projection": True, "encoder_hidden_size": 512}
    lstm = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 288}
    return {
        "lora": lambda: peft.LoraConfig(r=16, lora_alpha=32, **every),
        "lora_fa": lambda: peft.LoraConfig(r=16, lora_alpha=32, **every),
        "dora": lambda: peft.LoraConfig(r=16, lora_alpha=32, use_dora=True, **every),
        "adalora": lambda: peft.AdaLoraConfig(init_r=12, total_step=1000, **every),
        "krona": lambda: peft.LoKrConfig(r=1000, alpha=1000, **every),
        "prefix": lambda: peft.PrefixTuningConfig(**prompt, **projection),
        "p_tuning_v2": lambda: peft.PrefixTuningConfig(**prompt),
        "prompt": lambda: peft.PromptTuningConfig(**prompt),
        "p_tuning": lambda: peft.PromptEncoderConfig(**prompt, **lstm),
    }


# They need trained adapters, an encoder, tasks of the rows, or a base in 4 bits.
OTHERS = ("fusion", "coda", "moelora", "qlora")


def names() -> list[str]:
    """The methods that add parameters; partial tuning has no tuner that could cost anything."""
    import luthier

    found = [m for m in luthier.methods("tuning") if not m.path.startswith("tuning/partial")]
    return [m.name for m in found if not m.searches and m.name not in OTHERS]


class Side:
    """One method on the model, by us or by PEFT, and its steps.

    Args:
        size: parameters that PEFT's LoRA shall have, where PEFT has no class of the method.
    """

    def __init__(self, base: Any, name: str, ours: bool, size: int):
        import torch
        from peft import LoraConfig, get_peft_model

        import luthier
        from luthier.acceleration.fused_lora import fuse

        torch.manual_seed(0)
        if ours:
            self.model = luthier.attach(base, luthier.method(name)())
            fuse(self.model)
        elif name in peers():
            self.model = get_peft_model(base, peers()[name]())
        else:
            rank = max(1, round(size / EACH))
            self.model = get_peft_model(base, LoraConfig(r=rank, target_modules="all-linear"))
        self.optimizer = self._optimizer(name == "lora_fa" and not ours)
        self.hooks = self._hooks() if ours else None
        self.schedule = None if ours or name != "adalora" else self.model.base_model.update_and_allocate
        self.parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.ids = torch.randint(100, 40000, (ROWS, LENGTH))
        self.model.train()

    def _optimizer(self, lora_fa: bool) -> Any:
        import torch
        from peft.optimizers import create_lorafa_optimizer

        if lora_fa:
            return create_lorafa_optimizer(self.model, r=16, lora_alpha=32, lr=1e-4)
        learns = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.AdamW(learns, lr=1e-4, fused=True)

    def _hooks(self) -> Any:
        """The method's callbacks, called as a trainer calls them."""
        from transformers import TrainerControl, TrainerState, TrainingArguments
        from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

        from luthier.tuning import hooks

        wanted = [DefaultFlowCallback(), *hooks.callbacks(self.model)]
        found = CallbackHandler(wanted, self.model, None, self.optimizer, None)
        found.train_dataloader = None
        place = (TrainingArguments(use_cpu=True, report_to="none"), TrainerState(max_steps=1000))
        found.on_train_begin(*place, TrainerControl())
        return lambda event: getattr(found, event)(*place, TrainerControl())

    def step(self, clock: Callable[[], float] = time.perf_counter) -> float:
        """Its seconds."""
        import torch

        start = clock()
        if self.hooks:
            self.hooks("on_step_begin")
        out = self.model(
            input_ids=self.ids,
            attention_mask=torch.ones_like(self.ids),
            logits_to_keep=1,
            use_cache=False,
        )
        out.logits.float().square().mean().backward()
        if self.hooks:
            self.hooks("on_pre_optimizer_step")
        self.optimizer.step()
        if self.hooks:
            self.hooks("on_optimizer_step")
        if self.schedule:
            self.schedule(0)
        self.optimizer.zero_grad()
        return clock() - start


def serve(pipe: Connection, base: Any, given: Any, name: str, ours: bool, size: int) -> None:
    """A side in a process of its own: it tells its parameters, then the seconds and the peak of each step."""
    import torch

    torch.set_num_threads(given.threads)
    clock = time.process_time if given.clock == "processor" else time.perf_counter
    side = Side(base, name, ours, size)
    pipe.send(side.parameters)
    while pipe.recv():
        seconds = side.step(clock)
        pipe.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def compare(base: Any, given: Any, name: str) -> str:
    """A row of the table."""
    context = multiprocessing.get_context("fork")  # what is loaded is there, and nobody imports it again
    pipes: list[Connection] = []
    processes = []
    sizes: list[int] = []
    for ours in (True, False):
        mine, its = context.Pipe()
        process = context.Process(target=serve, args=(its, base, given, name, ours, sum(sizes)), daemon=True)
        process.start()
        its.close()
        pipes.append(mine)
        processes.append(process)
        sizes.append(mine.recv())
    seconds: list[list[float]] = [[], []]
    peaks = [0, 0]
    for turn in range(WARM_UP + given.steps):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            pipes[side].send(True)
            took, peaks[side] = pipes[side].recv()
            seconds[side].append(took)
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(False)
        process.join()
    ours, peer = (statistics.median(side[WARM_UP:]) for side in seconds)
    title = "PEFT's own" if name in peers() else "LoRA"
    return (
        f"| {name} | {title} | {sizes[0]:,} | {sizes[1]:,} "
        f"| {ours:.2f} | {peer:.2f} | {peer / ours:.2f}x "
        f"| {peaks[0] / 2**20:.0f} | {peaks[1] / 2**20:.0f} | {peaks[0] / peaks[1]:.2f} |"
    )


def profile(base: Any, name: str, ours: bool, steps: int) -> None:
    """Where the processor's time of one side goes, operator by operator."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    side = Side(base, name, ours, 0)
    side.step()
    with recorded(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            side.step()
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    parser.add_argument("--profile", action="store_true", help="show where the time of one method goes")
    parser.add_argument("--side", choices=("ours", "peer"), default="ours", help="of --profile")
    given = parser.parse_args()
    import torch

    import luthier

    given.threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    base, _ = luthier.load("smollm2-135m")
    if given.profile:
        profile(base, (given.methods or ["lora"])[0], given.side == "ours", given.steps)
        return
    print("| method | peer | parameters | peer's | s a step | peer's | speed | MiB | peer's | memory |")
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|", flush=True)
    for name in given.methods or names():
        print(compare(base, given, name), flush=True)


if __name__ == "__main__":
    main()
