"""Models and adapters saved as folders that `from_pretrained` and PEFT load, whole or not at all.

Beside the usual files lies `luthier.json`: checksums of all files, and for an adapter the fingerprint of the
base model that it was trained on. `luthier.models.loading` checks both.
"""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedTokenizerBase

import luthier
from luthier.errors import ModelError
from luthier.models import sources, structure
from luthier.resources import explain

log = logging.getLogger("luthier.models")

SAMPLES = 4096  # elements of each parameter that enter a fingerprint


def save(model: nn.Module, folder: Path | str, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
    """Write a whole model, or the adapter of a `PeftModel`, with generation config, tokenizer and template.

    The folder appears whole: it is written beside its place and moved there. A folder that we saved before
    is replaced; any other that is not empty is refused.

    Raises:
        ModelError: the folder holds other files, or the model's generation config is not valid.
        ResourceError: the folder cannot be written, or the disk is full.
    """
    folder = Path(folder).absolute()
    _require_free(folder)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        _write(model, draft)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(draft))
        content = json.dumps(_record(model, draft), indent=1)
        (draft / sources.RECORD).write_text(content, encoding="utf-8")
        _publish(draft, folder)
    except SafetensorError as error:  # safetensors reports a full disk as an error of its own
        raise explain(OSError(str(error)), folder) from error
    except OSError as error:
        raise explain(error, folder) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    log.info("saved %s", folder)
    return folder


def fingerprint(model: nn.Module) -> str:
    """A short text that tells whether two models have the same weights, whatever dtype they were loaded in.

    Two parts, "names-weights": of the names and shapes of the parameters, and of up to 4096 elements of each,
    rounded to bfloat16. Of a `PeftModel` it is the base's, as far as the adapter left it unchanged.
    """
    names, weights = hashlib.sha256(), hashlib.sha256()
    prefix = getattr(model.base_model, "prefix", None) if isinstance(model, PeftModel) else None
    for name, parameter in structure.base(model).named_parameters():
        if (prefix and prefix in name) or ".modules_to_save." in name:
            continue
        name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        names.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].to("cpu", torch.bfloat16).contiguous()
        weights.update(sample.view(torch.uint8).numpy().tobytes())
    return f"{names.hexdigest()[:12]}-{weights.hexdigest()[:20]}"


def check_files(folder: Path) -> None:
    """Prove that the weight files are whole, and that those which we saved are as we wrote them.

    Raises:
        ModelError: a file is missing, cut short or changed.
    """
    written = sources.record(folder).get("files", {})
    for path in sorted(folder.glob(sources.WEIGHTS)):
        try:
            with safe_open(str(path), framework="pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path} is damaged ({path.stat().st_size} bytes): {error}.", fix="Copy or save it again."
            ) from error
    for name, expected in written.items():
        path = folder / name
        if path.suffix != ".safetensors":
            continue
        if not path.is_file():
            raise ModelError(f"{path} is missing; {sources.RECORD} lists it.", fix="Copy or save it again.")
        size = path.stat().st_size
        if size != expected["bytes"] or hash_file(path) != expected["sha256"]:
            raise ModelError(
                f"{path} is not as it was saved: {size} bytes with another checksum than {sources.RECORD} "
                f"states ({expected['bytes']} bytes, {expected['sha256'][:12]}…).",
                fix=f"Copy or save it again; if it was changed on purpose, delete {folder / sources.RECORD}.",
            )


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_free(folder: Path) -> None:
    if folder.is_file():
        raise ModelError(f"{folder} is a file; a model is saved as a folder.", fix="Choose another name.")
    if not folder.is_dir():
        return
    ours = {sources.RECORD, *sources.record(folder).get("files", {})}
    others = sorted(p.name for p in folder.iterdir() if p.name not in ours)
    if others:
        raise ModelError(
            f"{folder} holds files that a model saved there would replace ({', '.join(others[:5])}).",
            fix="Choose a folder of its own, or empty this one.",
        )


def _write(model: nn.Module, draft: Path) -> None:
    if not isinstance(model, PeftModel):
        try:
            model.save_pretrained(str(draft))
        except ValueError as error:
            raise ModelError(f"The model cannot be saved: {error}") from error
        return
    config = model.peft_config[model.active_adapter]
    # A method whose initialisation changed the base (PiSSA) writes an adapter that fits the original base.
    if hasattr(config, "save_adapter"):
        config.save_adapter(model, draft)
    else:
        model.save_pretrained(str(draft))


def _record(model: nn.Module, draft: Path) -> dict[str, Any]:
    base = structure.base(model)
    record: dict[str, Any] = {"luthier": luthier.__version__, "class": type(base).__name__}
    record["task"] = structure.task(model)
    if isinstance(model, PeftModel):
        known = getattr(base, "luthier_origin", None)
        record["base"] = known or {"name": base.name_or_path, "fingerprint": fingerprint(model)}
        if record["task"] == "classification":
            record["id2label"] = base.config.id2label
    record["files"] = {
        path.name: {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        for path in sorted(draft.iterdir())
    }
    return record


def _publish(draft: Path, folder: Path) -> None:
    """Move the finished folder to its place; a former one is moved away first, and comes back on failure."""
    if not folder.is_dir():
        draft.rename(folder)
        return
    former = folder.with_name(f".{folder.name}.{os.getpid()}.former")
    folder.rename(former)
    try:
        draft.rename(folder)
    except OSError:
        former.rename(folder)
        raise
    shutil.rmtree(former, ignore_errors=True)
