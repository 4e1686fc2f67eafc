"""Answers in batches: prompts of like length together, padded on the left and masked, so that each answer is
the one that its prompt gets alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from luthier.models.structure import task
from luthier.models.tokens import end_of_turn

MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class Answer:
    """Generated ids without the end token, their text, and whether the model ended by itself."""

    ids: list[int]
    text: str
    ended: bool


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """All tokens that end an answer: the generation config's and the chat template's."""
    ends = model.generation_config.eos_token_id
    found = list(ends) if isinstance(ends, list) else [ends]
    found += [tokenizer.eos_token_id, end_of_turn(tokenizer)]
    return list(dict.fromkeys(token for token in found if token is not None))


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    *,
    batch_size: int = 16,
    on_batch: Callable[[int], None] | None = None,
    **options: Any,
) -> list[Answer]:
    """One answer a prompt, in order; greedy unless `options` say otherwise.

    Args:
        prompts: token ids, special tokens included.
        options: of transformers' `GenerationConfig`, such as max_new_tokens, do_sample, temperature.
        on_batch: called with the number of answers after each batch.
    """
    ends = end_tokens(model, tokenizer)
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "eos_token_id": ends} | options
    if not settings["do_sample"]:
        # A model's own sampling defaults do not apply to greedy decoding, and transformers warns of them.
        settings |= {key: None for key in ("temperature", "top_p", "top_k") if key not in options}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, Answer] = {}
    prefix = 0 if task(model) == "seq2seq" else 1
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in rows)
        ids = torch.full((len(rows), width), pad)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for row, i in enumerate(rows):
            if prompts[i]:
                ids[row, -len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, -len(prompts[i]) :] = 1
        output = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), pad_token_id=pad, **settings
        )
        # A decoder-only model returns prompt and answer; an encoder-decoder the start token and the answer.
        new = output[:, width if prefix else 1 :].tolist()
        for i, tokens in zip(rows, new, strict=True):
            answers[i] = _answer(tokens, set(ends), tokenizer)
        if on_batch:
            on_batch(len(rows))
    return [answers[i] for i in range(len(prompts))]


def _answer(tokens: list[int], ends: set[int], tokenizer: Any) -> Answer:
    stop = next((i for i, token in enumerate(tokens) if token in ends), None)
    kept = tokens if stop is None else tokens[:stop]
    return Answer(kept, tokenizer.decode(kept, skip_special_tokens=True), stop is not None)
