"""Checkpoints list their files with checksums, and are held to them before training goes on from one.

Without this a byte that the disk lost in the weights or in the optimiser's state is taken up in silence.
"""

import json
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from luthier import files
from luthier.errors import ModelError, TrainingError
from luthier.models import sources


def seal(folder: Path) -> None:
    """Write the record of a finished checkpoint: every file with its size and SHA-256."""
    record = {"files": files.listing(folder, folder.rglob("*"))}
    (folder / sources.RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")


def require_whole(folder: Path) -> None:
    """Hold a checkpoint against its record; one of another program's making has none and is taken as it is.

    Raises:
        TrainingError: a file is missing or is not as it was written.
    """
    try:
        listed = sources.record(folder).get("files", {})
    except ModelError as error:
        raise TrainingError(error.message, fix=_way_on(folder)) from error
    if found := files.damage(folder, listed):
        path, how = found
        raise TrainingError(f"{path} {how}.", fix=_way_on(folder))


def _way_on(folder: Path) -> str:
    """What to do about a damaged checkpoint: go on from the one before it, or start again."""
    beside = folder.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    earlier = [path for path in beside if _step(path) < _step(folder)]
    goes_on = f"go on from {max(earlier, key=_step).name}" if earlier else "start again from the beginning"
    return f"Delete the folder {folder} to {goes_on}."


def _step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdigit() else 0
