"""Is the plan's estimate of memory right? Plans, then trains SmolLM2-135M: LoRA and full, two batch sizes.

    python benchmarks/memory_estimate.py [--data FILE.jsonl] [--steps 4]

Each training runs in a fresh process; measured is the peak of its resident memory from start to end, loading
included. Without --data it makes the ticket mails of the quickstart. Result: benchmarks/README.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from luthier.recipe.planner import plan
from luthier.recipe.schema import Recipe

CASES = [("lora", 4), ("lora", 16), ("full", 4), ("full", 16)]


def recipe(data: str, method: str, batch: int, steps: int, output: str) -> Recipe:
    training = {"per_device_train_batch_size": batch, "max_steps": steps, "save_strategy": "no"}
    stage = {"tune": {"data": data, "method": method, "training": training}}
    return Recipe.model_validate(
        {"name": f"{method}-{batch}", "model": "smollm2-135m", "output": output, "stages": [stage]}
    )


def train(data: str, method: str, batch: int, steps: int) -> dict[str, float]:
    """In a process of its own: what `luthier run` does with a tune stage."""
    import luthier
    from luthier.recipe.schema import is_adapter
    from luthier.resources import PeakMemory

    stage = recipe(data, method, batch, steps, ".").stages[0]
    with PeakMemory() as memory, tempfile.TemporaryDirectory() as folder:
        model, tokenizer = luthier.load("smollm2-135m", train=not is_adapter(stage.method))
        trainer = luthier.trainer(
            "sft",
            model,
            stage.data,
            method=stage.method.method(),
            tokenizer=tokenizer,
            args=stage.training | {"output_dir": folder},
        )
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    return {"peak": memory.bytes, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--train", nargs=2, metavar=("METHOD", "BATCH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        print(json.dumps(train(args.data, args.train[0], int(args.train[1]), args.steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.data is None:
            from luthier.data import tickets

            tickets.write(folder, seed=0)
            args.data = str(Path(folder, "train.jsonl"))
        print("| method | batch | estimated | measured | off | time estimated | measured |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for method, batch in CASES:
            planned = plan(recipe(args.data, method, batch, args.steps, folder)).stages[0]
            done = subprocess.run(
                [sys.executable, __file__, "--data", args.data, "--steps", str(args.steps), "--train", method,
                 str(batch)],
                stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            measured = json.loads(done.stdout.splitlines()[-1])
            guess = planned.memory.total
            off = guess / measured["peak"] - 1
            print(f"| {method} | {batch} | {guess / 1e9:.2f} GB | {measured['peak'] / 1e9:.2f} GB", end=" | ")
            print(f"{off:+.0%} | {planned.seconds:.0f} s | {measured['seconds']:.0f} s |", flush=True)
            print(f"  {planned.detail}; {planned.memory}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
