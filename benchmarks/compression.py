"""What does compression cost? Every method at several widths and sparsities, on the same text, one table.

    luthier data tickets data/tickets
    luthier run recipes/quickstart.yaml
    python benchmarks/compression.py weights [--only gptq awq] [--output runs/compression]
    python benchmarks/compression.py inputs
    python benchmarks/compression.py sparsity
    python benchmarks/compression.py structure

Perplexity on the first tokens of WikiText-2's validation text (../shared/data), calibration on Shakespeare's
plays: another source, so that no method gains by knowing the text. SmolLM2 as it comes lies on a grid of 4
bits in groups of 32; groups of 64 make that grid useless, and widths of 3 and 4 bits mean something.

The last column is what a user sees: the quickstart's model, its LoRA merged, compressed with its own training
mails as calibration; of how many mails unlike those it still makes the right record.

Every row is two `luthier run`s, each of which saves the model, loads it again in a fresh process and
compares: what is finished is not run again. Size, seconds and peak memory are those of the first; the peak is
the compress stage's, without the process of that proof.
"""

import argparse
from pathlib import Path
from typing import Any

from tuning import DATA, run

CHARACTERS = 24_000
PLAYS = {"data": f"{DATA}/tinyshakespeare.txt", "samples": 32, "max_length": 256}
MAILS = {"data": "data/tickets/train.jsonl", "samples": 32, "max_length": 256}
RECORDS = {
    "data": "data/tickets/test.jsonl",
    "metrics": ["exact_match"],
    "samples": 50,
    "batch_size": 50,
    "generation": {"max_new_tokens": 80},
}
Row = tuple[str, list[dict[str, Any]]]


def weights() -> list[Row]:
    """Weights alone, in groups of 64."""
    found: list[Row] = []
    for bits in (8, 4, 3):
        grid = {"bits": bits, "group_size": 64}
        names = ("rtn", "gptq") if bits == 8 else ("rtn", "gptq", "awq", "zeroquant_v2")
        found += [(f"{name} W{bits}", [{"name": name} | grid]) for name in names]
    found.append(("gptq W3, all tokens in full", [{"name": "gptq", "bits": 3, "token_cap": None}]))
    return found


def inputs() -> list[Row]:
    """Weights and inputs in integers."""
    found: list[Row] = []
    for per in ("token", "tensor"):
        both = {"bits": 8, "group_size": None, "activation_bits": 8, "activation_per": per}
        found.append((f"rtn W8A8 {per}", [{"name": "rtn"} | both]))
        found.append((f"smoothquant W8A8 {per}", [{"name": "smoothquant"} | both]))
    found.append(("zeroquant W8A8", [{"name": "zeroquant", "bits": 8}]))
    found.append(("rptq W4A4, of norms A8", [{"name": "rptq"}]))
    found.append(("llm_int8", [{"name": "llm_int8"}]))
    low = {"bits": 4, "group_size": 64, "activation_bits": 8}
    found.append(("smoothquant then gptq W4A8", [{"name": "smoothquant"}, {"name": "gptq"} | low]))
    return found


def sparsity() -> list[Row]:
    found: list[Row] = []
    for share in ({"sparsity": 0.5}, {"pattern": "2:4"}):
        title = share.get("pattern", "50%")
        names = ("random", "magnitude", "wanda", "sparsegpt")
        found += [(f"{name} {title}", [{"name": name} | share]) for name in names]
    found.append(("sparsegpt 2:4 then gptq W4", [{"name": "sparsegpt", "pattern": "2:4"}, {"name": "gptq"}]))
    return found


def structure() -> list[Row]:
    """Neurons taken out of every block, without any training after it."""
    cut = {"name": "llm_pruner", "ratio": 0.1, "units": ["mlp"]}
    return [
        (f"llm_pruner {importance} 10%", [cut | {"importance": importance}])
        for importance in ("random", "l2", "vector", "element")
    ]


TABLES = {"weights": weights, "inputs": inputs, "sparsity": sparsity, "structure": structure}


def recipe(
    name: str,
    model: Any,
    methods: list[dict[str, Any]],
    calibration: dict[str, Any],
    evaluate: dict[str, Any],
) -> dict[str, Any]:
    """One run; without methods the model is measured as it is."""
    stages: list[dict[str, Any]] = [{"evaluate": evaluate}]
    if methods:
        stages.insert(0, {"compress": {"method": methods, "calibration": calibration}})
    return {"name": name, "model": model, "stages": stages}


def tuned(output: Path, adapter: Path) -> Path:
    """The quickstart's model with its LoRA merged, as a folder."""
    import luthier

    folder = output / "tuned"
    if not (folder / "config.json").is_file():
        model, tokenizer = luthier.load(adapter, dtype="float32", device="cpu")
        luthier.save(model.merge_and_unload(), folder, tokenizer)
    return folder


def line(title: str, plain: dict[str, Any], tickets: dict[str, Any]) -> str:
    measured = plain["evaluate"]["metrics"]["perplexity"]
    cells = [title, f"{measured['value']:.2f}", f"{measured['low']:.1f} to {measured['high']:.1f}"]
    matched = tickets["evaluate"]["metrics"]["exact_match"]
    cells.append(f"{matched['value']:.2f}")
    if "compress" in plain:
        stage = plain["compress"]
        cells += [f"{stage['artefact_bytes'] / 1e6:.0f}", f"{stage['metrics']['pass_seconds']:.0f}"]
        cells += [f"{stage['peak_memory_bytes'] / 1e9:.2f}"]
    else:
        cells += ["-"] * 3
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--only", nargs="+", help="names of methods; default: all")
    parser.add_argument("--model", default="smollm2-135m", help="alias, folder or Hub id")
    parser.add_argument(
        "--adapter", type=Path, default="runs/tickets/02-tune/adapter", help="the quickstart's"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/compression"))
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    models = [{"name": str(n), "dtype": "float32"} for n in (given.model, tuned(given.output, given.adapter))]
    text = given.output / "wikitext.txt"
    text.write_text(
        Path(DATA, "wikitext2_valid.txt").read_text(encoding="utf-8")[:CHARACTERS], encoding="utf-8"
    )
    perplexity = {"data": str(text), "metrics": ["perplexity"]}
    print("| | perplexity | 95 % | exact match | MB on disk | seconds | peak GB |")
    print("|---|--:|--:|--:|--:|--:|--:|", flush=True)
    rows = [("as it is", []), *TABLES[given.table]()]
    for title, methods in rows:
        if given.only and methods and not {m["name"] for m in methods} & set(given.only):
            continue
        name = title.replace(" ", "-").replace(":", "").replace("%", "").replace(",", "").lower()
        plain = run(given.output, recipe(name, models[0], methods, PLAYS, perplexity))
        tickets = run(given.output / "tickets", recipe(name, models[1], methods, MAILS, RECORDS))
        if plain and tickets:
            print(line(title, plain, tickets), flush=True)


if __name__ == "__main__":
    main()
