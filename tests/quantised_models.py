"""The tiny models with a base in 4 bits: as the loader gives it, and in integers of our own layers."""

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import tiny
import torch
from transformers import PreTrainedModel

import luthier
from luthier.compression.compress import compress
from luthier.models import structure

Make = Callable[[], PreTrainedModel]


@cache
def _folder(make: Make) -> tuple[tempfile.TemporaryDirectory, str]:
    """The folder, which lives as long as the process, and the model's task."""
    folder = tempfile.TemporaryDirectory(prefix="luthier-tiny-")
    model = make()
    model.save_pretrained(folder.name)
    tiny.tokenizer().save_pretrained(folder.name)
    return folder, structure.task(model) or "causal"


def folder(make: Make) -> Path:
    """Where the model lies, with its tokenizer and in full precision."""
    return Path(_folder(make)[0].name)


def load(make: Make, quantization: str | None = "nf4-dq", dtype: str = "float32") -> PreTrainedModel:
    place, task = _folder(make)
    options = {"task": task, "dtype": dtype, "device": "cpu", "quantization": quantization}
    return luthier.load(place.name, **options)[0].eval()


def rounded(make: Make, dtype: str = "float32", **options) -> PreTrainedModel:
    """Rounded to the nearest integer, with scales and zero points for each row."""
    model = make().to(getattr(torch, dtype))
    compress(model, luthier.method("peqa")(**options))
    return model
