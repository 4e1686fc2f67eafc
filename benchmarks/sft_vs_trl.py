"""SFT with LoRA on SmolLM2-135M: tokens of real content per second and peak memory, ours against TRL + PEFT.

    python benchmarks/sft_vs_trl.py [--data tickets gsm8k] [--rounds 5] [--steps 8] [--batch 8]

Every measurement is a process of its own: same examples in the same order, same batch, same LoRA, same
optimiser. The sides take turns round by round, so that other load on the machine hits all of them; a side's
figure is the median over all its steps but the first two. Peak memory is that of the whole process. That both
sides train the same is shown by their losses and their count of tokens.

    trl                       SFTTrainer as it comes: float32 weights under bfloat16 autocast, checkpointing
    trl bf16                  the same with weights loaded in bfloat16
    trl bf16 no-checkpoint    and without gradient checkpointing
    luthier equal             bfloat16 weights, no checkpointing, padded batches
    luthier                   as it comes
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIDES = ("trl", "trl bf16", "trl bf16 no-checkpoint", "luthier equal", "luthier")
PAIRS = [
    ("luthier equal", "trl bf16 no-checkpoint", 0.95, None),
    ("luthier", "trl", 1.5, 0.7),
    ("luthier", "trl bf16", 1.5, 0.7),
    ("luthier", "trl bf16 no-checkpoint", 1.5, 0.7),
]  # ours, theirs, least speed, most memory
WARM_UP = 2
GSM8K = Path(__file__).parents[1] / ".." / "shared" / "data" / "gsm8k_train.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["tickets", "gsm8k"], choices=["tickets", "gsm8k"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--gsm8k", type=Path, default=GSM8K, help="the training file of GSM8K, as JSON lines")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options.data[0], options)))
        return
    for data in options.data:
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for turn in range(options.rounds):
            for place in range(len(SIDES)):
                side = SIDES[(place + turn) % len(SIDES)]
                found[side].append(in_a_process(side, data, options))
        report(data, found)


def in_a_process(side: str, data: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [
        sys.executable, "-W", "ignore", __file__, "--side", side, "--data", data,
        "--steps", str(options.steps),
        "--batch", str(options.batch), "--gsm8k", str(options.gsm8k),
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def measure(side: str, data: str, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        rows = examples(data, options, (WARM_UP + options.steps) * options.batch, Path(folder))
        arguments = {
            "output_dir": folder, "max_steps": WARM_UP + options.steps, "learning_rate": 2e-4,
            "use_cpu": True,
            "per_device_train_batch_size": options.batch, "save_strategy": "no", "logging_steps": 1,
            "report_to": "none", "disable_tqdm": True, "optim": "adamw_torch_fused", "seed": 0,
        }  # fmt: skip
        trainer = (with_trl if side.startswith("trl") else with_luthier)(side, rows, arguments)
        clock = make_clock()
        trainer.add_callback(clock)
        trainer.train()
    tokens = trainer.state.num_input_tokens_seen or trainer._total_train_tokens
    return {
        "seconds": clock.seconds[WARM_UP:],
        "tokens": tokens / len(clock.seconds),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def make_clock() -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds.append(time.perf_counter() - self.start)

    return Clock()


def examples(data: str, options: argparse.Namespace, count: int, folder: Path) -> list[dict[str, Any]]:
    """Rows of prompt and completion, both lists of turns."""
    if data == "tickets":
        from luthier.data import tickets

        path, _ = tickets.write(folder, train=count, test=1)
        chats = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
        return [{"prompt": turns[:-1], "completion": turns[-1:]} for turns in chats]
    lines = options.gsm8k.read_text(encoding="utf-8").splitlines()[:count]
    return [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in map(json.loads, lines)
    ]


def lora() -> dict[str, Any]:
    return {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def with_trl(side: str, rows: list[dict[str, Any]], arguments: dict[str, Any]) -> Any:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    folder = model_folder()
    model: Any = folder
    if "bf16" in side:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    if "no-checkpoint" in side:
        arguments = {**arguments, "gradient_checkpointing": False}
    return SFTTrainer(
        model,
        args=SFTConfig(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(**lora()),
    )


def with_luthier(side: str, rows: list[dict[str, Any]], arguments: dict[str, Any]) -> Any:
    import luthier

    path = Path(arguments["output_dir"]) / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    equal = side == "luthier equal"
    model, tokenizer = luthier.load("smollm2-135m", dtype="bfloat16" if equal else "auto")
    objective = luthier.method("sft")(packing=False) if equal else "sft"
    method = luthier.method("lora")(r=16, lora_alpha=32)
    return luthier.trainer(objective, model, path, method=method, args=arguments, tokenizer=tokenizer)


def model_folder() -> str:
    from luthier.models import gguf, sources

    return str(gguf.converted(sources.locate("smollm2-135m")))


def report(data: str, found: dict[str, list[dict[str, Any]]]) -> None:
    speed = {
        side: statistics.median(run["tokens"] / s for run in runs for s in run["seconds"])
        for side, runs in found.items()
    }
    memory = {side: statistics.median(run["peak"] for run in runs) for side, runs in found.items()}
    print(f"\n{data}: {found['trl'][0]['tokens']:.0f} tokens of content a step, {len(found['trl'])} rounds\n")
    print("| side | tokens/s | s a step, medians of the rounds | peak MiB | first, last loss |")
    print("|---|---|---|---|---|")
    for side, runs in found.items():
        steps = [statistics.median(run["seconds"]) for run in runs]
        first, last = runs[0]["losses"][0], runs[0]["losses"][-1]
        print(
            f"| {side} | {speed[side]:.0f} | {min(steps):.2f} to {max(steps):.2f} "
            f"| {memory[side] / 2**20:.0f} | {first:.4f}, {last:.4f} |"
        )
    print("\n| ratio | speed | wanted | memory | wanted |\n|---|---|---|---|---|")
    for ours, theirs, least, most in PAIRS:
        fast, large = speed[ours] / speed[theirs], memory[ours] / memory[theirs]
        wanted = "" if most is None else f"<= {most}"
        print(f"| {ours} / {theirs} | {fast:.2f} | >= {least} | {large:.2f} | {wanted} |")
    counts = {round(run["tokens"]) for runs in found.values() for run in runs}
    assert len(counts) == 1, f"the sides did not train on the same tokens: {counts}"


if __name__ == "__main__":
    main()
