"""Encoded data on disk, under a key of everything that it depends on: the rows, the template, the
tokenizer, the settings, and the source of the code that encodes (so that a change of it is a new key)."""

import hashlib
import inspect
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from datasets import Dataset, load_from_disk
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

log = logging.getLogger("luthier.data")


def folder() -> Path:
    return Path(os.environ.get("LUTHIER_CACHE", "~/.cache/luthier")).expanduser() / "data"


@cache
def code_version(*modules: ModuleType) -> str:
    """A hash of the modules' source."""
    return hashlib.sha256("".join(inspect.getsource(module) for module in modules).encode()).hexdigest()


def tokenizer_key(tokenizer: Any) -> str:
    """A hash of all that decides the ids of a text, from the vocabulary to the chat template."""
    digest = hashlib.sha256(type(tokenizer).__name__.encode())
    if tokenizer.is_fast:
        digest.update(tokenizer.backend_tokenizer.to_str().encode())
    else:
        digest.update(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    digest.update(json.dumps(special, sort_keys=True).encode())
    digest.update(json.dumps(tokenizer.chat_template, sort_keys=True).encode())
    return digest.hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of `datasets` inside: what takes no time needs none."""
    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


def key(fingerprint: str, tokenizer: Any, code: str, settings: dict[str, Any]) -> str:
    """The key of an encoding: rows, tokenizer with template, code, settings."""
    parts = [fingerprint, tokenizer_key(tokenizer), code, json.dumps(settings, sort_keys=True, default=str)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def kept(name: str, build: Callable[[], tuple[Dataset, dict[str, Any]]]) -> tuple[Dataset, dict[str, Any]]:
    """The data set and its record under `name`, built and stored where they are not there yet.

    A folder appears whole or not at all; a cache that cannot be written is done without.
    """
    place = folder() / name
    if (place / "record.json").is_file():
        return load_from_disk(str(place)), json.loads((place / "record.json").read_text())
    dataset, record = build()
    if not len(dataset):
        return dataset, record  # `datasets` saves an empty one and then cannot read it
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{name}-"))
        with quiet():
            dataset.save_to_disk(str(temporary))
        (temporary / "record.json").write_text(json.dumps(record))
        os.replace(temporary, place)
    except OSError as error:  # a full or read-only disk, or another process that was quicker
        log.info("the encoded data are not cached: %s", error)
        if "temporary" in locals():
            shutil.rmtree(temporary, ignore_errors=True)
    return dataset, record
