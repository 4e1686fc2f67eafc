"""Standard benchmarks through the lm-evaluation-harness (the extra `lm-eval`), on a model in memory.

Source: Gao et al., the lm-evaluation-harness. A task is a name that the harness knows (its data comes from
the Hub) or a YAML file, which may read local data and then runs offline.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from luthier.errors import DataError, ResourceError, did_you_mean
from luthier.evaluation.bootstrap import Metric
from luthier.models import structure
from luthier.tuning.probe import evaluating

log = logging.getLogger("luthier.evaluation")

_95 = 1.959964  # standard errors on each side of a 95% interval


def run_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | Path],
    *,
    batch_size: int = 8,
    fewshot: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    seed: int = 0,
) -> dict[str, Metric]:
    """Metrics by "task/metric", each with the interval of its standard error.

    Args:
        model: causal or seq2seq model, with an adapter or without.
        tasks: names, or YAML files of the harness; paths in a file are relative to the working directory.
        fewshot: examples in the prompt; by default as the task says.
        limit: use the first so many rows of each task only.
        chat: render prompts with the chat template.

    Raises:
        ResourceError: the extra is not installed.
        DataError: a task that does not exist, or whose data cannot be read.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ResourceError(
            f"The lm-evaluation-harness is not installed ({error}).",
            fix="Run `pip install 'luthier[lm-eval]'`.",
        ) from error
    files = [name for name in map(str, tasks) if name.endswith((".yaml", ".yml"))]
    # Reading the harness's own thousands of tasks takes seconds: only where one of them is asked for.
    manager = TaskManager(include_defaults=len(files) < len(tasks))
    _require_tasks(tasks, files, manager)
    backend = "seq2seq" if structure.base(model).config.is_encoder_decoder else "causal"
    try:
        with evaluating(model):  # HFLM puts the model into evaluation mode for good
            wrapped = HFLM(pretrained=model, backend=backend, tokenizer=tokenizer, batch_size=batch_size)
            found = simple_evaluate(
                wrapped,
                tasks=[str(task) for task in tasks],
                num_fewshot=fewshot,
                limit=limit,
                apply_chat_template=chat,
                task_manager=manager,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"The tasks {', '.join(map(str, tasks))} cannot be run: {error}",
            fix="Look into the task's file: its data, its fields, and the names of its splits.",
        ) from error
    return _metrics(found or {})


def _require_tasks(tasks: Sequence[str | Path], files: list[str], manager: Any) -> None:
    for task in map(str, tasks):
        if task in files and not Path(task).is_file():
            raise DataError(f"There is no task file {task}.")
        if task not in files and not manager.match_tasks([task]):
            raise DataError(f"The harness has no task '{task}'.", fix=did_you_mean(task, manager.all_tasks))


def _metrics(found: dict[str, Any]) -> dict[str, Metric]:
    """The harness writes `acc,none` and `acc_stderr,none`: a metric and the filter of its answers."""
    metrics = {}
    for task, values in found.get("results", {}).items():
        for key, value in values.items():
            name, _, chosen = key.partition(",")
            if not chosen or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{name}_stderr,{chosen}")
            half = _95 * error if isinstance(error, int | float) else 0.0
            count = found.get("n-samples", {}).get(task, {}).get("effective", 0)
            label = f"{task}/{name}" if chosen == "none" else f"{task}/{name} ({chosen})"
            metrics[label] = Metric(float(value), value - half, value + half, count)
    return metrics
