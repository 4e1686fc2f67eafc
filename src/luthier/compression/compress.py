"""`luthier.compress`: one method or several, in one pass over the blocks of a model."""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from luthier.compression.block import Block
from luthier.compression.calibration import Batch, calibrate, chain, choose_layers
from luthier.compression.method import OneShot
from luthier.compression.records import Record
from luthier.errors import DataError, MethodError
from luthier.models import structure

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
            that go block by block and stand side by side share one pass; of these the last that rounds does
            so, earlier ones only prepare (SmoothQuant, then GPTQ).
        calibration: `{"input_ids": (batch, seq), "attention_mask": (batch, seq)}`, mask 0 for padding.
            Methods that look at weights alone need none.
        folder: where finished blocks are kept, so that a pass that was killed goes on; None keeps nothing.

    Returns:
        A record of each layer, or each unit of a structured method.

    Raises:
        MethodError: a layer that cannot be compressed so, or methods that do not go together.
        DataError: calibration data is missing, empty, or has token ids that the model does not know.
        ModelError: the model is not a chain of blocks.
    """
    if isinstance(model, PeftModel):
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
            found += together[0].compress(model, _required(together[0], batches))
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
                f"{type(config).__module__.rpartition('.')[2]} is no compression method.",
                fix="`luthier methods compression` lists them.",
            )
        if found and isinstance(config, OneShot) and isinstance(found[-1][0], OneShot):
            found[-1].append(config)
        else:
            found.append([config])
    return found


def _one_pass(
    model: nn.Module, configs: list[OneShot], batches: list[Batch], folder: Path | None
) -> list[Record]:
    layers = structure.linears(model)
    chosen = [choose_layers(model, c.targets, c.exclude) for c in configs]
    for config, names in zip(configs, chosen, strict=True):
        for name in sorted(names):
            config.check(name, layers[name])
    rounding = [i for i, c in enumerate(configs) if c.quantizes]
    if any(c.needs_data for c in configs):
        batches = _required(next(c for c in configs if c.needs_data), batches)

    def change(block: Block) -> Iterable[Record]:
        for index, (config, names) in enumerate(zip(configs, chosen, strict=True)):
            block.choose(names)
            config.prepare(block)
            if not config.quantizes or index == rounding[-1]:
                yield from config.change(block)

    if not batches:
        return [record for block in chain(model) for record in change(block)]
    identity = f"{configs} {_digest(batches)} {_digest([dict(model.named_parameters())])}"
    return calibrate(model, batches, change, folder=folder, identity=identity)


def _required(config: Any, batches: list[Batch]) -> list[Batch]:
    if not batches:
        raise DataError(
            f"{type(config).__module__.rpartition('.')[2]} needs calibration data, and there is none.",
            fix="Give some thousand tokens of text like that which the model will see (calibration).",
        )
    return batches


def _checked(model: nn.Module, calibration: Iterable[Batch]) -> list[Batch]:
    rows = model.get_input_embeddings().weight.shape[0]
    batches = []
    for index, batch in enumerate(calibration):
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        if ids.dim() != 2 or not ids.numel() or (mask is not None and mask.shape != ids.shape):
            raise DataError(
                f"Calibration batch {index} has input_ids of shape {tuple(ids.shape)}"
                + ("" if mask is None else f", attention_mask {tuple(mask.shape)}")
                + ".",
                fix="Give both as (batch, seq).",
            )
        if int(ids.max()) >= rows or int(ids.min()) < 0:
            raise DataError(
                f"Calibration batch {index} has token ids that the model ({rows} tokens) has not."
            )
        batches.append({key: value for key, value in batch.items() if key in ("input_ids", "attention_mask")})
    return batches


def _digest(tensors: Sequence[dict[str, Tensor]]) -> str:
    """Of the bits of tensors and their names."""
    found = hashlib.sha256()
    for group in tensors:
        for name, tensor in group.items():
            found.update(
                f"{name} {tuple(tensor.shape)} {int(torch.hash_tensor(tensor.detach()).item())}".encode()
            )
    return found.hexdigest()
