"""`luthier methods [PATH]` prints the tree of methods; `luthier methods show NAME` one of them, whole."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from luthier import taxonomy
from luthier.errors import MethodError
from luthier.options import Option
from luthier.taxonomy import Method


def command(
    path: Annotated[str, typer.Argument(help="A branch, family or method; or 'show'.")] = "",
    name: Annotated[str, typer.Argument(help="After 'show': the method's name or path.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    add: Annotated[list[str] | None, typer.Option("--add", help="A method file of your own.")] = None,
) -> None:
    """The tree of methods. `luthier methods show NAME` prints a method's card and options."""
    for file in add or []:
        taxonomy.add_file(file)
    if path == "show" and not name:
        raise MethodError("No method is named.", fix="Write luthier methods show lora, say.")
    if path == "show":
        method = taxonomy.find(name)
        _print_json(_record(method, options=True)) if as_json else _show(method)
    else:
        found = taxonomy.methods(path)
        _print_json([_record(method) for method in found]) if as_json else _tree(found)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, default=str))


def _record(method: Method, options: bool = False) -> dict[str, Any]:
    keys = ("path", "name", "title", "paper", "when", "cost", "origin", "fault", "source")
    record: dict[str, Any] = {key: getattr(method, key) for key in keys}
    if options:
        record["doc"] = method.doc
        record["options"] = [
            {"name": o.name, "type": o.type, "default": o.default, "help": o.help, "range": o.range()}
            for o in method.options()
        ]
    return record


def _tree(found: list[Method]) -> None:
    root = Tree("[bold]methods[/]")
    nodes = {"": root}
    for method in found:
        parts = method.path.split("/")
        for depth in range(1, len(parts)):
            place = "/".join(parts[:depth])
            if place not in nodes:
                nodes[place] = nodes["/".join(parts[: depth - 1])].add(f"[bold]{parts[depth - 1]}[/]")
        text = f"[red]{method.fault}[/]" if method.fault else f"[dim]{method.title}[/]"
        own = "" if method.origin == "luthier" else f" [yellow]({method.origin})[/]"
        nodes["/".join(parts[:-1])].add(f"{method.name}  {text}{own}")
    Console().print(root)


def _show(method: Method) -> None:
    console = Console()
    options = method.options()
    console.print(f"[bold]{method.path}[/]  [dim]{method.source}[/]")
    console.print(Markdown(method.doc))
    if options:
        console.print(_table(options))


def _table(options: list[Option]) -> Table:
    """Name and meaning; type, default and range below the meaning, so that no column is squeezed."""
    table = Table("option", "meaning", title="Options", title_justify="left")
    table.columns[0].no_wrap = True
    for o in options:
        facts = ", ".join(part for part in (o.type, o.range(), f"default {o.default!r}") if part)
        table.add_row(o.name, f"{escape(o.help)}\n[dim]{escape(facts)}[/]")
    return table
