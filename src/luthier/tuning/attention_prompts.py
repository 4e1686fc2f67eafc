"""Learnt keys and values in front of those of the text, in every attention: the engine of prefix tuning,
P-tuning v2 and APrompt.

In layer l, with P learnt pairs for each key/value head,

    o = softmax( q [K_pre; K]^T s + mask ) [V_pre; V],    K_pre, V_pre (kv heads, P, dim)

The prompt's columns are open to every query. Nothing else changes: outputs have the length of the text, the
cache holds the text alone, packed documents stay apart, and each of them sees the prompt.

An attention function in transformers' `AttentionInterface`, which every attention module calls, does it:
"sdpa-prompts" stands over "sdpa", "eager-prompts" over "eager", "documents-prompts" over our packed rows.
Where the kernel is causal without a mask (training on full rows), P empty queries are put in front of the
real ones and their outputs dropped: causal attention of P + T positions, at the kernel's full speed.

The attention modules are found by running the model on three tokens and seeing who calls. Positions of the
text are shifted by P, as behind a cache of that length, where the model takes positions.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from luthier.acceleration.documents import NAME as DOCUMENTS
from luthier.acceleration.documents import document_lengths
from luthier.errors import MethodError
from luthier.tuning.probe import empty_inputs, evaluating
from luthier.tuning.soft_prompts import PromptLayer

SUFFIX = "-prompts"
INNER = ("sdpa", "eager")  # what a model may be loaded with
ELSEWHERE = "method: prompt works on any architecture; method: lora changes weights instead."


# The attention function --------------------------------------------------------------------------------


class Call(NamedTuple):
    """One call of the attention function: how many query heads and queries, and what is attended to.

    key (batch, kv heads, seq, dim), and value.
    """

    module: nn.Module
    heads: int
    queries: int
    key: Tensor
    value: Tensor


class Places(NamedTuple):
    """Where tokens stand in their text, for what depends on it; a trunk's hook hands it down to the layers.

    queries (1 or batch, seq) and keys (1 or batch, seq with the cache): their positions.
    rows (batch, seq): which row of a prompt in the input a column is, -1 for text; None without any.
    """

    queries: Tensor
    keys: Tensor
    rows: Tensor | None = None


_calls: list[Call] | None = None


def over(inner: str) -> str:
    """The name of the attention with prompts over the attention `inner`; registered where it is not yet."""
    name = inner + SUFFIX
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, partial(prompted_attention, inner=inner))
        AttentionMaskInterface.register(name, partial(_mask, inner=inner))
    return name


def underlying(name: str) -> str:
    """The attention under the prompts: 'sdpa' of 'sdpa-prompts'; any other name is its own."""
    return name.removesuffix(SUFFIX)


def prompted_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    inner: str,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """query (batch, heads, seq, dim), key, value (batch, kv heads, seq, dim) to (batch, seq, heads, dim)."""
    attend = _function(inner, module)
    if _calls is not None:
        _calls.append(Call(module, query.shape[1], query.shape[2], key, value))
    positions, places = kwargs.get("position_ids"), kwargs.pop("prompt_places", None)
    if inner == DOCUMENTS and positions is not None:
        # A document begins where positions are 0, and they may have been shifted.
        positions = kwargs["position_ids"] = positions - positions[:, :1]
    prompt = next((child for child in module.children() if isinstance(child, AttentionPrompt)), None)
    pair = bias = None
    if prompt is not None:
        pair = prompt(query)
        bias = None if places is None else prompt.scores(places, query, key, kwargs.get("scaling"))
    if pair is None and bias is None:
        return attend(module, query, key, value, attention_mask, **kwargs)
    pair = (key[:, :, :0], value[:, :, :0]) if pair is None else pair
    front = [part.expand(len(query), -1, -1, -1) for part in pair]
    if inner == DOCUMENTS and attention_mask is None and positions is not None:
        if bias is None:
            return _by_document(attend, module, [query, key, value], front, kwargs)
        attention_mask = _block_diagonal(positions)  # a bias is a mask, with which no kernel goes by document
    if bias is not None or kwargs.get("position_bias") is not None:
        return _biased(attend, module, [query, key, value], front, attention_mask, bias, inner, kwargs)
    length, queries, empty = front[0].shape[2], query.shape[2], 0
    if attention_mask is not None:
        attention_mask = _padded(attention_mask, length)
    elif _is_causal(module, inner, queries, kwargs):
        key, value = key[:, :, :queries], value[:, :, :queries]  # an empty static cache is longer
        empty, query = length, torch.cat([_no_queries(query, length), query], dim=2)
    key, value = torch.cat([front[0], key], dim=2), torch.cat([front[1], value], dim=2)
    output, weights = attend(module, query, key, value, attention_mask, **kwargs)
    return output[:, empty:], weights


def _biased(
    attend: Callable,
    module: nn.Module,
    text: list[Tensor],
    front: list[Tensor],
    mask: Tensor | None,
    bias: Tensor | None,
    inner: str,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The same with something added to the scores: the model's `position_bias` over the text's keys, or
    `bias` over the prompt's and the text's."""
    query, key, value = text
    length, queries = front[0].shape[2], query.shape[2]
    own = kwargs.pop("position_bias", None)
    if own is not None:
        own = F.pad(own, (length, 0))
        bias = own if bias is None else own + bias
    assert bias is not None
    if mask is None and _is_causal(module, inner, queries, kwargs):
        mask = query.new_ones(1, 1, queries, key.shape[2], dtype=torch.bool).tril()
    mask = None if mask is None else _padded(mask, length)
    if inner == "eager":  # whose functions know masks, and few a bias
        mask = bias if mask is None else mask + bias
    else:
        kwargs["position_bias"] = bias
    key, value = torch.cat([front[0], key], dim=2), torch.cat([front[1], value], dim=2)
    found: tuple[Tensor, Tensor | None] = attend(module, query, key, value, mask, **kwargs)
    return found


def _is_causal(module: nn.Module, inner: str, queries: int, kwargs: dict[str, Any]) -> bool:
    """Whether attention without a mask means causal attention."""
    causal = kwargs.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    return bool(causal) and queries > 1 and inner != "eager"


def _padded(mask: Tensor, length: int) -> Tensor:
    """The mask (batch, 1, seq, keys) with the prompt's columns in front, open to every query."""
    return F.pad(mask, (length, 0), value=True if mask.dtype == torch.bool else 0.0)


def _by_document(
    attend: Callable,
    module: nn.Module,
    text: list[Tensor],
    prompt: list[Tensor],
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """Packed rows with the prompt put before each document, its outputs dropped again."""
    positions = kwargs.pop("position_ids").expand(len(text[0]), -1)
    length = prompt[0].shape[2]
    outputs = []
    for row in range(len(text[0])):
        lengths = document_lengths(positions[row])
        fronts = (_no_queries(text[0][:1], length), *(part[row : row + 1] for part in prompt))
        longer = [
            torch.cat(
                [part for piece in whole[row : row + 1].split(lengths, 2) for part in (front, piece)], 2
            )
            for front, whole in zip(fronts, text, strict=True)
        ]
        places = torch.cat([torch.arange(length + n, device=positions.device) for n in lengths])[None]
        output, _ = attend(module, *longer, None, position_ids=places, **kwargs)  # (1, longer, heads, dim)
        parts = output.split([length + n for n in lengths], dim=1)
        outputs.append(torch.cat([part[:, length:] for part in parts], dim=1))
    return torch.cat(outputs), None


def _block_diagonal(positions: Tensor) -> Tensor:
    """The causal mask (batch, 1, seq, seq) of packed rows, from positions (batch, seq) that begin at 0."""
    document = (positions == 0).long().cumsum(1)
    same = document[:, None, :, None] == document[:, None, None, :]
    return same.tril()


def _no_queries(query: Tensor, length: int) -> Tensor:
    return query.new_zeros(query.shape[0], query.shape[1], length, query.shape[3])


def _function(inner: str, module: nn.Module) -> Callable:
    if inner != "eager":
        return ALL_ATTENTION_FUNCTIONS[inner]
    # Each architecture has an eager function of its own, in the file of its attention.
    for cls in type(module).__mro__:
        found = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if found is not None:
            return found
    raise MethodError(
        f"{type(module).__name__} has no eager attention.", fix="Load the model with attn: sdpa."
    )


def _mask(*, inner: str, **kwargs: Any) -> Tensor | None:
    if _calls is not None:  # whether a mask can be left out is seen from numbers, which meta tensors lack
        kwargs["allow_is_causal_skip"] = False
    return ALL_MASK_ATTENTION_FUNCTIONS[inner](**kwargs)


# Where the prompts go ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """An attention module: `kind` is "self", or of an encoder-decoder "encoder", "decoder" or "cross".

    It has `queries` heads of queries over `heads` heads of keys and values.
    """

    path: str
    kind: str
    layer: int
    queries: int
    heads: int
    key_dim: int
    value_dim: int

    @property
    def size(self) -> int:
        """Numbers for one position of the prompt: its keys, then its values."""
        return self.heads * (self.key_dim + self.value_dim)


def find_sites(model: nn.Module) -> list[Site]:
    """The attention modules of a model in the order in which they run; works on the meta device.

    Raises:
        MethodError: the model's attention cannot be given keys and values from outside.
    """
    _require_interface(model)
    calls = run_recorded(model)
    if not calls:
        raise MethodError(
            f"{type(model).__name__} has no attention that takes learnt keys and values.", fix=ELSEWHERE
        )
    paths = {module: path for path, module in model.named_modules()}
    found: list[Site] = []
    for call in calls:
        if hasattr(call.module, "sinks"):
            raise MethodError(
                f"The attention of {type(model).__name__} has learnt sinks of its own; prompts were not "
                "tried with them.",
                fix=ELSEWHERE,
            )
        kind = _kind(model, call)
        layer = sum(site.kind == kind for site in found)
        heads, key_dim, value_dim = call.key.shape[1], call.key.shape[3], call.value.shape[3]
        found.append(Site(paths[call.module], kind, layer, call.heads, heads, key_dim, value_dim))
    return found


def recording() -> bool:
    """Whether the model runs only for its calls to be seen."""
    return _calls is not None


def run_recorded(model: nn.Module, ids: Tensor | None = None) -> list[Call]:
    """What the attention modules are called with on a text `ids` (1, seq), by default on three empty inputs.

    An encoder-decoder reads the text in both halves; the decoder's empty inputs are two.
    """
    global _calls
    both = model.config.is_encoder_decoder
    inputs = empty_inputs(model)
    if ids is not None:
        inputs = {"use_cache": True, "input_ids": ids} | ({"decoder_input_ids": ids} if both else {})
    before = model.config._attn_implementation
    model.set_attn_implementation(over(underlying(before)))
    _calls = []
    try:
        with evaluating(model):
            # Not the head: it may be large, and a classifier's looks for padding.
            (model if both else model.base_model)(**inputs)
        return _calls
    finally:
        _calls = None
        model.set_attn_implementation(before)


def _kind(model: nn.Module, call: Call) -> str:
    if not model.config.is_encoder_decoder:
        return "self"
    if any(module is call.module for module in model.get_encoder().modules()):
        return "encoder"
    return "decoder" if call.queries == call.key.shape[2] else "cross"


def _require_interface(model: nn.Module) -> None:
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not model._can_set_attn_implementation():
        raise MethodError(
            f"{name} does not call its attention through transformers' AttentionInterface: learnt keys and "
            "values cannot be added to it.",
            fix=ELSEWHERE,
        )
    inner = underlying(model.config._attn_implementation)
    if inner not in INNER:
        raise MethodError(
            f"Learnt keys and values work with attention {' or '.join(INNER)}; {name} uses {inner}.",
            fix="Load the model with attn: sdpa.",
        )


# The prompts -------------------------------------------------------------------------------------------


class Reparametrisation(nn.Module):
    """What the prompts of all layers of one kind share: tanh(P' W_1 + b_1), (P, width) to (P, hidden)."""

    def __init__(self, length: int, width: int, hidden: int):
        super().__init__()
        self.embedding = nn.Embedding(length, width)
        self.inner = nn.Linear(width, hidden)

    def forward(self) -> Tensor:
        states: Tensor = torch.tanh(self.inner(self.embedding.weight))
        return states


class AttentionPrompt(PromptLayer):
    """The learnt keys and values of one attention module, for several adapters by name.

    An adapter has either a `table` (P, size), or a `head` from what its layers share to the same. The shared
    part belongs to the first layer; the others know where it is.
    """

    adapter_layer_names: tuple[str, ...] = ("table", "head", "shared")
    other_param_names: tuple[str, ...] = ("dropout", "_elsewhere", "_folded")

    def __init__(self, site: Site):
        super().__init__()
        self.site = site
        self.table = nn.ParameterDict()
        self.head = nn.ModuleDict()
        self.shared = nn.ModuleDict()
        self.dropout: dict[str, float] = {}
        self._elsewhere: dict[str, Reparametrisation] = {}

    def add_table(self, adapter: str, length: int, std: float, dropout: float = 0.0) -> None:
        """A prompt that learns directly, drawn from N(0, std^2)."""
        self.dropout[adapter] = dropout
        self.table[adapter] = nn.Parameter(std * torch.randn(length, self.site.size))

    def add_head(self, adapter: str, shared: Reparametrisation, *, owns: bool, dropout: float = 0.0) -> None:
        """A prompt made of what its layers share; one of them owns that."""
        self.dropout[adapter] = dropout
        if owns:
            self.shared[adapter] = shared
        self._elsewhere[adapter] = shared
        self.head[adapter] = nn.Linear(shared.inner.out_features, self.site.size)

    @torch.no_grad()
    def start_from(self, adapter: str, pairs: Tensor) -> None:
        """Make the prompt equal to `pairs` (P, size), a head by its smallest change that does it."""
        if adapter in self.table:
            self.table[adapter].copy_(pairs)
            return
        head = self.head[adapter]
        states = F.pad(
            self._elsewhere[adapter](), (0, 1), value=1.0
        ).double()  # (P, hidden + 1), for the bias
        missing = (pairs - self.pairs(adapter)).double()
        change = torch.linalg.lstsq(states, missing, driver="gelsd").solution.T  # (size, hidden + 1)
        head.weight += change[:, :-1]
        head.bias += change[:, -1]

    def has(self, adapter: str) -> bool:
        return adapter in self.table or adapter in self.head

    def reparametrisation(self, adapter: str) -> Reparametrisation | None:
        return self._elsewhere.get(adapter)

    def pairs(self, adapter: str) -> Tensor:
        """Keys and values (P, size) in fp32, whatever precision the model computes in."""
        if adapter in self.table:
            return self.table[adapter]
        head, shared = self.head[adapter], self._elsewhere[adapter]
        return self.computed(adapter, [*head.parameters(), *shared.parameters()], lambda: head(shared()))

    def length(self) -> int:
        """P of what is active now, and 0 where nothing is."""
        return sum(self._lengths())

    def _lengths(self) -> Iterator[int]:
        for adapter in [] if self.disable_adapters else self.active_adapters:
            if adapter in self.table:
                yield len(self.table[adapter])
            elif adapter in self.head:
                yield self._elsewhere[adapter].embedding.num_embeddings

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keys and values (1 or batch, kv heads, P, dim) in the dtype of the queries; None without any."""
        if self.disable_adapters:
            return None
        parts = []
        for adapter in self.active_adapters:
            if not self.has(adapter):
                continue
            pairs = self.pairs(adapter)[None]  # (1, P, size)
            if self.training and self.dropout[adapter]:
                pairs = F.dropout(pairs.expand(len(query), -1, -1), self.dropout[adapter])
            parts.append(pairs)
        if not parts:
            return None
        rows = max(len(part) for part in parts)
        whole = torch.cat([part.expand(rows, -1, -1) for part in parts], dim=1)
        site = self.site
        split = whole.to(query.dtype).split([site.heads * site.key_dim, site.heads * site.value_dim], dim=-1)
        key, value = (part.unflatten(-1, (site.heads, -1)).transpose(1, 2) for part in split)
        return key, value

    def scores(self, places: Places, query: Tensor, key: Tensor, scale: float | None) -> Tensor | None:
        """What is added to the scores, (1 or batch, heads, seq, P + keys); nothing here."""
        return None

    def fold(self, adapter: str, pairs: Tensor | None = None) -> None:
        """Drop the reparametrisation for its value, or for `pairs` (P, size)."""
        value = self.pairs(adapter) if pairs is None else pairs
        held = self.table[adapter] if adapter in self.table else self.head[adapter].weight
        learns = held.requires_grad
        for store in (self.head, self.shared, self._elsewhere, self._folded):
            if adapter in store:
                del store[adapter]
        self.table[adapter] = nn.Parameter(value.detach().to(held.dtype, copy=True), requires_grad=learns)
