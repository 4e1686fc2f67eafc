"""Make the model smaller in one pass over its blocks, save it as others load it, and prove that."""

import logging
import statistics
import time
from typing import Any

from luthier.compression.calibration_data import batches
from luthier.compression.compress import compress
from luthier.compression.records import Record
from luthier.models import structure
from luthier.models.saving import save, verify_export
from luthier.recipe.context import Context
from luthier.recipe.leakage import stage_data
from luthier.recipe.schema import CompressStage
from luthier.recipe.stages import StageResult

log = logging.getLogger("luthier.recipe")


def run(stage: CompressStage, context: Context) -> StageResult:
    """`model/`: the compressed model; blocks that an interrupted session finished are not done again.

    Raises:
        MethodError: a layer that cannot be compressed so.
        CheckError: the folder does not reload as what was saved.
    """
    model, tokenizer = context.lend(train=False)
    given: list[Any] = []
    details: dict[str, Any] = {}
    if stage.calibration is not None:
        data, _ = stage_data(stage, context.work)
        size = {"samples": stage.calibration.samples, "max_length": stage.calibration.max_length}
        classes = structure.task(model) == "classification"
        given = batches(data, tokenizer, **size, seed=context.recipe.seed, classes=classes)
        tokens = sum(int(batch["attention_mask"].sum()) for batch in given)
        details = {"data": data.report.as_dict(), "calibration_tokens": tokens}
        log.info("calibration: %d tokens of %s", tokens, data.spec.path)
    details["bytes_before"] = _bytes(model)
    start = time.perf_counter()
    methods = [context.method(spec) for spec in stage.method]
    records = compress(model, methods, calibration=given, folder=context.work / "checkpoints")
    seconds = time.perf_counter() - start
    folder = save(model, context.work / "model", tokenizer)
    verify_export(folder, model, tokenizer)
    return StageResult(
        metrics=_metrics(records) | {"pass_seconds": seconds},
        details=details | {"layers": [record.as_dict() for record in records]},
        total=sum(parameter.numel() for parameter in model.parameters()),
        left=(model, tokenizer, False),
    )


def _bytes(model: Any) -> int:
    """Of all that a model holds; what is tied counts once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())


def _metrics(records: list[Record]) -> dict[str, float]:
    """Means over the layers: bits of a weight, share of zeros, error of the output."""
    found = {}
    for name in ("bits", "sparsity", "after"):
        values = [value for record in records if (value := getattr(record, name)) is not None]
        if values:
            found["error" if name == "after" else name] = statistics.fmean(values)
    return found
