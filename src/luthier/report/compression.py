"""What a compress stage did: sizes, the state of each layer after the last method, and maps of it.

A stage of several methods leaves several records of a layer. Bits and sparsity are what the layer has in the
end. Each method's error is against the layer as it found it; the maps show the last one, the table all.
"""

import math
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from luthier.report import charts, wording
from luthier.report.read import Run, Stage

_BLOCK = re.compile(r"(?:(?P<stack>.+?)\.)?(?P<block>\d+)\.(?P<kind>.+)")
_PLAIN = "Error of plain rounding or masking"
_OPEN = 64  # a table of so many parts is shown at once


@dataclass
class Layer:
    """A layer, or what a structured method names: the end of all records of it, errors in their order."""

    name: str
    bits: float | None = None
    sparsity: float | None = None
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def take(self, record: dict[str, Any]) -> None:
        self.bits = record.get("bits") if record.get("bits") is not None else self.bits
        self.sparsity = record.get("sparsity") if record.get("sparsity") is not None else self.sparsity
        self.before += [record["before"]] if record.get("before") is not None else []
        self.after += [record["after"]] if record.get("after") is not None else []
        self.seconds += record.get("seconds") or 0.0
        self.notes += [record["note"]] if record.get("note") and record["note"] not in self.notes else []

    @property
    def remark(self) -> str:
        return "; ".join(self.notes)

    @property
    def error(self) -> float | None:
        return self.after[-1] if self.after else None


@dataclass(frozen=True)
class Column:
    """A column of the table: what stands in it, and what it is sorted by."""

    title: str
    key: Callable[[Layer], Any]
    text: Callable[[Layer], str]
    number: bool = True


def views(run: Run) -> list[dict[str, Any]]:
    """A part of the page for each compress stage that has ended."""
    found = []
    for stage in run.of_kind("compress"):
        layers = read_layers(stage)
        if layers:
            maps = _maps(layers, _error_of(stage, layers))
            found.append(
                {
                    "stage": stage,
                    "facts": _facts(run, stage, layers),
                    "maps": maps,
                    "layers": layers,
                    "open": not maps or len(layers) <= _OPEN,
                    "columns": _columns(layers),
                }
            )
    return found


def read_layers(stage: Stage) -> list[Layer]:
    """The state in which the stage left each layer, in the order in which they were first changed."""
    found: dict[str, Layer] = {}
    for record in (stage.manifest.get("details") or {}).get("layers") or []:
        if isinstance(record, dict) and record.get("name"):
            name = str(record["name"])
            found.setdefault(name, Layer(name)).take(record)
    return list(found.values())


def sizes(run: Run, stage: Stage) -> tuple[float | None, float | None]:
    """Bytes of the weights before and after the stage; None where they are not known."""
    earlier = run.stages[: run.stages.index(stage)]
    left = [size for s in earlier if (size := _weights(s)) is not None]
    held = (stage.manifest.get("details") or {}).get("bytes_before")
    return (left[-1] if left else held), _weights(stage)


def shrinking(run: Run, stage: Stage) -> str:
    """'538 MB → 177 MB', or as much of it as is known."""
    return " → ".join(wording.size(size) for size in sizes(run, stage) if size)


def _weights(stage: Stage) -> float | None:
    """Bytes of the weights of the whole model that a stage left on disk."""
    files = stage.manifest.get("artefacts") or {}
    found = [
        entry.get("bytes") or 0
        for name, entry in files.items()
        if name.startswith("model/") and name.endswith((".safetensors", ".gguf"))
    ]
    return sum(found) or None


def _facts(run: Run, stage: Stage, layers: list[Layer]) -> list[tuple[str, str]]:
    """(title, text) of what became smaller, and of what it cost."""
    before, after = sizes(run, stage)
    size = shrinking(run, stage)
    if before and after:
        size += f", {after / before:.0%} of what they took"
    found = [
        ("Size of the weights", size),
        ("Bits of a weight", _spread([v.bits for v in layers], _bits)),
        ("Sparsity", _spread([v.sparsity for v in layers], wording.percent)),
    ]
    measured = [v for v in layers if v.error is not None and math.isfinite(v.error)]
    if measured:
        worst = max(measured, key=lambda v: v.error or 0.0)
        turns = range(max(len(v.after) for v in measured))
        means = [statistics.fmean(v.after[i] for v in measured if len(v.after) > i) for i in turns]
        of = " of the last method" if len(means) > 1 else ""
        text = f"{', then '.join(map(_error, means))} in the mean; the largest{of}, "
        text += f"{_error(worst.error or 0.0)}, in {worst.name}"
        found.append((_error_of(stage, layers).title, text))
    return [(title, text) for title, text in found if text]


def _spread(values: list[float | None], write: Callable[[float], str]) -> str:
    """'4 in all 210', or '3.47 in the mean over 210, from 2 to 8'; '' where there is none."""
    known = [v for v in values if v is not None]
    if not known:
        return ""
    low, high = write(min(known)), write(max(known))
    if low == high:
        return f"{low} in {'all ' if len(known) > 1 else ''}{len(known)}"
    return f"{write(statistics.fmean(known))} in the mean over {len(known)}, from {low} to {high}"


def _columns(layers: list[Layer]) -> list[Column]:
    """Those in which something stands that is not in the column beside it."""
    several = any(len(layer.after) > 1 for layer in layers)
    after = "Error, method by method" if several else "Error"
    found = [
        Column("Bits", lambda v: _or_empty(v.bits), lambda v: _or_dash(v.bits, _bits)),
        Column("Sparsity", lambda v: _or_empty(v.sparsity), lambda v: _or_dash(v.sparsity, wording.percent)),
        Column(_PLAIN, lambda v: v.before[-1] if v.before else "", lambda v: _errors(v.before)),
        Column(after, lambda v: _or_empty(v.error), lambda v: _errors(v.after)),
        Column("Time", lambda v: v.seconds, lambda v: wording.duration(v.seconds)),
        Column("Remark", lambda v: v.remark, lambda v: v.remark, number=False),
    ]
    idle = set() if any(v.before != v.after and any(v.before) for v in layers) else {_PLAIN}
    idle |= set() if any(v.seconds >= 0.05 for v in layers) else {"Time"}
    return [c for c in found if c.title not in idle and any(c.key(v) != "" for v in layers)]


def _errors(values: list[float]) -> str:
    return ", ".join(map(_error, values)) or "–"


def _or_empty(value: float | None) -> Any:
    return "" if value is None else value


def _or_dash(value: float | None, write: Callable[[float], str]) -> str:
    return "–" if value is None else write(value)


def _error_of(stage: Stage, layers: list[Layer]) -> wording.Meaning:
    """What the errors of the stage are errors of."""
    blind = not stage.config.get("calibration") or any(
        "error of the weight" in n for v in layers for n in v.notes
    )
    what = "weight" if blind else "output"
    sentence = (
        "Squared, relative to the weight's own square: no data decides it."
        if blind
        else "Squared, relative to the output's own square, on the calibration data."
    )
    if any(len(layer.after) > 1 for layer in layers):
        sentence += " Of the last method, against the layer as it found it."
    return wording.Meaning(f"Error of the {what}", sentence, "lower")


def _maps(layers: list[Layer], error: wording.Meaning) -> list[dict[str, Any]]:
    """Maps of what differs between the layers; what is the same everywhere is said in the facts."""
    bits = wording.Meaning("Bits of a weight", "In how many bits the layer holds a weight.")
    sparsity = wording.Meaning("Sparsity", "Share of weights that are zero, or of units that were taken out.")
    found = [
        _map(layers, bits, lambda v: v.bits, _bits),
        _map(layers, sparsity, lambda v: v.sparsity, wording.percent),
        _map(layers, error, lambda v: v.error, _error, log=True),
    ]
    return [entry for entry in found if entry is not None]


def _map(
    layers: list[Layer],
    meaning: wording.Meaning,
    value: Callable[[Layer], float | None],
    write: Callable[[float], str],
    *,
    log: bool = False,
) -> dict[str, Any] | None:
    """One map; None where all is the same, or there are no blocks to lay side by side."""
    gathered: dict[tuple[str, int], list[float]] = {}
    for layer in layers:
        place = _place(layer.name)
        number = value(layer)
        if place is not None and number is not None:
            gathered.setdefault(place, []).append(number)
    if len({block for _, block in gathered}) < 2:
        return None
    names = _short_names(list(dict.fromkeys(kind for kind, _ in gathered)))
    cells = {(names[kind], block): statistics.fmean(v) for (kind, block), v in gathered.items()}
    if len({write(v) for v in cells.values()}) < 2:
        return None
    title = f"{meaning.title} by block and kind of layer"
    finite = {place: v for place, v in cells.items() if math.isfinite(v)}
    if finite:
        most = max(finite, key=lambda place: finite[place])
        title += f", {write(min(finite.values()))} to {write(finite[most])}"
        title += f", the most in block {most[1]}, {most[0]}"
    svg = charts.heat_map(cells, title=title, write=write, log=log)
    return {"title": meaning.title, "sentence": meaning.sentence, "svg": svg}


def _place(name: str) -> tuple[str, int] | None:
    """(kind, block) of `model.layers.3.mlp.down_proj`; experts, which differ by a number, are one kind."""
    match = _BLOCK.fullmatch(name)
    if match is None:
        return None
    kind = ".".join("*" if part.isdigit() else part for part in match["kind"].split("."))
    return f"{match['stack']}.*.{kind}" if match["stack"] else kind, int(match["block"])


def _short_names(kinds: list[str]) -> dict[str, str]:
    """The shortest end of each that no other has."""
    found = {}
    for kind in kinds:
        parts = kind.split(".")
        ends = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        others = [f".{other}" for other in kinds if other != kind]
        found[kind] = next((end for end in ends if not any(o.endswith(f".{end}") for o in others)), kind)
    return found


def _bits(value: float) -> str:
    return f"{value:.3g}"


def _error(value: float) -> str:
    return wording.significant(value, 2)
