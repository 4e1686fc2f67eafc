"""A partly tuned model saved as its changed weights only.

The file is safetensors: the changed tensors under their names, and in its metadata the hash of all the
others. The others were frozen, so the hash is that of the base too, and a delta is never put on a base that
it does not fit.
"""

import hashlib
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from luthier.errors import ModelError
from luthier.tuning.groups import trained_names, untie_head

FORMAT = "luthier-delta-1"


def save_delta(model: nn.Module, path: Path | str, names: Collection[str] | None = None) -> None:
    """Write the weights called `names` (default: those that learn now) of `model` to `path`.

    Raises:
        ModelError: nothing learns.
    """
    changed = set(trained_names(model) if names is None else names)
    if not changed:
        raise ModelError(
            "No weight of the model learns: there is nothing to save.", fix="Attach a method first."
        )
    tensors = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if n in changed}
    untied = str(not getattr(model.config, "tie_word_embeddings", False))
    metadata = {"format": FORMAT, "rest": rest_hash(model, changed), "untied": untied}
    save_file(tensors, path, metadata)


def load_delta(model: nn.Module, path: Path | str) -> nn.Module:
    """Put the weights of a delta file on its base model, in place.

    Raises:
        ModelError: the file is no delta, names weights that the model lacks, or belongs to another base.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ModelError(f"{path} is not a delta file.", fix=f"Expected the metadata format: {FORMAT}.")
        if metadata["untied"] == "True" and model.config.tie_word_embeddings:
            untie_head(model)
        parameters = dict(model.named_parameters())
        names = set(file.keys())
        unknown = sorted(names - set(parameters))
        if unknown:
            raise ModelError(f"{path} holds weights that the model lacks, such as {unknown[0]}.")
        if rest_hash(model, names) != metadata["rest"]:
            raise ModelError(
                f"{path} belongs to another base: the weights that it does not hold differ.",
                fix="Load the model that was tuned.",
            )
        with torch.no_grad():
            for name in names:
                parameters[name].copy_(file.get_tensor(name))
    return model


def rest_hash(model: nn.Module, changed: Collection[str]) -> str:
    """Hash of the names and bytes of all parameters that are not in `changed`."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name not in changed:
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
