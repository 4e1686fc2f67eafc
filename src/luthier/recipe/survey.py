"""How much data a stage reads: its rows, and their lengths in tokens estimated from a sample."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from luthier.data.load import Loaded
from luthier.errors import ModelError
from luthier.models.sources import Source
from luthier.recipe.leakage import prompts

SAMPLE = 64  # rows that are tokenised
CHARACTERS = 4.0  # of a token, where there is no tokenizer yet
MESSAGE = 5  # tokens that a chat template puts around a message


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


def amount(loaded: Loaded, source: Source) -> Amount:
    """Estimate the tokens of a data set."""
    texts = [_texts(row) for row in loaded.records]
    ratio = _characters(tuple("\n".join(parts) for parts, _, _ in texts[:SAMPLE]), _tokenizer(source))
    lengths, answers = [], []
    for parts, answer, messages in texts:
        lengths.append(int(sum(map(len, parts)) / ratio) + MESSAGE * messages)
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
def _tokenizer(source: Source) -> Any:
    """The model's fast tokenizer where its file is here (a GGUF file has none before its conversion)."""
    from tokenizers import Tokenizer

    from luthier.models import gguf, sources

    while source.base is not None:
        source = sources.locate(source.base)
    folder = gguf.target(source) if source.gguf_file else source.path
    file = folder / "tokenizer.json" if folder is not None else None
    if file is None or not file.is_file():
        return None
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the only kind that tokenizers raises
        message = f"The tokenizer file {file} cannot be read: {error}."
        raise ModelError(message, fix="Copy or save it again.") from error
