"""Adapters of a tiny model on disk, as if trained: what a fusion starts from."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import small_training as training
import torch

from luthier import method
from luthier.tuning.attach import attach
from luthier.tuning.hooks import save_adapter


def save(model: Any, name: str, folder: Path | str, seed: int = 1, **options: Any) -> str:
    """Train nothing, but disturb an adapter and save it; the folder."""
    torch.manual_seed(seed)
    adapted = training.disturb(attach(model, method(name)(**options)), 0.2, seed=seed)
    save_adapter(adapted, folder)
    return str(folder)


@cache
def pfeiffer(build: Any, count: int = 2) -> list[str]:
    """Folders of `count` serial adapters on the model that `build` makes, kept while the process runs."""
    root = Path(tempfile.mkdtemp())
    options = {"placement": "pfeiffer", "bottleneck_dim": 4}
    return [save(build(), "serial", root / str(i), seed=i + 1, **options) for i in range(count)]
