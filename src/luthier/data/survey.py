"""What a data set is like before anything is trained on it: lengths, copies, leaks, what would be cut."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.data.load import Loaded, load
from luthier.data.rows import Row
from luthier.data.spec import DataSpec
from luthier.data.tokenize import EncodeReport, encode

ENCODED = ("text", "messages", "prompt_completion")


@dataclass
class Survey:
    """The findings.

    Attributes:
        held_out: the evaluation data, where some were given.
        lengths: of each example, in `unit`s (tokens with a tokenizer, else characters).
        truncated: examples longer than max_length; emptied: of these, the ones that lose every label.
        encoding: the report of the encoding, where rows are of a type that is trained as text.
        empty_labels: places of examples without any label, cut or not.
    """

    loaded: Loaded
    lengths: list[int]
    unit: str
    held_out: Loaded | None = None
    truncated: int = 0
    emptied: int = 0
    encoding: EncodeReport | None = None
    empty_labels: list[str] = field(default_factory=list)

    @property
    def faulty(self) -> bool:
        """Whether training as it stands would be refused or give wrong figures."""
        held_out_bad = self.held_out is not None and self.held_out.report.rejected
        report = self.loaded.report
        return bool(report.rejected or report.leaked or self.empty_labels or held_out_bad)


def survey(
    spec: DataSpec,
    *,
    eval_spec: DataSpec | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
    train_on: Any = "assistant_all",
    chat: str = "auto",
    rejected_file: Path,
) -> Survey:
    """Look at a whole data set. Nothing is refused but a file that gives no record at all.

    Bad records are written to `rejected_file`, those of the evaluation data beside it (eval-NAME).

    Raises:
        DataError: nothing can be read, the format is unknown, or the chat template cannot be trained on.
    """
    everything = {"on_bad": "quarantine", "max_bad": 1.0, "allow_leakage": True}
    held_out = None
    if eval_spec is not None:
        aside = rejected_file.with_name(f"eval-{rejected_file.name}")
        held_out = load(eval_spec.model_copy(update=everything), rejected_file=aside)
    loaded = load(spec.model_copy(update=everything), eval_path=held_out, rejected_file=rejected_file)
    if tokenizer is None or loaded.type not in ENCODED:
        lengths = [sum(len(text) for text in strings(row)) for row in loaded.records]
        return Survey(loaded, lengths, "characters", held_out)
    encoded = encode(loaded, tokenizer, max_length=None, train_on=train_on, chat=chat, allow_empty=True)
    found = Survey(loaded, [], "tokens", held_out, encoding=encoded.report)
    for index, labels in zip(encoded.source, encoded.dataset["labels"], strict=True):
        found.lengths.append(len(labels))
        if max_length is not None and len(labels) > max_length:
            found.truncated += 1
            if all(label < 0 for label in labels[1:max_length]):
                found.emptied += 1
                found.empty_labels.append(loaded.where(index))
    if encoded.report.unlabelled:
        trained = set(encoded.source)
        found.empty_labels += [loaded.where(i) for i in range(len(loaded)) if i not in trained]
    return found


def strings(row: Row) -> Iterator[str]:
    """All text of a canonical row."""
    for key, value in row.items():
        if key in ("origin", "tools", "gold", "steps"):
            continue
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            yield from (item["content"] if isinstance(item, dict) else str(item) for item in value)


def histogram(lengths: list[int], bins: int = 8) -> list[tuple[int, int, int]]:
    """(from, up to, count) of lengths in bins of equal width."""
    width = max(-(-max(lengths) // bins), 1)
    counts = [0] * bins
    for length in lengths:
        counts[min(max(length - 1, 0) // width, bins - 1)] += 1
    return [(i * width + 1, (i + 1) * width, count) for i, count in enumerate(counts)]
