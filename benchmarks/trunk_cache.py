"""How much faster is training with a frozen trunk when the trunk's activations are kept on disk?

    python benchmarks/trunk_cache.py [--rows 32] [--epochs 4]

Trains the same rows for a few epochs without and with `cache_trunk`, on an encoder (MiniLM, SST-2, eight
times as many rows) and a decoder (SmolLM2-135M, GSM8K). Prints the wall time of the training with everything
in it, how much faster the first epoch (which fills the cache) and the later ones are, the size of the cache,
and the largest difference between the losses.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from luthier import attach, load, method
from luthier.data.load import load as read
from luthier.data.packing import PaddedCollator
from luthier.data.tokenize import encode, encode_classification
from luthier.resources import folder_bytes, release_memory
from luthier.tuning import hooks, trunk_cache

DATA = Path(__file__).parents[1] / ".." / "shared" / "data"


class Epochs(TrainerCallback):
    """The wall time of each epoch, in seconds."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self._start)


def minilm(rows):
    model, tokenizer = load("minilm", task="classification", num_labels=2, dtype="float32", train=True)
    spec = {"path": str(DATA / "sst2_train.tsv"), "columns": {"text": "0", "label": "1"}, "limit": 8 * rows}
    return model, tokenizer, encode_classification(read(spec), tokenizer, max_length=64).dataset


def smollm2(rows):
    model, tokenizer = load("smollm2-135m", train=True)
    spec = {"path": str(DATA / "gsm8k_train.jsonl"), "limit": rows}
    return model, tokenizer, encode(read(spec), tokenizer, max_length=512).dataset


CASES = {
    "MiniLM, linear_probe": (minilm, "linear_probe", {}, 16),
    "MiniLM, top_layers k=2": (minilm, "top_layers", {"k": 2}, 16),
    "SmolLM2-135M, top_layers k=2": (smollm2, "top_layers", {"k": 2}, 4),
    "SmolLM2-135M, top_layers k=8": (smollm2, "top_layers", {"k": 8}, 4),
}


def measure(build, name, options, batch_size, cached, rows, epochs):
    """Losses, seconds of each epoch, seconds of the whole training."""
    set_seed(0)
    model, tokenizer, dataset = build(rows)
    model = attach(model, method(name)(**options, cache_trunk=cached))
    watch = Epochs()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, per_device_train_batch_size=batch_size, num_train_epochs=epochs, use_cpu=True,
            report_to="none", logging_steps=1, disable_tqdm=True, save_strategy="no",
            remove_unused_columns=False,
        )  # fmt: skip
        trainer = Trainer(
            model, args, train_dataset=dataset, data_collator=PaddedCollator(tokenizer.pad_token_id),
            callbacks=[*hooks.callbacks(model), watch],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        total = time.perf_counter() - start
    return [e["loss"] for e in trainer.state.log_history if "loss" in e], watch.seconds, total


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=4)
    given = parser.parse_args()
    print("| case | without, s | with, s | faster | first epoch | later epochs | cache, MB | difference |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for title, (build, name, options, batch_size) in CASES.items():
        with tempfile.TemporaryDirectory() as cache:
            os.environ["LUTHIER_TRUNK_CACHE"] = cache
            settings = (build, name, options, batch_size)
            plain, plain_epochs, plain_total = measure(*settings, False, given.rows, given.epochs)
            release_memory()
            cached, epochs, total = measure(*settings, True, given.rows, given.epochs)
            size = folder_bytes(trunk_cache.cache_root()) / 1e6
        release_memory()
        difference = max(abs(a - b) for a, b in zip(plain, cached, strict=True))
        later = sum(plain_epochs[1:]) / sum(epochs[1:])
        print(
            f"| {title} | {plain_total:.1f} | {total:.1f} | {plain_total / total:.2f}x | "
            f"{plain_epochs[0] / epochs[0]:.2f}x | {later:.2f}x | {size:.1f} | {difference:.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
