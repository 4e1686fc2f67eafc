"""Measure the model as the stages before left it; hold it against the recipe's figures and against before."""

import dataclasses
import json
import logging
from typing import Any

from luthier import checks
from luthier.evaluation.evaluate import evaluate
from luthier.evaluation.names import METRICS
from luthier.recipe.context import Context
from luthier.recipe.expectation import meets
from luthier.recipe.leakage import stage_data
from luthier.recipe.schema import EvaluateStage
from luthier.recipe.stages import StageResult

log = logging.getLogger("luthier.recipe")

# The rows drawn and the bootstrap are the same in every run whatever its seed, so that runs compare in pairs.
SEED = 0


def run(stage: EvaluateStage, context: Context) -> StageResult:
    """Metrics with their intervals, and `predictions.jsonl` for the metrics that have one a row."""
    data, _ = stage_data(stage, context.work)
    model, tokenizer = context.model()
    found = evaluate(
        model,
        data,
        tuple(stage.metrics),
        tokenizer=tokenizer,
        batch_size=stage.batch_size,
        generation=stage.generation,
        samples=stage.samples,
        seed=SEED,
        prompt=context.prompt() if stage.prompt is None else stage.prompt,
    )
    if found.predictions:
        with (context.work / "predictions.jsonl").open("w", encoding="utf-8") as file:
            for prediction in found.predictions:
                file.write(json.dumps(prediction, ensure_ascii=False, default=str) + "\n")
    metrics = {name: dataclasses.asdict(metric) for name, metric in found.metrics.items()}
    _compare_with_stated(stage, metrics)
    _compare_with_before(stage, metrics, context)
    details = {"seed": SEED, "predictions": len(found.predictions), **found.details}
    details["data"] = data.report.as_dict()
    return StageResult(metrics=metrics, details=details)


def _compare_with_stated(stage: EvaluateStage, metrics: dict[str, Any]) -> None:
    """A missed figure fails the run, but only after its results are kept: the runner looks at the line."""
    for name, expectation in stage.expect.items():
        value = metrics[name]["value"]
        checks.record("end", f"{name} as stated", meets(expectation, value), value, expectation, refuse=False)


def _compare_with_before(stage: EvaluateStage, metrics: dict[str, Any], context: Context) -> None:
    """Against the first evaluation on the same data: tuning must not have made a metric clearly worse."""
    measured = _rows(stage.data.model_dump(mode="json"))
    for index, before in enumerate(context.earlier):
        if before.stage != stage.kind or _rows(before.config["data"]) != measured:
            continue
        smaller = any(stage.stage == "compress" for stage in context.earlier[index + 1 :])
        for name, after in metrics.items():
            if name in before.metrics and name in METRICS:
                former = before.metrics[name]
                if smaller:  # what compression may cost is for the recipe to state
                    log.info("%s: from %.4g to %.4g", name, former["value"], after["value"])
                    continue
                checks.record(
                    "end",
                    f"{name} not worse than before",
                    not _clearly_worse(former, after, METRICS[name].higher_is_better),
                    after["value"],
                    former["value"],
                    f"from {former['value']:.4g} to {after['value']:.4g}",
                    refuse=False,
                )
        return


def _rows(data: dict[str, Any]) -> dict[str, Any]:
    """What of a data spec decides the rows that are measured."""
    return {key: value for key, value in data.items() if key != "allow_leakage"}


def _clearly_worse(before: dict[str, Any], after: dict[str, Any], higher_is_better: bool) -> bool:
    """Whether the intervals lie apart, on the wrong side."""
    if higher_is_better:
        return after["high"] < before["low"]
    return after["low"] > before["high"]
