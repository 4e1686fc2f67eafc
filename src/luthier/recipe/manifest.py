"""What a stage leaves on disk: its folder, which appears whole or not at all, and its manifest.

    runs/<name>/02-tune/            the finished stage: manifest.json and its artefacts
    runs/<name>/02-tune.partial/    the stage in work: started.json, checkpoints/, artefacts so far
    runs/<name>/02-tune.old/        the former result, only while the new one takes its place

A manifest holds everything that the result depends on (`inputs`: the contents of data and model files, the
stage's settings, the output of the stage before, library versions, the seed) and everything that came out.
A stage whose inputs are the same and whose artefacts are unharmed need not run again.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from luthier import files
from luthier.errors import ResourceError

LIBRARIES = ("luthier", "torch", "transformers", "peft", "trl")


@dataclass
class Manifest:
    """What went into a stage and what came out of it; `manifest.json` holds the same fields.

    Attributes:
        stage: kind ('tune', 'evaluate', 'export'); `name` is the user's, or the kind.
        config: the stage's settings as in the recipe, defaults filled in.
        inputs: contents that it read: 'model', 'data', 'upstream' ..., each with a 'sha256'.
        metrics: {name: {value, low, high, n}} of an evaluation, {name: number} of training.
        checks: the proofs that were made (`luthier.checks.Check.as_dict`).
        history: the trainer's log, one entry a logging step.
        seconds: wall time of the stage, earlier interrupted sessions included.
        peak_memory_bytes: peak resident memory of the process during the stage.
        artefacts: {path in the stage's folder: {sha256, bytes}}.
        artefact_bytes: size of the model or adapter that the stage made.
    """

    stage: str
    name: str
    config: dict[str, Any]
    inputs: dict[str, Any]
    versions: dict[str, str]
    seed: int | None
    status: str = "done"
    metrics: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    sessions: int = 1
    peak_memory_bytes: int = 0
    peak_memory_exact: bool = True
    peak_cuda_bytes: int = 0
    trainable: int | None = None
    total: int | None = None
    artefacts: dict[str, dict[str, Any]] = field(default_factory=dict)
    artefact_bytes: int = 0
    started: str = ""
    finished: str = ""

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Manifest":
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in record.items() if key in known})

    def identity(self) -> dict[str, Any]:
        """What decides whether the stage must run again."""
        return {
            "stage": self.stage,
            "config": self.config,
            "inputs": self.inputs,
            "versions": self.versions,
            "seed": self.seed,
        }

    def output_hash(self) -> str:
        """The hash by which a later stage knows this one's output: identity and artefacts."""
        hashes = {path: entry["sha256"] for path, entry in self.artefacts.items()}
        return hash_json({"identity": self.identity(), "artefacts": hashes})


class StageFolder:
    """One stage's place in the run folder, through work, interruption and completion."""

    def __init__(self, run: Path, number: int, name: str):
        self.label = f"{number:02d}-{name}"
        self.final = run / self.label
        self.partial = run / f"{self.label}.partial"
        self.old = run / f"{self.label}.old"

    def recover(self) -> None:
        """Finish or undo a replacement that was cut off, so that `final` is a whole state again."""
        if (self.partial / "manifest.json").exists():
            self._swap()
        elif self.old.exists() and not self.final.exists():
            self.old.rename(self.final)
        _remove(self.old)

    def manifest(self) -> Manifest | None:
        """The manifest of the finished stage, or None."""
        record = read_json(self.final / "manifest.json")
        return Manifest.from_dict(record) if record else None

    def begin(self, identity: dict[str, Any], resume: bool = True) -> "Session":
        """Open the folder of work; what an interrupted session with the same inputs left is kept."""
        started = read_json(self.partial / "started.json")
        if not (resume and started and started["identity"] == identity):
            _remove(self.partial)
            self.partial.mkdir(parents=True)
            started = {"identity": identity, "seconds": 0.0, "sessions": 0, "session_started": 0.0}
        checkpoints = sorted((self.partial / "checkpoints").glob("checkpoint-*"), key=_modified)
        if checkpoints:
            # Work after the last checkpoint is lost, so the time up to that checkpoint is what it took.
            started["seconds"] += max(0.0, _modified(checkpoints[-1]) - started["session_started"])
        started["sessions"] += 1
        started["session_started"] = time.time()
        write_json(self.partial / "started.json", started)
        return Session(self.partial, started["seconds"], started["sessions"], bool(checkpoints))

    def discard(self) -> None:
        """Throw away what an interrupted session left."""
        _remove(self.partial)

    def publish(self, manifest: Manifest) -> None:
        """Make the work the stage's result. The manifest is the sign of completeness: it comes last."""
        write_json(self.partial / "manifest.json", manifest.as_dict())
        self._swap()

    def copy(self, other: Path) -> None:
        """Lay the finished stage folder `other` ready as this stage's result; `recover` puts it in place.

        Files are linked where possible: nobody writes into a finished folder, so they cost no disk twice.
        """
        _remove(self.partial)
        skip = shutil.ignore_patterns("manifest.json")
        shutil.copytree(other, self.partial, copy_function=_link, ignore=skip)
        write_json(self.partial / "manifest.json", read_json(other / "manifest.json"))

    def _swap(self) -> None:
        _remove(self.partial / "checkpoints")
        (self.partial / "started.json").unlink(missing_ok=True)
        if self.final.exists():
            _remove(self.old)
            self.final.rename(self.old)
        self.partial.rename(self.final)
        _remove(self.old)


@dataclass(frozen=True)
class Session:
    """A stage in work: its folder, and what earlier interrupted sessions spent on it."""

    folder: Path
    seconds_before: float
    number: int
    has_checkpoint: bool


def record_artefacts(folder: Path, names: tuple[str, ...] = ("model", "adapter", "prompt")) -> files.Listing:
    """The files in the artefact folders of `folder`, with size and checksum."""
    return files.listing(folder, (path for name in names for path in (folder / name).rglob("*")))


def damage(folder: Path, manifest: Manifest) -> str | None:
    """How the artefacts in `folder` differ from those recorded, in words, or None."""
    found = files.damage(folder, manifest.artefacts)
    return f"{found[0].relative_to(folder).as_posix()} {found[1]}" if found else None


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Why a stage must run again: what differs between two identities, in words."""
    before, after = _flat(old), _flat(new)
    reasons = []
    for key in sorted(before.keys() | after.keys()):
        one, two = before.get(key), after.get(key)
        if one == two:
            continue
        section, _, rest = key.partition(".")
        if section == "inputs":
            name = rest.removesuffix(".sha256")
            reasons.append(f"{name.replace('_', ' ')} changed" if rest.endswith(".sha256") else "")
        elif section == "versions":
            reasons.append(f"{rest} {one} → {two}")
        elif section == "config":
            reasons.append(f"{rest}: {_short(one)} → {_short(two)}")
        else:
            reasons.append(f"{key}: {_short(one)} → {_short(two)}")
    named = list(dict.fromkeys(reason for reason in reasons if reason))
    return named or (["its inputs changed"] if reasons else [])


def versions() -> dict[str, str]:
    """The versions that results depend on, read without importing."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


_hashes: dict[tuple[str, int, int], str] = {}


def hash_once(path: Path) -> str:
    """`files.hash_file`, read once in a process while the file's size and time stay the same."""
    stat = path.stat()
    key = (os.path.realpath(path), stat.st_size, stat.st_mtime_ns)
    if key not in _hashes:
        _hashes[key] = files.hash_file(path)
    return _hashes[key]


def hash_files(paths: list[Path], root: Path) -> str:
    """One hash of several files: of their contents and their names relative to `root`."""
    return hash_json({os.path.relpath(path, root): hash_once(path) for path in sorted(paths)})


def hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically: a reader sees the old content or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False, default=str)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def read_json(path: Path) -> Any:
    """The content of a JSON file, or None where there is none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


_held: set[str] = set()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; the system frees it when the process ends, however it ends.

    A record lock (`lockf`), not `flock`: data-loading workers are forked, and a fork would keep an flock
    after its parent is killed.

    Raises:
        ResourceError: another run works in the folder; names its process.
    """
    path = folder / ".lock"
    key = os.path.realpath(path)
    message = f"Another run is working in {folder}"
    fix = "Wait for it to end, or write elsewhere with --output."
    if key in _held:  # a record lock does not keep out its own process
        raise ResourceError(f"{message} (in this process).", fix=fix)
    with path.open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise ResourceError(f"{message} (process {file.read().strip() or '?'}).", fix=fix) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        _held.add(key)
        try:
            yield
        finally:
            _held.discard(key)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found.update(_flat(inner, f"{prefix}.{key}" if prefix else str(key)))
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _modified(path: Path) -> float:
    return path.stat().st_mtime


def _remove(path: Path) -> None:
    """Make a folder vanish at once: a half-removed one must not be taken for an interrupted stage."""
    trash = path.with_name(f".{path.name}.trash")
    shutil.rmtree(trash, ignore_errors=True)
    if path.exists():
        path.rename(trash)
        shutil.rmtree(trash)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
