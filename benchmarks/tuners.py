"""What does a training step cost under each tuning method, against PEFT's own class of it?

    python benchmarks/tuners.py [--methods krona prefix] [--rounds 3] [--steps 5]

SmolLM2-135M, 4 rows of 160 tokens, forward, backward and AdamW; the head runs on the last column only, so
that the trunk, where the tuners are, is what is measured. Where PEFT has no class of a method, the peer is
PEFT's LoRA of about as many parameters. Ours runs as in a trainer of ours: fused where it has LoRA layers.
Every measurement is a process of its own, and the sides take turns. Result: benchmarks/README.md.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

ROWS, LENGTH = 4, 160
WARM_UP = 2


def peers() -> dict[str, Callable[[], Any]]:
    """PEFT's config of the same method and size, by our name."""
    import peft

    every = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return {
        "lora": lambda: peft.LoraConfig(r=16, lora_alpha=32, **every),
        "dora": lambda: peft.LoraConfig(r=16, lora_alpha=32, use_dora=True, **every),
        "adalora": lambda: peft.AdaLoraConfig(init_r=12, total_step=1000, **every),
        "krona": lambda: peft.LoKrConfig(r=1000, alpha=1000, **every),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM"),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM"),
        "p_tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=20, task_type="CAUSAL_LM"),
    }


# They need trained adapters, an encoder, tasks of the rows, or a base in 4 bits.
OTHERS = ("fusion", "coda", "moelora", "qlora")


def names() -> list[str]:
    """The methods that add parameters; partial tuning has no tuner that could cost anything."""
    import luthier

    found = [m for m in luthier.methods("tuning") if not m.path.startswith("tuning/partial")]
    return [m.name for m in found if not m.searches and m.name not in OTHERS]


def measure(name: str, side: str, steps: int) -> dict[str, Any]:
    import torch
    from peft import get_peft_model

    import luthier
    from luthier.acceleration.fused_lora import fused

    torch.manual_seed(0)
    model, _ = luthier.load("smollm2-135m")
    ours = luthier.method(name)()
    if side == "ours":
        model = luthier.attach(model, ours)
    elif name in peers():
        model = get_peft_model(model, peers()[name]())
    else:
        model = get_peft_model(model, lora_of(luthier.attach(model, ours)))
    learns = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learns, lr=1e-4, fused=True)
    ids = torch.randint(100, 40000, (ROWS, LENGTH))
    model.train()
    seconds = []
    with fused(model) if side == "ours" else torch.enable_grad():
        for _ in range(WARM_UP + steps):
            start = time.perf_counter()
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=1, use_cache=False)
            out.logits.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - start)
    return {
        "seconds": seconds[WARM_UP:],
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "parameters": sum(p.numel() for p in learns),
    }


def lora_of(model: Any) -> Any:
    """PEFT's LoRA on all linear layers with about as many parameters; the adapter given is taken off."""
    import peft

    from luthier.tuning.attach import trainable

    wanted, _ = trainable(model)
    model.unload()
    each = 305_280  # parameters of rank 1 on all linear layers of SmolLM2-135M
    return peft.LoraConfig(r=max(1, round(wanted / each)), target_modules="all-linear", task_type="CAUSAL_LM")


def in_a_process(name: str, side: str, steps: int) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, "--one", name, side, "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} ({side}) failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        name, side = given.one
        print(json.dumps(measure(name, side, given.steps)))
        return
    print("| method | peer | parameters | peer's | s a step | peer's | speed | MiB | peer's | memory |")
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|", flush=True)
    for name in given.methods or names():
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
        for turn in range(given.rounds):
            for side in ("ours", "peer") if turn % 2 == 0 else ("peer", "ours"):
                runs[side].append(in_a_process(name, side, given.steps))
        ours, peer = (statistics.median(s for run in runs[side] for s in run["seconds"]) for side in runs)
        mine, theirs = (statistics.median(run["peak"] for run in runs[side]) / 2**20 for side in runs)
        title = "PEFT's own" if name in peers() else "LoRA"
        sizes = [f"{found[0]['parameters']:,}" for found in runs.values()]
        print(
            f"| {name} | {title} | {sizes[0]} | {sizes[1]} "
            f"| {ours:.2f} | {peer:.2f} | {peer / ours:.2f}x "
            f"| {mine:.0f} | {theirs:.0f} | {mine / theirs:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
