"""`luthier plan RECIPE [key=value ...]`: what a recipe will take, and whether it fits on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.recipe.planner import Plan


def command(
    recipe: Annotated[Path, typer.Argument(help="A recipe file (YAML).")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as seed=1 or tune.method.r=4."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Do not refuse a plan that will not fit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Estimate parameters, memory, time and disk of every stage. Refuses what cannot fit (status 2)."""
    import json

    from rich.console import Console

    from luthier.errors import ResourceError
    from luthier.recipe.planner import plan
    from luthier.recipe.source import load_recipe

    found = plan(load_recipe(recipe, overrides or ()))
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        show(found, Console(soft_wrap=True))
    if not found.fits and not force:
        raise ResourceError(found.verdict, fix="`luthier plan --force` shows it all the same.")


def show(plan: "Plan", console: "Console") -> None:
    """The plan as a table, a line a stage, and the parts of its largest stage."""
    from dataclasses import asdict

    from rich.table import Table

    from luthier.resources import show_bytes

    table = Table(box=None, header_style="dim")
    for title in ("stage", "trains", "memory", "time", "disk"):
        table.add_column(title, no_wrap=True)
    table.add_column("")
    for number, stage in enumerate(plan.stages, 1):
        table.add_row(
            f"{number:02}-{stage.name}",
            ""
            if stage.trainable is None
            else f"{stage.trainable:,} ({_share(stage.trainable, stage.total)})",
            show_bytes(stage.memory.total),
            _duration(stage.seconds),
            show_bytes(stage.disk_bytes),
            stage.detail,
        )
    console.print(table)
    parts = ", ".join(f"{name} {show_bytes(size)}" for name, size in asdict(plan.peak.memory).items() if size)
    console.print(f"[dim]memory of {plan.peak.name}: {parts}[/]", highlight=False)
    console.print(f"[dim]{plan.placement}[/]", highlight=False)
    if plan.fits:
        console.print(plan.verdict, highlight=False)


def _share(part: int, whole: int | None) -> str:
    share = 100 * part / (whole or part)
    return f"{share:.2g}%" if share < 99.5 else "100%"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
