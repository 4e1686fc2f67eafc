"""Answers in batches: padded on the left, sorted by length, each ended at the model's or the template's end.

Greedy answers are those that each prompt would get alone (up to rounding in half precision): the mask comes
from lengths, never from the pad id, so that pad = eos is harmless.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, set_seed

from luthier.acceleration.last_column import last_column
from luthier.errors import DataError, MethodError
from luthier.evaluation.perplexity import context_length
from luthier.models import structure
from luthier.models.tokens import end_of_turn
from luthier.terminal import track
from luthier.tuning.hooks import of_batch
from luthier.tuning.probe import evaluating

MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class Answer:
    """What the model wrote. `finished`: it ended by itself, before the limit of tokens."""

    text: str
    finished: bool
    tokens: int


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
    options: dict[str, Any] | None = None,
    seed: int = 0,
    where: Callable[[int], str] | None = None,
    inputs: Mapping[str, Sequence[int]] | None = None,
) -> list[Answer]:
    """One answer for each prompt (its token ids, as `luthier.data.tokenize.prompt_ids` gives them), in order.

    Args:
        options: fields of `transformers.GenerationConfig`; greedy and at most 256 new tokens by default.
        seed: of sampling. A sampled answer depends on its batch, a greedy one does not.
        where: the place of prompt i, for messages.
        inputs: what the model takes with each prompt (`luthier.tuning.hooks.row_inputs`).

    Raises:
        DataError: a prompt that leaves no room for an answer in the model's context.
        MethodError: options that transformers refuses.
    """
    config = generation_config(model, tokenizer, options or {})
    _require_room(model, prompts, config, where)
    ends = set(config.eos_token_id or [])
    if config.do_sample:
        set_seed(seed)
    found: list[Answer | None] = [None] * len(prompts)
    # Longest first: a batch that is too large for the memory fails at once and not after an hour.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    with evaluating(model), last_column(model):
        for start in track(range(0, len(order), batch_size), "answers"):
            batch = order[start : start + batch_size]
            extra = of_batch(inputs or {}, batch, structure.base(model).device)
            made = _batch(model, [prompts[i] for i in batch], config, extra)
            for i, new in zip(batch, made, strict=True):
                found[i] = _answer(new, ends, tokenizer)
    return [answer for answer in found if answer is not None]


def generation_config(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> GenerationConfig:
    """The model's own settings, made greedy, with every end token of model, tokenizer and template."""
    base = structure.base(model)
    own = base.generation_config
    end = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    end = [*end, end_of_turn(tokenizer)]
    ends = list(dict.fromkeys(e for e in end if e is not None)) or [tokenizer.eos_token_id]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    settings: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": MAX_NEW_TOKENS,
        "eos_token_id": [e for e in ends if e is not None],
        "pad_token_id": pad,
    }
    for name in ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"):
        settings[name] = getattr(own, name, None)
    if options.get("do_sample"):
        settings |= {name: getattr(own, name) for name in ("temperature", "top_p", "top_k")}
    if "max_length" in options:
        del settings["max_new_tokens"]
    settings |= options
    if isinstance(settings["eos_token_id"], int):
        settings["eos_token_id"] = [settings["eos_token_id"]]
    try:
        return GenerationConfig(**settings)
    except (ValueError, TypeError) as error:
        raise MethodError(f"These generation settings do not go together: {error}") from error


def _require_room(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    where: Callable[[int], str] | None,
) -> None:
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]), default=None)
    limit = context_length(model)
    if longest is None or limit is None or structure.base(model).config.is_encoder_decoder:
        return
    room = limit - len(prompts[longest])
    if room < (config.max_new_tokens or 1):
        name = f"The prompt of {where(longest)}" if where else f"Prompt {longest + 1} of {len(prompts)}"
        raise DataError(
            f"{name} has {len(prompts[longest])} tokens, the model's context "
            f"{limit}, so {max(room, 0)} are left for an answer of up to {config.max_new_tokens or 1}.",
            fix="Shorten the prompt, or lower generation: {max_new_tokens: ...}.",
        )


def _batch(
    model: nn.Module, prompts: list[Sequence[int]], config: GenerationConfig, extra: dict[str, Tensor]
) -> Tensor:
    """New tokens (batch, new) of one batch, padded behind each end token."""
    base = structure.base(model)
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), config.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.as_tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    try:
        out = model.generate(
            input_ids=ids.to(base.device),
            attention_mask=mask.to(base.device),
            generation_config=config,
            **extra,
        )
    except ValueError as error:  # settings that transformers judges only here
        raise MethodError(f"Nothing can be generated with these settings: {error}") from error
    # An encoder-decoder's output begins with the start token, a decoder's with the prompt.
    begin = 1 if base.config.is_encoder_decoder else longest
    return out[:, begin:].cpu()


def _answer(new: Tensor, ends: set[int], tokenizer: PreTrainedTokenizerBase) -> Answer:
    ids = new.tolist()
    stop = next((at for at, token in enumerate(ids) if token in ends), None)
    kept = ids if stop is None else ids[:stop]
    text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Answer(str(text), stop is not None, len(kept))
