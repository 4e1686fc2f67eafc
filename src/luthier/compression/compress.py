"""`luthier.compress`: one method or several, in one pass over the blocks of a model."""

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from luthier.compression.block import Block
from luthier.compression.calibration import Batch, calibrate, chain, choose_layers
from luthier.compression.method import OneShot
from luthier.compression.records import Record
from luthier.errors import DataError, MethodError
from luthier.models import structure
from luthier.models.bits import digest
from luthier.resources import replaces_weights, trim_heap
from luthier.tuning.soft_prompts import learnt_positions

log = logging.getLogger("luthier.compression")


def compress(
    model: nn.Module,
    method: Any,
    *,
    calibration: Iterable[Batch] = (),
    folder: Path | str | None = None,
) -> list[Record]:
    """Compress a model in place.

    Args:
        model: of transformers; an adapter must be merged before.
        method: config of a compression method (`luthier.method("gptq")(bits=4)`), or a list of them. Those
            that go block by block and stand side by side share one pass. A layer is rounded by the last of
            them that names it; earlier ones only prepare it (SmoothQuant, then GPTQ).
        calibration: `{"input_ids": (batch, seq), "attention_mask": (batch, seq)}`, mask 0 for padding.
            Methods that look at weights alone need none. Those that look at the loss of a model that is not
            causal want `labels`, (batch,) or (batch, seq), beside.
        folder: where finished blocks are kept, so that a pass that was killed goes on; None keeps nothing.

    Returns:
        A record of each layer, or each unit of a structured method.

    Raises:
        MethodError: a layer that cannot be compressed so, or methods that do not go together.
        DataError: calibration data is missing, empty, too long, or has token ids that the model has not.
        ModelError: the model is not a chain of blocks.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()) or hasattr(model, "peft_config"):
        raise MethodError(
            "The model carries an adapter, whose base would change under it.",
            fix="Merge it first (luthier.tuning.merge, or the stage `- export: {merge: true}`).",
        )
    configs = list(method) if isinstance(method, list | tuple) else [method]
    batches = _checked(model, calibration)
    found: list[Record] = []
    for together in _passes(configs):
        if isinstance(together[0], OneShot):
            found += _one_pass(model, together, batches, None if folder is None else Path(folder))
        else:
            wants = getattr(together[0], "wants_data", True)
            found += together[0].compress(model, _required(together[0], batches) if wants else batches)
    return found


def _passes(configs: Sequence[Any]) -> list[list[Any]]:
    """Methods that share a pass, and those that work on their own, in order."""
    if not configs:
        raise MethodError(
            "No compression method is given.", fix="Give one, such as luthier.method('gptq')()."
        )
    found: list[list[Any]] = []
    for config in configs:
        if not hasattr(config, "compress") and not isinstance(config, OneShot):
            raise MethodError(
                f"{_title(config)} is no compression method.",
                fix="Give a config, as luthier.method('gptq')(); `luthier methods compression` lists them.",
            )
        if found and isinstance(config, OneShot) and isinstance(found[-1][0], OneShot):
            found[-1].append(config)
        else:
            found.append([config])
    return found


def _one_pass(
    model: nn.Module, configs: list[OneShot], batches: list[Batch], folder: Path | None
) -> list[Record]:
    chosen = [choose_layers(model, c.targets, c.exclude) for c in configs]
    for config, names in zip(configs, chosen, strict=True):
        for name in sorted(names):
            config.check(name, model.get_submodule(name))
    own = _shares(configs, chosen)
    _say_what_is_left(model)

    def change(block: Block) -> Iterable[Record]:
        for config, names, mine in zip(configs, chosen, own, strict=True):
            block.choose(names)
            config.prepare(block)
            if mine:
                block.choose(mine)
                yield from config.change(block)

    wanting = next((c for c in configs if c.wants_data), None)
    if wanting is None:
        records: list[Record] = []
        for block in chain(model):
            with replaces_weights(block.module):
                records += change(block)
            trim_heap()
        return records
    batches = _required(wanting, batches)
    identity = "" if folder is None else _identity(model, configs, batches)
    propagates = any(config.propagates for config in configs)
    return calibrate(model, batches, change, folder=folder, identity=identity, propagates=propagates)


def _shares(configs: Sequence[OneShot], chosen: Sequence[set[str]]) -> list[set[str]]:
    """Which layers each method changes itself: of those that round, the last that names a layer.

    Raises:
        MethodError: a method that only rounds is left nothing, or one prunes what was rounded before.
    """
    own: list[set[str]] = []
    for index, (config, names) in enumerate(zip(configs, chosen, strict=True)):
        later = [n for c, n in list(zip(configs, chosen, strict=True))[index + 1 :] if c.quantizes]
        mine = names.difference(*later) if config.quantizes else names
        if not mine and type(config).prepare is OneShot.prepare:
            raise MethodError(
                f"{_title(config)} is left nothing to do: a later method rounds all of its layers.",
                fix="Give one method that rounds, or let each name its own layers (targets).",
            )
        before = [n for c, n in zip(configs[:index], own, strict=True) if c.quantizes]
        if not config.quantizes and (lost := names.intersection(set().union(*before))):
            raise MethodError(
                f"{_title(config)} comes after a method that rounds {min(lost)} and could not change it.",
                fix="Put it first: zeros outlive the rounding that follows.",
            )
        own.append(mine)
    return own


def _say_what_is_left(model: nn.Module) -> None:
    """A warning where weights of the blocks lie in no linear layer, as those of stacked experts do."""
    inside = [p for block in chain(model) for p in block.module.parameters()]
    share = sum(p.numel() for p in inside if p.dim() > 2) / sum(p.numel() for p in inside)
    if share > 0.01:
        log.warning(
            "%.0f%% of the weights of the blocks are experts stacked in one tensor, no linear layers: "
            "they stay as they are",
            100 * share,
        )


def _title(config: Any) -> str:
    kind = type(config)
    if kind.__name__ == "Config":
        return kind.__module__.rpartition(".")[2]
    return getattr(config, "name", repr(config))


def _required(config: Any, batches: list[Batch]) -> list[Batch]:
    if not batches:
        raise DataError(
            f"{_title(config)} needs calibration data, and there is none.",
            fix="Give some thousand tokens of text like that which the model will see (calibration).",
        )
    return batches


def _checked(model: nn.Module, calibration: Iterable[Any]) -> list[Batch]:
    if isinstance(calibration, Mapping):
        calibration = [calibration]
    config: Any = structure.base(model).config
    longest = learnt_positions(model)[0] or getattr(config, "max_position_embeddings", None)
    rows = structure.embeddings(model).weight.shape[0]
    batches = []
    for index, batch in enumerate(calibration):
        ids, mask = _tensors(batch, index)
        least, most = int(ids.min()), int(ids.max())
        if least < 0 or most >= rows:
            raise DataError(
                f"Calibration batch {index} has ids {least} to {most}; the model knows 0 to {rows - 1}.",
                fix="Encode the text with the model's own tokenizer.",
            )
        if longest is not None and ids.shape[1] > longest:
            raise DataError(
                f"Calibration batch {index} is {ids.shape[1]} tokens long; the model takes {longest}.",
                fix=f"Cut the samples to {longest} tokens (max_length).",
            )
        parts = {"input_ids": ids, "attention_mask": mask, "labels": _labels(batch, index)}
        batches.append({name: tensor for name, tensor in parts.items() if tensor is not None})
    if batches and not any("attention_mask" not in b or b["attention_mask"].any() for b in batches):
        raise DataError(
            "All calibration tokens are padding: attention_mask is 0 everywhere.",
            fix="Give 1 for each token of the text and 0 for padding.",
        )
    return batches


def _tensors(batch: Any, index: int) -> tuple[Tensor, Tensor | None]:
    """Ids and mask of a batch."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.is_floating_point():
        raise DataError(
            f"Calibration batch {index} has no input_ids, a tensor of integers.",
            fix='Give a list of {"input_ids": (batch, seq), "attention_mask": (batch, seq)}.',
        )
    mask = batch.get("attention_mask")
    if ids.dim() != 2 or not ids.numel() or (mask is not None and mask.shape != ids.shape):
        raise DataError(
            f"Calibration batch {index} has input_ids of shape {tuple(ids.shape)}"
            + ("" if mask is None else f", attention_mask {tuple(mask.shape)}")
            + ".",
            fix="Give both as (batch, seq), with at least one token.",
        )
    return ids, mask


def _labels(batch: Mapping[str, Any], index: int) -> Tensor | None:
    """What a model that is not causal should say of each row, or of each token."""
    labels = batch.get("labels")
    shape = batch["input_ids"].shape
    if labels is not None and (not isinstance(labels, Tensor) or labels.shape not in (shape, shape[:1])):
        raise DataError(
            f"Calibration batch {index} has labels that are neither (batch,) nor (batch, seq).",
            fix=f"Give a tensor of shape {tuple(shape[:1])} or {tuple(shape)}, or leave labels out.",
        )
    return labels


def _identity(model: nn.Module, configs: Sequence[OneShot], batches: Sequence[Batch]) -> str:
    """Of methods with their options, the data and the model: whether a pass is the one that was begun."""
    found = hashlib.sha256()
    for config in configs:
        found.update(f"{type(config).__module__} {config}\n".encode())
    for tensors in [*batches, model.state_dict()]:
        for name, tensor in tensors.items():
            found.update(f"{name} {digest(tensor)}\n".encode())
    return found.hexdigest()
