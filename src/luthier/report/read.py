"""A run or comparison folder as plain records, read from its JSON files only.

A report is asked for at any moment: while a stage is at work, after one failed, or years later without the
models. Whatever is missing is left empty; only a folder that is no run at all is refused.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.errors import DataError

_STAGES = "[0-9][0-9]*-*"
FINISHED = ("done", "unchanged", "shared")


@dataclass
class Stage:
    """One stage of a run.

    Attributes:
        label: its folder's name; `name` is the recipe's, `kind` is tune, evaluate, export, ...
        status: done, running, failed, interrupted or pending.
        taken_over: where its result is from, if it did not run.
        config: its settings from the manifest, or from the recipe where it has not ended.
        manifest: what the runner wrote about it; empty until it is done.
        history: the trainer's log; of an unfinished stage, that of its last checkpoint.
        checkpoint: the step that an unfinished stage can go on from.
    """

    label: str
    name: str
    kind: str
    status: str
    taken_over: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    checkpoint: int | None = None

    @property
    def metrics(self) -> dict[str, "Metric"]:
        return read_metrics(self.manifest.get("metrics"))


@dataclass(frozen=True)
class Metric:
    """A measured number with its 95% confidence interval and the number of examples, where known."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    @property
    def has_interval(self) -> bool:
        return self.low is not None and self.high is not None


@dataclass
class Run:
    """One run: its recipe and stages in order."""

    folder: Path
    name: str
    status: str
    error: str
    recipe: dict[str, Any]
    record: dict[str, Any]
    stages: list[Stage]

    def of_kind(self, kind: str) -> list[Stage]:
        return [stage for stage in self.stages if stage.kind == kind]


def read_run(folder: Path) -> Run:
    """The run in `folder`.

    Raises:
        DataError: the folder is not a run's.
    """
    record = _json(folder / "run.json")
    if record is None and not any(folder.glob(_STAGES)):
        raise DataError(
            f"{folder} is not a run folder: it holds neither run.json nor a stage's folder.",
            fix="Give the folder that `luthier run` or `luthier compare` wrote, such as runs/tickets.",
        )
    record = record if isinstance(record, dict) else {}
    recipe = record["recipe"] if isinstance(record.get("recipe"), dict) else {}
    return Run(
        folder=folder,
        name=str(record.get("name") or recipe.get("name") or folder.resolve().name),
        status=str(record.get("status") or "unknown"),
        error=str(record.get("error") or ""),
        recipe=recipe,
        record=record,
        stages=_read_stages(folder, record, recipe),
    )


def read_comparison(folder: Path) -> dict[str, Any]:
    """The content of `comparison.json`.

    Raises:
        DataError: there is none, or it holds no rows.
    """
    record = _json(folder / "comparison.json")
    if not isinstance(record, dict) or not isinstance(record.get("rows"), list):
        raise DataError(
            f"{folder} is not a comparison folder: its comparison.json is missing or holds no rows.",
            fix="Give the folder that `luthier compare` wrote, such as runs/tickets-compare.",
        )
    return record


def read_metrics(record: Any) -> dict[str, Metric]:
    """{name: Metric} of a manifest's or row's `metrics`: plain numbers or {value, low, high, n}."""
    found = {}
    for name, entry in (record or {}).items() if isinstance(record, dict) else ():
        parts = entry if isinstance(entry, dict) else {"value": entry}
        value = parts.get("value")
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[str(name)] = Metric(float(value), parts.get("low"), parts.get("high"), parts.get("n"))
    return found


def _read_stages(folder: Path, record: dict[str, Any], recipe: dict[str, Any]) -> list[Stage]:
    """The stages that run.json lists; without it, those whose folders are there."""
    configs = dict(enumerate(map(_settings, recipe.get("stages") or []), start=1))
    entries = record.get("stages")
    if not isinstance(entries, list):
        labels = {
            p.name.removesuffix(".partial") for p in folder.glob(_STAGES) if p.is_dir() and p.suffix != ".old"
        }
        entries = [{"folder": label} for label in sorted(labels)]
    return [
        _read_stage(folder, entry, configs.get(i, {}))
        for i, entry in enumerate(entries, start=1)
        if isinstance(entry, dict) and entry.get("folder")
    ]


def _settings(stage: Any) -> dict[str, Any]:
    """The settings of a stage as a recipe writes it: a mapping of one key, its kind."""
    if isinstance(stage, dict) and len(stage) == 1:
        stage = next(iter(stage.values()))
    return stage if isinstance(stage, dict) else {}


def _read_stage(folder: Path, entry: dict[str, Any], config: dict[str, Any]) -> Stage:
    label = str(entry["folder"])
    final, partial = folder / label, folder / f"{label}.partial"
    status = str(entry.get("status") or ("done" if final.exists() else "running"))
    if status == "pending" or (status in FINISHED and not final.exists()):
        status = "pending"
    manifest: dict[str, Any] = (_json(final / "manifest.json") if status in FINISHED else None) or {}
    name = label.partition("-")[2] or label
    return Stage(
        label=label,
        name=str(entry.get("name") or manifest.get("name") or name),
        kind=str(entry.get("kind") or manifest.get("stage") or name),
        status="done" if status in FINISHED else status,
        taken_over=str(entry.get("reason") or "") if status in ("unchanged", "shared") else "",
        config=manifest.get("config") or config,
        manifest=manifest,
        checks=[c for c in manifest.get("checks") or entry.get("checks") or [] if isinstance(c, dict)],
        history=manifest.get("history") or ([] if status in FINISHED else _checkpoint_history(partial)),
        predictions=_lines(final / "predictions.jsonl") if status in FINISHED else [],
        checkpoint=None if status in FINISHED else max(_checkpoints(partial), default=None),
    )


def _checkpoints(path: Path) -> dict[int, Path]:
    """{step: state of the training} of the checkpoints of a stage at work."""
    states = path.glob("checkpoints/checkpoint-*/trainer_state.json")
    return {int(state.parent.name.rpartition("-")[2]): state for state in states}


def _checkpoint_history(path: Path) -> list[dict[str, Any]]:
    """The log in the newest checkpoint of a stage at work."""
    found = _checkpoints(path)
    record = _json(found[max(found)]) if found else None
    return record.get("log_history", []) if isinstance(record, dict) else []


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file; a last line that is only half written is left out."""
    found = []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    for line in text.split("\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found
