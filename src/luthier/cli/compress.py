"""`luthier compress MODEL TEXT --method gptq --bits 4`: a recipe that makes a model smaller, made and run."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from luthier.compression.calibration import Batch

# Of so many calibration windows one is held out, on which perplexity is measured, where that decides.
HELD_OUT = 4


def command(
    model: Annotated[str, typer.Argument(help="Alias, folder, GGUF file or Hub id.")],
    data: Annotated[Path, typer.Argument(help="Calibration data: text or rows like those it will see.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes of the recipe: compress.method.0.bits=3."),
    ] = None,
    method: Annotated[
        str, typer.Option("--method", help="A compression method, or several: smoothquant,gptq.")
    ] = "gptq",
    bits: Annotated[int | None, typer.Option("--bits", help="Bits of a weight.")] = None,
    group_size: Annotated[
        int | None, typer.Option("--group-size", min=0, help="Weights of a row that share a scale.")
    ] = None,
    fit: Annotated[
        str, typer.Option("--fit", metavar="100MB", help="The most bytes on disk: each layer gets its bits.")
    ] = "",
    increase: Annotated[
        str, typer.Option("--max-perplexity-increase", metavar="2%", help="The most that quality may cost.")
    ] = "",
    samples: Annotated[int, typer.Option("--samples", min=1, help="Windows of calibration.")] = 64,
    max_length: Annotated[int, typer.Option("--max-length", min=8, help="Tokens of a window.")] = 512,
    test: Annotated[Path | None, typer.Option("--test", help="Text on which the result is measured.")] = None,
    name: Annotated[str, typer.Option("--name", help="Name of the run's folder.")] = "compressed",
    seed: Annotated[int, typer.Option("--seed")] = 0,
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder of the run.")] = Path(
        "runs"
    ),
) -> None:
    """Make a model smaller: with a method as it is, or with as many bits a layer as a budget allows."""
    from luthier.cli import run
    from luthier.errors import RecipeError
    from luthier.recipe.source import write_recipe

    if fit and increase:
        raise RecipeError("--fit and --max-perplexity-increase exclude each other.", fix="Give one of them.")
    if (fit or increase) and bits is not None:
        raise RecipeError("--bits is for all layers, a budget for each its own.", fix="Drop one of the two.")
    methods: list[dict[str, Any]] = [{"name": part.strip()} for part in method.split(",")]
    given = {"bits": bits, "group_size": group_size}
    methods[-1] |= {key: value for key, value in given.items() if value is not None}
    calibration = {"data": str(data), "samples": samples, "max_length": max_length}
    why = ""
    if fit or increase:
        if len(methods) > 1:
            raise RecipeError("A budget goes with one method.", fix="Give --method gptq, say.")
        methods[0]["layer_bits"], why = _layer_bits(model, calibration, methods[0], fit, increase, seed)
    stages: list[dict[str, Any]] = [{"compress": {"method": methods, "calibration": calibration}}]
    if test is not None:
        measure = {"data": str(test), "metrics": ["perplexity"]}
        stages = [{"evaluate": measure | {"name": "before"}}, *stages, {"evaluate": measure}]
    recipe = {"name": name, "model": model, "seed": seed, "output": str(output), "stages": stages}
    file = output / f"{name}.yaml"
    write_recipe(file, recipe, why)
    typer.echo(f"recipe  {file}")
    run.command(file, overrides)


def _layer_bits(
    name: str, calibration: dict[str, Any], method: dict[str, Any], fit: str, increase: str, seed: int
) -> tuple[dict[str, int], str]:
    """Bits of each layer, and what was found in words."""
    from luthier.compression import budget
    from luthier.errors import MethodError
    from luthier.taxonomy import find

    chosen = find(method["name"], "compression")
    if not any(option.name == "layer_bits" for option in chosen.options()):
        raise MethodError(
            f"{chosen.name} has no layer_bits: it cannot give each layer bits of its own.",
            fix="Give --method gptq, awq or rtn.",
        )
    size, share = _bytes(fit) if fit else 0, _share(increase) if increase else 0.0
    model, batches = _given(name, calibration, seed)
    config = chosen(**{key: value for key, value in method.items() if key != "name"})
    if fit:
        found = budget.layer_bits(model, batches, size, group_size=config.group_size)
        why = f"At most {fit} on disk."
    else:
        held_out, batches = _apart(batches)
        found, rise = budget.within_loss(model, batches, held_out, share, config)
        why = f"Perplexity rose by {rise:.2%} on held-out calibration text; {increase} were allowed."
    mean = sum(found.values()) / len(found)
    return (
        found,
        f"{why} Bits of each layer by what rounding it costs; {mean:.2f} in the mean over the layers.",
    )


def _given(name: str, calibration: dict[str, Any], seed: int) -> "tuple[Any, list[Batch]]":
    from luthier.compression.calibration_data import batches
    from luthier.data.load import load as load_data
    from luthier.models.loading import load

    model, tokenizer = load(name)
    size = {key: calibration[key] for key in ("samples", "max_length")}
    return model, batches(load_data(calibration["data"]), tokenizer, **size, seed=seed)


def _apart(batches: "list[Batch]") -> "tuple[list[Batch], list[Batch]]":
    """A quarter of the windows to measure on, and the others; each a batch of its own."""
    from luthier.errors import DataError

    single = [
        {key: row[None] for key, row in zip(b, rows, strict=True)}
        for b in batches
        for rows in zip(*b.values(), strict=True)
    ]
    if len(single) < HELD_OUT:
        raise DataError(
            f"{len(single)} windows of calibration leave none to measure on.",
            fix="Raise --samples, or give more text.",
        )
    return single[::HELD_OUT], [batch for index, batch in enumerate(single) if index % HELD_OUT]


def _bytes(text: str) -> int:
    """'100MB' as 100,000,000."""
    from luthier.errors import RecipeError

    units = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmg]?)b?", text.strip().lower())
    if not found:
        raise RecipeError(f"--fit {text} is no size.", fix="Write 100MB or 1.5GB.")
    return int(float(found[1]) * units[found[2]])


def _share(text: str) -> float:
    """'2%' or '0.02' as 0.02."""
    from luthier.errors import RecipeError

    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(%?)", text.strip())
    if not found:
        raise RecipeError(f"--max-perplexity-increase {text} is no share.", fix="Write 2% or 0.02.")
    return float(found[1]) / (100 if found[2] else 1)
