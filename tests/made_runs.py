"""Run and comparison folders made in code, with the files that the runner writes and nothing else."""

import json
import math
import random
from pathlib import Path
from typing import Any

MODEL = {"name": "smollm2-135m", "task": "causal", "dtype": "auto", "device": "auto", "attn": "auto"}
VERSIONS = {
    "luthier": "0.1.0",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "peft": "0.21.2",
    "trl": "1.16.0",
}
ENVIRONMENT = {
    "python": "3.11.9",
    "system": "Linux-6.1-x86_64",
    "cpu": "AMD EPYC 7B13",
    "cores": 2,
    "memory_bytes": 24_000_000_000,
    "gpus": [],
    "versions": VERSIONS,
}
PRODUCTS = ("Lumo desk lamp", "Corvex kettle", "Aria headphones", "Nordic stool")


def evaluate_config(path: str = "data/tickets/test.jsonl") -> dict[str, Any]:
    metrics = ["exact_match", "field_f1", "perplexity"]
    return {"data": {"path": path, "format": "auto"}, "metrics": metrics, "samples": None, "batch_size": 16}


def tune_config() -> dict[str, Any]:
    return {
        "data": {"path": "data/tickets/train.jsonl", "format": "auto"},
        "method": {"name": "lora", "r": 16},
        "objective": {"name": "sft"},
        "training": {"max_steps": 150, "learning_rate": 0.001},
    }


def recipe(*stages: dict[str, Any]) -> dict[str, Any]:
    return {"name": "tickets", "model": MODEL, "seed": 0, "output": "runs", "stages": list(stages)}


def check(
    when: str, name: str, passed: bool = True, value: Any = None, held: Any = None, detail: str = ""
) -> dict:
    return {"when": when, "name": name, "passed": passed, "value": value, "tolerance": held, "detail": detail}


def metric(value: float, half: float, n: int = 200) -> dict[str, float]:
    return {"value": value, "low": max(0.0, value - half), "high": value + half, "n": n}


def history(steps: int = 150, held_out: bool = True) -> list[dict[str, float]]:
    draw = random.Random(0)
    found: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        loss = 0.04 + 1.9 * math.exp(-step / 18) + draw.gauss(0, 0.035) * math.exp(-step / 150)
        rate = 1e-3 * min(1, step / 10) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        gradient = 0.4 + 2.2 * math.exp(-step / 12) + abs(draw.gauss(0, 0.12))
        found.append(
            {
                "step": step,
                "epoch": step / 60,
                "loss": abs(loss),
                "learning_rate": rate,
                "grad_norm": gradient,
            }
        )
        if held_out and step % 30 == 0:
            found.append({"step": step, "eval_loss": 0.06 + 1.7 * math.exp(-step / 20), "eval_runtime": 2.0})
    found.append({"step": steps, "train_runtime": 212.0, "train_loss": 0.31, "total_flos": 1e13})
    return found


def record_of(draw: random.Random) -> dict[str, Any]:
    return {
        "product": draw.choice(PRODUCTS),
        "category": draw.choice(["delivery", "defect", "billing"]),
        "urgency": draw.choice(["low", "normal", "high"]),
        "order": f"A-{draw.randint(1000, 9999)}",
        "date": f"2026-0{draw.randint(1, 9)}-1{draw.randint(0, 9)}",
        "action": draw.choice(["refund", "replacement", None]),
    }


def predictions(tuned: bool, count: int = 60) -> list[dict[str, Any]]:
    """The base chats; the tuned model is right but for every ninth answer; the base had one of those."""
    found = []
    for index in range(count):
        draw = random.Random(index)
        gold = record_of(draw)
        right = index in (7, 8) if not tuned else index % 9 != 8
        answer = dict(gold) if right else gold | {"urgency": "high", "date": "2026-01-02"}
        text = json.dumps(answer)
        if not (tuned or right):
            text = "I'm sorry to hear that. Please contact the support team with your order number."
        hits = sum(answer[key] == gold[key] for key in gold) / len(gold) if tuned or right else 0.0
        prompt = (
            "Turn this mail into JSON with product, category, urgency, order, date and action.\n\n"
            f"Subject: my {gold['product']}\n\nHello, I bought it on {gold['date']} (order {gold['order']}) "
            "and it never arrived. <b>Please</b> help.\n\nBest, Mia"
        )
        found.append(
            {"index": index, "prompt": prompt, "gold": json.dumps(gold), "prediction": text}
            | {"exact_match": float(right), "field_f1": hits}
        )
    return found


def manifest(kind: str, name: str, config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "stage": kind,
        "name": name,
        "config": config,
        "inputs": {"model": {"sha256": "ab" * 32}, "data": {"sha256": "cd" * 32}},
        "versions": VERSIONS,
        "seed": 0,
        "status": "done",
        "metrics": {},
        "checks": [],
        "history": [],
        "details": {
            "placement": {
                "dtype": "float32",
                "device": "cpu",
                "attn": "sdpa",
                "reason": "float32 (no fast bf16 here) on cpu (no accelerator found), sdpa attention",
            }
        },
        "seconds": 41.0,
        "sessions": 1,
        "peak_memory_bytes": 1_210_000_000,
        "peak_memory_exact": True,
        "peak_cuda_bytes": 0,
        "trainable": None,
        "total": None,
        "artefact_bytes": 0,
    } | changes


def before() -> dict[str, Any]:
    metrics = {
        "exact_match": metric(0.015, 0.015),
        "field_f1": metric(0.212, 0.03),
        "perplexity": metric(9.42, 0.6),
    }
    return manifest("evaluate", "before", evaluate_config(), metrics=metrics)


def after() -> dict[str, Any]:
    metrics = {
        "exact_match": metric(0.865, 0.047),
        "field_f1": metric(0.961, 0.016),
        "perplexity": metric(1.18, 0.03),
    }
    lines = [
        check("end", "exact_match as stated", value=0.865, held=">= 0.8"),
        check(
            "end", "exact_match not worse than before", value=0.865, held=0.015, detail="from 0.015 to 0.865"
        ),
    ]
    return manifest("evaluate", "after", evaluate_config(), metrics=metrics, checks=lines, seconds=66.0)


def tune() -> dict[str, Any]:
    lines = [
        check(
            "data", "end token trained", value="100%", held="100%", detail="<|im_end|> closes every answer"
        ),
        check("data", "rows that lost all trained tokens", value=0, held=0, detail="3 of 1,500 truncated"),
        check("before", "target patterns matched", value=7, held=7, detail="210 layers, 79% of the model"),
        check(
            "before", "output equals the base at step 0", value=0.0, held=1e-6, detail="probe of 32 tokens"
        ),
        check("step1", "frozen weights unchanged", value=0.0, held=0.0),
        check("step1", "gradients finite and non-zero", value=420, held=420),
        check("step1", "peak memory against estimate", value=1.08, held=1.3),
    ]
    return manifest(
        "tune",
        "tune",
        tune_config(),
        metrics={"train_loss": 0.31},
        checks=lines,
        history=history(),
        seconds=214.3,
        peak_memory_bytes=1_930_000_000,
        trainable=4_884_480,
        total=139_399_744,
        artefact_bytes=19_560_000,
    )


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")


def finished_run(folder: Path) -> Path:
    """A run of before, tune, after, as in the quickstart."""
    write(folder / "01-before" / "manifest.json", before())
    write_lines(folder / "01-before" / "predictions.jsonl", predictions(tuned=False))
    write(folder / "02-tune" / "manifest.json", tune())
    write(folder / "03-after" / "manifest.json", after())
    write_lines(folder / "03-after" / "predictions.jsonl", predictions(tuned=True))
    stages = [("01-before", "evaluate"), ("02-tune", "tune"), ("03-after", "evaluate")]
    parts = {"weights": 538_000_000, "adapter": 19_500_000, "activations": 900_000_000, "logits": 0}
    plan = {
        "placement": "float32 on cpu",
        "stages": [
            {},
            {"seconds": 240.0, "memory_bytes": 2_080_000_000, "trainable": 4_884_480, "memory": parts},
            {},
        ],
    }
    write(
        folder / "run.json",
        {
            "name": "tickets",
            "status": "done",
            "recipe": recipe(
                {"evaluate": evaluate_config() | {"name": "before"}},
                {"tune": tune_config()},
                {"evaluate": evaluate_config() | {"name": "after"}},
            ),
            "recipe_file": "recipes/quickstart.yaml",
            "command": None,
            "started": "2026-03-01T10:00:00+00:00",
            "finished": "2026-03-01T10:05:21+00:00",
            "error": None,
            "environment": ENVIRONMENT,
            "plan": plan,
            "stages": [
                {
                    "folder": label,
                    "kind": kind,
                    "name": label[3:],
                    "status": "done",
                    "reason": "it has not run yet",
                }
                for label, kind in stages
            ],
        },
    )
    return folder


def change_record(folder: Path, statuses: dict[str, str], **changes: Any) -> None:
    """Rewrite run.json with other statuses of stages, and other fields."""
    path = folder / "run.json"
    record = json.loads(path.read_text()) | changes
    for stage in record["stages"]:
        stage["status"] = statuses.get(stage["folder"], stage["status"])
    write(path, record)


def comparison(folder: Path) -> Path:
    """Five methods, two seeds; one method failed with its second seed, one with both."""
    figures = {
        #               exact  perpl.  trainable    memory  tuning  artefact
        "lora": (0.865, 1.18, 4_884_480, 1.93e9, 214, 19.6e6),
        "dora": (0.880, 1.17, 5_022_720, 2.21e9, 371, 20.1e6),
        "full": (0.895, 1.15, 134_515_008, 3.42e9, 402, 538e6),
        "top_layers": (0.640, 1.42, 14_158_080, 1.51e9, 118, 538e6),
        "linear_probe": (0.080, 3.10, 28_311_552, 1.62e9, 96, 538e6),
        "gradual_unfreezing": (None, None, None, None, None, None),
    }
    rows = []
    for name, (exact, perplexity, trainable, memory, seconds, size) in figures.items():
        for seed in (0, 1):
            row: dict[str, Any] = {
                "settings": {"tune.method": name},
                "seed": seed,
                "run": f"method-{name}_seed-{seed}",
            }
            if exact is None or (name == "dora" and seed == 1):
                rows.append(
                    row | {"status": "failed", "error": "The loss is not finite at step 12.", "metrics": {}}
                )
                continue
            shift = 0.012 * (-1) ** seed
            rows.append(
                row
                | {
                    "status": "done",
                    "error": None,
                    "metrics": {
                        "exact_match": metric(exact + shift, 0.045),
                        "perplexity": metric(perplexity - shift, 0.03),
                    },
                    "trainable": trainable,
                    "total": 139_399_744,
                    "peak_memory_bytes": memory,
                    "tune_seconds": seconds + seed,
                    "seconds": seconds + 107,
                    "artefact_bytes": size,
                }
            )
    write(
        folder / "comparison.json",
        {
            "name": "tickets",
            "status": "failed",
            "recipe": recipe({"tune": tune_config()}, {"evaluate": evaluate_config()}),
            "recipe_file": "recipes/quickstart.yaml",
            "vary": {"tune.method": list(figures)},
            "seeds": [0, 1],
            "rows": rows,
        },
    )
    return folder
