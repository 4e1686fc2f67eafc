"""Files listed with size and checksum when they are written, and held to the list before they are read.

Loads no torch: the runner lists artefacts before and after anything heavy is there.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Listing = dict[str, dict[str, Any]]
"""{path relative to the folder: {bytes, sha256}}."""


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listing(folder: Path, paths: Iterable[Path]) -> Listing:
    """The files among `paths`, which lie in `folder`, in the order of their names."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        for path in sorted(paths)
        if path.is_file()
    }


def damage(folder: Path, listed: Mapping[str, Mapping[str, Any]]) -> tuple[Path, str] | None:
    """The first file that is not as it was listed, and in words how it differs; None if all are whole."""
    for name, expected in listed.items():
        path = folder / name
        if not path.is_file():
            return path, "is missing"
        if (size := path.stat().st_size) != expected["bytes"]:
            return path, f"is not as it was saved: {size} bytes, not {expected['bytes']}"
        if hash_file(path) != expected["sha256"]:
            return path, "is not as it was saved: its checksum is another"
    return None
