"""`luthier run RECIPE [key=value ...]`: run a recipe, or what of it is not done yet."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.recipe.runner import Run


def command(
    recipe: Annotated[Path, typer.Argument(help="A recipe file (YAML).")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as seed=1 or tune.method.r=4."),
    ] = None,
    from_stage: Annotated[
        str, typer.Option("--from", metavar="STAGE", help="Run again from this stage on: its name or number.")
    ] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Run every stage again, from its beginning.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Make the run's folder in DIR.")
    ] = None,
    ignore_memory: Annotated[
        bool, typer.Option("--ignore-memory", help="Run even where the plan says that it will not fit.")
    ] = False,
) -> None:
    """Run a recipe. Finished stages are not run again; an interrupted one goes on from its checkpoint."""
    from rich.console import Console

    from luthier.cli.plan import show
    from luthier.recipe.runner import run

    console = Console(soft_wrap=True)
    try:
        result = run(
            recipe,
            overrides=overrides or (),
            from_stage=from_stage or None,
            force=force,
            output=output,
            ignore_memory=ignore_memory,
            show_plan=lambda plan: show(plan, console),
        )
    except KeyboardInterrupt:
        again = "the same command" + (" without --force and --from" if force or from_stage else "")
        console.print(f"Stopped. What is done is kept; {again} goes on from there.")
        raise
    _show(result, console)
    if not result.passed:
        raise typer.Exit(1)


def _show(result: "Run", console: "Console") -> None:
    from rich.table import Table

    table = Table("stage", "", "time", "peak memory", "result", box=None, header_style="dim")
    for stage in result.stages:
        table.add_row(
            stage.folder.name,
            stage.status,
            f"{stage.manifest.seconds:.0f} s",
            f"{stage.manifest.peak_memory_bytes / 1e9:.2f} GB",
            ", ".join(_metric(name, value) for name, value in stage.manifest.metrics.items()),
        )
    console.print(table)
    for stage in result.stages:
        for check in stage.manifest.checks:
            if not check["passed"]:
                console.print(f"[red]✗[/] {_missed(check, stage.status)}", highlight=False)
    if result.artefact is not None:
        name = "prompt " if result.artefact.name == "prompt" else "model  "
        console.print(f"{name} {result.artefact}")
    console.print(f"report  {result.report}")


def _missed(check: dict[str, Any], status: str) -> str:
    """A proof that failed: by name where this run has logged its numbers, whole where an earlier one did."""
    if status == "done":
        return f"{check['name']}: see above"
    return f"{check['name']}: {check['value']} (held to {check['tolerance']})"


def _metric(name: str, metric: object) -> str:
    if not isinstance(metric, dict):
        return f"{name} {metric:.4g}" if isinstance(metric, float) else f"{name} {metric}"
    text = f"{name} {metric['value']:.4g}"
    known = metric.get("low") is not None and metric.get("high") is not None
    return f"{text} [{metric['low']:.4g}, {metric['high']:.4g}]" if known else text
