"""What the page of a run shows, computed from its record: one function a section."""

import io
import math
import shlex
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from ruamel.yaml import YAML

from luthier import taxonomy
from luthier.errors import MethodError
from luthier.report import charts, compression, notices, wording
from luthier.report.predictions import Predictions, compare_predictions
from luthier.report.read import Metric, Run, Stage

# Curves in the order in which a reader wants them; entries that say nothing over time are left out.
_FIRST = ["loss", "learning_rate", "grad_norm"]
_NOT_CURVES = {
    "step", "epoch", "total_flos", "train_runtime", "train_loss", "train_samples_per_second",
    "train_steps_per_second", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second",
    "num_tokens",
}  # fmt: skip


# (title, field of the plan, field of the manifest, how it is written)
_QUANTITIES = (
    ("Peak memory", "memory_bytes", "peak_memory_bytes", wording.size),
    ("Wall time", "seconds", "seconds", wording.duration),
    ("Trainable parameters", "trainable", "trainable", wording.count),
    ("Artefact on disk", "artefact_bytes", "artefact_bytes", wording.size),
)


# Parts of a manifest's details that have a place of their own on the page.
_DATA = {"data": "trained on", "eval_data": "held out"}
_DONE_WITH = {"evaluate": "evaluated", "compress": "calibrated on"}
_SHOWN_ELSEWHERE = {"placement", "layers", "calibration_tokens", "bytes_before", *_DATA}


@dataclass(frozen=True)
class Headline:
    """One metric before and after, with its verdict in words."""

    name: str
    title: str
    sentence: str
    before: Metric | None
    after: Metric
    verdict: str
    tone: str  # good, bad, neutral
    chart: Markup


def page(run: Run) -> dict[str, Any]:
    """All values of the template `run.html.j2`."""
    before, after = before_and_after(run)
    return {
        "run": run,
        "summary": summary(run),
        "stop": stop(run),
        "headlines": headlines(before, after, first_alone(run, before, after)) if after else [],
        "notices": [
            (stage, notice) for stage in run.of_kind("tune") for notice in notices.read_curves(stage.history)
        ],
        "checks": check_lines(run),
        "stages": [stage_view(run, i) for i in range(len(run.stages))],
        "accounts": accounts(run),
        "compressions": compression.views(run),
        "curves": [(stage, stage_curves(stage)) for stage in run.of_kind("tune") if stage.history],
        "metrics": metrics_table(run),
        "predictions": example_pages(before, after),
        "costs": cost_rows(run),
        "estimates": estimates(run),
        "environment": environment(run),
        "inputs": inputs(run),
        "commands": commands(run),
        "recipe": recipe_text(run.recipe),
    }


def before_and_after(run: Run) -> tuple[Stage | None, Stage | None]:
    """The first and last evaluation on the same data as the last one; (None, stage) where it is alone."""
    done = [stage for stage in run.of_kind("evaluate") if stage.metrics]
    if not done:
        return None, None
    after = done[-1]
    same = [stage for stage in done if _data(stage) == _data(after)]
    return (same[0] if len(same) > 1 else None), after


def first_alone(run: Run, before: Stage | None, after: Stage | None) -> str:
    """Before what the only evaluation is, where the one after it has not ended; else ''."""
    if before is not None or after is None:
        return ""
    later = run.stages[run.stages.index(after) + 1 :]
    kind = next((stage.kind for stage in later if stage.kind != "evaluate"), "")
    return {"tune": "tuning", "compress": "compression", "export": "the export"}.get(kind, kind)


def headlines(before: Stage | None, after: Stage, first_before: str = "") -> list[Headline]:
    former = before.metrics if before else {}
    asked = [name for name in after.metrics if name in (after.config.get("metrics") or [])]
    found = []
    for name in asked or after.metrics:
        new = after.metrics[name]
        old = former.get(name)
        meaning = wording.meaning(name)
        verdict, tone = _verdict(name, old, new)
        if first_before:
            verdict = f"Measured before {first_before}; the evaluation after it has not ended."
        rows = [("before", old.value, old.low, old.high, "second")] if old else []
        rows.append(("after" if old else "result", new.value, new.low, new.high, "main"))
        finite = all(math.isfinite(row[1]) for row in rows)
        chart = charts.interval_track(
            rows,
            title=f"{meaning.title}: " + ", ".join(f"{r[0]} {wording.show(name, r[1])}" for r in rows),
            share=meaning.share,
            format_x=(lambda v: f"{100 * v:.0f}%") if meaning.share else wording.significant,
            width=260,
        )
        chart = chart if finite else Markup("")
        found.append(Headline(name, meaning.title, meaning.sentence, old, new, verdict, tone, chart))
    return found


def _verdict(name: str, old: Metric | None, new: Metric) -> tuple[str, str]:
    """How far it moved, and whether that is more than chance."""
    meaning = wording.meaning(name)
    if old is None:
        return "There is no evaluation before, so this says nothing about what the run changed.", "neutral"
    change = new.value - old.value
    if change == 0:
        return "Unchanged.", "neutral"
    if meaning.share:
        moved = f"{abs(100 * change):.1f} points {'higher' if change > 0 else 'lower'}"
    elif old.value:
        moved = f"{abs(change / old.value):.0%} {'higher' if change > 0 else 'lower'}"
    else:
        moved = f"{wording.significant(abs(change))} {'higher' if change > 0 else 'lower'}"
    if not (old.has_interval and new.has_interval):
        return f"{moved}; no interval was measured.", "neutral"
    assert old.low is not None
    assert old.high is not None
    assert new.low is not None
    assert new.high is not None
    if new.low <= old.high and old.low <= new.high:
        return f"{moved}, but the intervals overlap: it may be chance.", "neutral"
    better = (change > 0) == (meaning.better == "higher")
    return f"{moved}; the intervals lie apart.", "good" if better else "bad"


def summary(run: Run) -> str:
    """What was done, in one sentence."""
    model = run.recipe.get("model")
    name = model.get("name") if isinstance(model, dict) else model
    steps = []
    for stage in run.stages:
        if stage.kind == "tune":
            method = _name(stage.config.get("method")) or "a method"
            searched = _searches(method)
            text = f"given a prompt by {method}" if searched else f"tuned with {method}"
            objective = None if searched else _name(stage.config.get("objective"))
            text += f" ({objective})" if objective else ""
            steps.append(text + (f" on {_data(stage)}" if _data(stage) else ""))
        elif stage.kind == "compress":
            steps.append(f"compressed with {' and '.join(_methods(stage)) or 'a method'}")
        elif stage.kind == "evaluate":
            steps.append("evaluated")
        elif stage.kind == "export":
            steps.append(f"exported as {stage.config.get('format', 'a folder')}")
        else:
            steps.append(stage.kind)
    return f"{name or 'A model'}: {', then '.join(steps)}." if steps else str(name or "")


def stop(run: Run) -> dict[str, str] | None:
    """Of a run that did not end: where it stopped, what is kept, and what to type to go on."""
    if run.status not in ("failed", "interrupted"):
        return None
    at = next((stage for stage in run.stages if stage.status == run.status), None)
    kept = [stage.label for stage in run.stages if stage.status == "done"]
    words = [f"Done and kept: {', '.join(kept)}."] if kept else []
    if at is not None and at.checkpoint is not None:
        words.append(
            f"{at.label} goes on from its checkpoint at step {at.checkpoint}; with other settings it starts "
            "again."
        )
    elif at is not None:
        words.append(f"{at.label} starts again from its beginning.")
    return {
        "title": ("Interrupted" if run.status == "interrupted" else "The run failed")
        + (f" in {at.label}" if at is not None else ""),
        "kept": " ".join(words),
        "command": _going_on(run),
    }


def _going_on(run: Run) -> str:
    """The run's command without what would make it start from the beginning."""
    words = iter(shlex.split(_command(run)))
    kept = []
    for word in words:
        if word == "--from":
            next(words, None)
        elif word != "--force" and not word.startswith("--from="):
            kept.append(word)
    return shlex.join(kept)


def check_lines(run: Run) -> dict[str, Any]:
    """Every proof: failed ones first, the others in the order of the run."""
    lines = [
        {
            "passed": bool(check.get("passed")),
            "name": check.get("name", ""),
            "value": wording.plain(check.get("value")),
            "tolerance": wording.plain(check.get("tolerance")),
            "detail": check.get("detail") or "",
            "when": wording.WHEN.get(str(check.get("when")), check.get("when", "")),
            "stage": stage.label,
        }
        for stage in run.stages
        for check in stage.checks
    ]
    lines.sort(key=lambda line: line["passed"])
    failed = sum(not line["passed"] for line in lines)
    order = dict.fromkeys([*wording.WHEN.values(), *(line["when"] for line in lines)])
    groups = [(when, [line for line in lines if line["passed"] and line["when"] == when]) for when in order]
    groups = [(when, lines) for when, lines in groups if lines]
    return {"lines": lines, "groups": groups, "failed": failed, "passed": len(lines) - failed}


def _searches(method: str) -> bool:
    """Whether a method of that name searches a prompt; one that is not known here is taken to train."""
    try:
        return taxonomy.find(method, "tuning").searches
    except MethodError:
        return False


def stage_view(run: Run, i: int) -> dict[str, Any]:
    """One stage: title and paper of its methods, and its settings as (key, value)."""
    stage = run.stages[i]
    methods = _methods(stage) if stage.kind in ("tune", "compress") else []
    return {
        "stage": stage,
        "number": i + 1,
        "methods": [_title_and_paper(name, stage.kind) for name in methods],
        "size": compression.shrinking(run, stage) if stage.kind == "compress" else "",
        "settings": flat({k: v for k, v in stage.config.items() if k != "name"}),
        "details": flat({k: v for k, v in _details(stage).items() if k not in _SHOWN_ELSEWHERE}),
    }


def _title_and_paper(name: str, kind: str) -> tuple[str, str]:
    """Of a method that serves stages of a kind; one that is not known here has its name alone."""
    try:
        method = taxonomy.find(name, {"tune": "tuning", "compress": "compression"}[kind])
    except MethodError:
        return name, ""
    return method.title, method.paper


def accounts(run: Run) -> list[dict[str, Any]]:
    """What became of each stage's data; stages that read the same share one account."""
    found: list[dict[str, Any]] = []
    for stage in run.stages:
        for name, title in _DATA.items():
            record = _details(stage).get(name)
            if not isinstance(record, dict):
                continue
            title = _DONE_WITH.get(stage.kind, title) if name == "data" else title
            rows, spec = _account(record), stage.config
            if stage.kind == "compress":
                spec = stage.config.get("calibration") or {}
                rows += _windows(spec, _details(stage).get("calibration_tokens"))
            account = {"record": record, "title": title, "rows": rows}
            same = next((a for a in found if a.items() >= account.items()), None)
            if same is not None:
                same["stages"].append(stage.label)
                continue
            path = (spec.get(name) or {}).get("path", "")
            faults = [fault for fault in record.get("faults") or [] if isinstance(fault, dict)]
            found.append(account | {"stages": [stage.label], "path": path, "faults": faults})
    return found


def _windows(calibration: dict[str, Any], tokens: Any) -> list[tuple[str, str]]:
    """What a compress stage took of its data."""
    most, length = calibration.get("samples"), calibration.get("max_length")
    text = f"{tokens} tokens, in at most {most} windows of up to {length}"
    return [("Calibration", text)] if tokens else []


def _account(record: dict[str, Any]) -> list[tuple[str, str]]:
    """The numbers of a load and of an encoding in words; what did not occur is left out."""
    kind = ("conversational " if record.get("conversational") else "") + str(record.get("type", ""))
    rows = [
        ("Rows", f"{record.get('rows')} of {kind}, from {record.get('read')} records"),
        ("Read as", str(record.get("format", ""))),
        ("Bad records", _codes(record.get("rejected")) or "none"),
        ("Set aside in", str(record.get("rejected_file") or "")),
        ("Repaired or remarked", _codes(record.get("noted"))),
        ("Exact copies", f"{record.get('duplicates', 0)}, of which {record.get('dropped', 0)} left out"),
        ("Also in the held-out data", "" if record.get("leaked") is None else str(record["leaked"])),
        ("Columns not used", ", ".join(record.get("unused") or [])),
    ]
    encoding = record.get("encoding")
    if isinstance(encoding, dict) and encoding.get("tokens"):
        share = encoding.get("trained", 0) / encoding["tokens"]
        limit = f", cut at {encoding['max_length']}" if encoding.get("max_length") else ""
        rows += [
            ("Examples", f"{encoding.get('examples')} of {encoding['tokens']:,} tokens, {share:.1%} trained"),
            (
                "Lengths",
                f"half up to {encoding.get('length_50')} tokens, 99% up to {encoding.get('length_99')}, the "
                f"longest {encoding.get('longest')}",
            ),
            ("Truncated", f"{encoding.get('truncated', 0)} examples{limit}"),
            ("Left with nothing to learn", f"{encoding.get('emptied', 0)} examples, left out"),
        ]
    return [(title, text) for title, text in rows if text]


def _codes(counts: Any) -> str:
    return ", ".join(f"{count} {code}" for code, count in sorted((counts or {}).items()))


def flat(record: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted keys; what is not set is left out."""
    if not isinstance(record, dict):
        return [(prefix, wording.plain(record))]
    found: list[tuple[str, str]] = []
    for key, value in record.items():
        if value is None or value in ({}, [], ""):
            continue
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, list) and all(isinstance(item, dict) for item in value):
            value = dict(enumerate(value))  # as in overrides: method.0.bits
        elif isinstance(value, list):
            value = ", ".join(map(wording.plain, value)) if not any(map(_nested, value)) else str(value)
        found.extend(flat(value, name))
    return found


def stage_curves(stage: Stage) -> list[dict[str, Any]]:
    """The charts of one training: loss with held-out loss, then everything else that was logged."""
    names = dict.fromkeys(key for entry in stage.history for key in entry)
    wanted = [n for n in names if n not in _NOT_CURVES and not n.startswith("eval_")]
    wanted.sort(key=lambda n: _FIRST.index(n) if n in _FIRST else len(_FIRST))
    found = []
    for name in wanted:
        main = _finite(notices.series(stage.history, name))
        held_out = _finite(notices.series(stage.history, f"eval_{name}"))
        if not main:
            continue
        meaning = wording.logged_meaning(name)
        lines = [charts.Series(name, main)]
        if held_out:
            lines.append(charts.Series(f"held-out {name}", held_out, "second"))
        chart = charts.curves(
            lines,
            title=f"{meaning.title} over training steps",
            format_y=(lambda v: f"{100 * v:.3g}%") if meaning.share else wording.significant,
            share=meaning.share,
        )
        last = wording.significant(main[-1][1])
        found.append(
            {
                "title": meaning.title,
                "sentence": meaning.sentence,
                "svg": chart,
                "last": last,
                "two": bool(held_out),
            }
        )
    return found


def metrics_table(run: Run) -> list[dict[str, Any]]:
    """One table for each evaluation data set: metrics down, evaluations across."""
    tables: dict[str, list[Stage]] = {}
    for stage in run.of_kind("evaluate"):
        if stage.metrics:
            tables.setdefault(_data(stage), []).append(stage)
    found = []
    for data, stages in tables.items():
        names = dict.fromkeys(name for stage in stages for name in stage.metrics)
        rows = [
            {
                "name": name,
                "meaning": wording.meaning(name),
                "cells": [stage.metrics.get(name) for stage in stages],
            }
            for name in names
        ]
        found.append({"data": data, "stages": stages, "rows": rows})
    return found


def example_pages(before: Stage | None, after: Stage | None) -> Predictions | None:
    return compare_predictions(before, after) if after else None


def cost_rows(run: Run) -> list[dict[str, Any]]:
    """Time, memory and size of each stage; a bar shows the share of the longest."""
    rows = [
        {
            "stage": stage,
            "seconds": stage.manifest.get("seconds"),
            "memory": stage.manifest.get("peak_memory_bytes") or None,
            "cuda": stage.manifest.get("peak_cuda_bytes") or None,
            "exact": stage.manifest.get("peak_memory_exact", True),
            "size": stage.manifest.get("artefact_bytes") or None,
            "trainable": stage.manifest.get("trainable"),
            "total": stage.manifest.get("total"),
            "sessions": stage.manifest.get("sessions", 1),
        }
        for stage in run.stages
        if stage.manifest
    ]
    longest = max((row["seconds"] or 0 for row in rows), default=0)
    for row in rows:
        row["share"] = (row["seconds"] or 0) / longest if longest else 0
    return rows


def estimates(run: Run) -> list[dict[str, Any]]:
    """What the planner expected of each stage beside what was measured."""
    plan = run.record.get("plan")
    planned = plan.get("stages") if isinstance(plan, dict) else None
    found = []
    for entry, stage in zip(planned or [], run.stages, strict=False):
        for title, guessed, measured, write in _QUANTITIES:
            guess, value = entry.get(guessed), stage.manifest.get(measured)
            if not (guess and value):
                continue
            off = guess / value - 1
            row = {"stage": stage, "title": title, "estimate": write(guess), "measured": write(value)}
            row["off"] = "exact" if abs(off) < 0.005 else f"{off:+.0%}"
            held = entry.get("memory") if guessed == "memory_bytes" else None
            row["parts"] = ", ".join(f"{name} {wording.size(n)}" for name, n in (held or {}).items() if n)
            found.append(row)
    return found


def environment(run: Run) -> list[tuple[str, str]]:
    """The machine, the versions, and where and in what precision the model was held, with the reason."""
    machine = {k: v for k, v in (run.record.get("environment") or {}).items() if k != "versions"}
    titles = {
        "cpu": "Processor",
        "cores": "Cores",
        "memory_bytes": "Memory",
        "gpus": "GPUs",
        "python": "Python",
    }
    rows = []
    for key, value in machine.items():
        if value in (None, [], ""):
            continue
        text = wording.size(value) if key == "memory_bytes" else wording.plain(value)
        rows.append(
            (titles.get(key, key.capitalize()), ", ".join(value) if isinstance(value, list) else text)
        )
    rows.extend((name, str(number)) for name, number in versions(run).items())
    return rows + _placements(run)


def _placements(run: Run) -> list[tuple[str, str]]:
    """In what precision, where and with which attention each stage held its model, with the reason."""
    reasons: dict[str, list[str]] = {}
    for stage in run.stages:
        placement = _details(stage).get("placement")
        if isinstance(placement, dict) and placement.get("reason"):
            reasons.setdefault(str(placement["reason"]), []).append(stage.label)
    if not reasons and (planned := (run.record.get("plan") or {}).get("placement")):
        return [("Precision", str(planned))]
    if len(reasons) == 1:
        return [("Precision", next(iter(reasons)))]
    return [(f"Precision in {', '.join(labels)}", reason) for reason, labels in reasons.items()]


def versions(run: Run) -> dict[str, str]:
    """Versions of the libraries, from the run's record or that of its first stage."""
    records = [run.record.get("environment") or {}, *(stage.manifest for stage in run.stages)]
    return next((record["versions"] for record in records if record.get("versions")), {})


def inputs(run: Run) -> list[tuple[str, str, str]]:
    """(stage, what it read, short hash of its content)."""
    return [
        (stage.label, str(name).replace("_", " "), str(entry["sha256"])[:16])
        for stage in run.stages
        for name, entry in (stage.manifest.get("inputs") or {}).items()
        if isinstance(entry, dict) and entry.get("sha256")
    ]


def commands(run: Run) -> list[str]:
    """What to type to get the same again."""
    pinned = [f"{name}=={number}" for name, number in versions(run).items() if number != "not installed"]
    lines = [f"pip install {' '.join(pinned)}"] if pinned else []
    lines.append(_command(run))
    if any(stage.kind in ("tune", "compress", "export") and stage.status == "done" for stage in run.stages):
        lines.append(f"luthier chat {run.folder} --base")
    return lines


def _command(run: Run) -> str:
    return run.record.get("command") or f"luthier run {run.record.get('recipe_file') or 'recipe.yaml'}"


def recipe_text(recipe: dict[str, Any]) -> str:
    if not recipe:
        return ""
    stream = io.StringIO()
    yaml = YAML()
    yaml.width = 100
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.dump(recipe, stream)
    return stream.getvalue()


def _details(stage: Stage) -> dict[str, Any]:
    return stage.manifest.get("details") or {}


def _finite(points: list[charts.Point]) -> list[charts.Point]:
    return [p for p in points if math.isfinite(p[1])]


def _nested(value: Any) -> bool:
    return isinstance(value, dict | list)


def _methods(stage: Stage) -> list[str]:
    """Names of the stage's methods; a compress stage has a list of them."""
    spec = stage.config.get("method")
    return [name for s in (spec if isinstance(spec, list) else [spec]) if (name := _name(s))]


def _name(spec: Any) -> str | None:
    if isinstance(spec, dict):
        spec = spec.get("name")
    return str(spec) if spec else None


def _data(stage: Stage) -> str:
    data = stage.config.get("data")
    return str(data.get("path", "")) if isinstance(data, dict) else str(data or "")
