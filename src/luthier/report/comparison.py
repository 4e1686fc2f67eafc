"""A comparison as rows of settings, with means over seeds, Pareto fronts and findings computed from them."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from luthier.report import wording
from luthier.report.read import Metric, read_metrics


@dataclass(frozen=True)
class Quality:
    """A metric of one setting: the mean over its seeds, and what is known about its uncertainty.

    Attributes:
        low, high: the 95% interval over test examples (mean of the seeds' bounds), widened to hold every
            seed's value. None where it was not measured.
        spread: standard deviation over seeds; None with a single seed.
    """

    value: float
    low: float | None
    high: float | None
    spread: float | None
    seeds: int


@dataclass
class Setting:
    """All runs with the same settings."""

    label: str
    settings: dict[str, Any]
    runs: list[dict[str, Any]]
    quality: dict[str, Quality] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)

    @property
    def failures(self) -> list[dict[str, Any]]:
        return [run for run in self.runs if run.get("status") != "done"]


@dataclass(frozen=True)
class Cost:
    """A column beside quality. `drawn` ones are better when smaller: plotted, and counted in findings."""

    key: str
    title: str
    sentence: str
    write: Callable[[float | None], str]
    cheapest: str = ""

    @property
    def drawn(self) -> bool:
        return bool(self.cheapest)


COSTS = (
    Cost(
        "trainable",
        "Trainable parameters",
        "What the optimizer holds and an adapter stores.",
        wording.count,
        "trains the fewest parameters",
    ),
    Cost(
        "peak_memory_bytes",
        "Peak memory",
        "The most that the process held while tuning, or in any stage; the machine must have it.",
        wording.size,
        "needs the least memory",
    ),
    Cost("tune_seconds", "Tuning time", "Wall time of tuning alone.", wording.duration, "tunes the fastest"),
    Cost("seconds", "Wall time", "Of all stages, evaluation and shared stages included.", wording.duration),
    Cost(
        "artefact_bytes",
        "Artefact size",
        "What is stored and shipped.",
        wording.size,
        "is the smallest to store",
    ),
    Cost("bits", "Bits of a weight", "Mean over the layers that were rounded.", lambda v: f"{v:.3g}"),
    Cost(
        "sparsity",
        "Sparsity",
        "Share of weights that are zero, or of units that were taken out; mean over the layers.",
        lambda v: f"{100 * (v or 0):.1f}%",
    ),
)


def read_settings(record: dict[str, Any]) -> list[Setting]:
    """The comparison's rows, gathered over seeds, in the order in which they were run."""
    vary = record.get("vary")
    keys = list(vary) if isinstance(vary, dict) else []
    gathered: dict[str, Setting] = {}
    for row in record["rows"]:
        settings = row.get("settings") or {}
        label = label_of(settings, keys)
        gathered.setdefault(label, Setting(label, settings, [])).runs.append(row)
    for setting in gathered.values():
        _measure(setting)
    return list(gathered.values())


def label_of(settings: dict[str, Any], keys: list[str]) -> str:
    """What tells a row from the others: 'lora', 'r=8', 'dora, r=16'."""
    parts = []
    for key in [k for k in keys if k in settings] or list(settings):
        value = settings[key]
        tail = key.rsplit(".", 1)[-1]
        if isinstance(value, dict) or (isinstance(value, list) and tail == "method"):
            parts.append(written(value))
        else:
            parts.append(
                str(value) if tail in ("method", "objective", "name", "model") else f"{tail}={value}"
            )
    return ", ".join(parts) or "as written"


def written(value: Any) -> str:
    """A varied value for readers. A method with its options: 'lora r=8'; several in one pass: 'a + b'."""
    if isinstance(value, list):
        return " + ".join(map(written, value))
    if not isinstance(value, dict):
        return str(value)
    inner = ", ".join(f"{k}={v}" for k, v in value.items() if k != "name")
    return " ".join(filter(None, [str(value.get("name", "")), inner]))


def metric_names(settings: list[Setting]) -> list[str]:
    """All metrics measured, the deciding one first: shares of right answers before overlap and likelihood."""
    names = list(dict.fromkeys(name for setting in settings for name in setting.quality))
    first = ["exact_match", "accuracy", "f1", "field_f1"]
    return sorted(names, key=lambda n: (first.index(n) if n in first else len(first), names.index(n)))


def front(settings: list[Setting], metric: str, cost: str) -> set[str]:
    """Labels of the settings that no other beats: none is as good and as cheap, and better in one."""
    points = [
        (s.label, gain(metric, s.quality[metric].value), s.cost[cost])
        for s in settings
        if metric in s.quality and cost in s.cost
    ]
    return {
        label
        for label, gain, price in points
        if not any(
            other_gain >= gain and other_price <= price and (other_gain > gain or other_price < price)
            for _, other_gain, other_price in points
        )
    }


def findings(settings: list[Setting], metric: str) -> list[str]:
    """What the numbers say about `metric`, in sentences."""
    measured = [s for s in settings if metric in s.quality]
    if not measured:
        return []
    name = wording.meaning(metric).title.lower()
    best = max(measured, key=lambda s: gain(metric, s.quality[metric].value))
    found = [f"{best.label} has the best {name}: {_written(metric, best.quality[metric])}."]
    equals = [s for s in measured if s is not best and _within(best.quality[metric], s.quality[metric].value)]
    if best.quality[metric].low is None:
        found.append("No interval was measured, so small differences may be chance.")
        equals = []
    elif equals:
        found.append(
            f"{_names(equals)} {'lies' if len(equals) == 1 else 'lie'} within that interval: "
            f"on this test data {'it' if len(equals) == 1 else 'they'} cannot be told from {best.label}."
        )
    elif len(measured) > 1:
        found.append("No other lies within that interval, so the lead is more than chance.")
    found.extend(_cheapest([best, *equals], best))
    found.extend(_beaten(measured, metric))
    if noisy := [s for s in measured if _seeds_matter(s.quality[metric])]:
        found.append(
            f"For {_names(noisy)} the seed moves {name} more than the choice of test examples does: "
            "compare with more seeds before deciding."
        )
    return found


def _measure(setting: Setting) -> None:
    done = [run for run in setting.runs if run.get("status") == "done"]
    measured = [read_metrics(run.get("metrics")) for run in done]
    for name in dict.fromkeys(name for metrics in measured for name in metrics):
        setting.quality[name] = _quality([metrics[name] for metrics in measured if name in metrics])
    for cost in COSTS:
        values = [run[cost.key] for run in done if isinstance(run.get(cost.key), int | float)]
        if values:
            setting.cost[cost.key] = statistics.fmean(values)


def _quality(metrics: list[Metric]) -> Quality:
    values = [m.value for m in metrics]
    lows = [m.low for m in metrics if m.low is not None]
    highs = [m.high for m in metrics if m.high is not None]
    complete = len(lows) == len(highs) == len(values)
    return Quality(
        value=statistics.fmean(values),
        low=min(statistics.fmean(lows), *values) if complete else None,
        high=max(statistics.fmean(highs), *values) if complete else None,
        spread=statistics.stdev(values) if len(values) > 1 else None,
        seeds=len(values),
    )


def gain(metric: str, value: float) -> float:
    """The value turned so that more is better."""
    return -value if wording.meaning(metric).better == "lower" else value


def _within(quality: Quality, value: float) -> bool:
    return quality.low is not None and quality.high is not None and quality.low <= value <= quality.high


def _seeds_matter(quality: Quality) -> bool:
    if quality.spread is None or quality.low is None or quality.high is None:
        return False
    return 2 * quality.spread > (quality.high - quality.low) / 2


def _cheapest(candidates: list[Setting], best: Setting) -> list[str]:
    """Among settings of equal quality, which one is cheapest in each cost."""
    if len(candidates) < 2:
        return []
    parts: dict[str, list[str]] = {}
    for cost in filter(lambda cost: cost.drawn, COSTS):
        priced = [s for s in candidates if cost.key in s.cost]
        if len(priced) < 2:
            continue
        cheap = min(priced, key=lambda s: s.cost[cost.key])
        if cheap is best or cost.key not in best.cost or cheap.cost[cost.key] >= best.cost[cost.key]:
            continue
        share = cheap.cost[cost.key] / best.cost[cost.key]
        figure = f"{cost.write(cheap.cost[cost.key])}, {share:.0%} of {best.label}'s"
        parts.setdefault(cheap.label, []).append(f"{cost.cheapest} ({figure})")
    if not parts:
        return [f"Of these, {best.label} is also the cheapest in every cost measured."]
    return [f"Of these, {label} {_join(reasons)}." for label, reasons in parts.items()]


def _beaten(measured: list[Setting], metric: str) -> list[str]:
    """Settings on no front: something else is at least as good for less, whatever one pays for."""
    costs = [c.key for c in COSTS if c.drawn and sum(c.key in s.cost for s in measured) > 1]
    if not costs or len(measured) < 3:
        return []
    somewhere = set().union(*(front(measured, metric, cost) for cost in costs))
    beaten = [s for s in measured if s.label not in somewhere]
    if not beaten:
        return []
    verb = "is" if len(beaten) == 1 else "are"
    return [f"{_names(beaten)} {verb} on no front: for each cost, another is at least as good and as cheap."]


def _written(metric: str, quality: Quality) -> str:
    text = wording.show(metric, quality.value)
    if quality.low is not None:
        text += f" (95% interval {wording.interval(metric, quality.low, quality.high)})"
    return text + (f", mean of {quality.seeds} seeds" if quality.seeds > 1 else "")


def _names(settings: list[Setting]) -> str:
    return _join([s.label for s in settings])


def _join(parts: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
