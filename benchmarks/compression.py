"""What does compression cost? Every method at several widths and sparsities, on the same text, one table.

    luthier data tickets data/tickets
    luthier run recipes/quickstart.yaml
    python benchmarks/compression.py weights [--only gptq awq] [--output runs/compression]
    python benchmarks/compression.py inputs
    python benchmarks/compression.py sparsity
    python benchmarks/compression.py structure
    python benchmarks/compression.py trained
    python benchmarks/compression.py trained --table

Perplexity on the first tokens of WikiText-2's validation text (../shared/data), calibration on Shakespeare's
plays: another source, so that no method gains by knowing the text. SmolLM2 as it comes lies on a grid of 4
bits in groups of 32; groups of 64 make that grid useless, and widths of 3 and 4 bits mean something.

The last column is what a user sees: the quickstart's model, its LoRA merged, compressed with its own training
mails as calibration; of how many mails unlike those it still makes the right record.

Every row is two `luthier run`s, each of which saves the model, loads it again in a fresh process and
compares. Size, seconds and peak memory are those of the first; the peak is that of the stages that change the
model, without the process of that proof. Where a `tune` stage follows, its adapter's size and its seconds are
added. What came out is a line of benchmarks/results/compression.jsonl: a row that stands there with the same
recipes is not run again, and `--table` prints what is there and runs nothing. After a change of the code that
should change the figures, delete the lines that it concerns.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "compression.jsonl"
DATA = "../shared/data"
CHARACTERS = 24_000
WINDOWS = {"samples": 32, "max_length": 256}
STEPS = 32
BATCH = 4
TRAINED = {"samples": STEPS * BATCH, "max_length": 128}  # each window once
RECORDS = {
    "data": "data/tickets/test.jsonl",
    "metrics": ["exact_match"],
    "samples": 50,
    "batch_size": 50,
    "generation": {"max_new_tokens": 80},
}


@dataclass(frozen=True)
class Text:
    """What a row calibrates on, or is tuned on: every token of it is learnt."""

    data: str
    objective: dict[str, Any]


PLAYS = Text(f"{DATA}/tinyshakespeare.txt", {"name": "pretrain"})
MAILS = Text("data/tickets/train.jsonl", {"name": "sft", "train_on": "all", "packing": "rows"})


@dataclass(frozen=True)
class Row:
    """Methods in one pass, then a tuning, if any: a method and its learning rate."""

    title: str
    methods: list[dict[str, Any]]
    tune: tuple[dict[str, Any], float] | None = None
    windows: dict[str, int] = field(default_factory=lambda: WINDOWS)

    def stages(self, text: Text) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        if self.methods:
            calibration = {"data": text.data} | self.windows
            found.append({"compress": {"method": self.methods, "calibration": calibration}})
        if self.tune is not None:
            method, rate = self.tune
            objective = text.objective | {"max_length": TRAINED["max_length"]}
            training = {
                "max_steps": STEPS,
                "per_device_train_batch_size": BATCH,
                "learning_rate": rate,
                "warmup_steps": 0.1,
            }
            stage = {"data": text.data, "method": method, "objective": objective, "training": training}
            found.append({"tune": stage})
        return found


def weights() -> list[Row]:
    """Weights alone, in groups of 64."""
    found: list[Row] = []
    for bits in (8, 4, 3):
        grid = {"bits": bits, "group_size": 64}
        names = ("rtn", "gptq") if bits == 8 else ("rtn", "gptq", "awq", "zeroquant_v2")
        found += [Row(f"{name} W{bits}", [{"name": name} | grid]) for name in names]
    found.append(Row("gptq W3, all tokens in full", [{"name": "gptq", "bits": 3, "token_cap": None}]))
    return found


def inputs() -> list[Row]:
    """Weights and inputs in integers."""
    found: list[Row] = []
    for per in ("token", "tensor"):
        both = {"bits": 8, "group_size": None, "activation_bits": 8, "activation_per": per}
        found.append(Row(f"rtn W8A8 {per}", [{"name": "rtn"} | both]))
        found.append(Row(f"smoothquant W8A8 {per}", [{"name": "smoothquant"} | both]))
    found.append(Row("zeroquant W8A8", [{"name": "zeroquant", "bits": 8}]))
    found.append(Row("rptq W4A4, of norms A8", [{"name": "rptq"}]))
    found.append(Row("llm_int8", [{"name": "llm_int8"}]))
    low = {"bits": 4, "group_size": 64, "activation_bits": 8}
    found.append(Row("smoothquant then gptq W4A8", [{"name": "smoothquant"}, {"name": "gptq"} | low]))
    return found


def sparsity() -> list[Row]:
    found: list[Row] = []
    for share in ({"sparsity": 0.5}, {"pattern": "2:4"}):
        title = share.get("pattern", "50%")
        names = ("random", "magnitude", "wanda", "sparsegpt")
        found += [Row(f"{name} {title}", [{"name": name} | share]) for name in names]
    found.append(
        Row("sparsegpt 2:4 then gptq W4", [{"name": "sparsegpt", "pattern": "2:4"}, {"name": "gptq"}])
    )
    return found


def structure() -> list[Row]:
    """Neurons taken out of every block, without any training after it."""
    cut = {"name": "llm_pruner", "ratio": 0.1, "units": ["mlp"]}
    return [
        Row(f"llm_pruner {importance} 10%", [cut | {"importance": importance}])
        for importance in ("random", "l2", "vector", "element")
    ]


def trained() -> list[Row]:
    """What a short training does for a smaller model, in bfloat16, which machines multiply faster."""
    cut = {"name": "llm_pruner", "ratio": 0.25, "units": ["mlp"]}
    random, element = [cut | {"importance": "random"}], [cut | {"importance": "element"}]
    lora = ({"name": "lora", "r": 8, "lora_alpha": 16}, 2e-3)
    own = {"name": "loraprune", "ratio": 0.25, "units": ["mlp"], "steps": STEPS, "every": 3, "settle": 0.3}
    movement = {"name": "gum", "ratio": 0.25, "steps": STEPS, "learning_rate": 1e-4}
    coarse = [{"name": "rtn", "bits": 4, "group_size": 64}]
    low = {"bits": 4, "group_size": 64, "activation_bits": 8}
    taught = {"name": "llm_qat", "learning_rate": 1e-4, "batch_size": 4}
    return [
        Row("llm_pruner random 25%", random),
        Row("llm_pruner random 25%, then lora", random, lora),
        Row("llm_pruner element 25%, then lora", element, lora),
        Row("loraprune 25%", [own | {"learning_rate": 2e-3}], windows=TRAINED),
        Row("llm_pruner random 25%, then full", random, ({"name": "full"}, 1e-4)),
        Row("gum 25%", [movement], windows=TRAINED),
        Row("rtn W4", coarse),
        Row("rtn W4, then peqa", coarse, ({"name": "peqa"}, 2e-4)),
        Row("rtn W4A8", [{"name": "rtn"} | low]),
        Row("llm_qat W4A8", [taught | low], windows=TRAINED),
    ]


TABLES = {
    "weights": weights,
    "inputs": inputs,
    "sparsity": sparsity,
    "structure": structure,
    "trained": trained,
}


def recipe(name: str, model: Any, row: Row, text: Text, evaluate: dict[str, Any]) -> dict[str, Any]:
    """One run; without stages of its own the model is measured as it is."""
    return {"name": name, "model": model, "stages": [*row.stages(text), {"evaluate": evaluate}]}


def digest(recipes: list[dict[str, Any]]) -> str:
    """What a recorded row is known by: all of its recipes but the names."""
    told = [{key: value for key, value in one.items() if key != "name"} for one in recipes]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def recorded() -> dict[str, dict[str, Any]]:
    """The finished rows by the digest of their recipes."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return {one["recipe"]: one for one in map(json.loads, lines)}


def run(folder: Path, made: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The manifests of a recipe's stages; None where it failed."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{made['name']}.yaml"
    file.write_text(json.dumps(made, indent=1))  # JSON is YAML
    command = ["luthier", "run", str(file), "--output", str(folder)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with file.with_suffix(".log").open("w") as log:
        done = subprocess.run(command, env=os.environ | {"PATH": path}, stdout=log, stderr=log)
    if done.returncode:
        print(f"{made['name']} failed: {file.with_suffix('.log')}", file=sys.stderr)
        return None
    found = sorted((folder / made["name"]).glob("*/manifest.json"))
    return [json.loads(manifest.read_text()) for manifest in found]


def record(table: str, row: Row, key: str, plain: list[dict], tickets: list[dict]) -> dict[str, Any]:
    """What is kept of a row."""
    metrics = plain[-1]["metrics"] | tickets[-1]["metrics"]
    kept = {
        name: {part: round(metrics[name][part], 4) for part in ("value", "low", "high")}
        for name in ("perplexity", "exact_match")
    }
    one: dict[str, Any] = {"recipe": key, "table": table, "row": row.title, "metrics": kept}
    if changing := plain[:-1]:
        one["artefact_bytes"] = _size(changing)
        one["seconds"] = round(sum(_seconds(stage) for stage in changing), 1)
        one["peak_memory_bytes"] = max(stage["peak_memory_bytes"] for stage in changing)
    return one


def _seconds(stage: dict[str, Any]) -> float:
    """Of the pass, without the proof; of a tuning all of it."""
    return float(stage["metrics"].get("pass_seconds", stage["seconds"]))


def _size(stages: list[dict[str, Any]]) -> int:
    """A model's, and that of an adapter that stands on it."""
    adapters = [s for s in stages if any(name.startswith("adapter/") for name in s["artefacts"])]
    whole = [stage for stage in stages if stage not in adapters]
    return int(whole[-1]["artefact_bytes"]) + sum(s["artefact_bytes"] for s in adapters)


def measure(table: str, row: Row, output: Path, made: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Run the two recipes of a row and record them; None where one failed."""
    plain, tickets = run(output, made[0]), run(output / "tickets", made[1])
    if plain is None or tickets is None:
        return None
    one = record(table, row, digest(made), plain, tickets)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as results:
        results.write(json.dumps(one) + "\n")
    return one


def tuned(output: Path, adapter: Path) -> None:
    """The quickstart's model with its LoRA merged, as the folder `tuned`."""
    import luthier

    folder = output / "tuned"
    if not (folder / "config.json").is_file():
        model, tokenizer = luthier.load(adapter, dtype="float32", device="cpu")
        luthier.save(model.merge_and_unload(), folder, tokenizer)


def line(one: dict[str, Any]) -> str:
    measured, matched = (one["metrics"][name] for name in ("perplexity", "exact_match"))
    value = measured["value"]
    cells = [one["row"], f"{value:.2f}" if value < 1e5 else f"{value:.0e}"]
    low, high = measured["low"], measured["high"]
    cells.append(f"{low:.1f} to {high:.1f}" if high < 1e5 else f"{low:.0e} to {high:.0e}")
    cells.append(f"{matched['value']:.2f}")
    if "seconds" in one:
        cells += [f"{one['artefact_bytes'] / 1e6:.0f}", f"{one['seconds']:.0f}"]
        cells += [f"{one['peak_memory_bytes'] / 1e9:.2f}"]
    else:
        cells += ["-"] * 3
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--only", nargs="+", help="names of methods; default: all")
    parser.add_argument("--table", action="store_true", dest="print_only", help="run nothing")
    parser.add_argument("--model", default="smollm2-135m", help="alias, folder or Hub id")
    parser.add_argument(
        "--adapter", type=Path, default="runs/tickets/02-tune/adapter", help="the quickstart's"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/compression"))
    given = parser.parse_args()
    text = given.output / "wikitext.txt"
    if not given.print_only:
        given.output.mkdir(parents=True, exist_ok=True)
        tuned(given.output, given.adapter)
        beginning = Path(DATA, "wikitext2_valid.txt").read_text(encoding="utf-8")[:CHARACTERS]
        text.write_text(beginning, encoding="utf-8")
    dtype = "auto" if given.table == "trained" else "float32"
    models = [{"name": str(name), "dtype": dtype} for name in (given.model, given.output / "tuned")]
    perplexity = {"data": str(text), "metrics": ["perplexity"]}
    print("| | perplexity | 95 % | exact match | MB on disk | seconds | peak GB |")
    print("|---|--:|--:|--:|--:|--:|--:|", flush=True)
    for row in [Row("as it is", []), *TABLES[given.table]()]:
        if given.only and row.methods and not {m["name"] for m in row.methods} & set(given.only):
            continue
        name = row.title.translate(str.maketrans(" ", "-", ":%,()")).lower()
        made = [
            recipe(name, models[0], row, PLAYS, perplexity),
            recipe(name, models[1], row, MAILS, RECORDS),
        ]
        one = recorded().get(digest(made))
        if one is None and not given.print_only:
            one = measure(given.table, row, given.output, made)
        if one is None:
            print(f"{row.title} has not been measured", file=sys.stderr)
        else:
            print(line(one), flush=True)


if __name__ == "__main__":
    main()
