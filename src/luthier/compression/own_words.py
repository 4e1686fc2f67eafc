"""Text that a language model writes of itself, when there is no data (Liu et al., 2023, arXiv 2305.17888).

A text starts with a token of the vocabulary. The next few tokens are the likeliest ones, so that it gets off
to a sound start; all others are drawn from the whole distribution, which greedy text hardly shows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from luthier.terminal import progress
from luthier.tuning.probe import evaluating

AT_ONCE = 32  # texts
SOUND = (3, 4, 5)  # tokens after which drawing begins, the first included


def write(
    model: nn.Module,
    count: int,
    length: int,
    *,
    seed: int = 0,
    sound: Sequence[int] = SOUND,
    batch_size: int = AT_ONCE,
) -> list[list[int]]:
    """So many texts of up to `length` tokens, without the special tokens that end them.

    Args:
        sound: how long the likeliest tokens are taken; text by text in turn.
    """
    plan: dict[int, list[int]] = {}
    for first, start in starts(model, count, seed, sound):
        plan.setdefault(min(start, length), []).append(first)
    texts: list[list[int]] = []
    devices = [model.device] if model.device.type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(devices=devices), progress("text") as bar:
        torch.manual_seed(seed)
        task = bar.add_task("", total=count, note="")
        for start, firsts in plan.items():
            for ids in torch.tensor(firsts, device=model.device)[:, None].split(batch_size):
                texts += _without_end(model, _continued(model, ids, start, length))
                bar.update(task, advance=len(ids))
    return texts


def starts(model: nn.Module, count: int, seed: int, sound: Sequence[int]) -> list[tuple[int, int]]:
    """(first token, tokens until drawing begins) of each text: all tokens in random order, in turn."""
    rows = model.get_input_embeddings().weight.shape[0]
    special = set(_special(model))
    generator = torch.Generator().manual_seed(seed)
    order = [i for i in torch.randperm(rows, generator=generator).tolist() if i not in special]
    turns = (divmod(index, len(order)) for index in range(count))
    return [(order[place], sound[(place + turn) % len(sound)]) for turn, place in turns]


def windows(texts: Sequence[list[int]], length: int) -> list[list[int]]:
    """The texts one after the other, cut into windows; what is left over at the end is dropped."""
    stream = [token for text in texts for token in text]
    length = min(length, max(1, len(stream)))
    return [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]


def _continued(model: Any, ids: Tensor, start: int, length: int) -> Tensor:
    """Texts (batch, up to length) that begin with ids (batch, 1)."""
    if start > ids.shape[1]:
        ids = _generate(model, ids, do_sample=False, min_length=start, max_length=start)
    if length > start:
        ids = _generate(model, ids, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_length=length)
    return ids


def _generate(model: Any, ids: Tensor, **options: Any) -> Tensor:
    ends = _special(model)
    config = GenerationConfig(
        **options,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        repetition_penalty=1.0,
        use_cache=True,
    )
    made: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return made


def _special(model: Any) -> list[int]:
    """Tokens that end a text, or fill one up."""
    found: list[int] = []
    for settings in (getattr(model, "generation_config", None), model.config):
        for name in ("eos_token_id", "pad_token_id"):
            value = getattr(settings, name, None)
            found += value if isinstance(value, list) else [] if value is None else [value]
    return list(dict.fromkeys(found))


def _without_end(model: nn.Module, texts: Tensor) -> list[list[int]]:
    special = set(_special(model))
    found = []
    for text in texts.tolist():
        end = next((i for i, token in enumerate(text) if token in special), len(text))
        found.append(text[:end])
    return found
