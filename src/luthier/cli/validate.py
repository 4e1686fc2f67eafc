"""`luthier validate RECIPE [key=value ...]`: whether a recipe can be run, and all that is wrong with it."""

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as seed=1 or tune.method.r=4."),
]


def command(
    recipe: Annotated[Path, typer.Argument(help="A recipe file (YAML).")],
    overrides: Overrides = None,
) -> None:
    """Check a recipe without loading anything: keys, types, ranges, pairs, files."""
    from rich.console import Console
    from rich.table import Table

    from luthier.recipe.source import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    table = Table("", "stage", "what", box=None, header_style="dim")
    for number, stage in enumerate(loaded.stages, 1):
        table.add_row(f"{number:02}", stage.name, stage.summary())
    console = Console(soft_wrap=True)
    console.print(f"[green]✓[/] {recipe} is valid: {loaded.name}, {loaded.model.name} ({loaded.model.task})")
    console.print(table)
