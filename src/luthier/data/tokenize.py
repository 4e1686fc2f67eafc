"""From canonical rows to token ids and labels, with an account and proofs of what became of each row.

Labels are not shifted; -100 marks what is not trained. The label of a text's first token counts for
nothing (nothing predicts it), so "has a label" means: at position 1 or later.
"""

import logging
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset

import luthier.data.chat
import luthier.data.masking
from luthier import checks
from luthier.data import cache
from luthier.data.chat import Rendered, Renderer, special_tokens
from luthier.data.load import Loaded
from luthier.data.masking import Example, Prefix, batches, marked, plain_ids, tokenised
from luthier.data.rows import Message, Row
from luthier.errors import CheckError, DataError, did_you_mean

log = logging.getLogger("luthier.data")

TrainOn = Literal["assistant_all", "assistant_last", "completion", "all"]
TRAIN_ON = ("assistant_all", "assistant_last", "completion", "all")
IGNORED = -100


@dataclass
class EncodeReport:
    """What became of the rows.

    Attributes:
        records: rows given. examples: encoded texts that came out.
        tokens: of all examples; `trained` are those with a label.
        truncated: examples cut at max_length. emptied: those (and `unlabelled`, which nothing cut) that
            keep no label; they are left out.
        first_emptied: the row of the first emptied example.
        split: conversations that became one example a turn, because the template rewrites earlier turns.
        length_99: the length in which 99 % of the examples fit whole; `longest` is that of all, uncut.
        end_tokens: the tokens that end trained answers; `ended` is the share of answers that end in one.
        bos_run: the most beginning-of-text tokens in a row.
        marked: rows whose own text contains a special token of the tokenizer.
        unlike_served: prompts cut into other tokens than when they are served, of `compared`.
        label_names: class names in the order of their numbers, for classification.
    """

    records: int
    max_length: int | None
    chat: bool = False
    train_on: str = ""
    examples: int = 0
    tokens: int = 0
    trained: int = 0
    truncated: int = 0
    emptied: int = 0
    unlabelled: int = 0
    first_emptied: int | None = None
    split: int = 0
    length_50: int = 0
    length_99: int = 0
    longest: int = 0
    end_tokens: list[str] = field(default_factory=list)
    ended: float = 1.0
    bos_run: int = 0
    marked: int = 0
    compared: int = 0
    unlike_served: int = 0
    label_names: list[str] | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def share(self) -> float:
        """The share of tokens that is trained."""
        return self.trained / max(self.tokens, 1)

    def line(self) -> str:
        lost = self.emptied - self.unlabelled
        cut = f"{self.truncated} of {self.examples + self.emptied} truncated, {lost} lost all trained tokens"
        return (
            f"{self.examples} examples, {self.tokens} tokens, {self.share:.1%} trained; half have up to "
            f"{self.length_50} tokens, 99% up to {self.length_99}, the longest {self.longest}; {cut}"
        )


@dataclass
class Encoded:
    """`dataset` {input_ids, labels} of int32; `source[i]` is the index of the row of example i."""

    dataset: Dataset
    report: EncodeReport
    source: list[int]

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def label_names(self) -> list[str] | None:
        return self.report.label_names


# Prompts and answers -----------------------------------------------------------------------------------


def uses_chat(tokenizer: Any, chat: str) -> bool:
    """Whether prompt and completion are rendered as a conversation. Raises DataError for another word."""
    if chat not in ("auto", "on", "off"):
        raise DataError(f"chat is {chat!r}.", fix="Choose from: auto, on, off.")
    return chat == "on" or (chat == "auto" and bool(tokenizer.chat_template))


def conversation(row: Row) -> tuple[list[Message], int]:
    """A row as messages, and how many of them are its prompt; strings lose the white space at their ends.

    Raises:
        DataError: the row has no prompt.
    """
    if "messages" in row:
        return row["messages"], len(row["messages"]) - 1
    prompt = row.get("prompt")
    if prompt is None:
        raise DataError(f"A row of {', '.join(k for k in row if k != 'origin')} has no prompt.")
    messages = [{"role": "user", "content": prompt.strip()}] if isinstance(prompt, str) else list(prompt)
    answer = row.get("completion", [])
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer.strip()}]
    return messages + answer, len(messages)


def prompt_text(
    row: Row, tokenizer: Any, *, chat: str = "auto", options: dict[str, Any] | None = None
) -> str:
    """The text that is served to get the answer of a row, without the tokenizer's beginning-of-text token."""
    if _is_plain(row, tokenizer, chat):
        return row["prompt"]
    messages, asked = conversation(row)
    return Renderer(tokenizer, options).render(messages[:asked], row.get("tools"), prompt=True)


def prompt_ids(
    row: Row, tokenizer: Any, *, chat: str = "auto", options: dict[str, Any] | None = None
) -> list[int]:
    """The ids of `prompt_text` with at most one beginning-of-text token: what `encode` trains on, too."""
    text = prompt_text(row, tokenizer, chat=chat, options=options)
    return Prefix(tokenizer, _is_plain(row, tokenizer, chat))(text) + plain_ids(tokenizer, text)


def _is_plain(row: Row, tokenizer: Any, chat: str) -> bool:
    return isinstance(row.get("prompt"), str) and not uses_chat(tokenizer, chat)


def gold(row: Row) -> str:
    """The reference answer of a row: its `gold`, else the completion or the last assistant message.

    Raises:
        DataError: the row has no answer.
    """
    if row.get("gold") is not None:
        return str(row["gold"])
    answer = row.get("completion", row.get("messages"))
    if isinstance(answer, list) and answer:
        answer = answer[-1]["content"]
    if not isinstance(answer, str):
        raise DataError(f"A row of {', '.join(k for k in row if k != 'origin')} has no reference answer.")
    return answer.strip()


# Encoding for causal language models -------------------------------------------------------------------


def encode(
    loaded: Loaded,
    tokenizer: Any,
    *,
    max_length: int | None,
    train_on: TrainOn = "assistant_all",
    chat: str = "auto",
    allow_empty: bool = False,
    options: dict[str, Any] | None = None,
    use_cache: bool = True,
) -> Encoded:
    """Token ids and labels of text, messages or prompt_completion rows.

    Args:
        max_length: longer examples are cut at the end and counted; None cuts nothing.
        train_on: assistant_all trains every turn of the assistant, assistant_last and completion the last
            one (of prompt and completion, completion trains all turns of the completion), all every token
            up to the end of the last answer. Rows of text are trained whole.
        chat: whether prompt and completion are rendered with the chat template; auto does so where the
            tokenizer has one.
        allow_empty: leave out (and count) examples that keep no trained token, instead of refusing them.
        options: variables of the chat template, such as {"enable_thinking": False}.

    Raises:
        DataError: another type of rows, a template that cannot be trained on, or emptied examples.
        CheckError: two beginning-of-text tokens, answers without end, a trained share of 0 or 1.
    """
    if loaded.type not in ("text", "messages", "prompt_completion"):
        raise DataError(
            f"{loaded.spec.path} holds rows of type {loaded.type}, which are not trained as text.",
            fix="Use data with messages, prompt and completion, or text; or map them with columns.",
        )
    if train_on not in TRAIN_ON:
        raise DataError(f"train_on is {train_on!r}.", fix=f"Choose from: {', '.join(TRAIN_ON)}.")
    as_chat = loaded.type == "messages" or (
        loaded.type != "text" and (loaded.report.conversational or uses_chat(tokenizer, chat))
    )

    def build() -> tuple[Dataset, dict[str, Any]]:
        report = EncodeReport(len(loaded), max_length, as_chat, train_on)
        rendered = _render(loaded, tokenizer, train_on, as_chat, options)
        turns = Counter(item.source for item in rendered)
        report.split = sum(count > 1 for count in turns.values())
        return _finish(_examples(loaded, rendered, tokenizer, report), tokenizer, report)

    _say_template(loaded.type, tokenizer, as_chat, options)
    settings = {"max_length": max_length, "train_on": train_on, "chat": as_chat, "options": options}
    return _cached(loaded, tokenizer, settings, build, use_cache, allow_empty)


def _say_template(type: str, tokenizer: Any, as_chat: bool, options: dict[str, Any] | None) -> None:
    """Say where rows are rendered otherwise than the tokenizer renders a chat when it is served."""
    if as_chat and options:
        value = "with " + ", ".join(f"{name}={value!r}" for name, value in options.items())
        checks.record("data", "chat template", True, value, detail="evaluation and chat leave these out")
    elif not as_chat and tokenizer.chat_template and type != "text":
        detail = "prompt and completion are joined as they are; evaluation and chat use the template"
        checks.record("data", "chat template", True, "not used", detail=detail)


def encode_pretrain(loaded: Loaded, tokenizer: Any, *, max_length: int, use_cache: bool = True) -> Encoded:
    """Blocks of at most `max_length` tokens, each of one document; every token is trained, none is lost.

    A document is its text between the tokenizer's beginning-of-text token, if it has one, and an
    end-of-text token. No block holds parts of two documents (`pack` fills them up). labels = input_ids.

    Raises:
        DataError: the rows are not text.
    """
    _require(loaded, "text", "text")

    def build() -> tuple[Dataset, dict[str, Any]]:
        report = EncodeReport(len(loaded), None, False, "all")
        documents = _examples(loaded, _render(loaded, tokenizer, "all", False, None), tokenizer, report)
        blocks = [
            Example(e.ids[at : at + max_length], e.trained[at : at + max_length], e.source)
            for e in documents
            for at in range(0, len(e.ids), max_length)
            # A last block of one token would train nothing: nothing predicts its only token.
            if len(e.ids) - at > 1
        ]
        return _finish(blocks, tokenizer, report)

    return _cached(loaded, tokenizer, {"pretrain": max_length}, build, use_cache, allow_empty=False)


def encode_classification(
    loaded: Loaded, tokenizer: Any, *, max_length: int | None, labels: list[str] | None = None
) -> Encoded:
    """Texts (or pairs) with the tokenizer's own special tokens, and the number of their class.

    The data set is {input_ids, labels: int, token_type_ids where the model has them}. For a tokenizer
    without separator, the two texts of a pair stand in two lines.

    Args:
        labels: class names in order; by default those of the spec, else those found. Encode held-out data
            with the `label_names` of the training data.

    Raises:
        DataError: other rows, one class only, or a label that is none of the classes.
    """
    _require(loaded, "classification", "text and label")
    names = labels or loaded.spec.labels or class_names(loaded)
    report = EncodeReport(len(loaded), max_length, label_names=names)
    numbers = [_class_number(row["label"], names, loaded, i) for i, row in enumerate(loaded.records)]
    found = Counter(numbers)
    checks.record(
        "data", "classes", True, len(names), detail=", ".join(f"{n}: {found[i]}" for i, n in enumerate(names))
    )
    columns: dict[str, list[np.ndarray]] = {}
    lengths: list[int] = []
    for batch in batches(loaded.records):
        texts: list[Any] = [row["text"] for row in batch]
        if "text_pair" in loaded.records[0]:
            pairs = [(row["text"], row.get("text_pair") or "") for row in batch]
            texts = pairs if tokenizer.sep_token else ["\n".join(pair) for pair in pairs]
        options = {"return_attention_mask": False, "verbose": False}
        whole = tokenizer(texts, **options)
        cut = tokenizer(texts, truncation=True, max_length=max_length, **options) if max_length else whole
        lengths += [len(ids) for ids in whole["input_ids"]]
        for name, rows in cut.items():
            columns.setdefault(name, []).extend(np.array(row, np.int32) for row in rows)
    count_lengths(report, lengths)
    report.truncated = sum(length > (max_length or length) for length in lengths)
    report.examples, report.tokens = len(lengths), sum(len(ids) for ids in columns["input_ids"])
    report.trained = report.examples
    prove_kept(loaded, report, allow_empty=False)
    dataset = as_dataset(columns).add_column("labels", numbers)
    return Encoded(dataset, report, list(range(len(loaded))))


def _require(loaded: Loaded, type: str, fields: str) -> None:
    if loaded.type != type:
        raise DataError(
            f"{loaded.spec.path} holds rows of type {loaded.type}; this objective takes {fields}.",
            fix="Use another file or objective, or map the columns.",
        )


def class_names(loaded: Loaded) -> list[str]:
    """The names found: whole numbers are numbered as they are, names are sorted."""
    found = {row["label"] for row in loaded.records}
    if all(isinstance(label, bool) for label in found):
        return ["false", "true"]
    names = {str(label).strip() for label in found}
    if len(names) < 2:
        raise DataError(
            f"{loaded.spec.path} has one class only: {names.pop()}.", fix="Use data of two classes or more."
        )
    if all(name.lstrip("-").isdigit() for name in names):
        values = sorted(map(int, names))
        # Labels 0 and 2 are a sample that lacks class 1; labels -1 and 1, or 1 to 5, are as many as found.
        return [str(n) for n in (range(values[-1] + 1) if values[0] == 0 and values[-1] < 1000 else values)]
    return sorted(names)


def _class_number(label: Any, names: list[str], loaded: Loaded, index: int) -> int:
    name = str(label).lower() if isinstance(label, bool) else str(label).strip()
    if name in names:
        return names.index(name)
    if isinstance(label, int) and 0 <= label < len(names) and not all(n.lstrip("-").isdigit() for n in names):
        return int(label)
    fix = did_you_mean(name, names)
    raise DataError(f"{loaded.where(index)}: label {label!r} is none of the {len(names)} classes.", fix=fix)


def encode_seq2seq(
    loaded: Loaded, tokenizer: Any, *, max_length: int | None, max_target_length: int | None = None
) -> Encoded:
    """Prompts for the encoder and completions for the decoder: {input_ids, labels}, each with an end token.

    A prompt that is too long keeps its end token, for the encoder reads whole texts; a completion that is
    cut loses it, so that the model does not learn to stop there.

    Raises:
        DataError: rows other than prompt and completion.
    """
    _require(loaded, "prompt_completion", "prompt and completion")
    report = EncodeReport(len(loaded), max_target_length, train_on="completion")
    columns: dict[str, list[np.ndarray]] = {"input_ids": [], "labels": []}
    lengths: list[int] = []
    sources_cut = 0
    for batch in batches(loaded.records):
        prompts = [prompt_text(row, tokenizer) for row in batch]
        whole = tokenizer(prompts, verbose=False)["input_ids"]
        cut = tokenizer(prompts, truncation=max_length is not None, max_length=max_length, verbose=False)
        answers = [row["completion"] if isinstance(row["completion"], str) else gold(row) for row in batch]
        targets = tokenizer(text_target=answers, verbose=False)["input_ids"]
        for before, source, target in zip(whole, cut["input_ids"], targets, strict=True):
            sources_cut += len(before) > len(source)
            end = [] if target[-1:] == [tokenizer.eos_token_id] else [tokenizer.eos_token_id]
            lengths.append(len(target) + len(end))
            columns["input_ids"].append(np.array(source, np.int32))
            columns["labels"].append(np.array([*target, *end][:max_target_length], np.int32))
    checks.record("data", "truncated prompts", True, sources_cut, detail=_cut_at(max_length))
    count_lengths(report, lengths)
    report.examples, report.trained = len(lengths), sum(len(ids) for ids in columns["labels"])
    report.tokens = report.trained + sum(len(ids) for ids in columns["input_ids"])
    report.truncated = sum(length > (max_target_length or length) for length in lengths)
    report.end_tokens = [tokenizer.eos_token]
    prove_kept(loaded, report, allow_empty=False)
    return Encoded(as_dataset(columns), report, list(range(len(loaded))))


def _render(
    loaded: Loaded, tokenizer: Any, train_on: str, as_chat: bool, options: dict[str, Any] | None
) -> list[Rendered]:
    rows = list(enumerate(loaded.records))
    if loaded.type == "text":
        return [Rendered(row["text"], [(0, len(row["text"]))], True, index) for index, row in rows]
    if not as_chat:
        return [_plain(row, train_on, index) for index, row in rows]
    renderer = Renderer(tokenizer, options)
    rendered = []
    for index, row in rows:
        messages, asked = conversation(row)
        try:
            texts = renderer.trained(messages, row.get("tools"), _turns(row, messages, asked, train_on))
        except DataError as error:
            raise DataError(f"{loaded.where(index)}: {error.message}", fix=error.fix) from error
        for text in texts:
            spans = [(0, text.spans[-1][1])] if train_on == "all" and text.spans else text.spans
            rendered.append(Rendered(text.text, spans, text.end, index))
    return rendered


def _plain(row: Row, train_on: str, index: int) -> Rendered:
    text = row["prompt"] + row["completion"]
    return Rendered(text, [(0 if train_on == "all" else len(row["prompt"]), len(text))], True, index)


def _turns(row: Row, messages: list[Message], asked: int, train_on: str) -> list[int]:
    """Indices of the assistant's messages that are trained."""
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1)]
    if "completion" in row:  # what is in the prompt is given
        turns = [i for i in turns if i >= asked]
    if train_on in ("assistant_last", "all") or (train_on == "completion" and "messages" in row):
        turns = [i for i in turns if i == len(messages) - 1]
    return turns


# Counting, cutting, proving ----------------------------------------------------------------------------


def _examples(
    loaded: Loaded, rendered: list[Rendered], tokenizer: Any, report: EncodeReport
) -> list[Example]:
    """The examples of all texts, uncut; how they begin and end goes into the report."""
    examples, served = tokenised(rendered, tokenizer, plain=not report.chat)
    report.compared, report.unlike_served = served.compared, served.unlike
    report.marked = marked(loaded.records, tokenizer)
    special = set(tokenizer.convert_tokens_to_ids(list(special_tokens(tokenizer))))
    ends = Counter(int(e.ids[np.flatnonzero(e.trained)[-1]]) for e in examples if e.trained.any())
    proper = Counter({token: count for token, count in ends.items() if token in special})
    report.ended = sum(proper.values()) / max(sum(ends.values()), 1)
    report.end_tokens = [tokenizer.convert_ids_to_tokens(token) for token, _ in proper.most_common()]
    report.bos_run = max(_run(e.ids, tokenizer.bos_token_id) for e in examples)
    return examples


def _run(ids: np.ndarray, token: int | None) -> int:
    """How many of one token stand at the start: 2 is a doubled beginning-of-text token."""
    if token is None:
        return 0
    others = np.flatnonzero(ids != token)
    return int(others[0]) if len(others) else len(ids)


def _finish(examples: list[Example], tokenizer: Any, report: EncodeReport) -> tuple[Dataset, dict[str, Any]]:
    """Cut at max_length, count, leave out what has no label, and build the data set."""
    count_lengths(report, [len(e.ids) for e in examples])
    kept: list[Example] = []
    for example in examples:
        cut = report.max_length is not None and len(example.ids) > report.max_length
        report.truncated += cut
        ids, trained = example.ids[: report.max_length], example.trained[: report.max_length]
        if trained[1:].any():
            kept.append(Example(ids, trained, example.source))
            continue
        report.emptied += 1
        report.unlabelled += not example.trained[1:].any()
        if report.first_emptied is None:
            report.first_emptied = example.source
    report.examples = len(kept)
    report.tokens = sum(len(e.ids) for e in kept)
    report.trained = sum(int(e.trained[1:].sum()) for e in kept)
    labels = [np.where(e.trained, e.ids, IGNORED) for e in kept]
    dataset = as_dataset({"input_ids": [e.ids for e in kept], "labels": labels})
    return dataset, {"report": report.as_dict(), "source": [e.source for e in kept]}


def count_lengths(report: EncodeReport, lengths: list[int]) -> None:
    report.length_50, report.length_99 = (int(np.quantile(lengths, q, method="higher")) for q in (0.5, 0.99))
    report.longest = max(lengths)


def as_dataset(columns: dict[str, list[np.ndarray]]) -> Dataset:
    """A data set of lists of int32, built without a Python object a number."""
    table = {}
    for name, rows in columns.items():
        chunks = []
        for batch in batches(rows):
            offsets = np.concatenate([[0], np.cumsum([len(row) for row in batch])]).astype(np.int32)
            values = np.concatenate(batch).astype(np.int32)
            chunks.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)))
        table[name] = pa.chunked_array(chunks, type=pa.list_(pa.int32()))
    return Dataset(pa.table(table))


def _cached(
    loaded: Loaded,
    tokenizer: Any,
    settings: dict[str, Any],
    build: Callable[[], tuple[Dataset, dict[str, Any]]],
    use_cache: bool,
    allow_empty: bool,
) -> Encoded:
    if use_cache:
        code = cache.code_version(sys.modules[__name__], luthier.data.chat, luthier.data.masking)
        dataset, record = cache.kept(cache.key(loaded.fingerprint, tokenizer, code, settings), build)
    else:
        dataset, record = build()
    report = EncodeReport(**record["report"])
    prove_kept(loaded, report, allow_empty, tokenizer.model_max_length)
    _prove(report)
    log.info("%s", report.line())
    return Encoded(dataset, report, record["source"])


def prove_kept(loaded: Loaded, report: EncodeReport, allow_empty: bool, context: int | None = None) -> None:
    """Record what was cut, and refuse examples that keep nothing to learn.

    Args:
        context: tokens that the model takes, as its tokenizer knows.

    Raises:
        DataError: with the first such row, and the length that keeps 99 % of the examples whole.
    """
    checks.record("data", "truncated examples", True, report.truncated, detail=_cut_at(report.max_length))
    allowed = allow_empty and report.examples > 0
    passed = allowed or not report.emptied
    try:
        checks.record("data", "emptied examples", passed, report.emptied, None if allowed else 0)
    except CheckError:
        raise _emptied(loaded, report, context) from None


def _emptied(loaded: Loaded, report: EncodeReport, context: int | None) -> DataError:
    """Which examples keep nothing to learn, and what would keep them."""
    leave_out = "leave such examples out (allow_empty: true in the objective)"
    where = loaded.where(report.first_emptied or 0)
    total = report.examples + report.emptied
    if report.emptied == report.unlabelled:
        return DataError(
            f"{report.emptied} of {total} examples have nothing that is trained; the first is {where}.",
            fix=f"Check train_on and the messages' weights, or {leave_out}.",
        )
    enough = report.length_99 if report.length_99 > (report.max_length or 0) else report.longest
    fix = f"Set max_length to {enough}, or {leave_out}."
    if context is not None and enough > context:
        fix = f"The model takes {context} tokens: shorten these examples, or {leave_out}."
    return DataError(
        f"{report.emptied} of {total} examples lose all their trained tokens where they are cut at "
        f"max_length {report.max_length}; the first is {where}. A length of {report.length_99} keeps 99% of "
        f"the examples whole, {report.longest} all of them.",
        fix=fix,
    )


def _cut_at(max_length: int | None) -> str:
    return "nothing is cut" if max_length is None else f"at {max_length} tokens"


def _prove(report: EncodeReport) -> None:
    if report.chat:
        detail = f"{report.split} conversations are one example a turn" if report.split else "one text each"
        checks.record("data", "template prefix property", True, report.records, detail=detail)
    served = report.compared - report.unlike_served
    detail = "the others merge over the end of the prompt" if report.unlike_served else ""
    checks.record(
        "data", "prompts as served", not report.unlike_served, served, report.compared, detail, refuse=False
    )
    checks.record(
        "data", "one beginning-of-text token", report.bos_run <= 1, report.bos_run, 1,
        fix="The data or the template write a second one: remove it there.",
    )  # fmt: skip
    checks.record(
        "data", "end token trained", report.ended == 1.0, report.ended, 1.0, " ".join(report.end_tokens),
        fix="Set tokenizer.eos_token: the tokenizer has no end-of-text token and the template writes none.",
    )  # fmt: skip
    partial = report.chat and report.train_on != "all"
    checks.record(
        "data", "trained share", not partial or 0 < report.share < 1, report.share,
        "above 0 and below 1" if partial else None,
        fix="See `luthier data show`: a chat of which all or nothing is trained has a wrong mask.",
    )  # fmt: skip
    if report.marked:
        checks.record("data", "rows that hold special tokens as text", True, report.marked)
