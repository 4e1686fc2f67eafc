"""Tokens one after the other, with little around the model: what `model.generate` gives, sooner.

`generate` of transformers prepares inputs, checks criteria and builds masks anew for every token, and its
cache is copied at each step. Here the keys and values lie in room that is reserved once, and Llama-shaped
models run in their straight form (`luthier.acceleration.straight`); others through their own forward pass.
Greedy tokens are those of `generate(do_sample=False)` where no two logits lie within rounding of each other.
"""

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer

from luthier.acceleration.straight import Straight, straight
from luthier.errors import MethodError
from luthier.models import structure

log = logging.getLogger("luthier.acceleration")

# Settings of a generation config that would change the tokens and that this loop does not know: their
# values that change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "num_beams": (None, 1),
    "bad_words_ids": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "sequence_bias": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
}


@torch.inference_mode()
def generate(
    model: nn.Module,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | list[int] | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """The prompt and what a causal model goes on with.

    Args:
        input_ids: (batch, seq).
        attention_mask: (batch, seq), 0 where a row is padded, which must be on its left.
        temperature: 0 takes the likeliest token; else tokens are drawn with torch's own random numbers.
        top_k, top_p: draw among the k likeliest, or among the likeliest that make up p.
        eos_token_id: what ends a row; by default what the model's generation config says, [] for nothing.
        on_token: gets each column of new tokens (batch,) as it comes.

    Returns:
        (batch, seq + new), at most max_new_tokens new; a row that has ended is filled with the pad token.

    Raises:
        MethodError: the model is no causal one, or its generation config asks for what is not done here.
    """
    ends, pad = _ends(model, eos_token_id)
    warpers = _warpers(temperature, top_k, top_p)
    step = _stepper(model, attention_mask)
    batch, seq = input_ids.shape
    step.reserve(batch, seq + max_new_tokens)
    tokens = input_ids.new_full((batch, seq + max_new_tokens), pad)
    tokens[:, :seq] = input_ids
    open_rows = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
    end_ids = torch.tensor(ends, device=input_ids.device)
    chosen, length = input_ids, seq
    for length in range(seq + 1, seq + max_new_tokens + 1):
        logits = step(chosen)
        if warpers is None:
            chosen = logits.argmax(-1)
        else:
            scores = warpers(tokens[:, : length - 1], logits.float())
            chosen = torch.multinomial(scores.softmax(-1), 1)[:, 0]
        if ends:
            chosen = torch.where(open_rows, chosen, pad)
            open_rows &= torch.isin(chosen, end_ids, invert=True)
        tokens[:, length - 1] = chosen
        if on_token is not None:
            on_token(chosen)
        if ends and not open_rows.any():
            break
        chosen = chosen[:, None]
    return tokens[:, :length]


class _Own:
    """A model's own forward pass, with keys and values in room reserved once."""

    def __init__(self, model: Any, attention_mask: Tensor | None):
        self.model = model
        self.mask = attention_mask
        takes = inspect.signature(structure.base(model).forward).parameters
        self.last: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self.places = "position_ids" in takes

    def reserve(self, batch: int, room: int) -> None:
        self.cache = DynamicCache(config=self.model.config.get_text_config())
        self.cache.layers = [_Room(room) if type(m) is DynamicLayer else m for m in self.cache.layers]
        self.past = 0
        if self.mask is not None:
            whole = self.mask.new_ones(batch, room)
            whole[:, : self.mask.shape[1]] = self.mask
            self.mask, self.positions = whole, (whole.cumsum(-1) - 1).clamp_min(0)

    def __call__(self, ids: Tensor) -> Tensor:
        end = self.past + ids.shape[1]
        inputs = dict(self.last)
        if self.mask is not None:
            inputs["attention_mask"] = self.mask[:, :end]
            if self.places:
                inputs["position_ids"] = self.positions[:, self.past : end]
        output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **inputs)
        self.past = end
        logits: Tensor = output.logits[:, -1]
        return logits


class _Room(DynamicLayer):
    """Keys and values of a layer (batch, heads, room, dim), of which the first ones are filled."""

    def __init__(self, room: int):
        super().__init__()
        self.room = room

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.all_keys, self.all_values = (
                t.new_empty(*t.shape[:2], self.room, t.shape[-1]) for t in (key_states, value_states)
            )
            self.filled = 0
        start, self.filled = self.filled, self.filled + key_states.shape[2]
        self.all_keys[:, :, start : self.filled] = key_states
        self.all_values[:, :, start : self.filled] = value_states
        self.keys, self.values = self.all_keys[:, :, : self.filled], self.all_values[:, :, : self.filled]
        return self.keys, self.values


def _stepper(model: Any, attention_mask: Tensor | None) -> Straight | _Own:
    whole = structure.base(model)
    if whole.config.is_encoder_decoder or not whole.can_generate():
        raise MethodError(
            f"Only causal language models decode; this is {type(whole).__name__}.",
            fix="Use model.generate where the model has it.",
        )
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise MethodError("PEFT puts soft prompts before the input of this model.", fix="Use model.generate.")
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None
    if attention_mask is not None:
        if not bool(attention_mask[:, -1].all()):
            raise MethodError("A row is padded on its right.", fix="Pad on the left: padding_side='left'.")
        return _Own(model, attention_mask)
    found = straight(model)
    if isinstance(found, Straight):
        return found
    log.debug("Decoding through the model's own forward pass: %s.", found)
    return _Own(model, None)


def _ends(model: Any, given: int | list[int] | None) -> tuple[list[int], int]:
    """The tokens that end a row, and what fills it after."""
    config = structure.base(model).generation_config
    for name, neutral in NEUTRAL.items():
        value = getattr(config, name, None)
        if value not in neutral:
            raise MethodError(
                f"The model's generation config sets {name}: {value}, which this loop does not do.",
                fix=f"Use model.generate, or set model.generation_config.{name} = None.",
            )
    ends = config.eos_token_id if given is None else given
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    pad = config.pad_token_id
    return ends, (ends[0] if ends else 0) if pad is None else pad


def _warpers(temperature: float, top_k: int | None, top_p: float | None) -> LogitsProcessorList | None:
    if not temperature:
        if top_k is not None or top_p is not None:
            raise MethodError(
                "top_k and top_p are for drawn tokens.",
                fix="Give a temperature too, 1.0 for the model's own.",
            )
        return None
    warpers = LogitsProcessorList()
    if temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers
