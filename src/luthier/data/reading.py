"""Containers: from a path or a Hub id to raw records, each with the file and line it came from.

A record that cannot be read (broken UTF-8, a torn line, a row with too many cells) is yielded with its
fault, so that the caller decides; what makes a whole file unreadable raises `DataError`.
"""

import csv
import gzip
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.data.spec import DataSpec
from luthier.errors import DataError, nearest

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_TRAIN = {"train", "training"}
_HELD_OUT = {"test", "valid", "validation", "val", "dev", "eval", "heldout"}
_NUMBER = re.compile(r"[-+]?[0-9.]+")


@dataclass(frozen=True)
class Raw:
    """One record as read. `line` counts `unit`s; `fault` is (code, reason) of an unreadable one."""

    row: Any
    file: str
    line: int
    unit: str = "line"
    fault: tuple[str, str] | None = None

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}" if self.unit == "line" else f"{self.file}, {self.unit} {self.line}"


def resolve(spec: DataSpec) -> Path | None:
    """The file or folder that a spec names, or None for a Hub id.

    Raises:
        DataError: there is no such file or folder and the name cannot be a Hub id.
    """
    path = Path(spec.path).expanduser()
    candidates = [path] if path.is_absolute() or spec.base is None else [path, spec.base / path]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    looks_like_file = _suffix(path) in SUFFIXES or path.is_absolute() or spec.path.startswith((".", "~"))
    if not looks_like_file and _HUB_ID.fullmatch(spec.path):
        return None
    looked = " or ".join(str(candidate.absolute()) for candidate in candidates)
    raise DataError(f"There is no data file or folder {looked}.", fix=_near_files(candidates))


def _near_files(candidates: list[Path]) -> str:
    for candidate in candidates:
        if candidate.parent.is_dir():
            names = [p.name for p in candidate.parent.iterdir() if p.is_dir() or _suffix(p) in SUFFIXES]
            if close := nearest(candidate.name, names):
                return f"Did you mean {' or '.join(str(candidate.parent / name) for name in close)}?"
            return f"The folder {candidate.parent.absolute()} exists; check the file's name."
    return f"The folder {candidates[0].absolute().parent} does not exist either; check the path."


def files(spec: DataSpec, place: Path) -> list[Path]:
    """The data files that `place` stands for, sorted.

    Raises:
        DataError: an unknown container, an empty folder, or a folder that holds training and test files.
    """
    if place.is_file():
        if _suffix(place) not in SUFFIXES:
            raise DataError(
                f"{place} has a suffix of no kind of data file that can be read.",
                fix=f"Convert it to one of {', '.join(SUFFIXES)}, each also with .gz.",
            )
        return [place]
    found = sorted(
        p
        for p in place.rglob("*")
        if p.is_file()
        and _suffix(p) in SUFFIXES
        and not any(part.startswith((".", "_")) for part in p.relative_to(place).parts)
        and ".rejected." not in p.name
    )
    if not found:
        raise DataError(
            f"The folder {place} holds no data file.", fix=f"Known suffixes are {', '.join(SUFFIXES)}."
        )
    marks = {path: _split_words(path.relative_to(place)) for path in found}
    if spec.split is not None:
        picked = [path for path, words in marks.items() if spec.split.lower() in words]
        if not picked:
            names = ", ".join(str(p.relative_to(place)) for p in found[:8])
            raise DataError(
                f"No file of {place} is named after split '{spec.split}'.", fix=f"It holds {names}."
            )
        return picked
    train, test = (
        next((p for p, words in marks.items() if words & kind), None) for kind in (_TRAIN, _HELD_OUT)
    )
    if train is not None and test is not None:
        raise DataError(
            f"The folder {place} holds both {train.name} and {test.name}; reading them together would train "
            "on the test data.",
            fix="Write split: train, or name one file.",
        )
    return found


def _split_words(path: Path) -> set[str]:
    return set(re.split(r"[^a-z]+", str(path).lower()))


def _suffix(path: Path) -> str:
    return (Path(path.stem) if path.suffix.lower() == ".gz" else path).suffix.lower()


def read(spec: DataSpec) -> Iterator[Raw]:
    """The records of everything that a spec names, in the order of the files.

    Raises:
        DataError: nothing is there, or a file cannot be read at all.
    """
    place = resolve(spec)
    if place is None:
        yield from _hub(spec)
    elif place.is_dir() and (place / "state.json").is_file() and (place / "dataset_info.json").is_file():
        from datasets import load_from_disk

        yield from _table(load_from_disk(str(place)), str(place))
    else:
        for path in files(spec, place):
            yield from read_file(path, spec)


def read_file(path: Path, spec: DataSpec) -> Iterator[Raw]:
    """The records of one file."""
    suffix = _suffix(path)
    if suffix == ".parquet":
        yield from _parquet(path)
        return
    content = _bytes(path)
    if suffix in (".jsonl", ".ndjson"):
        yield from _json_lines(content, str(path))
    elif suffix == ".json":
        yield from _json(content, str(path))
    elif suffix in (".csv", ".tsv"):
        yield from _delimited(_decode(content, path), str(path), "\t" if suffix == ".tsv" else None, spec)
    else:
        yield from _plain(_decode(content, path), str(path), spec)


def _bytes(path: Path) -> bytes:
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}.", fix="Check that the file is whole.") from error
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(
            f"{path} is UTF-16, not UTF-8.", fix=f"Convert it: iconv -f UTF-16 -t UTF-8 {path.name} > new."
        )
    if not content.strip():
        raise DataError(f"{path} is empty.", fix="Check the path, or the program that wrote the file.")
    return content.removeprefix(b"\xef\xbb\xbf")


def _decode(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: byte {error.start} (0x{content[error.start]:02x}) is not UTF-8.",
            fix=f"If the file is Latin-1, convert it: iconv -f LATIN1 -t UTF-8 {path.name} > new.",
        ) from error


# JSON --------------------------------------------------------------------------------------------------


def _json_lines(content: bytes, file: str) -> Iterator[Raw]:
    lines = content.split(b"\n")
    torn = len(lines) if lines[-1] else 0  # the number of a last line that no newline ends
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield Raw(json.loads(line.decode("utf-8")), file, number)
        except UnicodeDecodeError as error:
            reason = f"byte {error.start} of the line (0x{line[error.start]:02x}) is not UTF-8"
            yield Raw(_shown(line), file, number, fault=("E_UTF8", reason))
        except (json.JSONDecodeError, RecursionError) as error:
            at = f" at column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else ""
            reason = "the last line is torn off" if number == torn else "the line is not JSON"
            yield Raw(_shown(line), file, number, fault=("E_JSON", reason + at))


def _shown(line: bytes) -> str:
    return line.decode("utf-8", errors="backslashreplace")


def _json(content: bytes, file: str) -> Iterator[Raw]:
    try:
        value = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError:
        _decode(content, Path(file))  # raises, with the line
        return
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:  # one object a line, under the wrong suffix
            yield from _json_lines(content, file)
            return
        raise DataError(
            f"{file}:{error.lineno} is not JSON at column {error.colno}: {error.msg}.",
            fix="A .json file holds one array of objects; one object a line is .jsonl.",
        ) from error
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        yield Raw(row, file, number, "record")


# Tables ------------------------------------------------------------------------------------------------


def _delimited(text: str, file: str, delimiter: str | None, spec: DataSpec) -> Iterator[Raw]:
    csv.field_size_limit(sys.maxsize)
    if delimiter is None:
        head = text[: text.find("\n")] if "\n" in text else text
        delimiter = (
            ";" if head.count(";") > head.count(",") else "," if head.count(",") else "\t" * ("\t" in head)
        )
        delimiter = delimiter or ","
    cells = _tsv_rows(text) if delimiter == "\t" else _csv_rows(text, delimiter, file)
    first = next(cells, None)
    if first is None:
        raise DataError(f"{file} is empty.")
    named = spec.header if spec.header is not None else _is_header(first[1])
    names = [name.strip() for name in first[1]] if named else [str(i) for i in range(len(first[1]))]
    if len(set(names)) < len(names):
        raise DataError(f"{file}:1 names a column twice: {', '.join(names)}.", fix="Rename one of them.")
    for number, row in cells if named else _again(first, cells):
        if len(row) != len(names):
            reason = f"the line has {len(row)} cells and the first has {len(names)}"
            yield Raw(row, file, number, fault=("E_KEYS", reason))
        else:
            yield Raw(dict(zip(names, row, strict=True)), file, number)


def _again(first: Any, rest: Iterable[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _is_header(cells: list[str]) -> bool:
    """Names are short, not numbers, and differ. A sentence or a label in the first line is data."""
    names = [cell.strip() for cell in cells]
    return (
        all(name and len(name) <= 40 and not _NUMBER.fullmatch(name) for name in names)
        and len({name.lower() for name in names}) == len(names)
        and not any(name.count(" ") > 3 for name in names)
    )


def _csv_rows(text: str, delimiter: str, file: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        start = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{file}:{start} is not CSV: {error}.", fix="A quote inside a quoted cell is doubled."
            ) from error
        if row:
            yield start, row


def _tsv_rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """Tab-separated lines. Quotes count only where they enclose a whole cell: corpora hold them as text."""
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if line.strip():
            yield number, [_unquoted(cell) for cell in line.split("\t")]


def _unquoted(cell: str) -> str:
    if len(cell) >= 2 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', ""):
        return cell[1:-1].replace('""', '"')
    return cell


def _parquet(path: Path) -> Iterator[Raw]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield Raw(row, str(path), number, "row")
    except (pyarrow.ArrowInvalid, OSError) as error:
        text = str(error).splitlines()[0]
        raise DataError(f"{path} is not a whole Parquet file: {text}.", fix="Write it again.") from error
    if not number:
        raise DataError(f"{path} is empty.")


def _plain(text: str, file: str, spec: DataSpec) -> Iterator[Raw]:
    text = text.replace("\r\n", "\n")
    if spec.separator is not None:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                prompt, found, completion = line.partition(spec.separator)
                fault = None if found else ("E_KEYS", f"the line has no separator {spec.separator!r}")
                yield Raw({"prompt": prompt, "completion": completion}, file, number, fault=fault)
        return
    if spec.rows == "file":
        yield Raw({"text": text}, file, 1)
        return
    line = r"[^\n]*\S[^\n]*"
    pattern = line if spec.rows == "line" else rf"{line}(?:\n{line})*"
    at, counted = 1, 0
    for match in re.finditer(pattern, text):
        at += text.count("\n", counted, match.start())
        counted = match.start()
        yield Raw({"text": match.group()}, file, at)


# The Hub -----------------------------------------------------------------------------------------------


def _hub(spec: DataSpec) -> Iterator[Raw]:
    from datasets import Dataset, load_dataset

    try:
        found = load_dataset(spec.path, name=spec.subset, split=spec.split, revision=spec.revision)
    except Exception as error:  # the Hub client raises a dozen kinds, all meaning that nothing was loaded
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"There is no file or folder '{spec.path}' here, and as a data set of the Hub it cannot be "
            f"loaded: {reason.rstrip('.')}.",
            fix="Check the name, the subset and the network (HF_HUB_OFFLINE), or give a file.",
        ) from error
    if not isinstance(found, Dataset):
        raise DataError(
            f"The data set {spec.path} has the splits {', '.join(found)}.",
            fix=f"Write split: {next(iter(found))}.",
        )
    yield from _table(found, spec.path)


def _table(dataset: Any, name: str) -> Iterator[Raw]:
    if not hasattr(dataset, "column_names") or isinstance(dataset.column_names, dict):
        raise DataError(
            f"{name} holds several splits: {', '.join(dataset)}.", fix="Name the folder of one split."
        )
    for number, row in enumerate(dataset, 1):
        yield Raw(row, name, number, "row")
