"""Multiple choice by log-likelihood: which continuation does the model find most likely?

    score(c)      = sum_t log p(c_t | prompt, c_<t)
    score_norm(c) = score(c) / letters of c            (longer choices are not at a disadvantage)

Prompt and choice are tokenised together, as one text: the tokens of the choice are those that reach beyond
the prompt's end. Tokenised apart, the split at their border may be one that the model never saw.
Sources: Brown et al., 2020 (GPT-3), section 2.4; Gao et al., the lm-evaluation-harness (acc and acc_norm).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from luthier.data.load import Loaded
from luthier.data.masking import Prefix
from luthier.data.tokenize import prompt_text, uses_chat
from luthier.errors import DataError
from luthier.evaluation.likelihood import token_log_probs
from luthier.tuning.hooks import row_inputs


@dataclass(frozen=True)
class Ranked:
    """Log-likelihoods (choices,) of one question, raw and per letter, and the number of the right choice."""

    raw: np.ndarray
    norm: np.ndarray
    label: int

    def right(self, normalised: bool) -> float:
        return float(np.argmax(self.norm if normalised else self.raw) == self.label)


def rank(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    loaded: Loaded,
    *,
    batch_size: int = 8,
    chat: str = "auto",
) -> list[Ranked]:
    """The choices of every row of {prompt, choices, label}.

    Args:
        chat: whether the prompt is rendered with the chat template; a prompt that is continued as it stands
            gets a space before the choice where there is none.

    Raises:
        DataError: rows of another type, or a tokenizer that cannot tell where its tokens lie.
    """
    if loaded.type != "multiple_choice":
        raise DataError(
            f"{loaded.spec.path} holds rows of type {loaded.type}, but multiple choice needs questions.",
            fix="Give rows of prompt, choices (a list of texts) and label (number of the right one, from 0).",
        )
    sequences, lengths = [], []
    for row in loaded.records:
        as_chat = uses_chat(tokenizer, chat) or not isinstance(row["prompt"], str)
        prefix = Prefix(tokenizer, plain=not as_chat)
        prompt = prompt_text(row, tokenizer, chat=chat)
        for choice in row["choices"]:
            between = "" if as_chat or prompt[-1:].isspace() or choice[:1].isspace() else " "
            # White space at the end of a plain prompt belongs to the next word's token.
            border = len(prompt) if as_chat else len(prompt.rstrip())
            sequences.append(_joint(tokenizer, prompt + between + choice, border, prefix))
            lengths.append(max(len(choice), 1))
    inputs = row_inputs(model, [row for row in loaded.records for _ in row["choices"]])
    found = token_log_probs(model, sequences, batch_size=batch_size, inputs=inputs)
    values = [float(p.double().sum()) for p in found]
    ranked, at = [], 0
    for row in loaded.records:
        part = slice(at, at := at + len(row["choices"]))
        raw = np.array(values[part])
        ranked.append(Ranked(raw, raw / np.array(lengths[part]), row["label"]))
    return ranked


def _joint(tokenizer: Any, text: str, border: int, prefix: Prefix) -> tuple[list[int], list[int]]:
    """Ids of a text, and the positions of the tokens that reach beyond the letter `border`."""
    if not tokenizer.is_fast:
        raise DataError(
            "Multiple choice needs a fast tokenizer, which tells where in the text its tokens lie.",
            fix="Use the model's tokenizer.json.",
        )
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    before = prefix(text)
    positions = [
        at
        for at, (start, end) in enumerate(encoding["offset_mapping"], start=len(before))
        if end > border and end > start and at > 0
    ]
    return before + encoding["input_ids"], positions
