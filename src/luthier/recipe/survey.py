"""How much data a stage reads: its rows, their lengths in tokens estimated from a sample, and its batches."""

import statistics
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from luthier.data.load import Loaded
from luthier.errors import ModelError
from luthier.models import gguf, sources, tokens
from luthier.models.sources import Source
from luthier.recipe.cheaper import argument
from luthier.recipe.leakage import prompts
from luthier.recipe.schema import TuneStage

SAMPLE = 64  # rows that are tokenised
CHARACTERS = 4.0  # of a token, where there is no tokenizer yet
MESSAGE = 5  # tokens that a chat template puts around a message, where it is not known yet
PACKED = 0.95  # share of a packed block that is filled


@dataclass(frozen=True)
class Amount:
    """Rows of a data set and their lengths in tokens.

    Attributes:
        lengths: estimated tokens of each row.
        answers: of them, tokens of the answer (completion or assistant turns); all in plain text.
        prompts: what identifies each row's prompt.
    """

    lengths: list[int]
    answers: list[int]
    prompts: list[bytes]

    def __len__(self) -> int:
        return len(self.lengths)

    def quantile(self, share: float) -> int:
        return sorted(self.lengths)[min(len(self) - 1, int(share * len(self)))]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def trained_share(self) -> float:
        return sum(self.answers) / max(1, self.tokens)


@dataclass(frozen=True)
class Batch:
    """What one forward pass of training sees.

    Attributes:
        rows, length: shape of the largest micro-batch, in tokens; documents that share a row are kept apart,
            so they cost what rows of their length do.
        labelled: its tokens that are trained.
        fill: tokens of the mean micro-batch over those of the largest one.
        steps: optimizer steps of the whole training.
    """

    rows: int
    length: int
    labelled: int
    fill: float
    steps: int

    @classmethod
    def of(cls, stage: TuneStage, data: Amount) -> "Batch":
        options = {o.name: o.default for o in stage.objective.method.options()} | stage.objective.options
        limit = options.get("max_length") or max(data.lengths)
        if getattr(stage.objective.method.load().Config, "cuts_documents", False):
            lengths = [min(n - start, limit) for n in data.lengths for start in range(0, n, limit)]
        else:
            lengths = [min(n, limit) for n in data.lengths]
        rows = int(argument(stage, "per_device_train_batch_size"))
        examples, fill = len(lengths), 1.0
        if options.get("packing") == "rows":
            length = min(limit, sum(lengths))
            examples = max(1, round(sum(lengths) / (length * PACKED)))
        elif options.get("packing", False):  # the examples of a batch, one after another
            mean = statistics.fmean(lengths)
            # The largest of many sums of `rows` lengths lies about three deviations above their mean.
            largest = min(max(lengths), mean + 3 * statistics.pstdev(lengths) / min(rows, examples) ** 0.5)
            length, fill = round(largest), mean / largest
        else:  # padded to the longest
            length = sorted(lengths)[min(examples - 1, round(examples * (1 - 0.5 / rows)))]
        rows = min(rows, examples)
        epoch = max(1, -(-examples // (rows * argument(stage, "gradient_accumulation_steps"))))
        steps = argument(stage, "max_steps")
        if steps <= 0:
            steps = round(epoch * argument(stage, "num_train_epochs"))
        share = data.trained_share if options.get("train_on", "all") != "all" else 1.0
        return cls(rows, max(1, length), max(1, int(rows * length * share)), fill, steps)


def amount(loaded: Loaded, source: Source) -> Amount:
    """Estimate the tokens of a data set."""
    texts = [_texts(row) for row in loaded.records]
    ratio = _characters(tuple("\n".join(parts) for parts, _, _ in texts[:SAMPLE]), _tokenizer(source))
    around, each = _template(source)
    lengths, answers = [], []
    for parts, answer, messages in texts:
        template = around + each * messages if messages else 0
        lengths.append(int(sum(map(len, parts)) / ratio) + template)
        answers.append(int(answer / ratio) + 1)
    return Amount(lengths, [min(a, n) for a, n in zip(answers, lengths, strict=True)], prompts(loaded))


def _texts(row: dict[str, Any]) -> tuple[list[str], int, int]:
    """The texts of a row, the characters that are trained, the number of messages."""
    messages = row.get("messages") or [
        {"role": role, "content": content}
        for key, role in (("prompt", "user"), ("completion", "assistant"))
        for content in [row.get(key)]
        if isinstance(content, str)
    ]
    messages += [
        turn for key in ("prompt", "completion") if isinstance(turns := row.get(key), list) for turn in turns
    ]
    if messages:
        contents = [str(message.get("content") or "") for message in messages]
        trained = sum(len(c) for m, c in zip(messages, contents, strict=True) if m.get("role") == "assistant")
        return contents, trained, len(messages)
    parts = [str(value) for key, value in row.items() if key.startswith("text")]
    return parts, sum(map(len, parts)), 0


@cache
def _characters(texts: tuple[str, ...], tokenizer: Any) -> float:
    """Characters of a token."""
    if tokenizer is None:
        return CHARACTERS
    tokens = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    return sum(map(len, texts)) / max(1, tokens)


@cache
def _template(source: Source) -> tuple[int, int]:
    """Tokens that the chat template puts around a conversation (a system prompt, say), and each message."""
    file = _tokenizer_file(source)
    if file is None:
        return 0, MESSAGE
    tokenizer = tokens.load(str(file.parent), str(file.parent), False, None)
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
    try:
        texts = [str(tokenizer.apply_chat_template(turns[:n], tokenize=False)) for n in (2, 4)]
    except (ValueError, TemplateError):  # there is no template, or it wants conversations of another kind
        return 0, MESSAGE
    one, two = (len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    each = (two - one) // 2 - 1  # without its content, a token
    return max(0, one - 2 * (each + 1)), each


@cache
def _tokenizer(source: Source) -> Any:
    """The model's fast tokenizer where its file is here (a GGUF file has none before its conversion)."""
    from tokenizers import Tokenizer

    file = _tokenizer_file(source)
    if file is None:
        return None
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the only kind that tokenizers raises
        message = f"The tokenizer file {file} cannot be read: {error}."
        raise ModelError(message, fix="Copy or save it again.") from error


def _tokenizer_file(source: Source) -> Path | None:
    while source.base is not None:
        source = sources.locate(source.base)
    folder = gguf.target(source) if source.gguf_file else source.path
    file = None if folder is None else Path(folder) / "tokenizer.json"
    return file if file is not None and file.is_file() else None
