"""Swap the quantised layers of a model for fast ones, in place, and back."""

import logging
from collections import Counter, defaultdict
from typing import TypeVar

from torch import nn

from luthier.acceleration.convert import convert, join
from luthier.acceleration.fast_linear import FastLinear
from luthier.compression.linear import quantized_layers

Model = TypeVar("Model", bound=nn.Module)
log = logging.getLogger("luthier.acceleration")

# Layers of one parent that read the same input: their rows are multiplied at once.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def accelerate(model: Model) -> Model:
    """Give a model fast layers in place of its quantised ones; returns the same model.

    The outputs stay what they were, up to rounding (see `luthier.acceleration.fast_linear`). A layer that no
    kernel takes stays as it is; the log says which, and why. Its state dict stays the same too.
    """
    kinds: Counter[str] = Counter()
    passed_over: Counter[str] = Counter()
    plain: defaultdict[str, list[str]] = defaultdict(list)
    for name, layer in quantized_layers(model).items():
        if isinstance(layer, FastLinear):
            continue
        made = convert(layer)
        if isinstance(made, str):
            plain[made].append(name)
            continue
        model.set_submodule(name, made)
        kinds[made.title] += 1
        passed_over[made.passed_over] += bool(made.passed_over)
    _join(model)
    if kinds:
        log.info("Fast layers: %s.", ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
    elif not plain:
        log.info("No layer to make fast: none is quantised, or all are fast already.")
    for reason, count in (+passed_over).items():
        log.info("%d of them have no better kernel on this machine (%s).", count, reason)
    for reason, names in plain.items():
        log.warning(
            "%d quantised layers stay plain (%s): %s%s.", len(names), reason, ", ".join(names[:4]),
            ", ..." if len(names) > 4 else "",
        )  # fmt: skip
    return model


def undo(model: Model) -> Model:
    """Give a model back the plain quantised layers that `accelerate` took, in place; returns the model."""
    for name, layer in quantized_layers(model).items():
        if isinstance(layer, FastLinear):
            model.set_submodule(name, layer.plain())
    return model


def _join(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for names in TOGETHER:
            parts = [getattr(parent, name, None) for name in names]
            if all(isinstance(part, FastLinear) for part in parts):
                join(parts)  # type: ignore[arg-type]
