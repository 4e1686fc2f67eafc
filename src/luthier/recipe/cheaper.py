"""Changes of a stage that save memory: what the plan suggests where a recipe does not fit."""

from collections.abc import Iterator
from typing import Any

from luthier.recipe.arguments import training_arguments
from luthier.recipe.schema import EvaluateStage, Stage, TuneStage, is_adapter


def argument(stage: TuneStage, name: str) -> Any:
    """A field of a stage's training, or its default."""
    return stage.training.get(name, training_arguments()[name].default)


def changes(stage: Stage) -> Iterator[tuple[str, Stage]]:
    """Changes of a stage that save memory, each with what to write."""
    if isinstance(stage, EvaluateStage):
        for size in (4, 1):
            if size < stage.batch_size:
                yield f"batch_size: {size}", stage.model_copy(update={"batch_size": size})
    if not isinstance(stage, TuneStage):
        return

    def trained(**settings: Any) -> TuneStage:
        return stage.model_copy(update={"training": stage.training | settings})

    rows, accumulation = (
        argument(stage, "per_device_train_batch_size"),
        argument(stage, "gradient_accumulation_steps"),
    )
    smaller: dict[str, Any] = {}
    while rows > 1:
        rows, accumulation = rows // 2, accumulation * 2
        smaller = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
        # The same optimizer steps, in smaller pieces.
        yield _written(smaller), trained(**smaller)
    lean = smaller | {"gradient_checkpointing": True}
    yield _written(lean), trained(**lean)
    lean |= {"optim": "adafactor"}
    yield _written(lean), trained(**lean)
    if not is_adapter(stage.method):
        lora = type(stage.method).model_validate("lora")
        yield "method: lora", stage.model_copy(update={"method": lora})
        yield f"method: lora and {_written(lean)}", trained(**lean).model_copy(update={"method": lora})


def _written(settings: dict[str, Any]) -> str:
    words = {True: "true", False: "false"}
    return (
        "training: {"
        + ", ".join(f"{k}: {words.get(v, v) if isinstance(v, bool) else v}" for k, v in settings.items())
        + "}"
    )
