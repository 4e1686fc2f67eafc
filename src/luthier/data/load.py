"""From files to canonical rows, with an account of every record: used, repaired, skipped or rejected."""

import hashlib
import json
import os
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from luthier import checks
from luthier.data import formats
from luthier.data.reading import Raw, read, resolve
from luthier.data.rows import Reject, Row
from luthier.data.spec import DataSpec
from luthier.errors import DataError, did_you_mean

PEEK = 200  # rows that detection looks at
_SPACE = re.compile(r"\s+")


@dataclass
class Fault:
    """One rejected record: where it stood, its code, the reason."""

    where: str
    code: str
    reason: str


@dataclass
class DataReport:
    """The account of a load: each record read is used, rejected, left out, dropped or beyond the limit.

    Attributes:
        files: files (or the Hub id) that gave records.
        format: format seen or asked for; `type` is the canonical type of the rows.
        read: records of the files. rows: canonical rows that came out.
        noted: code -> records repaired or remarked (W_CTRL, E_STEP, E_ROLE, E_GOLD, S_SKIP).
        rejected: code -> records set aside. faults: the first 20 of them.
        duplicates: rows that are exact copies of an earlier one. dropped: those that were removed.
        skipped: rows at the beginning that were left out as the spec asks.
        leaked: rows whose prompt is in the evaluation data, None where none was given.
        unused: columns of the file that no field of ours reads.
    """

    files: list[str] = field(default_factory=list)
    format: str = ""
    type: str = ""
    conversational: bool = False
    read: int = 0
    rows: int = 0
    noted: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    rejected_file: str | None = None
    duplicates: int = 0
    dropped: int = 0
    skipped: int = 0
    leaked: int | None = None
    unused: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        """One sentence for the terminal."""
        shape = "conversational " if self.conversational and self.type != "messages" else ""
        text = f"{self.rows} rows of {shape}{self.type} from {self.read} records, read as {self.format}"
        if self.skipped:
            text += f"; the first {self.skipped} are left out"
        counts = self.noted | self.rejected
        if counts:
            text += "; " + ", ".join(f"{n} {code}" for code, n in sorted(counts.items()))
        if self.rejected_file:
            text += f"; rejected records are in {self.rejected_file}"
        if self.unused:
            text += f"; columns not used: {', '.join(self.unused)}"
        return text


@dataclass
class Loaded:
    """Canonical rows of one type (`luthier.data.rows`), each with its `origin` {file, line}."""

    records: list[Row]
    type: str
    report: DataReport
    spec: DataSpec

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the rows without their origins."""
        digest = hashlib.sha256(self.type.encode())
        for row in self.records:
            digest.update(canonical(row))
        return digest.hexdigest()

    def where(self, index: int) -> str:
        origin = self.records[index]["origin"]
        return f"{origin['file']}:{origin['line']}"


def canonical(row: Row) -> bytes:
    """A row without its origin as bytes: what duplicates and fingerprints compare."""
    plain = {key: value for key, value in row.items() if key != "origin"}
    return json.dumps(plain, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n"


def load(
    spec: DataSpec | str | Path,
    *,
    eval_path: DataSpec | Loaded | str | Path | None = None,
    rejected_file: Path | None = None,
) -> Loaded:
    """Read, detect, convert and check a data set.

    Args:
        spec: what to read; a plain path is read with the defaults.
        eval_path: held-out data (read or not yet); training rows whose prompt is in it leak, and are
            refused (strict) or set aside (quarantine).
        rejected_file: where quarantined records go; by default beside the data.

    Raises:
        DataError: missing, empty or unknown data, a bad record under `strict`, or too many under
            `quarantine`. The message names file and line.
    """
    spec = DataSpec.model_validate(spec) if not isinstance(spec, DataSpec) else spec
    raws = list(read(spec))
    if not raws:
        raise DataError(f"{spec.path} has no record.")
    report = DataReport(read=len(raws), files=list(dict.fromkeys(raw.file for raw in raws)))
    report.format = _format(raws, spec)
    report.type = formats.FORMATS[report.format].type
    report.unused = _unused(raws, spec, report.format)
    held_out = None
    if eval_path is not None:
        held = eval_path if isinstance(eval_path, Loaded) else load(eval_path)
        held_out = {prompt_key(row) for row in held.records}
    records, set_aside = _convert(raws, spec, report, held_out)
    if set_aside:
        report.rejected_file = str(_write_rejected(set_aside, spec, rejected_file))
    _enough(report, spec)
    if spec.skip and not records:
        raise DataError(
            f"Nothing of {spec.path} is left: skip: {spec.skip} leaves out all of its {report.skipped} good "
            "records.",
            fix="Write a smaller skip.",
        )
    report.conversational = formats.one_kind(records) == "conversational"
    report.rows = len(records)
    _prove(report, spec)
    return Loaded(records, report.type, report, spec)


def _format(raws: list[Raw], spec: DataSpec) -> str:
    """The format asked for, or the one detected on the first rows, which 95 % of them must fit."""
    seen = [raw.row for raw in raws if raw.fault is None and isinstance(raw.row, dict)][:PEEK]
    if not seen:
        first = raws[0]
        raise DataError(
            f"{spec.path} has no readable record; the first is {first.where}: "
            + (first.fault[1] if first.fault else f"{type(first.row).__name__}, not an object with fields")
            + ".",
            fix='A record is an object with fields, such as {"prompt": "...", "completion": "..."}.',
        )
    columns = {key for row in seen for key in row}
    for ours, theirs in spec.columns.items():
        if theirs not in columns:
            fix = did_you_mean(theirs, [str(c) for c in columns])
            raise DataError(f"{spec.path} has no column '{theirs}' (mapped to {ours}).", fix=fix)
    if spec.format != "auto":
        return spec.format
    rows = [formats.rename(row, spec.columns) for row in seen]
    try:
        # What is mapped by hand decides alone, where it is a whole format.
        mapped = [{key: row[key] for key in spec.columns if key in row} for row in rows]
        return formats.detect(mapped) if spec.columns else formats.detect(rows)
    except DataError as error:
        if spec.columns:
            return formats.detect(rows)
        example = json.dumps(seen[0], ensure_ascii=False, default=str)
        shown = example if len(example) <= 300 else example[:300] + "..."
        message = f"{raws[0].file}: {error.message} The first row is {shown}."
        raise DataError(message, fix=error.fix) from error


def _unused(raws: list[Raw], spec: DataSpec, format: str) -> list[str]:
    """Columns that no converter reads: found by converting with and without each."""
    sample = [
        formats.rename(r.row, spec.columns) for r in raws if r.fault is None and isinstance(r.row, dict)
    ][:5]
    unused = []
    for column in sorted(
        {key for row in sample for key, value in row.items() if value not in (None, "", [])}
    ):
        if all(_outcome(row, format, spec) == _outcome(row, format, spec, column) for row in sample):
            unused.append(column)
    return unused


def _outcome(row: Row, format: str, spec: DataSpec, without: str | None = None) -> Any:
    try:
        return formats.convert({k: v for k, v in row.items() if k != without}, format, spec, [])
    except Reject as reject:
        return reject.code, reject.reason


def _convert(
    raws: list[Raw], spec: DataSpec, report: DataReport, held_out: set[str] | None
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Canonical rows, and what is set aside; counts go into the report."""
    records: list[Row] = []
    set_aside: list[dict[str, Any]] = []
    noted: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    seen: set[bytes] = set()
    report.leaked = None if held_out is None else 0
    for raw in raws:
        if spec.limit is not None and len(records) >= spec.limit:
            break
        notes: list[str] = []
        try:
            rows = _take(_rows(raw, report.format, spec, notes), spec, report, seen)
            if held_out is not None and any(prompt_key(row) in held_out for row in rows):
                report.leaked = (report.leaked or 0) + 1
                if not spec.allow_leakage:
                    raise Reject("W_LEAK", "its prompt is in the evaluation data too")
        except Reject as reject:
            if spec.on_bad == "strict":
                raise DataError(
                    f"{raw.where}: {reject.reason} ({reject.code}).", fix=_remedy(reject)
                ) from None
            rejected[reject.code] += 1
            if len(report.faults) < 20:
                report.faults.append(Fault(raw.where, reject.code, reject.reason))
            set_aside.append({"line": raw.line, "code": reject.code, "reason": reject.reason, "row": raw.row})
            continue
        noted.update(set(notes))
        records += [row | {"origin": {"file": raw.file, "line": raw.line}} for row in rows]
    report.noted, report.rejected = dict(noted), dict(rejected)
    return records[: spec.limit], set_aside


def _take(rows: list[Row], spec: DataSpec, report: DataReport, seen: set[bytes]) -> list[Row]:
    """The rows that are used: no copies that are to be dropped, and none of those to be left out.

    What is left out has been seen: with `skip: n, duplicates: drop` no row is one of the first n.
    """
    taken = []
    for row in rows:
        key = hashlib.sha256(canonical(row)).digest()
        copy = key in seen
        seen.add(key)
        report.duplicates += copy
        if copy and spec.duplicates == "drop":
            report.dropped += 1
        elif report.skipped < spec.skip:
            report.skipped += 1
        else:
            taken.append(row)
    return taken


def _rows(raw: Raw, format: str, spec: DataSpec, notes: list[str]) -> list[Row]:
    if raw.fault is not None:
        raise Reject(*raw.fault)
    row = formats.rename(raw.row, spec.columns) if isinstance(raw.row, dict) else raw.row
    return formats.convert(row, format, spec, notes)


def _remedy(reject: Reject) -> str:
    if reject.code == "W_LEAK":
        return "Write on_bad: quarantine to leave such records out, or allow_leakage: true to keep them."
    return "Correct the record, or write on_bad: quarantine to set bad records aside and go on."


def _write_rejected(set_aside: list[dict[str, Any]], spec: DataSpec, target: Path | None) -> Path:
    """Write the rejected records beside the data, or in the current folder where that is not possible."""
    if target is None:
        place = resolve(spec)
        name = f"{place.name.split('.')[0] if place else spec.path.replace('/', '--')}.rejected.jsonl"
        folder = (place if place.is_dir() else place.parent) if place else Path()
        target = (folder if os.access(folder, os.W_OK) else Path()) / name
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(item, ensure_ascii=False, default=str) for item in set_aside)
    target.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")
    return target


def _enough(report: DataReport, spec: DataSpec) -> None:
    bad = sum(report.rejected.values())
    counts = ", ".join(f"{n} {code}" for code, n in sorted(report.rejected.items()))
    first = f"; the first is {report.faults[0].where}: {report.faults[0].reason}" if report.faults else ""
    if bad == report.read or report.read == report.noted.get("S_SKIP"):
        raise DataError(f"No record of {spec.path} can be used ({counts or 'all skipped'}){first}.")
    share = bad / report.read
    if share > spec.max_bad:
        raise DataError(
            f"{bad} of {report.read} records of {spec.path} are bad ({counts}), {share:.1%} and more than "
            f"{spec.max_bad:.0%}{first}. They are in {report.rejected_file}.",
            fix="Correct them, map the columns, or raise max_bad.",
        )


def _prove(report: DataReport, spec: DataSpec) -> None:
    bad = sum(report.rejected.values())
    tolerance = 0 if spec.on_bad == "strict" else f"{spec.max_bad:.0%} of {report.read}"
    checks.record("data", "format", True, report.format, detail=report.line())
    checks.record("data", "bad records", True, bad, tolerance)
    if report.leaked is not None:
        kept = report.leaked if spec.allow_leakage else 0
        detail = f"{report.leaked} found, " + ("kept" if spec.allow_leakage else "none left")
        checks.record("data", "train/test leakage", True, kept, None if spec.allow_leakage else 0, detail)


def prompt_key(row: Row) -> str:
    """What identifies the question of a row: its prompt without case and spacing (for text, the text)."""
    if "messages" in row:
        asked: Any = row["messages"][:-1]
    else:
        asked = row.get("prompt", row.get("text", row.get("chosen")))
    if isinstance(asked, list):
        asked = "\n".join(f"{m['role']}: {m['content']}" for m in asked)
    asked = f"{asked}\n{row['text_pair']}" if row.get("text_pair") else asked
    return _SPACE.sub(" ", str(asked)).strip().casefold()


def leaks(train: list[Row], held_out: list[Row]) -> list[int]:
    """Indices of training rows whose prompt is in the held-out rows too."""
    known = {prompt_key(row) for row in held_out}
    return [index for index, row in enumerate(train) if prompt_key(row) in known]
