"""`luthier chat MODEL`: talk to a model in the terminal, streamed; `--base` puts its base beside it."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.chat import Answer, Chat

_BLOCK = '"""'


def command(
    model: Annotated[
        str, typer.Argument(help="A run's folder, an adapter, a model folder, an alias or a Hub id.")
    ],
    base: Annotated[bool, typer.Option("--base", help="Let the base model answer beside it.")] = False,
    system: Annotated[str, typer.Option("--system", metavar="TEXT", help="System prompt.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, help="0 always takes the likeliest token; default: the model's own way."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampled answers.")] = 0,
) -> None:
    """Talk to a model. Lines of a pipe are answered one by one; \"\"\" opens and closes a longer message."""
    from rich.console import Console
    from transformers import set_seed

    from luthier.chat import open_chat

    console, notes = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)
    generation: dict[str, Any] = {}
    if temperature is not None:
        generation = (
            {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature}
        )
    with notes.status(f"Loading {model} ..."):
        chat = open_chat(
            model, base=base, system=system, max_new_tokens=max_new_tokens, generation=generation
        )
    set_seed(seed)
    if sys.stdin.isatty():
        notes.print(
            f"[bold]{model}[/] · /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves",
            highlight=False,
        )
    if not chat.has_template:
        notes.print("It has no chat template: it goes on with what you write.", style="dim")
    talk(chat, messages(console), console, notes)


def talk(chat: "Chat", lines: Iterator[str], console: "Console", notes: "Console") -> None:
    """Answer one message after another until there is none left, or /quit."""
    from luthier.errors import LuthierError

    for line in lines:
        try:
            if line.startswith("/"):
                reply = chat.command(line)
                if reply is None:
                    return
                notes.print(reply, style="dim", markup=False, highlight=False)
            elif line.strip():
                for answer in _shown(chat, line.strip(), console):
                    _remark(answer, chat, notes)
        except LuthierError as error:
            notes.print(str(error), style="red", markup=False, highlight=False)


def messages(console: "Console") -> Iterator[str]:
    """Messages as they are written: a line each, or the lines between two lines of three quotes."""
    block: list[str] | None = None
    for line in _lines(console):
        if line.strip() == _BLOCK:
            if block is not None:
                yield "\n".join(block)
            block = [] if block is None else None
        elif block is not None:
            block.append(line)
        else:
            yield line
    if block:  # the pipe ended inside it
        yield "\n".join(block)


def _lines(console: "Console") -> Iterator[str]:
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    import readline  # noqa: F401  (arrow keys and history)

    while True:
        try:
            yield console.input("[bold]›[/] ")
        except KeyboardInterrupt:
            console.print("\n[dim]/quit or Ctrl-D leaves.[/]")
        except EOFError:
            console.print()
            return


def _shown(chat: "Chat", text: str, console: "Console") -> list["Answer"]:
    """The answers as they come: in two columns where a wide terminal has room, else one below the other."""
    if len(chat.sides) > 1 and console.is_terminal and console.width >= 80:
        return _in_columns(chat, text, console)
    current = ""

    def write(side: str, piece: str) -> None:
        nonlocal current
        if len(chat.sides) > 1 and side != current:
            console.print(f"{chr(10) if current else ''}{side}:", style="bold", highlight=False)
            current = side
        console.print(piece, end="", markup=False, highlight=False)

    answers = chat.say(text, write)
    console.print()
    return answers


def _in_columns(chat: "Chat", text: str, console: "Console") -> list["Answer"]:
    from rich.live import Live
    from rich.table import Table

    said = {side.name: "" for side in chat.sides}

    def table() -> Table:
        from rich.text import Text

        grid = Table(*said, expand=True, box=None, header_style="bold", padding=(0, 2, 0, 0))
        for column in grid.columns:
            column.ratio = 1
        grid.add_row(*(Text(words) for words in said.values()))
        return grid

    with Live(table(), console=console, vertical_overflow="visible", auto_refresh=False) as live:

        def write(side: str, piece: str) -> None:
            said[side] += piece
            live.update(table(), refresh=True)

        return chat.say(text, write)


def _remark(answer: "Answer", chat: "Chat", notes: "Console") -> None:
    """What the user must know of an answer beside its text."""
    who = f"{answer.side}: " if len(chat.sides) > 1 else ""
    if answer.dropped:
        plural = "turn" if answer.dropped == 1 else "turns"
        notes.print(
            f"{who}the {answer.dropped} oldest {plural} no longer fit the context and were left out.",
            style="dim",
        )
    if answer.ended == "length":
        notes.print(f"{who}cut at {answer.tokens} tokens (--max-new-tokens).", style="dim")
    elif answer.ended == "stopped":
        notes.print(f"{who}stopped.", style="dim")
