"""`luthier data show|check|tickets`: what the model would see, what is wrong with a file, example data."""

import logging
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from luthier.errors import DataError

if TYPE_CHECKING:
    from luthier.data.load import Loaded
    from luthier.data.spec import DataSpec
    from luthier.data.survey import Survey
    from luthier.data.tokenize import Encoded

app = typer.Typer(help="Look at data: what the model sees, what is wrong; make the example data.")
_TRAINED, _GIVEN, _CUT = "bold green", "dim", "strike red"
_SHOWN = 4000  # characters of one example that are printed

File = Annotated[str, typer.Argument(help="File, folder or Hub id.")]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Model whose template and tokens are used.")]
MaxLength = Annotated[int | None, typer.Option(min=1, help="Where examples are cut, in tokens.")]
TrainOn = Annotated[
    Literal["assistant_all", "assistant_last", "completion", "all"], typer.Option(help="What is trained.")
]
Chat = Annotated[Literal["auto", "on", "off"], typer.Option(help="Render prompt and completion as chat.")]
Format = Annotated[str, typer.Option(help="What a row means; by default detected.")]
Column = Annotated[list[str] | None, typer.Option("--column", help="OURS=THEIRS, as often as needed.")]
Split = Annotated[str | None, typer.Option(help="Split of a Hub data set or folder.")]


@app.callback()
def quiet() -> None:
    # What is checked on the way is said in the tables.
    logging.getLogger("luthier").setLevel(logging.WARNING)
    logging.getLogger("luthier.models.gguf").setLevel(logging.INFO)  # takes long, and only once


@app.command()
def show(
    file: File,
    model: Model = None,
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="How many rows.")] = 3,
    start: Annotated[int, typer.Option(min=0, help="The first row, counted from 0.")] = 0,
    max_length: MaxLength = None,
    train_on: TrainOn = "assistant_all",
    chat: Chat = "auto",
    format: Format = "auto",
    column: Column = None,
    split: Split = None,
) -> None:
    """Print rows as the model sees them; what is trained is green and bold, what would be cut is red."""
    from luthier.data.load import load

    loaded = load(_spec(file, format, column, split, limit=start + rows))
    console = Console()
    console.print(loaded.report.line(), markup=False, highlight=False)
    if start >= len(loaded):
        raise DataError(f"{file} has {len(loaded)} rows.", fix="Choose a smaller --start.")
    if model is None:
        for index in range(start, len(loaded)):
            console.rule(f"[bold]{loaded.where(index)}")
            console.print(_plain(loaded.records[index]))
        return
    from luthier.data.tokenize import encode

    tokenizer = _tokenizer(model)
    options: dict[str, Any] = {"train_on": train_on, "chat": chat, "allow_empty": True, "use_cache": False}
    encoded = encode(loaded, tokenizer, max_length=None, **options)
    for number, index in enumerate(encoded.source):
        if index >= start:
            _show_example(console, loaded, encoded, number, tokenizer, max_length)


def _show_example(
    console: Console,
    loaded: "Loaded",
    encoded: "Encoded",
    number: int,
    tokenizer: Any,
    max_length: int | None,
) -> None:
    ids, labels = encoded.dataset[number]["input_ids"], encoded.dataset[number]["labels"]
    cut = len(ids) if max_length is None else max_length
    trained = sum(label >= 0 for label in labels[1:cut])
    console.rule(f"[bold]{loaded.where(encoded.source[number])}[/] · {len(ids)} tokens, {trained} trained")
    text = Text()
    at = 0
    while at < len(ids):
        style, stop = _style(at, labels, cut), at
        while stop < len(ids) and _style(stop, labels, cut) == style:
            stop += 1
        text.append(tokenizer.decode(ids[at:stop], clean_up_tokenization_spaces=False), style=style)
        at = stop
    console.print(_shortened(text))
    if cut < len(ids):
        console.print(
            f"cut after {cut} tokens" + ("" if trained else ": nothing trained is left"), style="red"
        )


def _style(at: int, labels: list[int], cut: int) -> str:
    return _CUT if at >= cut else _TRAINED if labels[at] >= 0 else _GIVEN


def _shortened(text: Text) -> Text:
    if len(text) <= _SHOWN:
        return text
    left_out = len(text) - _SHOWN
    middle = Text(f" … {left_out} characters … ", style="yellow")
    return text[: _SHOWN // 2] + middle + text[-_SHOWN // 2 :]


def _plain(row: dict[str, Any]) -> Text:
    """A row without a template: field by field, the assistant's words as trained."""
    text = Text()
    answers = {"completion", "chosen"} if {"completion", "chosen"} & set(row) else {"text", "label", "labels"}
    for key, value in row.items():
        if key == "origin":
            continue
        if isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]:
            for message in value:
                learnt = message["role"] == "assistant" and key in answers | {"messages"}
                text.append(f"{key if key != 'messages' else ''} {message['role']}: ".lstrip(), style="cyan")
                text.append(f"{message['content']}\n", style=_TRAINED if learnt else _GIVEN)
        else:
            text.append(f"{key}: ", style="cyan")
            text.append(f"{value}\n", style=_TRAINED if key in answers else _GIVEN)
    return _shortened(text)


@app.command()
def check(
    file: File,
    eval_file: Annotated[str | None, typer.Option("--eval", help="Held-out data that must not leak.")] = None,
    model: Model = None,
    max_length: MaxLength = None,
    train_on: TrainOn = "assistant_all",
    chat: Chat = "auto",
    format: Format = "auto",
    column: Column = None,
    split: Split = None,
    rejected: Annotated[Path | None, typer.Option(help="Write bad records with reasons here.")] = None,
) -> None:
    """Report lengths, bad records, copies, empty labels, truncation, leakage; exit 1 on a fault."""
    from luthier.data.survey import survey

    with TemporaryDirectory() as temporary:
        found = survey(
            _spec(file, format, column, split),
            eval_spec=_spec(eval_file, format, column, None) if eval_file else None,
            tokenizer=_tokenizer(model) if model else None,
            max_length=max_length,
            train_on=train_on,
            chat=chat,
            rejected_file=rejected or Path(temporary) / "rejected.jsonl",
        )
    console = Console()
    console.print(_summary(found, max_length))
    _print_lengths(console, found)
    _print_faults(console, found)
    if found.faulty:
        raise typer.Exit(1)


def _summary(found: "Survey", max_length: int | None) -> Table:
    report, encoding = found.loaded.report, found.encoding
    table = Table(show_header=False, box=None)
    table.add_row("format", f"{report.format}, {'conversational ' * report.conversational}{report.type}")
    table.add_row("records", f"{report.read}, giving {report.rows} rows")
    table.add_row("columns not used", ", ".join(report.unused) or "none")
    table.add_row("bad records", _counts(report.rejected))
    table.add_row("repaired or remarked", _counts(report.noted))
    table.add_row("exact copies", str(report.duplicates))
    if found.held_out is not None:
        held_out = found.held_out.report
        table.add_row("records of --eval", f"{held_out.read}, bad: {_counts(held_out.rejected)}")
        table.add_row("prompts also in --eval", str(report.leaked))
    if encoding is not None:
        if found.loaded.type != "text":
            table.add_row("trained share of tokens", f"{encoding.share:.1%}")
        table.add_row("answers end with", " ".join(encoding.end_tokens))
        table.add_row("special tokens in the text", f"{encoding.marked} rows")
        if encoding.split:
            table.add_row("one example a turn", f"{encoding.split} conversations")
    table.add_row("examples without a label", str(len(found.empty_labels)))
    if max_length is not None and encoding is not None:
        table.add_row("truncated", f"{found.truncated}, of which {found.emptied} lose every trained token")
        table.add_row("length that keeps 99%", f"{encoding.length_99} tokens")
    return table


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {code}" for code, count in sorted(counts.items())) or "none"


def _print_lengths(console: Console, found: "Survey") -> None:
    from luthier.data.survey import histogram

    table = Table(found.unit, "examples", "", title="Lengths", title_justify="left", box=None)
    bins = histogram(found.lengths)
    most = max(count for _, _, count in bins)
    for low, high, count in bins:
        table.add_row(f"{low} to {high}", str(count), "█" * math.ceil(30 * count / most))
    console.print(table)


def _print_faults(console: Console, found: "Survey") -> None:
    report = found.loaded.report
    if report.faults:
        table = Table("where", "code", "reason", title="Bad records", title_justify="left", box=None)
        for fault in report.faults:
            table.add_row(Text(Path(fault.where).name), fault.code, Text(fault.reason))
        console.print(table)
        if sum(report.rejected.values()) > len(report.faults):
            console.print("Give --rejected FILE to get them all.")
    if found.empty_labels:
        places = ", ".join(Path(where).name for where in found.empty_labels[:10])
        console.print(f"Without a label: {places}", markup=False)


@app.command()
def tickets(
    out: Annotated[Path, typer.Argument(help="Folder to write train.jsonl and test.jsonl into.")],
    seed: Annotated[int, typer.Option(help="Seed of the generator.")] = 0,
    train: Annotated[int, typer.Option(min=1, help="Training mails.")] = 1000,
    test: Annotated[int, typer.Option(min=1, help="Test mails.")] = 100,
) -> None:
    """Write the support tickets of the quickstart: mails and the records that they hold."""
    from luthier.data.tickets import write

    for path in write(out, seed=seed, train=train, test=test):
        typer.echo(str(path))


def _spec(
    path: str, format: str, column: list[str] | None, split: str | None, limit: int | None = None
) -> "DataSpec":
    from luthier.data.spec import DataSpec

    pairs = [item.partition("=") for item in column or []]
    if any(not (ours and theirs) for ours, _, theirs in pairs):
        raise DataError(
            f"--column {' '.join(column or [])} is not OURS=THEIRS.", fix="Write --column prompt=question."
        )
    columns = {ours: theirs for ours, _, theirs in pairs}
    try:
        given = {"path": path, "format": format, "columns": columns, "split": split, "limit": limit}
        return DataSpec.model_validate(given)
    except ValidationError as error:
        found = error.errors()[0].get("ctx", {})
        raise DataError(f"{found.get('message', error.errors()[0]['msg'])}.", fix=found.get("fix")) from None


def _tokenizer(model: str) -> Any:
    """The tokenizer of a model, without its weights."""
    from luthier.models import gguf, sources, tokens

    if (Path(model).expanduser() / "tokenizer.json").is_file():
        return tokens.load(model, str(Path(model).expanduser()), False, None)
    source = sources.locate(model)
    path = gguf.converted(source) if source.gguf_file else source.path
    own = path is None or any((path / file).is_file() for file in tokens.FILES)
    if source.base is not None and not own:
        return _tokenizer(source.base)
    return tokens.load(source.name, str(path or source.hub_id), False, None)
