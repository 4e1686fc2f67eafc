"""`luthier schema` prints the JSON Schema of recipes, from which an editor completes and checks them."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write to this file instead.")] = None,
    add: Annotated[list[str] | None, typer.Option("--add", help="A method file of your own.")] = None,
) -> None:
    """Print the JSON Schema of recipes: keys, methods and each method's options."""
    import json

    from luthier import taxonomy
    from luthier.recipe.schema import json_schema
    from luthier.resources import explain

    for file in add or []:
        taxonomy.add_file(file)
    text = json.dumps(json_schema(), indent=2)
    if out is None:
        typer.echo(text)
    else:
        try:
            out.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise explain(error, out, fix="Choose another file with --out.") from error
        typer.echo(f"{out} is written. First line of a recipe: # yaml-language-server: $schema={out.name}")
