"""The kinds of stage, one file each: `run(stage, context) -> StageResult`.

A stage writes its artefacts into `context.work`; the runner makes the folder whole and writes the manifest.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class StageResult:
    """What a stage hands to the runner for its manifest.

    Attributes:
        metrics: {name: {value, low, high, n}} of an evaluation, {name: number} of training.
        history: the trainer's log.
        details: anything else worth reading: steps, placement, settings that were chosen.
        left: (model, tokenizer, train) that `Context.lend` gave, whose weights are now the stage's artefact.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    trainable: int | None = None
    total: int | None = None
    left: tuple[Any, Any, bool] | None = None


def find(kind: str) -> Callable[..., StageResult]:
    """The function that runs a stage of that kind."""
    return importlib.import_module(f"luthier.recipe.stages.{kind}").run
