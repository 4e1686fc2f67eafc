"""Tokens that skip a block: which are chosen, and how a block runs on those alone.

Soft top-k: for scores s (n,) the weights

    argmax_l  s . l + eps H(l),    sum l = k,  0 <= l_i <= 1,    H(l) = -sum l log l

which are l_i = min(1, exp((s_i + a) / eps)) for the one a that gives the sum. `soft_top_k` finds it exactly;
`iterative_top_k` by a fixed number of dual steps, which are few for small eps: the sum then stays below k.

`RoutedLayer` stands beside a block of a model, not around it: hooks on the block hand it the chosen rows of
all that has a place in the sequence (states, mask, positions), and put back what it made of them.
"""

import inspect
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from luthier.errors import MethodError
from luthier.tuning.tuner import DeltaLayer, in_precision_of

NOWHERE = -1e9  # the score of padding: no weight, and no infinities in the gradient


def soft_top_k(scores: Tensor, k: Tensor, eps: float) -> Tensor:
    """Weights (batch, n) of scores (batch, n) that sum to k (batch,), k < n; exact, in fp32 or better.

    With the scores sorted, the first j saturate at 1; right is the least j that keeps the rest at most 1.
    """
    count = torch.arange(scores.shape[1], device=scores.device)
    with torch.no_grad():
        ordered, order = scores.sort(dim=1, descending=True)
        tail = (ordered / eps).flip(1).logcumsumexp(1).flip(1)  # logsumexp over i >= j
        left = (k[:, None] - count).clamp(min=1)
        fits = (ordered + eps * (left.log() - tail) <= 0) | (count >= k[:, None] - 1)
        saturated = fits.int().argmax(1)  # (batch,), the first that fits
        ranks = order.argsort(1)
        full = ranks < saturated[:, None]
    rest = torch.logsumexp((scores / eps).masked_fill(full, -math.inf), dim=1)
    a = (k - saturated).clamp(min=1).log() - rest  # of eps
    weights = torch.exp((scores / eps + a[:, None]).clamp(max=0))
    return torch.where(full, torch.ones_like(weights), weights)


def iterative_top_k(
    scores: Tensor, k: Tensor, eps: float, steps: int, eps_init: float, eps_decay: float
) -> Tensor:
    """The same by `steps` dual steps from b = 0, with eps falling from `eps_init`; differentiated through."""
    b = torch.zeros_like(scores)
    a = torch.zeros_like(scores[:, :1])
    now = eps
    for step in range(steps):
        now = max(eps, eps_init * eps_decay**step)
        a = now * (k.log()[:, None] - torch.logsumexp((scores + b) / now, dim=1, keepdim=True))
        b = (-scores - a).clamp(max=0)
    return torch.exp((scores + a + b) / now)


class Chosen(NamedTuple):
    """The rows that a block sees, in their order.

    index (batch, k): where they stand; real (batch, k): False for spare rows of a shorter text.
    weight (batch, k): m, by which their change counts; 0 for spare rows.
    """

    index: Tensor
    real: Tensor
    weight: Tensor


def choose(scores: Tensor, real: Tensor, reduction: float, weigh: Any, kept: Tensor | None = None) -> Chosen:
    """Of a text of length l the ceil(l / reduction) tokens with the highest scores.

    Args:
        scores (batch, n), real (batch, n): False for padding.
        weigh: soft top-k, from scores (batch, n) and k (batch,).
        kept (batch,): the place of a token that is chosen in any case, with weight 1.
    """
    n = scores.shape[1]
    length = real.sum(1)
    k = torch.ceil(length / reduction).clamp(min=1)  # (batch,)
    free = real
    if kept is not None:
        free = real & (torch.arange(n, device=scores.device) != kept[:, None])
    left = k - (real.sum(1) - free.sum(1))
    weights = weigh(scores.masked_fill(~free, NOWHERE), left.clamp(min=1)) * (left > 0)[:, None]
    weights = torch.where(free, weights, real.to(weights.dtype))
    weights = torch.where((k >= length)[:, None], real.to(weights.dtype), weights)
    most = math.ceil(n / reduction)
    # By the scores, for saturated weights are all 1.
    ranked = scores.masked_fill(~real, NOWHERE).masked_fill(real & ~free, -NOWHERE)
    index = ranked.topk(most, dim=1).indices
    taken = torch.arange(most, device=scores.device) < torch.minimum(k, length)[:, None]
    order = torch.where(taken, index, index + n).argsort(1)  # in the order of the text, spare rows last
    index, taken = index.gather(1, order), taken.gather(1, order)
    return Chosen(index, taken, weights.gather(1, index) * taken)


def rows_of(states: Tensor, index: Tensor) -> Tensor:
    """Rows (batch, k, ...) of states (1 or batch, n, ...)."""
    states = states.expand(len(index), *states.shape[1:])
    where = index.reshape(*index.shape, *[1] * (states.ndim - 2)).expand(-1, -1, *states.shape[2:])
    return states.gather(1, where)


def square_of(mask: Tensor, index: Tensor) -> Tensor:
    """The chosen rows and columns of a mask or bias (1 or batch, heads, 1 or n, n): (batch, heads, q, k)."""
    mask = mask.expand(len(index), *mask.shape[1:])
    heads, k = mask.shape[1], index.shape[1]
    if mask.shape[2] > 1:
        mask = mask.gather(2, index[:, None, :, None].expand(-1, heads, -1, mask.shape[3]))
    return mask.gather(3, index[:, None, None, :].expand(-1, heads, mask.shape[2], k))


def seen(mask: Tensor | None, states: Tensor) -> Tensor:
    """Which tokens are real (batch, n): those that a mask (batch, 1, q, n) lets some query see."""
    if mask is None:
        return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    if mask.ndim != 4 or mask.shape[-1] != states.shape[1]:
        raise MethodError(
            f"A mask of shape {tuple(mask.shape)} does not tell which tokens are padding.",
            fix="Load the model with attn: sdpa.",
        )
    open_ = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return open_.any(2).any(1).expand(len(states), -1)


class RoutedLayer(DeltaLayer):
    """Beside a block: y = x + A(N(x)) + m * (block(chosen x) - chosen x), put back where they were chosen.

    A change of it has `scores(states, normed)`, `weigh(scores, k)`, `kept(real)` and `reduction`, and is
    itself the adapter A.
    """

    def __init__(self, block: nn.Module, slot: str, width: int, norm: str | None):
        super().__init__(nn.Identity(), slot, width, width)
        self.norm = norm  # within the block
        self.names = list(inspect.signature(type(block).forward).parameters)[1:]
        self.held: tuple | None = None
        self._hooks = [
            block.register_forward_pre_hook(self._gather, with_kwargs=True),
            block.register_forward_hook(self._scatter),
        ]

    def why_unmergeable(self, adapter: str) -> str:
        return "it chooses tokens, which no weight could do"

    def unload_and_optionally_merge_module(self, merge: bool, **options: Any) -> nn.Module:
        """What PEFT calls to take the layer out again."""
        if merge:
            self.merge(**options)
        for hook in self._hooks:
            hook.remove()
        return self.base_layer

    def _active(self) -> Any:
        found = [] if self.disable_adapters else [n for n in self.active_adapters if n in self.deltas]
        if len(found) > 1:
            raise MethodError(
                f"The adapters {', '.join(found)} each choose their own tokens.", fix="Activate one of them."
            )
        return self.deltas[found[0]] if found else None

    def _gather(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        change, self.held = self._active(), None
        if change is None:
            return None
        given = dict(zip(self.names, args, strict=False)) | kwargs
        states, mask = given["hidden_states"], given.get("attention_mask")
        cache = given.pop("past_key_values", None)
        if cache is not None and cache.get_seq_length():
            raise MethodError("Tokens are chosen among a whole text: it cannot be continued from a cache.")
        normed = states if self.norm is None else block.get_submodule(self.norm)(states)
        added = in_precision_of(normed, change, states)
        if math.ceil(states.shape[1] / change.reduction) >= states.shape[1]:
            self.held = states, added, None, None
            return None
        scores = change.scores(states, normed)
        real = seen(mask, states)
        chosen = choose(scores, real, change.reduction, change.weigh, change.kept(real))
        rows = rows_of(states, chosen.index)
        bias = _bias(block, given, states) if "position_bias" in self.names else None
        self.held = (states + added, rows, chosen, bias)
        given["hidden_states"] = rows
        given["attention_mask"] = _mask(mask, chosen, states.dtype)
        if bias is not None:
            given["position_bias"] = square_of(bias, chosen.index)
        if given.get("position_embeddings") is not None:
            given["position_embeddings"] = tuple(
                rows_of(part, chosen.index) for part in given["position_embeddings"]
            )
        if given.get("position_ids") is not None:
            given["position_ids"] = rows_of(given["position_ids"], chosen.index)
        return (), given

    def _scatter(self, block: nn.Module, args: tuple, output: Any) -> Any:
        held, self.held = self.held, None
        if held is None:
            return None
        first, *others = output if isinstance(output, tuple) else (output,)
        base, rows, chosen, bias = held
        if chosen is None:
            made = first + rows  # all tokens went through; `rows` is what the adapter adds
        else:
            change = (first - rows) * chosen.weight[..., None].to(first.dtype)
            where = chosen.index[..., None].expand_as(change)
            made = base + torch.zeros_like(base).scatter(1, where, change)
            others = [bias if i == 0 and bias is not None else other for i, other in enumerate(others)]
        return (made, *others) if isinstance(output, tuple) else made


def _mask(mask: Tensor | None, chosen: Chosen, dtype: torch.dtype) -> Tensor | None:
    """The mask of the chosen rows: of each text its own, with spare rows hidden."""
    if mask is None:
        return None  # no padding, so no spare rows
    found = square_of(mask, chosen.index)
    hidden = ~chosen.real[:, None, None, :]
    closed = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    found = found.masked_fill(hidden, closed)
    # A spare row sees itself, for a row that sees nothing is not a number in some kernels.
    own = torch.eye(found.shape[3], dtype=torch.bool, device=found.device)[None, None] & hidden
    found = found.expand(-1, -1, found.shape[3], -1)
    return found.masked_fill(own, True if mask.dtype == torch.bool else 0.0)


def _bias(block: nn.Module, given: dict[str, Any], states: Tensor) -> Tensor:
    """The bias of relative positions (1, heads, n, n) of the whole text; T5's first block makes it."""
    found = given.get("position_bias")
    if found is None:
        maker = next(m for m in block.modules() if getattr(m, "has_relative_attention_bias", False))
        n = states.shape[1]
        found = maker.compute_bias(n, n, device=states.device)
    return found
