"""Luthier: tune, compress and align language models, every method of the field composable in one recipe.

Importing this package is cheap: names below load what they need (torch, peft, ...) on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from luthier.taxonomy import find as method
from luthier.taxonomy import methods

if TYPE_CHECKING:
    from luthier.acceleration.accelerate import accelerate
    from luthier.alignment.trainer import trainer
    from luthier.compression.compress import compress
    from luthier.evaluation.evaluate import evaluate
    from luthier.models.loading import load
    from luthier.models.saving import save
    from luthier.recipe.compare import compare
    from luthier.recipe.race import race
    from luthier.recipe.runner import run
    from luthier.tuning.attach import attach

__version__ = "0.1.0"

_LAZY = {
    "accelerate": "luthier.acceleration.accelerate",
    "load": "luthier.models.loading",
    "save": "luthier.models.saving",
    "compress": "luthier.compression.compress",
    "attach": "luthier.tuning.attach",
    "trainer": "luthier.alignment.trainer",
    "evaluate": "luthier.evaluation.evaluate",
    "run": "luthier.recipe.runner",
    "compare": "luthier.recipe.compare",
    "race": "luthier.recipe.race",
}

__all__ = [
    "__version__",
    "accelerate",
    "attach",
    "compare",
    "compress",
    "evaluate",
    "load",
    "method",
    "methods",
    "race",
    "run",
    "save",
    "trainer",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'luthier' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
