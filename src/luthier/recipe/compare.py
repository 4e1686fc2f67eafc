"""One recipe under several settings and seeds: every combination is a run of its own, and one table sums up.

All recipes are validated before the first run. The runs share the loaded base model and every stage that does
not depend on what is varied. What is finished stays finished: a comparison that was cut off goes on where it
was, and a run that fails takes no other with it.
"""

import dataclasses
import itertools
import json
import logging
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from luthier.errors import LuthierError, RecipeError
from luthier.recipe.manifest import hash_json, locked, versions, write_json
from luthier.recipe.runner import Run, run
from luthier.recipe.schema import Recipe
from luthier.recipe.source import load_recipe
from luthier.resources import environment, explain, require_writable

log = logging.getLogger("luthier.recipe")


@dataclass
class Row:
    """One run of a comparison.

    Attributes:
        settings: {varied key: value}.
        run: the run's folder, relative to the comparison's.
        status: 'pending', 'running', 'done', 'failed' or 'interrupted'.
        metrics: {name: {value, low, high, n}} of the evaluations after tuning; where several of them measure
            the same, 'stage/name'.
        trainable: parameters that learn. total: of the whole model.
        peak_memory_bytes: the most that the process held while tuning; without tuning, in any stage.
        seconds: wall time of all stages, also of those that were shared. tune_seconds: of tuning alone.
        artefact_bytes: size of the model or adapter that came out.
        bits, sparsity: what the compress stages made of the model, means over the layers.
    """

    settings: dict[str, Any]
    seed: int
    run: str
    status: str = "pending"
    error: str | None = None
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    trainable: int | None = None
    total: int | None = None
    peak_memory_bytes: int | None = None
    seconds: float | None = None
    tune_seconds: float | None = None
    artefact_bytes: int | None = None
    bits: float | None = None
    sparsity: float | None = None
    passed: bool | None = None

    def take(self, result: Run) -> None:
        """Fill in what a finished run has measured."""
        tuned = [s for s in result.stages if s.kind == "tune"]
        made = [s for s in result.stages if s.artefact is not None]
        self.status, self.error, self.passed = "done", None, result.passed
        self.metrics = _final_metrics(result)
        self.trainable = tuned[-1].manifest.trainable if tuned else None
        self.total = (tuned or made)[-1].manifest.total if tuned or made else None
        self.peak_memory_bytes = max(s.manifest.peak_memory_bytes for s in tuned or result.stages)
        self.seconds = sum(s.manifest.seconds for s in result.stages)
        self.tune_seconds = sum(s.manifest.seconds for s in tuned) if tuned else None
        self.artefact_bytes = made[-1].manifest.artefact_bytes if made else None
        compressed = [s.manifest.metrics for s in result.stages if s.kind == "compress"]
        self.bits, self.sparsity = (
            next((found[name] for found in reversed(compressed) if name in found), None)
            for name in ("bits", "sparsity")
        )


@dataclass
class Summary:
    """The finished runs of one setting, over its seeds.

    Attributes:
        metrics: {name: {mean, spread, low, high}}: mean and standard deviation over the seeds (None for one
            seed), and the mean bounds of the runs' own intervals.
        others: means of trainable, peak_memory_bytes, seconds, tune_seconds, artefact_bytes.
    """

    settings: dict[str, Any]
    seeds: list[int]
    failed: int
    metrics: dict[str, dict[str, float | None]]
    others: dict[str, float | None]


@dataclass
class Comparison:
    """All runs of a comparison; `comparison.json` holds the same.

    Attributes:
        folder: `<output>/<name>-compare`.
        report: the HTML page.
    """

    name: str
    folder: Path
    vary: dict[str, list[Any]]
    seeds: list[int]
    rows: list[Row]
    report: Path | None = None

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if row.status == "failed"]

    @property
    def summary(self) -> list[Summary]:
        """One entry a setting, in the order of the rows."""
        keys = list(dict.fromkeys(hash_json(row.settings) for row in self.rows))
        return [_summary([row for row in self.rows if hash_json(row.settings) == key]) for key in keys]


def compare(
    recipe: str | Path,
    vary: Mapping[str, Sequence[Any]],
    seeds: Sequence[int] | None = None,
    *,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    force: bool = False,
    ignore_memory: bool = False,
    show_plan: Callable[[Any], None] | None = None,
) -> Comparison:
    """Run a recipe under every combination of `vary` and `seeds`.

    Args:
        recipe: a YAML file.
        vary: {dotted key: values}, as overrides: {"tune.method": ["lora", {"name": "dora", "r": 4}]}.
        seeds: by default the recipe's own.
        overrides, output, force, ignore_memory, show_plan: as for `luthier.run`.

    Raises:
        RecipeError: a combination is no valid recipe, or nothing is varied. Nothing has run then.
        ResourceError: the folder cannot be written, or is in use.
    """
    base = load_recipe(recipe, overrides)
    folder = Path(output or base.output).expanduser() / f"{base.name}-compare"
    seeds = list(seeds) if seeds is not None else [base.seed]
    rows = _rows(vary, seeds)
    # The last word on name and output is the comparison's.
    recipes = [load_recipe(recipe, [*overrides, *_overrides(row), f"name={row.run}"]) for row in rows]
    recipes = [one.model_copy(update={"output": str(folder)}) for one in recipes]
    _say_what_is_replaced(base, vary)
    require_writable(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explain(error, folder) from error
    result = Comparison(base.name, folder, {key: list(values) for key, values in vary.items()}, seeds, rows)
    with locked(folder):
        _Record(result, base).go(recipes, force=force, ignore_memory=ignore_memory, show_plan=show_plan)
    from luthier.report.report import write_comparison

    result.report = write_comparison(folder)
    return result


class _Record:
    """The comparison in progress, and its file."""

    def __init__(self, comparison: Comparison, base: Recipe):
        self.comparison = comparison
        self.base = base
        self.started = _now()

    def go(self, recipes: list[Recipe], **options: Any) -> None:
        from luthier.recipe.context import Models

        models = Models()
        rows = self.comparison.rows
        self.write("running")
        for number, (row, recipe) in enumerate(zip(rows, recipes, strict=True), 1):
            log.info("run %d of %d: %s", number, len(rows), describe(row))
            row.status = "running"
            self.write("running")
            others = [self.comparison.folder / other.run for other in rows if other is not row]
            try:
                row.take(run(recipe, models=models, reuse=others, **options))
            except KeyboardInterrupt:
                row.status = "interrupted"
                self.write("interrupted")
                raise
            except Exception as error:
                row.status = "failed"
                row.error = (
                    str(error) if isinstance(error, LuthierError) else f"{type(error).__name__}: {error}"
                )
                log.error("%s failed: %s", row.run, row.error, exc_info=not isinstance(error, LuthierError))
            self.write("running")
        self.write("failed" if self.comparison.failed else "done")

    def write(self, status: str) -> None:
        comparison = self.comparison
        record = {
            "name": comparison.name,
            "status": status,
            "recipe": self.base.as_dict(),
            "recipe_file": str(self.base.file),
            "vary": comparison.vary,
            "seeds": comparison.seeds,
            "started": self.started,
            "finished": None if status == "running" else _now(),
            "environment": environment() | {"versions": versions()},
            "rows": [dataclasses.asdict(row) for row in comparison.rows],
            "summary": [dataclasses.asdict(summary) for summary in comparison.summary],
        }
        write_json(comparison.folder / "comparison.json", record)


def describe(row: Row) -> str:
    """A row in one line: 'tune.method=lora, seed=0'."""
    return ", ".join(
        [*(f"{key}={_written(value)}" for key, value in row.settings.items()), f"seed={row.seed}"]
    )


def _rows(vary: Mapping[str, Sequence[Any]], seeds: list[int]) -> list[Row]:
    for key, values in vary.items():
        if isinstance(values, str) or not values:
            raise RecipeError(
                f"'{key}' is to be varied over {values!r}, which is no list of values.",
                fix=f"Write vary={{'{key}': [...]}}, or --vary {key}=one,two.",
            )
        if key in ("seed", "name", "output"):
            raise RecipeError(f"'{key}' cannot be varied.", fix="Seeds are varied with --seeds 0,1,2.")
    if not seeds or (len(vary) == 0 and len(seeds) < 2):
        raise RecipeError("Nothing is varied.", fix="Write --vary tune.method=lora,dora, or --seeds 0,1.")
    rows: list[Row] = []
    for values in itertools.product(*vary.values()):
        settings = dict(zip(vary, values, strict=True))
        rows += [Row(settings, seed, _folder_name(settings, seed)) for seed in seeds]
    if len({row.run for row in rows}) < len(rows):
        raise RecipeError("The comparison has the same run twice.", fix="Give every value and seed once.")
    return rows


def _overrides(row: Row) -> list[str]:
    """JSON is YAML too."""
    return [*(f"{key}={json.dumps(value)}" for key, value in row.settings.items()), f"seed={row.seed}"]


def _folder_name(settings: dict[str, Any], seed: int) -> str:
    """A name that says the settings and is a plain folder name; a hash where that loses something."""
    parts = []
    for key, value in settings.items():
        written = _written(value)
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", written).strip("-.")[:40]
        if plain != written:
            plain = f"{plain}-{hash_json(value)[:6]}"
        parts.append(f"{key.rsplit('.', 1)[-1]}-{plain}")
    return "_".join([*parts, f"seed-{seed}"])


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _say_what_is_replaced(base: Recipe, vary: Mapping[str, Sequence[Any]]) -> None:
    """A varied method replaces the recipe's, its options included: said, so that nobody compares unawares."""
    for stage in base.stages:
        for name in ("method", "objective"):
            found = getattr(stage, name, None)
            specs = found if isinstance(found, list) else [] if found is None else [found]
            keys = [f"{stage.kind}.{name}", f"{stage.name}.{name}"]
            key = next((key for key in keys if key in vary), None)
            for spec in (spec for spec in specs if spec.options and key is not None):
                options = ", ".join(f"{option}: {value}" for option, value in spec.options.items())
                log.info("%s replaces the recipe's %s with its options (%s)", key, spec.name, options)


def _final_metrics(result: Run) -> dict[str, dict[str, Any]]:
    """The metrics of the evaluations that saw the final model."""
    last = max((i for i, s in enumerate(result.stages) if s.artefact is not None), default=-1)
    seen = [s for s in result.stages[last + 1 :] if s.kind == "evaluate"]
    if not seen:  # evaluated before an export only, say
        seen = [s for s in result.stages if s.kind == "evaluate"][-1:]
    names = [name for stage in seen for name in stage.manifest.metrics]
    return {
        name if names.count(name) == 1 else f"{stage.name}/{name}": metric
        for stage in seen
        for name, metric in stage.manifest.metrics.items()
    }


def _summary(rows: list[Row]) -> Summary:
    done = [row for row in rows if row.status == "done"]
    metrics: dict[str, dict[str, float | None]] = {}
    for name in dict.fromkeys(name for row in done for name in row.metrics):
        found = [row.metrics[name] for row in done if name in row.metrics]
        values = [entry["value"] for entry in found]
        metrics[name] = {
            "mean": _mean(values),
            "spread": statistics.stdev(values) if len(values) > 1 else None,
            "low": _mean([entry.get("low") for entry in found]),
            "high": _mean([entry.get("high") for entry in found]),
        }
    columns = ("trainable", "total", "peak_memory_bytes", "seconds", "tune_seconds", "artefact_bytes")
    others = {name: _mean([getattr(row, name) for row in done]) for name in columns}
    failed = sum(row.status == "failed" for row in rows)
    return Summary(rows[0].settings, [row.seed for row in done], failed, metrics, others)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
