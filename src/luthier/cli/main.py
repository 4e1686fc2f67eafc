"""The `luthier` command: one file a verb in this folder, each a `command` function or an `app` of sub-
commands.

Verb files import nothing heavy at the top (torch, transformers, peft): help answers in a fraction of a
second.
"""

import importlib
import logging
import os
import pkgutil
import sys
import traceback
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

import luthier.cli
from luthier import __version__
from luthier.errors import LuthierError

app = typer.Typer(
    name="luthier",
    help="Tune, compress and align language models: every method in one recipe, proven at each step.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_debug = False


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the libraries log.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    global _debug
    _debug = debug
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False, show_time=False)],
        force=True,
    )
    logging.getLogger("luthier").setLevel(logging.INFO)
    if not verbose:
        # Read by transformers when it is imported; our own lines say what matters.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of packages that it can do without


for found in sorted(pkgutil.iter_modules(luthier.cli.__path__), key=lambda m: m.name):
    if found.name == "main" or found.name.startswith("_"):
        continue
    verb = importlib.import_module(f"luthier.cli.{found.name}")
    if hasattr(verb, "app"):
        app.add_typer(verb.app, name=found.name)
    else:
        app.command(name=found.name)(verb.command)


def main() -> None:
    """Run the command line. A `LuthierError` is one paragraph and exit status 2; Ctrl-C is 130."""
    try:
        app()
    except LuthierError as error:
        if _debug or "--debug" in sys.argv:
            traceback.print_exc()
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        console.print("[bold red]error:[/] ", end="")
        console.print(str(error), markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
