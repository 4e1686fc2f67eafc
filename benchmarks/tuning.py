"""Which tuning method for which task? Every method on the same rows and steps, two seeds, one table a task.

    luthier data tickets data/tickets
    python benchmarks/tuning.py tickets [--methods lora krona] [--seeds 0 1] [--output runs/tuning]
    python benchmarks/tuning.py math
    python benchmarks/tuning.py sst2
    python benchmarks/tuning.py sst2 --table

tickets: mails to JSON records, SmolLM2-135M. math: word problems with worked answers, the same model, scored
by the last number on AddSub, whose own questions are taken out of the training rows (data/math). sst2:
sentiment of a sentence, MiniLM with a fresh classifier. The data of math and sst2 are public files in
../shared/data (see `TASKS`). An artefact holds the tokenizer too (3.6, 0.9 MB).

A method has the learning rate and options of the task's `settings`: the best of a few rates on seed 2, which
`--rates 1e-3 3e-3` tries. A method that has no settings yet is left out of the table, and named. Every run is
the recipe of a `luthier run`, in a process of its own on one thread. What came out is a line of
benchmarks/results/tuning.jsonl: a run that stands there with the same recipe is not made again, so the
benchmark may be stopped at any time, and `--table` prints what is there and runs nothing. After a change of
the code that should change the figures, delete the lines that it concerns.

Tokens/s are those of the processor time of the training, so that other work on the machine counts little.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import statistics
import sys
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "tuning.jsonl"
DATA = "../shared/data"
SST2 = {"text": "0", "label": "1"}
MATH = "data/math/train.jsonl"  # written by `write_math`
MATH_PROMPT = (
    "Solve the problem step by step. Write a short equation, compute it, and end with the answer as a number."
)


@dataclass(frozen=True)
class Task:
    model: Any
    tune: dict[str, Any]
    evaluate: dict[str, Any]
    metric: str
    settings: dict[str, tuple[float, dict[str, Any]]] = field(default_factory=dict)
    """Of each method: learning rate, and options where its own defaults do not suit the task."""


# Rates on SmolLM2, tried on the mails.
LANGUAGE: dict[str, tuple[float, dict[str, Any]]] = {
    "full": (2e-4, {}),
    "top_layers": (5e-4, {}),
    "frozen_bottom": (5e-4, {}),
    "gradual_unfreezing": (5e-4, {"unit": "step", "unfreeze_every": 5}),
    "serial": (2e-3, {}),
    "parallel": (5e-4, {"bottleneck_dim": 64}),
    "prompt": (2e-2, {}),
    "p_tuning": (2e-3, {"num_virtual_tokens": 10}),
    "p_tuning_v2": (2e-2, {}),
    "prefix": (2e-3, {"encoder_hidden_size": 512}),
    "aprompt": (1e-1, {}),
    "lora": (2e-3, {}),
    "dora": (2e-3, {}),
    "krona": (1.5e-2, {}),
    "adalora": (1e-2, {}),
    "autolora": (2e-3, {"search_steps": 10}),
    "dylora": (2e-3, {"train_prefix": True}),
    "kadaptation": (5e-3, {}),
    "lora_fa": (2e-3, {}),
    "delta_lora": (2e-3, {}),
    "qlora": (2e-3, {}),
}

TASKS = {
    "tickets": Task(
        model="smollm2-135m",
        tune={
            "data": "data/tickets/train.jsonl",
            "objective": {"name": "sft", "max_length": 256},
            "training": {"max_steps": 40, "per_device_train_batch_size": 2, "warmup_steps": 0.05},
        },
        evaluate={
            "data": "data/tickets/test.jsonl",
            "metrics": ["field_f1", "exact_match"],
            "samples": 32,
            "batch_size": 32,
            "generation": {"max_new_tokens": 80},
        },
        metric="field_f1",
        settings=LANGUAGE,
    ),
    "math": Task(
        model="smollm2-135m",
        tune={
            "data": MATH,
            "objective": {"name": "sft", "max_length": 256},
            "training": {"max_steps": 40, "per_device_train_batch_size": 4, "warmup_steps": 0.05},
        },
        evaluate={
            "data": f"{DATA}/addsub_test.json",
            "metrics": ["final_number"],
            "batch_size": 64,
            "generation": {"max_new_tokens": 80},
        },
        metric="final_number",
        settings=LANGUAGE
        | {
            "top_layers": (1e-4, {"k": 15}),
            "frozen_bottom": (1e-4, {}),
            "gradual_unfreezing": (1e-4, {"unit": "step", "unfreeze_every": 5, "groups_per_stage": 4}),
            "prompt": (1e-2, {"init": "text", "init_text": MATH_PROMPT}),
            "p_tuning": (5e-3, {"num_virtual_tokens": 10, "encoder": "mlp"}),
            "p_tuning_v2": (1e-1, {}),
        },
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
            "coda": (3e-3, {"reduction": 1.5}),
            "prompt": (1e-2, {}),
            "p_tuning": (1e-2, {"num_virtual_tokens": 5}),
            "p_tuning_v2": (3e-2, {}),
            "prefix": (3e-3, {"encoder_hidden_size": 64}),
            "aprompt": (5e-2, {"init": "random"}),
            "lora": (1e-3, {}),
            "dora": (1e-3, {}),
            "krona": (1e-2, {}),
            "adalora": (1e-2, {}),
            "autolora": (1e-3, {"search_steps": 20}),
            "dylora": (1e-3, {"train_prefix": True}),
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


def write_math() -> None:
    """The training rows of math: those with a right worked answer, whose question AddSub does not ask."""
    from luthier.evaluation.text_metrics import number_match

    rows, asked = (
        json.loads(Path(DATA, name).read_text())
        for name in ("llm_adapters_math_train.json", "addsub_test.json")
    )
    known = {" ".join(row["instruction"].split()) for row in asked}
    kept = [
        {key: row[key] for key in ("instruction", "output")}
        for row in rows
        if " ".join(row["instruction"].split()) not in known and number_match(row["output"], row["answer"])
    ]
    Path(MATH).parent.mkdir(parents=True, exist_ok=True)
    Path(MATH).write_text("".join(json.dumps(row) + "\n" for row in kept))


def digest(made: dict[str, Any]) -> str:
    """What a recorded run is known by: all of its recipe but the name."""
    text = json.dumps({key: value for key, value in made.items() if key != "name"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def recorded() -> dict[str, dict[str, Any]]:
    """The finished runs by the digest of their recipe."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {one["recipe"]: one for one in map(json.loads, lines)}


def execute(file: Path) -> None:
    """Run a recipe in this process, told in the log beside it; the processor time of the training is kept."""
    from transformers import Trainer

    import luthier

    log = os.open(file.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    train = Trainer.train

    def timed(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        output = train(self, *args, **kwargs)
        file.with_suffix(".seconds").write_text(str(time.process_time() - start))
        return output

    Trainer.train = timed
    luthier.run(file, output=file.parent, force=True)


def run(task: str, folder: Path, made: dict[str, Any]) -> dict[str, Any] | None:
    """What came out of a recipe, recorded; None where it failed. A recorded run is not made again."""
    key = digest(made)
    if key in (done := recorded()):
        return done[key]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{made['name']}.yaml"
    file.write_text(json.dumps(made, indent=1))  # JSON is YAML
    # A fork has this process's imports already, which are a fifth of a short run.
    process = multiprocessing.get_context("fork").Process(target=execute, args=(file,))
    process.start()
    process.join()
    if process.exitcode:
        print(f"{made['name']} failed: {file.with_suffix('.log')}", file=sys.stderr)
        return None
    stages = {}
    for manifest in sorted((folder / made["name"]).glob("*/manifest.json")):
        stage = json.loads(manifest.read_text())
        stages[stage["stage"]] = stage
    one = record(task, key, made, stages)
    if right := judged(folder / made["name"], TASKS[task].metric):
        one["right"] = right
    if "tune" in stages:
        seconds = float(file.with_suffix(".seconds").read_text())
        one["tokens_per_second"] = round(stages["tune"]["metrics"]["tokens"] / seconds)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as results:
        results.write(json.dumps(one) + "\n")
    return one


def record(task: str, key: str, made: dict[str, Any], stages: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a run."""
    one = {"recipe": key, "task": task, "method": "untuned", "seed": made["seed"]}
    if tuned := stages.get("tune"):
        options = dict(made["stages"][0]["tune"]["method"])
        one |= {"method": options.pop("name"), "options": options}
        one["rate"] = made["stages"][0]["tune"]["training"]["learning_rate"]
        one |= {key: tuned[key] for key in ("trainable", "peak_memory_bytes", "artefact_bytes")}
        one["loss"] = tuned["metrics"].get("loss")
    one["metrics"] = {
        name: {key: round(metric[key], 4) for key in ("value", "low", "high")}
        for name, metric in stages["evaluate"]["metrics"].items()
    }
    return one


def judged(folder: Path, metric: str) -> str | None:
    """Which answers of a run were right, a 0 or 1 for each; None where a row is not judged so."""
    rows = [json.loads(line) for file in folder.glob("*/predictions.jsonl") for line in file.open()]
    scores = [row["scores"].get(metric) for row in sorted(rows, key=lambda row: row["index"])]
    return "".join(f"{score:.0f}" for score in scores) if set(scores) <= {0, 1} else None


def gain(runs: list[dict[str, Any]], base: dict[str, Any]) -> str:
    """What a method adds to the untuned model, question by question, and its interval over the questions."""
    import numpy as np

    from luthier.evaluation.bootstrap import interval, mean

    before, *after = (np.array([int(one) for one in run["right"]]) for run in (base, *runs))
    found = interval(mean(np.mean(after, axis=0) - before))
    return f"{found.value:+.3f} ({found.low:+.2f} to {found.high:+.2f})"


def row(task: Task, title: str, runs: list[dict[str, Any]], base: dict[str, Any] | None) -> str:
    """A line of the table: mean over the seeds, mean bounds of the runs' intervals, and the costs.

    Args:
        base: the run of the untuned model, where answers are right or wrong: what is added to it is told too.
    """
    scores = [one["metrics"][task.metric] for one in runs]
    value, low, high = (statistics.fmean(s[key] for s in scores) for key in ("value", "low", "high"))
    seeds = " / ".join(f"{s['value']:.3f}" for s in scores)
    cells = [title, f"{value:.3f}", f"{low:.2f} to {high:.2f}", seeds]
    if base is not None:
        known = base not in runs and all("right" in one for one in runs)
        cells.append(gain(runs, base) if known else "-")
    tuned = [one for one in runs if "trainable" in one]
    if tuned:
        columns = ("trainable", "peak_memory_bytes", "tokens_per_second", "artefact_bytes")
        learns, peak, speed, size = (statistics.fmean(t[key] for t in tuned) for key in columns)
        cells += [f"{learns:,.0f}", f"{peak / 1e9:.2f}", f"{speed:.0f}", f"{size / 1e6:.2f}"]
    else:
        cells += ["-"] * 4
    return f"| {' | '.join(cells)} |"


def title(name: str, rate: float, options: dict[str, Any]) -> str:
    told = [f"{key} {textwrap.shorten(str(value), 20, placeholder=' ...')}" for key, value in options.items()]
    return f"{name} ({', '.join([f'{rate:g}', *told])})"


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import luthier

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--rates", nargs="+", type=float, help="search: these rates, on seed 2")
    parser.add_argument("--table", action="store_true", help="run nothing: the table of what is recorded")
    parser.add_argument("--output", type=Path, default=Path("runs/tuning"))
    given = parser.parse_args()
    task, folder = TASKS[given.task], given.output / given.task
    if not given.table:
        import peft  # noqa: F401  what every run needs, before the fork
        import transformers  # noqa: F401
        import trl  # noqa: F401

        if given.task == "math":
            write_math()

    def outcome(made: dict[str, Any]) -> dict[str, Any] | None:
        return recorded().get(digest(made)) if given.table else run(given.task, folder, made)

    untuned = outcome(recipe(task, "untuned", None, 0.0, 0))
    base = untuned if untuned and "right" in untuned else None
    columns = ["method", task.metric, "95 %", "seeds", *(["over untuned, 95 %"] if base else [])]
    columns += ["trainable", "peak GB", "tokens/s", "artefact MB"]
    print(f"| {' | '.join(columns)} |\n|---|{'--:|' * (len(columns) - 1)}", flush=True)
    for name in given.methods or ["untuned", *(m.name for m in luthier.methods("tuning") if not m.searches)]:
        if name == "untuned":
            if not given.rates and untuned:
                print(row(task, name, [untuned], base), flush=True)
            continue
        if name not in task.settings and not given.rates:
            print(f"{name} has no settings for {given.task}", file=sys.stderr)
            continue
        rate, options = task.settings.get(name, (0.0, {}))
        seeds = [2] if given.rates else given.seeds
        for trial in given.rates or [rate]:
            made = [recipe(task, f"{name}-{trial:g}-{s}", {"name": name} | options, trial, s) for s in seeds]
            if runs := [found for one in made if (found := outcome(one))]:
                print(row(task, title(name, trial, options), runs, base), flush=True)
            elif given.table:
                print(f"{name} has not run on {given.task}", file=sys.stderr)


if __name__ == "__main__":
    main()
