"""`luthier report FOLDER` writes the HTML page of a run or comparison again."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    folder: Annotated[Path, typer.Argument(help="A folder that `luthier run` or `luthier compare` wrote.")],
) -> None:
    """Write the report of a run or comparison again, from the files in its folder."""
    from luthier.report.report import write_comparison, write_report
    from luthier.resources import explain, is_resource

    write = write_comparison if (folder / "comparison.json").is_file() else write_report
    try:
        typer.echo(write(folder))
    except OSError as error:
        if not is_resource(error):
            raise
        raise explain(error, folder, fix="Change its permissions, or copy it elsewhere.") from error
