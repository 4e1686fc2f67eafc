"""Which tuning method for which task? Every method on the same rows and steps, two seeds, one table a task.

    luthier data tickets data/tickets
    python benchmarks/tuning.py tickets [--methods lora krona] [--seeds 0 1] [--output runs/tuning]
    python benchmarks/tuning.py math
    python benchmarks/tuning.py sst2

tickets: mails to JSON records, SmolLM2-135M. math: word problems with worked answers, the same model, scored
by the last number on AddSub. sst2: sentiment of a sentence, MiniLM with a fresh classifier. The data of math
and sst2 are public files in ../shared/data (see `TASKS`). An artefact holds the tokenizer too (3.6, 0.9 MB).

A method has the learning rate and options of the task's `settings`: the best of a few rates on seed 2, which
`--rates 1e-3 3e-3` tries. A method that has no settings yet is left out of the table, and named. Every run is
a `luthier run` of its own: what is finished is not run again, so the benchmark may be stopped at any time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DATA = "../shared/data"
SST2 = {"text": "0", "label": "1"}


@dataclass(frozen=True)
class Task:
    model: Any
    tune: dict[str, Any]
    evaluate: dict[str, Any]
    metric: str
    settings: dict[str, tuple[float, dict[str, Any]]] = field(default_factory=dict)
    """Of each method: learning rate, and options where its own defaults do not suit the task."""


TASKS = {
    "tickets": Task(
        model="smollm2-135m",
        tune={
            "data": "data/tickets/train.jsonl",
            "objective": {"name": "sft", "max_length": 256},
            "training": {"max_steps": 100, "per_device_train_batch_size": 2, "warmup_steps": 0.05},
        },
        evaluate={
            "data": "data/tickets/test.jsonl",
            "metrics": ["field_f1", "exact_match"],
            "samples": 64,
            "batch_size": 64,
            "generation": {"max_new_tokens": 80},
        },
        metric="field_f1",
    ),
    "math": Task(
        model="smollm2-135m",
        tune={
            "data": f"{DATA}/llm_adapters_math_train.json",
            "objective": {"name": "sft", "max_length": 256},
            "training": {"max_steps": 100, "per_device_train_batch_size": 4, "warmup_steps": 0.05},
        },
        evaluate={
            "data": f"{DATA}/addsub_test.json",
            "metrics": ["final_number"],
            "samples": 128,
            "batch_size": 64,
            "generation": {"max_new_tokens": 80},
        },
        metric="final_number",
    ),
    "sst2": Task(
        model={"name": "minilm", "task": "classification"},
        tune={
            "data": {"path": f"{DATA}/sst2_train.tsv", "columns": SST2, "limit": 800},
            "objective": {"name": "classification", "max_length": 64},
            "training": {"num_train_epochs": 3, "per_device_train_batch_size": 16, "warmup_steps": 0.1},
        },
        evaluate={
            "data": {"path": f"{DATA}/sst2_dev.tsv", "columns": SST2},
            "metrics": ["accuracy"],
            "batch_size": 64,
        },
        metric="accuracy",
        settings={
            "full": (1e-4, {}),
            "top_layers": (4e-4, {}),
            "frozen_bottom": (4e-4, {}),
            "linear_probe": (3e-2, {}),
            "gradual_unfreezing": (4e-4, {"unit": "step", "unfreeze_every": 18}),
            "serial": (1e-3, {}),
            "parallel": (1e-4, {}),
            "coda": (1e-3, {}),
            "prompt": (1e-2, {}),
            "p_tuning": (1e-2, {}),
            "p_tuning_v2": (3e-2, {}),
            "prefix": (1e-3, {}),
            "aprompt": (5e-2, {}),
            "lora": (1e-3, {}),
            "dora": (1e-3, {}),
            "krona": (1e-2, {}),
            "adalora": (1e-2, {}),
            "autolora": (1e-3, {}),
            "dylora": (1e-3, {}),
            "kadaptation": (3e-3, {}),
            "lora_fa": (1e-3, {}),
            "delta_lora": (1e-3, {}),
            "laplace_lora": (1e-3, {}),
            "qlora": (1e-3, {}),
        },
    ),
}


def recipe(task: Task, name: str, method: dict[str, Any] | None, rate: float, seed: int) -> dict[str, Any]:
    """One run; without a method the model is measured as it is."""
    stages: list[dict[str, Any]] = [{"evaluate": task.evaluate}]
    if method is not None:
        training = task.tune["training"] | {"learning_rate": rate}
        stages.insert(0, {"tune": task.tune | {"method": method, "training": training}})
    return {"name": name, "model": task.model, "seed": seed, "stages": stages}


def run(folder: Path, made: dict[str, Any]) -> dict[str, Any] | None:
    """What came out of a recipe: the manifests of its stages by kind; None where it failed."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{made['name']}.yaml"
    file.write_text(json.dumps(made, indent=1))  # JSON is YAML
    command = ["luthier", "run", str(file), "--output", str(folder)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (folder / f"{made['name']}.log").open("w") as log:
        done = subprocess.run(command, env=os.environ | {"PATH": path}, stdout=log, stderr=log)
    if done.returncode:
        print(f"{made['name']} failed: {log.name}", file=sys.stderr)
        return None
    found = {}
    for manifest in sorted((folder / made["name"]).glob("*/manifest.json")):
        stage = json.loads(manifest.read_text())
        found[stage["stage"]] = stage
    return found


def row(task: Task, title: str, runs: list[dict[str, Any]]) -> str:
    """A line of the table: mean over the seeds, mean bounds of the runs' intervals, and the costs."""
    scores = [one["evaluate"]["metrics"][task.metric] for one in runs]
    value, low, high = (statistics.fmean(s[key] for s in scores) for key in ("value", "low", "high"))
    seeds = " / ".join(f"{s['value']:.3f}" for s in scores)
    cells = [title, f"{value:.3f}", f"{low:.2f} to {high:.2f}", seeds]
    tuned = [one["tune"] for one in runs if "tune" in one]
    if tuned:
        mean = {key: statistics.fmean(t[key] for t in tuned) for key in ("trainable", "peak_memory_bytes")}
        speed = statistics.fmean(t["metrics"]["tokens_per_second"] for t in tuned)
        size = statistics.fmean(t["artefact_bytes"] for t in tuned)
        cells += [f"{mean['trainable']:,.0f}", f"{mean['peak_memory_bytes'] / 1e9:.2f}"]
        cells += [f"{speed:.0f}", f"{size / 1e6:.2f}"]
    else:
        cells += ["-"] * 4
    return f"| {' | '.join(cells)} |"


def main() -> None:
    import luthier

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--rates", nargs="+", type=float, help="search: these rates, on seed 2")
    parser.add_argument("--output", type=Path, default=Path("runs/tuning"))
    given = parser.parse_args()
    task, folder = TASKS[given.task], given.output / given.task
    print(f"| method | {task.metric} | 95 % | seeds | trainable | peak GB | tokens/s | artefact MB |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|", flush=True)
    if not given.methods and not given.rates:
        base = run(folder, recipe(task, "untuned", None, 0.0, 0))
        print(row(task, "untuned", [base] if base else []), flush=True)
    for name in given.methods or [m.name for m in luthier.methods("tuning") if not m.searches]:
        if name not in task.settings and not given.rates:
            print(f"{name} has no settings for {given.task}", file=sys.stderr)
            continue
        rate, options = task.settings.get(name, (0.0, {}))
        if given.rates:
            trials = [(f"{name} at {r:g}", r, 2) for r in given.rates]
            for title, trial, seed in trials:
                made = recipe(task, f"{name}-{trial:g}-{seed}", {"name": name} | options, trial, seed)
                if found := run(folder, made):
                    print(row(task, title, [found]), flush=True)
            continue
        method = {"name": name} | options
        recipes = [recipe(task, f"{name}-{seed}", method, rate, seed) for seed in given.seeds]
        runs = [found for one in recipes if (found := run(folder, one))]
        if runs:
            print(row(task, f"{name} ({rate:g})", runs), flush=True)


if __name__ == "__main__":
    main()
