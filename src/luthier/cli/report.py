"""`luthier report FOLDER` writes the HTML page of a run or comparison again."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    folder: Annotated[Path, typer.Argument(help="A folder that `luthier run` or `luthier compare` wrote.")],
) -> None:
    """Write the report of a run or comparison again, from the files in its folder."""
    from luthier.report.report import write_comparison, write_report

    write = write_comparison if (folder / "comparison.json").is_file() else write_report
    typer.echo(write(folder))
