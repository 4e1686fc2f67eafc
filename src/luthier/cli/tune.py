"""`luthier tune MODEL DATA --method auto --budget 1M`: a recipe for a model and its rows, made and run."""

import re
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from luthier.recipe.race import Contender, Race

AUTO = "auto"
# Optimiser steps of the training, and what is measured where there is a test file, by objective.
STEPS = 300
METRICS = {"classification": ["accuracy"], "pretrain": ["perplexity"], "seq2seq": ["exact_match", "rougeL"]}
OTHER_METRICS = ["perplexity", "exact_match"]


def command(
    model: Annotated[str, typer.Argument(help="Alias, folder, GGUF file or Hub id.")],
    data: Annotated[Path, typer.Argument(help="Training data: a file or folder of rows.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Changes of the recipe, such as tune.training.bf16=true."
        ),
    ] = None,
    method: Annotated[
        str, typer.Option("--method", help="A tuning method, or auto: the winner of a short race.")
    ] = AUTO,
    budget: Annotated[
        str, typer.Option("--budget", metavar="1M", help="The most parameters that may learn: 500k, 1M.")
    ] = "",
    candidates: Annotated[
        str, typer.Option("--candidates", metavar="A,B", help="The methods that race; default: six.")
    ] = "",
    laps: Annotated[
        str, typer.Option("--laps", metavar="8,24,72", help="Optimiser steps of each lap of the race.")
    ] = "",
    objective: Annotated[
        str, typer.Option("--objective", help="What the model learns from; default: as the rows are.")
    ] = "",
    test: Annotated[Path | None, typer.Option("--test", help="Rows on which the result is measured.")] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimiser steps of the training.")] = STEPS,
    name: Annotated[str, typer.Option("--name", help="Name of the run's folder.")] = "tuned",
    seed: Annotated[int, typer.Option("--seed")] = 0,
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder of the run.")] = Path(
        "runs"
    ),
) -> None:
    """Tune a model on rows of your own: a race chooses the method where none is given; the recipe is kept."""
    from luthier.cli import run
    from luthier.data.load import load
    from luthier.errors import RecipeError
    from luthier.recipe.race import LAPS, METHODS, OBJECTIVE, race, sized
    from luthier.recipe.source import write_recipe

    allowed = _parameters(budget)
    objective = objective or OBJECTIVE.get(load(data).type, "sft")
    spec = _model(model, objective)
    recipe_of = partial(_recipe, name, spec, seed, str(output), data, objective, steps=steps, test=test)
    if method == AUTO:
        methods = [n.strip() for n in candidates.split(",")] if candidates else list(METHODS)
        _require_overrides(recipe_of, methods, overrides or [])
        racing: Any = {"budget": allowed, "objective": objective, "seed": seed, "methods": methods}
        racing |= {"laps": _whole_numbers(laps) or LAPS, "folder": output / f"{name}-race"}
        found = race(spec, data, **racing)
        _show(found)
        chosen, why = found.winner, found.why
    elif candidates or laps:
        raise RecipeError("--candidates and --laps are of a race.", fix="Write --method auto, or drop them.")
    else:
        chosen, why = sized(spec, method, allowed, objective), ""
    file = output / f"{name}.yaml"
    write_recipe(file, recipe_of(chosen), why)
    typer.echo(f"recipe  {file}")
    run.command(file, overrides)


def _require_overrides(
    recipe_of: "Callable[[Contender], dict[str, Any]]", methods: list[str], overrides: list[str]
) -> None:
    """Refuse before the race what fits the recipe of no contender."""
    from luthier.errors import RecipeError
    from luthier.recipe.race import Contender
    from luthier.recipe.source import load_recipe, write_recipe

    refused: RecipeError | None = None
    for method in methods if overrides else []:
        with TemporaryDirectory() as folder:
            file = Path(folder) / "draft.yaml"
            write_recipe(file, recipe_of(Contender(method, {}, 1e-3, 0)), "")
            try:
                load_recipe(file, overrides)
                return
            except RecipeError as error:
                refused = error
    if refused is not None:
        raise refused


def _parameters(text: str) -> int | None:
    """'1M' as 1,000,000."""
    from luthier.errors import RecipeError

    if not text:
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kKmMbB]?)", text.strip().replace("_", ""))
    number = int(float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[found[2].lower()]) if found else 0
    if not number:
        raise RecipeError(f"--budget {text} is no number of parameters.", fix="Write 500k, 1M or 1000000.")
    return number


def _whole_numbers(text: str) -> list[int]:
    from luthier.errors import RecipeError

    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise RecipeError(f"--laps {text} is no list of numbers.", fix="Write --laps 8,24,72.") from error


def _model(name: str, objective: str) -> dict[str, Any]:
    from luthier.recipe.schema import TASK_OF_OBJECTIVE

    return {"name": name, "task": TASK_OF_OBJECTIVE.get(objective, "causal")}


def _recipe(
    name: str,
    model: dict[str, Any],
    seed: int,
    output: str,
    data: Path,
    objective: str,
    chosen: "Contender",
    steps: int,
    test: Path | None,
) -> dict[str, Any]:
    training = {
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": chosen.rate,
        "warmup_steps": 0.1,
    }
    method = {"name": chosen.method, **chosen.options}
    stages: list[dict[str, Any]] = [
        {"tune": {"data": str(data), "method": method, "objective": objective, "training": training}}
    ]
    if test is not None:
        metrics = METRICS.get(objective, OTHER_METRICS)
        stages.append({"evaluate": {"data": str(test), "metrics": metrics}})
    return {"name": name, "model": model, "seed": seed, "output": output, "stages": stages}


def _show(found: "Race") -> None:
    """The last lap of every contender, and the choice."""
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    table = Table("contender", "steps", "held-out loss", "parameters", "tokens/s", header_style="bold")
    seen: set[str] = set()
    for laps in reversed(found.laps):
        for lap in laps:
            if str(lap.contender) not in seen:
                seen.add(str(lap.contender))
                loss = lap.error.splitlines()[0] if lap.loss is None else f"{lap.loss:.4g}"
                count = f"{lap.contender.trainable:,}"
                table.add_row(str(lap.contender), str(lap.steps), loss, count, f"{lap.tokens_per_second:.0f}")
    console.print(table)
    console.print(found.why, highlight=False)
