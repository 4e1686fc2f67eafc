"""The formats of rows: how each is recognised and how it becomes canonical rows (`luthier.data.rows`).

Everything here is pure: a row in, rows out, no files.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.data import foreign
from luthier.data.rows import (
    Reject,
    Row,
    boolean,
    clean,
    differing,
    is_conversation,
    listed,
    messages,
    options,
    present,
    split_prompt,
    string,
    text_or_messages,
)
from luthier.errors import DataError

if TYPE_CHECKING:
    from luthier.data.spec import DataSpec

Converter = Callable[[Row, "DataSpec", list[str]], list[Row]]

CANONICAL_FIELDS = (
    "text", "text_pair", "label", "messages", "conversations", "tools", "prompt", "completion", "chosen",
    "rejected", "margin", "p", "score_chosen", "score_rejected", "completions", "labels", "scores", "gold",
    "instruction", "input", "output", "system", "history", "question", "answer", "choices", "task",
)  # fmt: skip

# What a column of this name usually is: only to suggest a mapping, never to guess one.
_SYNONYMS = {
    "prompt": ("question", "query", "instruction", "input", "problem", "source", "article", "document"),
    "completion": ("answer", "response", "output", "target", "solution", "summary", "reply", "translation"),
    "text": ("content", "body", "sentence", "review", "article", "document", "0"),
    "label": ("class", "category", "sentiment", "target", "intent", "tag", "1"),
    "chosen": ("accepted", "preferred", "better", "good"),
    "rejected": ("refused", "dispreferred", "worse", "bad"),
    "messages": ("conversation", "dialog", "dialogue", "turns", "chat"),
}
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "passage"),
    ("text", "text_pair"),
)
SINGLES = ("text", "sentence", "review")


@dataclass(frozen=True)
class Format:
    """One format: its name, the canonical type it becomes, the fields it must have, its converter."""

    name: str
    type: str
    needs: tuple[str, ...]
    convert: Converter


def _text(row: Row, spec: "DataSpec", notes: list[str]) -> list[Row]:
    return [{"text": string(row, "text")}]


def _messages(row: Row, spec: "DataSpec", notes: list[str]) -> list[Row]:
    value = listed(present(row, "messages"))
    if isinstance(value, list) and any(isinstance(m, dict) and "from" in m for m in value):
        return foreign.sharegpt(row, spec, notes)
    turns = messages(value, spec, notes, answer=True)
    if next(t["role"] for t in turns if t["role"] not in ("system", "developer")) != "user":
        raise Reject("E_ROLE", "the conversation does not start with the user's message")
    return [{"messages": turns, **options(row, "messages")}]


def _prompt_only(row: Row, spec: "DataSpec", notes: list[str]) -> list[Row]:
    return [{"prompt": text_or_messages(row, "prompt", spec, notes), **options(row, "prompt_only")}]


def _sides(row: Row, spec: "DataSpec", notes: list[str], *keys: str) -> Row:
    """Prompt and answers, all strings or all messages: a string beside messages becomes one."""
    sides: Row = {"prompt": text_or_messages(row, "prompt", spec, notes)}
    for key in keys:
        sides[key] = text_or_messages(row, key, spec, notes, answer=is_conversation(row.get(key)))
    kinds = {key: isinstance(value, list) for key, value in sides.items()}
    if len({kinds[key] for key in keys}) > 1:
        raise Reject("E_TYPE", f"of {' and '.join(keys)} one is text and the other messages")
    if kinds[keys[0]] and not kinds["prompt"]:
        sides["prompt"] = [{"role": "user", "content": sides["prompt"]}]
    elif kinds["prompt"] and not kinds[keys[0]]:
        sides |= {key: [{"role": "assistant", "content": sides[key]}] for key in keys}
    return sides


def _prompt_completion(row: Row, spec: "DataSpec", notes: list[str]) -> list[Row]:
    return [_sides(row, spec, notes, "completion") | options(row, "prompt_completion")]


def _preference(row: Row, spec: "DataSpec", notes: list[str]) -> list[Row]:
    sides = _sides(row, spec, notes, "chosen", "rejected")
    chosen, rejected = sides["chosen"], sides["rejected"]
    if isinstance(chosen, list) and chosen[0]["role"] != "assistant":
        # Whole conversations beside the prompt, as in ultrafeedback_binarized.
        prompt, chosen, rejected = split_prompt(chosen, rejected)
        if prompt[-len(sides["prompt"]) :] != sides["prompt"]:
            raise Reject("E_PREFIX", "the conversations do not begin with 'prompt'")
        sides = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    differing(chosen, rejected)
    return [sides | options(row, "preference")]


def _preference_implicit(row: Row, spec: "DataSpec", notes: list[str]) -> list[Row]:
    chosen, rejected = (text_or_messages(row, k, spec, notes, answer=True) for k in ("chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list):
        return [foreign.implicit_messages(chosen, rejected) | options(row, "preference")]
    if isinstance(chosen, list) or isinstance(rejected, list):
        raise Reject("E_TYPE", "of 'chosen' and 'rejected' one is text and the other messages")
    # Two strings do not tell where the prompt ends: cutting at the first differing character would cut
    # inside a word of the answers. They stay whole.
    differing(chosen, rejected)
    return [{"chosen": chosen, "rejected": rejected, **options(row, "preference")}]


def _unpaired(row: Row, spec: "DataSpec", notes: list[str]) -> list[Row]:
    label = boolean(row, "label")
    return [_sides(row, spec, notes, "completion") | {"label": label} | options(row, "unpaired")]


def _stepwise(row: Row, spec: "DataSpec", notes: list[str]) -> list[Row]:
    steps, labels = listed(present(row, "completions")), listed(present(row, "labels"))
    return [foreign.stepwise_row(string(row, "prompt"), steps, labels, notes)]


def _classification(row: Row, spec: "DataSpec", notes: list[str]) -> list[Row]:
    label = present(row, "label")
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if not isinstance(label, bool | int | str) or (isinstance(label, str) and not label.strip()):
        raise Reject("E_TYPE", f"'label' is {label!r}, not a class (a name or a whole number)")
    pair = next((p for p in PAIRS if all(row.get(key) is not None for key in p)), None)
    if pair is not None:
        return [{"text": string(row, pair[0]), "text_pair": string(row, pair[1]), "label": label}]
    key = next((key for key in SINGLES if row.get(key) is not None), "text")
    return [{"text": string(row, key), "label": label}]


def _multiple_choice(row: Row, spec: "DataSpec", notes: list[str]) -> list[Row]:
    choices, label = listed(present(row, "choices")), present(row, "label")
    if not isinstance(choices, list) or not all(isinstance(c, str) and c.strip() for c in choices):
        raise Reject("E_TYPE", "'choices' is not a list of texts")
    if isinstance(label, str) and label in choices:
        label = choices.index(label)
    if isinstance(label, str) and label.strip().isdigit():
        label = int(label)
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
        last = len(choices) - 1
        raise Reject("E_TYPE", f"'label' is {label!r}, neither a choice nor the number of one (0 to {last})")
    return [{"prompt": text_or_messages(row, "prompt", spec, notes), "choices": choices, "label": label}]


_ALL = (
    Format("prm800k", "stepwise", ("question", "label"), foreign.prm800k),
    Format("stepwise", "stepwise", ("prompt", "completions", "labels"), _stepwise),
    Format("math_shepherd", "stepwise", ("input", "label"), foreign.math_shepherd),
    Format("scored", "preference", ("completions",), foreign.scored),
    Format("hh_rlhf", "preference", ("chosen", "rejected"), foreign.hh_rlhf),
    Format("preference", "preference", ("prompt", "chosen", "rejected"), _preference),
    Format("alpaca_preference", "preference", ("instruction",), foreign.alpaca_preference),
    Format("preference_implicit", "preference", ("chosen", "rejected"), _preference_implicit),
    Format("multiple_choice", "multiple_choice", ("prompt", "choices", "label"), _multiple_choice),
    Format("unpaired", "unpaired", ("prompt", "completion", "label"), _unpaired),
    Format("prompt_completion", "prompt_completion", ("prompt", "completion"), _prompt_completion),
    Format("messages", "messages", ("messages",), _messages),
    Format("sharegpt", "messages", ("conversations",), foreign.sharegpt),
    Format("alpaca_kto", "unpaired", ("instruction", "output", "kto_tag"), foreign.alpaca_kto),
    Format("alpaca", "prompt_completion", ("instruction", "output"), foreign.alpaca),
    Format("self_instruct", "prompt_completion", ("instruction", "instances"), foreign.self_instruct),
    Format("gsm8k", "prompt_completion", ("question", "answer"), foreign.gsm8k),
    Format("gsm8k_socratic", "prompt_completion", ("question", "answer"), foreign.gsm8k_socratic),
    Format("hh_red_team", "prompt_only", ("transcript",), foreign.hh_red_team),
    Format("classification", "classification", ("label",), _classification),
    Format("prompt_only", "prompt_only", ("prompt",), _prompt_only),
    Format("text", "text", ("text",), _text),
)
FORMATS: dict[str, Format] = {format.name: format for format in _ALL}


def detect(rows: list[Row]) -> str:
    """The format of the first rows of a file, by their fields and a look at the values; first match wins.

    Raises:
        DataError: no format fits, with the fields seen, the nearest format and the mapping to write.
    """
    rows = [row for row in rows if isinstance(row, dict)]
    keys = {key for row in rows for key, value in row.items() if value is not None}

    def share(test: Callable[[Row], bool]) -> float:
        return sum(bool(test(row)) for row in rows) / max(len(rows), 1)

    for name, needs, test in _RULES:
        if needs <= keys and (test is None or share(test) >= 0.9):
            return name
    raise DataError(_unknown(keys), fix=_suggest(keys))


def _is_text(*names: str) -> Callable[[Row], bool]:
    return lambda row: all(isinstance(row.get(name), str) for name in names)


def _starts_human(row: Row) -> bool:
    return _is_text("chosen", "rejected")(row) and row["chosen"].startswith("\n\nHuman:")


_RULES: tuple[tuple[str, set[str], Callable[[Row], bool] | None], ...] = (
    (
        "prm800k",
        {"question", "label"},
        lambda r: isinstance(r["question"], dict) and isinstance(r["label"], dict) and "steps" in r["label"],
    ),
    ("stepwise", {"prompt", "completions", "labels"}, None),
    ("math_shepherd", {"input", "label"}, lambda r: _is_text("input", "label")(r) and "ки" in r["input"]),
    ("scored", {"prompt", "completions"}, None),
    ("scored", {"instruction", "completions"}, None),
    ("multiple_choice", {"prompt", "choices", "label"}, None),
    ("hh_rlhf", {"chosen", "rejected"}, _starts_human),
    ("preference", {"prompt", "chosen", "rejected"}, None),
    ("alpaca_preference", {"instruction", "chosen", "rejected"}, None),
    ("preference_implicit", {"chosen", "rejected"}, None),
    (
        "unpaired",
        {"prompt", "completion", "label"},
        lambda r: str(r.get("label")).lower() in ("true", "false", "0", "1", "0.0", "1.0"),
    ),
    ("prompt_completion", {"prompt", "completion"}, None),
    ("messages", {"messages"}, None),
    ("sharegpt", {"conversations"}, None),
    ("alpaca_preference", {"instruction", "output"}, lambda r: isinstance(listed(r.get("output")), list)),
    ("alpaca_kto", {"instruction", "output", "kto_tag"}, None),
    ("alpaca", {"instruction", "output"}, None),
    ("self_instruct", {"instruction", "instances"}, None),
    (
        "gsm8k_socratic",
        {"question", "answer"},
        lambda r: _is_text("answer")(r) and "####" in r["answer"] and " ** " in r["answer"],
    ),
    ("gsm8k", {"question", "answer"}, lambda r: _is_text("answer")(r) and "####" in r["answer"]),
    ("hh_red_team", {"transcript", "rating"}, None),
    *(("classification", {*pair, "label"}, None) for pair in PAIRS),
    *(("classification", {single, "label"}, None) for single in SINGLES),
    ("prompt_only", {"prompt"}, None),
    ("text", {"text"}, None),
)


def _unknown(keys: Iterable[str]) -> str:
    names = ", ".join(sorted(keys)) or "none"
    needs = {name: FORMATS[name].needs for name in ("prompt_completion", "alpaca", "preference", "unpaired")}
    needs |= {"classification": ("text", "label"), "gsm8k": ("question", "answer with '####'")}
    lacking = {name: [field for field in fields if field not in keys] for name, fields in needs.items()}
    best = min(needs, key=lambda name: len(lacking[name]) / len(needs[name]))
    some = len(lacking[best]) < len(needs[best])
    near = f" Nearest is {best}, which lacks {', '.join(lacking[best])}." if some else ""
    return f"The rows have the columns {names}, which is no known format.{near}"


def _suggest(keys: Iterable[str]) -> str:
    """The one line of mapping to write, from what the columns are called."""
    found = {ours: next((s for s in names if s in keys), None) for ours, names in _SYNONYMS.items()}
    found |= {ours: ours for ours in _SYNONYMS if ours in keys}
    for wanted in (
        ("chosen", "rejected"),
        ("prompt", "completion"),
        ("text", "label"),
        ("messages",),
        ("text",),
    ):
        if all(found[name] for name in wanted) and len({found[name] for name in wanted}) == len(wanted):
            # A column called 0 must reach us as text, so YAML needs the quotes.
            theirs = {name: f"'{s}'" if str(s).isdigit() else s for name, s in found.items()}
            pairs = ", ".join(f"{name}: {theirs[name]}" for name in wanted)
            return f"If that is what they mean, write columns: {{{pairs}}}."
    return (
        "Write columns: {prompt: THEIRS, completion: THEIRS} (or text, text + label, messages, "
        "prompt + chosen + rejected), with the names of the file's columns."
    )


def rename(row: Row, columns: dict[str, str]) -> Row:
    """The row under our names. A mapped column leaves its old name; the others stay."""
    if not columns:
        return row
    taken = set(columns.values())
    return {key: value for key, value in row.items() if key not in taken and key not in columns} | {
        ours: row[theirs] for ours, theirs in columns.items() if theirs in row
    }


def convert(row: Any, format: str, spec: "DataSpec", notes: list[str]) -> list[Row]:
    """Canonical rows of one row. Adds the codes of repairs to `notes`.

    Raises:
        Reject: with its code and reason.
    """
    if not isinstance(row, dict):
        raise Reject("E_TYPE", f"the record is {type(row).__name__}, not an object with fields")
    chosen = FORMATS[format]
    row = clean(row, notes)
    for key in chosen.needs:
        present(row, key)
    try:
        rows = chosen.convert(row, spec, notes)
    except (AttributeError, KeyError, TypeError) as error:
        # A deeply nested format (PRM800K) that is not nested as it should be.
        raise Reject("E_TYPE", f"the record is not nested as {format} is ({error})") from error
    # Rows of any type may say which of several tasks they are of.
    task = row.get("task")
    return rows if task is None or isinstance(task, list | dict) else [r | {"task": str(task)} for r in rows]


def kind(row: Row) -> str:
    """'conversational' where the first field that tells is a list of messages, else 'standard'."""
    for key in ("prompt", "chosen", "rejected", "completion", "messages"):
        if key in row:
            return "conversational" if is_conversation(row[key]) else "standard"
    return "standard"


def one_kind(rows: Iterable[Row]) -> str:
    """The one kind of all rows.

    Raises:
        DataError: strings and messages are mixed, with counts.
    """
    counts = Counter(kind(row) for row in rows)
    if len(counts) > 1:
        raise DataError(
            f"The data mixes {counts['standard']} rows of strings with {counts['conversational']} rows of "
            "messages.",
            fix="Give each its own file, or write all rows as messages.",
        )
    return next(iter(counts))
