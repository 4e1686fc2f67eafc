"""`luthier compare RECIPE --vary tune.method=lora,dora --seeds 0,1`: one recipe under several settings."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.recipe.compare import Comparison, Summary


def command(
    recipe: Annotated[Path, typer.Argument(help="A recipe file (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes that hold for all runs.")
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            "--vary", metavar="KEY=A,B,...", help="Try each value; several --vary make all combinations."
        ),
    ] = None,
    seeds: Annotated[
        str, typer.Option("--seeds", metavar="0,1,...", help="Seeds; default: the recipe's.")
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Run everything again.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Make the comparison's folder in DIR.")
    ] = None,
    ignore_memory: Annotated[
        bool, typer.Option("--ignore-memory", help="Run even where the plan says that it will not fit.")
    ] = False,
) -> None:
    """Run a recipe under every combination of settings and seeds, and put them into one table."""
    from rich.console import Console

    from luthier.recipe.compare import compare, describe

    console = Console(soft_wrap=True)
    try:
        result = compare(
            recipe,
            dict(_varied(text) for text in vary or []),
            _seeds(seeds),
            overrides=overrides or (),
            output=output,
            force=force,
            ignore_memory=ignore_memory,
        )
    except KeyboardInterrupt:
        console.print("Stopped. What is done is kept; the same command goes on from there.")
        raise
    _show(result, console)
    for row in result.failed:
        console.print(f"[red]✗[/] {describe(row)}: {row.error}", highlight=False)
    console.print(f"report  {result.report}")
    if result.failed:
        raise typer.Exit(1)


def _varied(text: str) -> tuple[str, list[Any]]:
    """'tune.method=lora,{name: dora, r: 4}' as key and values; the list is YAML without its brackets."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    from luthier.errors import RecipeError

    key, equals, written = text.partition("=")
    fix = "Write --vary tune.method=lora,dora."
    if not equals or not key.strip() or not written.strip():
        raise RecipeError(f"--vary {text} is not KEY=VALUE,VALUE.", fix=fix)
    try:
        return key.strip(), list(YAML(typ="safe", pure=True).load(f"[{written}]"))
    except YAMLError as error:
        raise RecipeError(f"--vary {text}: its values are not YAML.", fix=fix) from error


def _seeds(text: str) -> list[int] | None:
    from luthier.errors import RecipeError

    try:
        return [int(part) for part in text.split(",")] if text else None
    except ValueError as error:
        raise RecipeError(f"--seeds {text} is no list of numbers.", fix="Write --seeds 0,1,2.") from error


def _show(result: "Comparison", console: "Console") -> None:
    """One table: a row for each setting, or a column for each where rows would not fit the terminal."""
    from rich.measure import Measurement
    from rich.table import Table

    heads, rows = _cells(result)
    table = Table(*heads, header_style="bold")
    for row in rows:
        table.add_row(*row)
    endless = console.options.update(width=10_000)  # else it measures what would be cut
    if Measurement.get(console, endless, table).maximum > console.width:
        varied = len(result.vary)
        names = [" ".join(row[:varied]) for row in rows]
        table = Table(" ".join(heads[:varied]), *names, header_style="bold")
        for head, *cells in list(zip(heads, *rows, strict=True))[varied:]:
            table.add_row(head, *cells)
    console.print(table)


def _cells(result: "Comparison") -> tuple[list[str], list[list[str]]]:
    """Heads, and a row for each setting: its values, its quality, its costs."""
    from luthier.report.comparison import written
    from luthier.resources import show_bytes

    summary = result.summary
    names = list(dict.fromkeys(name for entry in summary for name in entry.metrics))
    varied = list(result.vary)
    heads = [*varied, "seeds", *names, "trainable", "peak memory", "time", "artefact"]
    rows = []
    for entry in summary:
        others = entry.others
        row = [written(entry.settings[key]) for key in varied]
        row.append(f"{len(entry.seeds)}" + (f" ({entry.failed} failed)" if entry.failed else ""))
        row += [_metric(entry, name) for name in names]
        row += [
            _or_dash(others["trainable"], lambda value: f"{value:,.0f}"),
            _or_dash(others["peak_memory_bytes"], show_bytes),
            _or_dash(others["seconds"], lambda value: f"{value:.0f} s"),
            _or_dash(others["artefact_bytes"], show_bytes),
        ]
        rows.append(row)
    return heads, rows


def _metric(entry: "Summary", name: str) -> str:
    """Mean, its spread over the seeds, and the interval."""
    found = entry.metrics.get(name)
    if found is None or found["mean"] is None:
        return "-"
    text = f"{found['mean']:.4g}"
    if found["spread"] is not None:
        text += f" ± {found['spread']:.2g}"
    if found["low"] is not None and found["high"] is not None:
        text += f" [{found['low']:.4g}, {found['high']:.4g}]"
    return text


def _or_dash(value: float | None, show: Any) -> str:
    return "-" if value is None else show(value)
