"""LLM-QAT: train the rounded model to predict as the full one does, on text that the full one wrote.

Paper: Liu et al., 2023, "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models",
    arXiv 2305.17888.
Pick it when one-shot methods lose too much (4-bit weights with inputs of 8 bits or fewer, a cache in 4 bits)
    and there is time to train all weights; no data is needed.
Cost: 16 bytes a parameter with AdamW, and the full-precision model beside it; two forward passes and a
    backward pass over the text, and the writing of it, which takes longest.

Rounded are, with alpha = max |x| over a slice and n = 2^(b-1) - 1 codes on either side of zero,

    weights             Q(W) = (alpha / n) round(n W / alpha)     slice: a row, or a group of a row
    inputs of layers    the same                                  slice: a token
    keys and values     the same, of k and v as their layers give them, before positions turn them

Nothing is clipped: outliers count in language models. Scales are those of the moment; they are not learnt.
Gradients pass straight through (dL/dx = dL/dQ); with `ste_clip` only where |x| < ste_clip, as in the authors'
code with 2. All weights learn, in float32, by

    L = sum over positions of KL(p_full || p_rounded)  /  number of positions (or of rows: normalize_by)

which has the gradients of the paper's cross-entropy with the full model's predictions as labels. Text: each
starts with another token of the vocabulary, goes on with the likeliest 2 to 4, then is drawn from the whole
distribution; `calibration` data are taken in its place. Embeddings, norms and the head are not rounded.

Differs: scales of inputs, keys and values follow compressed-tensors (2^b - 1 levels over 2 alpha), so that
files say what was trained; at 4 bits this clips the largest by half a step. Texts are not spelt out and read
again between writing and training. The mean over positions is the default; the authors' sum over positions is
`normalize_by: sequence`. Their binary and ternary grids are left out.
"""

import copy
import logging
import math
import tempfile
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from luthier import checks
from luthier.alignment.defaults import arguments
from luthier.compression.calibration import Batch, choose_layers
from luthier.compression.grid import Scheme, require_divides
from luthier.compression.linear import dimensions, require_plain
from luthier.compression.own_words import AT_ONCE, windows, write
from luthier.compression.qat import Distilling, Rounding, bake, divergence, insert
from luthier.compression.records import Course, Record
from luthier.data.packing import PaddedCollator
from luthier.errors import DataError, MethodError
from luthier.models import structure
from luthier.options import option
from luthier.tuning.probe import evaluating

log = logging.getLogger("luthier.compression")

HELD_OUT = 16  # one window of so many, at least one, is kept to measure with
PROBED = 128  # tokens on which the output of every layer is compared


@dataclass
class Config:
    """Options of LLM-QAT."""

    bits: int = option(4, "bits of a weight", ge=2, le=8)
    group_size: int | None = option(
        None, "neighbours along the input that share a scale; null: the row", ge=1
    )
    activation_bits: int | None = option(8, "bits of a layer's inputs; null: floating point", ge=2, le=8)
    kv_bits: int | None = option(None, "bits of keys and values; null: floating point", ge=2, le=8)
    ste_clip: float | None = option(None, "no gradient for numbers of this size and above; null: all", gt=0)
    texts: int = option(2048, "texts that the model writes, where no data are given", ge=2)
    max_length: int = option(256, "tokens of such a text, and of a window for training", ge=8)
    learning_rate: float = option(2e-5, "its peak; it falls by a cosine", gt=0)
    epochs: float = option(1.0, "passes over the text", gt=0)
    batch_size: int = option(8, "windows of a step", ge=1)
    normalize_by: str = option("token", "what the loss is a mean over", choices=("token", "sequence"))
    training: dict = option({}, "more of transformers' TrainingArguments")
    seed: int = option(0, "of the text and of the training", ge=0)
    targets: list = option([], "linear layers to round, by name or end of name; empty: all of the blocks")
    exclude: list = option([], "linear layers that stay as they are, by name or end of name")

    needs_data: ClassVar[bool] = False

    @property
    def wants_data(self) -> bool:
        return self.needs_data

    @property
    def scheme(self) -> Scheme:
        return Scheme(self.bits, self.group_size, True, self.activation_bits)

    def course(self, length: int | None) -> Course:
        """Of the text that the model writes; given text has an unknown length, and is taken to be as long."""
        steps = math.ceil(self.texts / self.batch_size * self.epochs)
        written = 0 if length else math.ceil(self.texts / AT_ONCE) * self.max_length
        return Course(steps, self.batch_size, self.max_length, written=written)

    def compress(self, model: Any, batches: list[Batch]) -> list[Record]:
        """Train the model and leave quantised layers, in place.

        Args:
            batches: text to train on; empty: what the model writes.

        Raises:
            MethodError: no language model, or layers that cannot be rounded.
            DataError: the text does not fill two windows.
            TrainingError: the loss explodes.
        """
        if structure.task(model) != "causal":
            raise MethodError(
                f"{type(model).__name__} predicts no next tokens to train on.",
                fix="Use llm_qat on a language model, or a method without training, such as gptq.",
            )
        names = sorted(choose_layers(model, self.targets, self.exclude))
        for name in names:
            layer = model.get_submodule(name)
            require_plain(name, layer)
            require_divides(self.scheme, dimensions(layer)[1], name)
        rows = _given(batches) or windows(
            write(model, self.texts, self.max_length, seed=self.seed), self.max_length
        )
        learnt, held_out = _split(rows)
        teacher = copy.deepcopy(model).requires_grad_(False).eval()
        insert(model, names, Rounding(self.scheme, self.kv_bits, self.ste_clip, model.dtype))
        before, nearest = _errors(model, teacher, names, held_out), _mean(model, teacher, held_out)
        self._train(model, teacher, learnt)
        bake(model).eval()
        after, trained = _errors(model, teacher, names, held_out), _mean(model, teacher, held_out)
        _say(nearest, trained)
        return [Record(n, before[n], after[n], bits=self.bits, note=f"on {PROBED} tokens") for n in names]

    def _train(self, model: Any, teacher: nn.Module, rows: list[list[int]]) -> None:
        caches = model.config.use_cache
        with tempfile.TemporaryDirectory(prefix="luthier-qat-") as folder:
            given = {
                "output_dir": folder,
                "save_strategy": "no",
                "learning_rate": self.learning_rate,
                "lr_scheduler_type": "cosine",
                "num_train_epochs": self.epochs,
                "per_device_train_batch_size": self.batch_size,
                "seed": self.seed,
            }
            args = arguments(given | self.training, model)
            args.remove_unused_columns = False
            trainer = Distilling(
                model=model,
                args=args,
                train_dataset=[{"input_ids": row, "labels": row} for row in rows],
                data_collator=PaddedCollator(),
                teacher=teacher,
                per_row=self.normalize_by == "sequence",
            )
            try:
                trainer.train()
            finally:  # accelerate's autocast around the model's forward, and what the Trainer has set
                trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
                model.config.use_cache = caches
                model.zero_grad(set_to_none=True)


def _given(batches: list[Batch]) -> list[list[int]]:
    """The rows of calibration batches, without padding."""
    rows = []
    for batch in batches:
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
        rows += [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
    return [row for row in rows if row]


def _split(rows: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Rows to learn from, and a few to measure with."""
    count = max(1, len(rows) // HELD_OUT)
    if len(rows) < 2:
        raise DataError(
            f"There are {len(rows)} windows of text: one to learn from, one to measure with are the least.",
            fix="Raise texts, lower max_length, or give more calibration data.",
        )
    return rows[:-count], rows[-count:]


def _mean(model: Any, teacher: Any, rows: list[list[int]]) -> float:
    """Divergence of the model from the teacher, a mean over positions."""
    total, count = 0.0, 0
    with evaluating(model):
        for row in rows:
            ids = torch.tensor([row], device=model.device)
            total += float(divergence(model(input_ids=ids).logits[0], teacher(input_ids=ids).logits[0]))
            count += len(row)
    return total / count


def _errors(model: Any, teacher: Any, names: list[str], rows: list[list[int]]) -> dict[str, float]:
    """Squared error of each layer's output relative to the teacher's, each on its own inputs."""
    ids = torch.tensor([rows[0][:PROBED]], device=model.device)
    expected: dict[str, Tensor] = {}
    found: dict[str, float] = {}

    def keep(name: str) -> Any:
        return lambda _, __, output: expected.update({name: output})

    def compare(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            own = expected.pop(name).float()
            found[name] = float((output.float() - own).square().sum() / own.square().sum())

        return hook

    for each, make in ((teacher, keep), (model, compare)):
        handles = [each.get_submodule(name).register_forward_hook(make(name)) for name in names]
        try:
            with evaluating(each):
                each(input_ids=ids)
        finally:
            for handle in handles:
                handle.remove()
    return found


def _say(nearest: float, trained: float) -> None:
    checks.record(
        "end",
        "nearer to the full model than rounding to the nearest",
        trained < nearest,
        trained,
        nearest,
        "divergence a token, on text that was kept",
        refuse=False,
    )
