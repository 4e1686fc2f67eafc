"""From rendered texts to token ids and a mask of what is trained.

The mask is found on characters (`luthier.data.chat`) and carried to tokens by the offsets of one
tokenisation of the whole text. Where a token would reach over the end of a served prompt, the text is cut
there and its parts are tokenised alone, because that is what the model gets to see when it is asked.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.data.chat import Rendered, special_tokens
from luthier.data.rows import Row

BATCH = 1000
_SAMPLE = 64  # prompts of chats that are compared with what is served


@dataclass
class Example:
    """Token ids (seq,) int32 and whether each is trained (seq,) bool; `source` is the row's index."""

    ids: np.ndarray
    trained: np.ndarray
    source: int


@dataclass(frozen=True)
class Served:
    """How many prompts were compared with what is served, and how many are cut into other tokens."""

    compared: int
    unlike: int


def batches(items: list[Any]) -> Iterator[list[Any]]:
    for at in range(0, len(items), BATCH):
        yield items[at : at + BATCH]


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text, nothing added."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


class Prefix:
    """The ids that a tokenizer puts before a text: for plain texts its beginning-of-text token, if any.

    A rendered chat gets none, because its template writes its own; nor does a text that starts with one.
    """

    def __init__(self, tokenizer: Any, plain: bool):
        self.bos = tokenizer.bos_token
        self.ids: list[int] = []
        if plain:
            bare, full = plain_ids(tokenizer, "a"), tokenizer("a", verbose=False)["input_ids"]
            start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
            self.ids = full[:start]

    def __call__(self, text: str) -> list[int]:
        return [] if self.bos and text.startswith(self.bos) else self.ids


def tokenised(rendered: list[Rendered], tokenizer: Any, plain: bool) -> tuple[list[Example], Served]:
    """One example a text, uncut, with beginning and end tokens; and how its prompts compare to served ones.

    Args:
        plain: the texts are no rendered chats, so that the tokenizer's own beginning-of-text token is due.
    """
    prefix = Prefix(tokenizer, plain)
    examples: list[Example] = []
    straddling: list[int] = []
    for batch in batches(rendered):
        for item, (ids, trained, straddles) in zip(batch, _masked(batch, tokenizer), strict=True):
            if straddles:
                straddling.append(len(examples))
            examples.append(_framed(item, ids, trained, prefix, tokenizer.eos_token_id))
    return examples, _as_served(rendered, examples, tokenizer, prefix, straddling, plain)


def _framed(item: Rendered, ids: np.ndarray, trained: np.ndarray, prefix: Prefix, eos: int | None) -> Example:
    before = prefix(item.text)
    after = [eos] if item.end and eos is not None and (not len(ids) or ids[-1] != eos) else []
    # A text that is trained whole is trained from its first token on.
    whole = bool(item.spans) and item.spans[0][0] == 0
    return Example(
        np.concatenate([np.array(before, np.int32), ids, np.array(after, np.int32)]).astype(np.int32),
        np.concatenate([[whole] * len(before), trained, [True] * len(after)]).astype(bool),
        item.source,
    )


def _masked(batch: list[Rendered], tokenizer: Any) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """(ids, trained, whether a token reaches over the start of a trained span) of each text."""
    if not tokenizer.is_fast:  # no offsets: every text is cut at its spans
        for item in batch:
            yield *_pieces(item, tokenizer), False
        return
    found = tokenizer(
        [item.text for item in batch],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    for item, ids, offsets in zip(batch, found["input_ids"], found["offset_mapping"], strict=True):
        starts, stops = np.array(offsets, np.int64).reshape(-1, 2).T
        # Some tokenizers leave the space before a word out of its offsets: what lies between two tokens
        # belongs to the later one. The tokens of one character's bytes share its offsets.
        starts = np.minimum(starts, np.concatenate([[0], np.maximum.accumulate(stops)[:-1]])[: len(ids)])
        trained = np.zeros(len(ids), bool)
        straddles = False
        for start, stop in item.spans:
            trained |= (stops > start) & (starts < stop)
            straddles |= bool(((starts < start) & (stops > start)).any())
        yield np.array(ids, np.int32), trained, straddles


def _pieces(item: Rendered, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of a text that is cut at both ends of its trained spans, each part tokenised alone."""
    ids: list[int] = []
    trained: list[bool] = []
    at = 0
    for start, stop in [*item.spans, (len(item.text), len(item.text))]:
        for part, learnt in ((item.text[at:start], False), (item.text[start:stop], True)):
            part_ids = plain_ids(tokenizer, part) if part else []
            ids += part_ids
            trained += [learnt] * len(part_ids)
        at = stop
    return np.array(ids, np.int32), np.array(trained, bool)


def _as_served(
    rendered: list[Rendered],
    examples: list[Example],
    tokenizer: Any,
    prefix: Prefix,
    straddling: list[int],
    plain: bool,
) -> Served:
    """Compare each prompt's ids with those of the prompt alone, and cut the text there where they differ.

    All plain prompts are compared (their last word and the answer's first may well merge), and a sample of
    the chats, whose template keeps the two apart; all of them, where one of the sample differs.
    """
    prompted = [i for i, item in enumerate(rendered) if item.spans and item.spans[-1][0] > 0]
    chosen = prompted[:: 1 if plain else max(len(prompted) // _SAMPLE, 1)]
    differing = _differing(chosen, rendered, examples, tokenizer, prefix)
    if differing and len(chosen) < len(prompted):
        chosen = prompted
        differing = _differing(chosen, rendered, examples, tokenizer, prefix)
    for index in differing | set(straddling):
        item = rendered[index]
        ids, trained = _pieces(item, tokenizer)
        # A tokenizer that puts a space before every text (SentencePiece) cannot be asked in parts.
        if _decoded(tokenizer, ids.tolist()) == _decoded(tokenizer, plain_ids(tokenizer, item.text)):
            examples[index] = _framed(item, ids, trained, prefix, tokenizer.eos_token_id)
    unlike = _differing(sorted(differing), rendered, examples, tokenizer, prefix)
    return Served(len(chosen), len(unlike))


def _differing(
    chosen: list[int], rendered: list[Rendered], examples: list[Example], tokenizer: Any, prefix: Prefix
) -> set[int]:
    """The examples that do not begin with the ids of their served prompt."""
    differing = set()
    for batch in batches(chosen):
        prompts = [rendered[i].text[: rendered[i].spans[-1][0]] for i in batch]
        served = tokenizer(prompts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for index, prompt, ids in zip(batch, prompts, served["input_ids"], strict=True):
            full = np.array(prefix(prompt) + ids, np.int32)
            if not np.array_equal(examples[index].ids[: len(full)], full):
                differing.add(index)
    return differing


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def marked(records: list[Row], tokenizer: Any) -> int:
    """Rows whose own text contains a special token, which the model then reads as one."""
    special = special_tokens(tokenizer)
    if not special:
        return 0
    pattern = re.compile("|".join(map(re.escape, special)))
    return sum(any(pattern.search(text) for text in _strings(row)) for row in records)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in ("origin", "role"):
                yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
