"""Compressing SmolLM2-135M: seconds, peak memory and perplexity, ours against llm-compressor on the same
tokens.

    python -m venv peer && peer/bin/pip install torch==2.13.0 llmcompressor==0.14.0
    python benchmarks/compression_vs_llmcompressor.py --peer peer/bin/python [--only gptq] [--samples 16]

llm-compressor lives in an environment of its own (it asks for transformers 5.17 at most). Every measurement
is a process: load the model, compress it with the same calibration windows, save it. The seconds are those of
the compression, without loading and saving; the peak is that of the whole process. What either side saved is
then read by transformers in this environment, and its perplexity measured on the same text. The sides take
turns.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / ".." / "shared" / "data"
CHARACTERS = 24_000
W4 = {"bits": 4, "group_size": 64}
# Ours by name and options; theirs as the modifiers of their library.
SCHEME = {
    "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64},
}
CASES: dict[str, dict[str, Any]] = {
    "gptq": W4,
    "awq": W4,
    "smoothquant": {},
    "sparsegpt": {"sparsity": 0.5},
    "wanda": {"sparsity": 0.5},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peer", help="the Python of llm-compressor's environment")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--samples", type=int, default=16, help="windows of 512 tokens")
    parser.add_argument("--sides", nargs="+", default=["luthier", "peer"], choices=["luthier", "peer"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--work", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(Path(given.work))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, given.samples)
        print("| method | side | seconds | peak GB | perplexity |\n|---|---|--:|--:|--:|")
        for method in given.only:
            for side in given.sides:
                found = measure(side, method, folder, given)
                quality = perplexity(folder / f"{method}-{side}", folder)
                cells = [f"{found['seconds']:.1f}", f"{found['peak'] / 1e9:.2f}", f"{quality:.2f}"]
                print(f"| {method} | {side} | {' | '.join(cells)} |", flush=True)


def prepare(folder: Path, samples: int) -> None:
    """The model in safetensors, and calibration windows (samples, 512) of Shakespeare's plays."""
    import luthier
    from luthier.compression.calibration_data import batches
    from luthier.data.load import load

    model, tokenizer = luthier.load("smollm2-135m", dtype="float32", device="cpu")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    windows = batches(load(str(DATA / "tinyshakespeare.txt")), tokenizer, samples=samples, max_length=512)
    ids = [row for batch in windows for row in batch["input_ids"].tolist()]
    (folder / "windows.json").write_text(json.dumps(ids))


def measure(side: str, method: str, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    job = {"side": side, "method": method, "folder": str(folder), "dtype": given.dtype}
    file = folder / "job.json"
    file.write_text(json.dumps(job))
    python = sys.executable if side == "luthier" else given.peer
    if python is None:
        raise SystemExit("Give --peer, the Python of llm-compressor's environment, or --sides luthier.")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [python, "-W", "ignore", __file__, "--work", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{side} failed at {method}:\n{done.stderr[-3000:]}")
    measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


def work(file: Path) -> None:
    """One measurement, in a process of its own; in the peer's environment nothing of ours is imported."""
    job = json.loads(file.read_text())
    folder = Path(job["folder"])
    ids = json.loads((folder / "windows.json").read_text())
    place = folder / f"{job['method']}-{job['side']}"
    run = with_luthier if job["side"] == "luthier" else with_peer
    seconds = run(job["method"], folder, ids, place, job["dtype"])
    print(json.dumps({"seconds": seconds, "peak": peak()}))


def peak() -> int:
    """Highest resident memory of this process; getrusage would count that of the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def with_luthier(method: str, folder: Path, ids: list[list[int]], place: Path, dtype: str) -> float:
    import torch

    import luthier

    model, _ = luthier.load(folder / "model", dtype=dtype, device="cpu")
    batches = [
        {"input_ids": part, "attention_mask": torch.ones_like(part)} for part in torch.tensor(ids).split(2)
    ]
    start = time.perf_counter()
    luthier.compress(model, luthier.method(method)(**CASES[method]), calibration=batches)
    seconds = time.perf_counter() - start
    luthier.save(model, place)
    return seconds


def with_peer(method: str, folder: Path, ids: list[list[int]], place: Path, dtype: str) -> float:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype)
    if not torch.accelerator.is_available():
        torch.Tensor.pin_memory = lambda tensor, *_: tensor  # its AWQ pins memory whether there is one or not
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    start = time.perf_counter()
    oneshot(
        model=model,
        dataset=data,
        recipe=modifiers(method),
        max_seq_length=512,
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
    )
    seconds = time.perf_counter() - start
    model.save_pretrained(place)
    return seconds


def modifiers(method: str) -> list[Any]:
    """llm-compressor's for a method, with the grid, damping and pattern that ours has."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
    from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    def groups() -> dict[str, Any]:
        return {"config_groups": {"group_0": {"targets": ["Linear"], **SCHEME}}, "ignore": ["lm_head"]}

    targets = {"targets": ["Linear"], "ignore": ["re:.*lm_head"]}
    made = {
        "gptq": lambda: [GPTQModifier(**groups(), actorder="static", dampening_frac=0.01)],
        "awq": lambda: [AWQModifier(duo_scaling=False), QuantizationModifier(**groups())],
        "smoothquant": lambda: [
            SmoothQuantModifier(smoothing_strength=0.5),
            QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
        ],
        "sparsegpt": lambda: [
            SparseGPTModifier(sparsity=0.5, block_size=128, dampening_frac=0.01, **targets)
        ],
        "wanda": lambda: [WandaPruningModifier(sparsity=0.5, **targets)],
    }
    found: list[Any] = made[method]()
    return found


def perplexity(place: Path, folder: Path) -> float:
    import luthier
    from luthier.evaluation.evaluate import evaluate

    text = folder / "text.txt"
    text.write_text((DATA / "wikitext2_valid.txt").read_text(encoding="utf-8")[:CHARACTERS], encoding="utf-8")
    _, tokenizer = luthier.load(folder / "model", dtype="float32", device="cpu")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place, dtype="float32").eval()
    return float(evaluate(model, str(text), ("perplexity",), tokenizer=tokenizer).metrics["perplexity"].value)


if __name__ == "__main__":
    main()
