"""What the page of a comparison shows, computed from its rows."""

import os
from pathlib import Path
from typing import Any

from luthier.report import charts, wording
from luthier.report.comparison import (
    COSTS,
    Quality,
    Setting,
    findings,
    front,
    gain,
    metric_names,
    read_settings,
)


def page(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """All values of the template `comparison.html.j2`."""
    settings = read_settings(record)
    names = metric_names(settings)
    return {
        "name": record.get("name") or folder.resolve().name.removesuffix("-compare"),
        "vary": record.get("vary") or {},
        "seeds": record.get("seeds") or [],
        "status": record.get("status") or _status(settings),
        "settings": settings,
        "metrics": [(name, wording.meaning(name)) for name in names],
        "costs": [cost for cost in COSTS if any(cost.key in s.cost for s in settings)],
        "rows": [_row(setting, names, folder) for setting in settings],
        "findings": findings(settings, names[0]) if names else [],
        "figures": [figures(settings, name) for name in names],
        "best": {name: _best(settings, name) for name in names},
        "bars": [bars(settings, name) for name in names],
        "failures": [(s.label, run) for s in settings for run in s.failures],
        "command": _command(record),
    }


def figures(settings: list[Setting], metric: str) -> dict[str, Any]:
    """The Pareto plots of one metric, one for each cost that tells the settings apart."""
    meaning = wording.meaning(metric)
    plots = []
    for cost in COSTS:
        measured = [s for s in settings if metric in s.quality and cost.key in s.cost]
        if not cost.drawn or len({s.cost[cost.key] for s in measured}) < 2:
            continue
        best = front(settings, metric, cost.key)
        marks = [_mark(s, metric, cost.key, s.label in best, cost.write) for s in measured]
        svg = charts.pareto(
            marks,
            title=f"{meaning.title} against {cost.title.lower()}; on the front: {', '.join(sorted(best))}",
            x_title=f"{cost.title} – less is better",
            format_x=cost.write,
            format_y=(lambda v: f"{100 * v:.0f}%") if meaning.share else wording.significant,
            lower_is_better=meaning.better == "lower",
            share=meaning.share,
        )
        plots.append({"cost": cost, "svg": svg, "front": [s.label for s in measured if s.label in best]})
    return {"name": metric, "meaning": meaning, "plots": plots}


def bars(settings: list[Setting], metric: str) -> dict[str, Any]:
    """One metric of all settings with their intervals, best first."""
    meaning = wording.meaning(metric)
    measured = [s for s in settings if metric in s.quality]
    measured.sort(key=lambda s: s.quality[metric].value, reverse=meaning.better != "lower")
    rows = [
        (
            s.label,
            s.quality[metric].value,
            s.quality[metric].low,
            s.quality[metric].high,
            "second" if i else "main",
        )
        for i, s in enumerate(measured)
    ]
    svg = charts.interval_track(
        rows,
        title=f"{meaning.title} of each setting with its 95% interval",
        share=meaning.share,
        format_x=(lambda v: f"{100 * v:.0f}%") if meaning.share else wording.significant,
    )
    return {"name": metric, "meaning": meaning, "svg": svg}


def _mark(setting: Setting, metric: str, cost: str, on_front: bool, write: Any) -> charts.Mark:
    quality = setting.quality[metric]
    hint = f"{setting.label}: {wording.show(metric, quality.value)}, {write(setting.cost[cost])}"
    return charts.Mark(
        setting.label, setting.cost[cost], quality.value, quality.low, quality.high, on_front, hint
    )


def _row(setting: Setting, names: list[str], folder: Path) -> dict[str, Any]:
    return {
        "setting": setting,
        "quality": [
            (name, setting.quality.get(name), _spread(name, setting.quality.get(name))) for name in names
        ],
        "links": [
            (run.get("seed"), link)
            for run in setting.runs
            if (link := _link(folder, run.get("run"))) is not None
        ],
        "done": len(setting.runs) - len(setting.failures),
        "total": len(setting.runs),
        "failed": any(run.get("status") == "failed" for run in setting.runs),
    }


def _best(settings: list[Setting], metric: str) -> str:
    measured = [s for s in settings if metric in s.quality]
    return max(measured, key=lambda s: gain(metric, s.quality[metric].value)).label


def _spread(name: str, quality: Quality | None) -> str:
    """The standard deviation over seeds, in the metric's own unit."""
    if quality is None or quality.spread is None:
        return ""
    if wording.meaning(name).share:
        return f"± {100 * quality.spread:.1f}"
    return f"± {wording.significant(quality.spread, 2)}"


def _link(folder: Path, run: Any) -> str | None:
    """The report of one run, relative to this page; None where it is not there."""
    if not run:
        return None
    for candidate in (folder / str(run), Path(str(run))):
        report = candidate / "report.html"
        if report.is_file():
            return Path(os.path.relpath(report.resolve(), folder.resolve())).as_posix()
    return None


def _status(settings: list[Setting]) -> str:
    states = {run.get("status") for s in settings for run in s.runs}
    return "failed" if "failed" in states else "running" if states - {"done"} else "done"


def _command(record: dict[str, Any]) -> str:
    if record.get("command"):
        return str(record["command"])
    vary = record.get("vary")
    parts = (
        [f"--vary {key}={','.join(map(str, values))}" for key, values in vary.items()]
        if isinstance(vary, dict)
        else []
    )
    seeds = ",".join(map(str, record.get("seeds") or [0]))
    return " ".join(
        ["luthier compare", str(record.get("recipe_file") or "recipe.yaml"), *parts, f"--seeds {seeds}"]
    )
