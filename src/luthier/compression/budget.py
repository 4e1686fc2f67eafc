"""How many bits each layer gets, so that the model fits a size: little where rounding hurts little.

What a rounding costs is estimated by the second-order term of the loss. With the error D of a layer's weight
(out, in), inputs x and the gradient g of the loss by the layer's output, tokens taken for independent,

    cost = 1/2 sum_i E[g_i^2] (D E[x x^T] D^T)_ii,

which one backward run over a few batches and one calibration pass give for every layer and every number of
bits. Bits are then handed out greedily: all layers start with the fewest, and the step that saves the most
cost for a byte is taken until the budget is spent. (The criterion is OBS's with a Kronecker-factored
curvature, as in Martens and Grosse, 2015, arXiv 1503.05671; the greedy hand-out is optimal up to one step
where costs are convex.)
"""

import copy
import heapq
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from luthier.compression.block import Block
from luthier.compression.calibration import Batch, calibrate, choose_layers
from luthier.compression.compress import compress
from luthier.compression.grid import Scheme, fit, require_divides
from luthier.compression.linear import dimensions, matrix
from luthier.compression.records import Record
from luthier.compression.statistics import Hessian
from luthier.errors import MethodError
from luthier.models import structure
from luthier.resources import show_bytes

log = logging.getLogger("luthier.compression")

BITS = (2, 3, 4, 5, 6, 8)
BACKWARD = 4  # batches of which gradients are taken


@dataclass
class Choice:
    """What a layer would cost with so many bits.

    Attributes:
        cost: estimated rise of the loss, nats a token.
        size: bytes on disk.
    """

    bits: int
    cost: float
    size: int


def layer_bits(
    model: nn.Module,
    batches: Sequence[Batch],
    budget: int,
    *,
    group_size: int | None = 64,
    bits: Sequence[int] = BITS,
) -> dict[str, int]:
    """Bits of every linear layer of the blocks, so that the whole model takes at most `budget` bytes on disk.

    The model is not changed. What is not in a block (embeddings, head, norms) stays as it is.

    Args:
        batches: as of `luthier.compress`; a causal language model learns them, token by token.
        group_size: neighbours that share a scale, which is stored too.

    Raises:
        MethodError: the budget is less than the model takes with the fewest bits.
    """
    table = choices(model, batches, group_size=group_size, bits=bits)
    return assign(table, budget - _rest(model, set(table)))


def assign(table: dict[str, list[Choice]], budget: int) -> dict[str, int]:
    """Bits of each layer from its choices, in at most `budget` bytes together (see above).

    Raises:
        MethodError: it is less than all layers take with their first choice.
    """
    taken = dict.fromkeys(table, 0)
    left = budget - sum(found[0].size for found in table.values())
    if left < 0:
        raise MethodError(
            f"The budget falls short by {show_bytes(-left)}, with {next(iter(table.values()))[0].bits} bits "
            "everywhere.",
            fix="Allow more, prune units first (llm_pruner), or use a smaller model.",
        )
    steps = [step for name in table if (step := _best_step(name, table[name], 0)) is not None]
    heapq.heapify(steps)
    while steps:
        _, name, to = heapq.heappop(steps)
        extra = table[name][to].size - table[name][taken[name]].size
        if extra > left:
            # A shorter step may fit still.
            nearer = _best_step(name, table[name][:to], taken[name])
        else:
            left, taken[name] = left - extra, to
            nearer = _best_step(name, table[name], to)
        if nearer is not None:
            heapq.heappush(steps, nearer)
    return {name: table[name][index].bits for name, index in taken.items()}


def _best_step(name: str, found: list[Choice], at: int) -> tuple[float, str, int] | None:
    """(negative saving a byte, name, choice) of the step up that saves the most for a byte."""
    gains = [
        (-(found[at].cost - found[to].cost) / (found[to].size - found[at].size), name, to)
        for to in range(at + 1, len(found))
    ]
    best = min(gains, default=None)
    return best if best is not None and best[0] < 0 else None


def choices(
    model: nn.Module, batches: Sequence[Batch], *, group_size: int | None = 64, bits: Sequence[int] = BITS
) -> dict[str, list[Choice]]:
    """What each linear layer of the blocks would cost with each number of bits, rounded to the nearest."""
    chosen = choose_layers(model, [], [])
    gradients = _output_gradients(model, batches[:BACKWARD], chosen)
    found: dict[str, list[Choice]] = {}

    def look(block: Block) -> Iterable[Record]:
        block.choose(chosen)
        layers = block.layers()
        for names in block.groups():
            hessian = Hessian(dimensions(layers[names[0]])[1], block.device)
            block.observe({names[0]: hessian})
            second = hessian.value / 2  # E[x x^T]
            for name in names:
                require_divides(Scheme(group_size=group_size), dimensions(layers[name])[1], name)
                found[name] = _choices(layers[name], gradients[name], second, group_size, bits)
        return []

    calibrate(model, batches, look)
    return found


def within_loss(
    model: nn.Module,
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    increase: float,
    method: Any,
    *,
    trials: int = 5,
) -> tuple[dict[str, int], float]:
    """The fewest bits with which perplexity rises by at most a share, measured: the search halves the budget.

    Args:
        held_out: batches on which perplexity is measured; not those of `batches`.
        increase: 0.02 allows two per cent.
        method: config of a quantiser with `layer_bits`; a copy of the model is compressed with it at each
            trial.

    Returns:
        The bits of each layer, and the share by which perplexity rose with them.

    Raises:
        MethodError: it rises by more even with the most bits.
    """
    table = choices(model, batches, group_size=method.group_size)
    low, high = (sum(found[end].size for found in table.values()) for end in (0, -1))
    base = _loss(model, held_out)
    best: tuple[dict[str, int], float] | None = None
    budget = high
    for _ in range(trials + 1):
        bits = assign(table, budget)
        trial = copy.deepcopy(model)
        compress(trial, replace(method, layer_bits=bits), calibration=batches)
        rise = math.expm1(_loss(trial, held_out) - base)
        log.info("%s of layers: perplexity %+.2f%%", show_bytes(budget), 100 * rise)
        if rise <= increase:
            best, high = (bits, rise), budget
        elif budget == high:
            break
        else:
            low = budget
        budget = (low + high) // 2
    if best is None:
        raise MethodError(
            f"Perplexity rises by {rise:.1%} even with {BITS[-1]} bits everywhere.",
            fix="Allow a larger increase.",
        )
    return best


@torch.no_grad()
def _loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Mean loss a token; the windows are of equal length."""
    losses = [
        float(model(**b, labels=b["input_ids"], use_cache=False).loss) * len(b["input_ids"]) for b in batches
    ]
    return sum(losses) / sum(len(b["input_ids"]) for b in batches)


def _choices(
    layer: nn.Module, gradient: Tensor, second: Tensor, group_size: int | None, bits: Sequence[int]
) -> list[Choice]:
    weight = matrix(layer)
    dtype = layer.weight.dtype
    assert isinstance(dtype, torch.dtype)
    found = []
    for count in sorted(bits):
        grid = fit(weight, Scheme(count, group_size), dtype)
        lost = grid.round(weight) - weight
        squared = ((lost @ second) * lost).sum(1)  # (out,)
        size = weight.numel() * count // 8 + grid.scale.numel() * grid.scale.element_size()
        found.append(Choice(count, float(gradient @ squared) / 2, size))
    return found


def _output_gradients(model: nn.Module, batches: Sequence[Batch], chosen: set[str]) -> dict[str, Tensor]:
    """E[g^2] over tokens of the gradient of the summed loss by each layer's output: (out,) a layer."""
    sums: dict[str, Tensor] = {}
    tokens = 0

    def watch(name: str, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, __: tuple, output: Tensor) -> None:
            output.register_hook(lambda g: add(name, g))

        return layer.register_forward_hook(hook)

    def add(name: str, gradient: Tensor) -> None:
        squares = gradient.detach().float().square().flatten(0, -2).sum(0)
        sums[name] = sums.get(name, torch.zeros_like(squares)) + squares

    layers = structure.linears(model)
    handles = [watch(name, layers[name]) for name in chosen]
    learns = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)  # so that gradients flow at all
    try:
        for batch in batches:
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            labels = batch["input_ids"].masked_fill(mask == 0, -100)
            count = int((labels[:, 1:] != -100).sum())
            with torch.enable_grad():
                (model(**batch, labels=labels, use_cache=False).loss * count).backward()
            tokens += count
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
        for parameter, own in learns.items():
            parameter.requires_grad_(own)
    return {name: value / tokens for name, value in sums.items()}


def _rest(model: nn.Module, layers: set[str]) -> int:
    """Bytes of all that is no weight of these layers; what is tied counts once."""
    own = {f"{name}.weight" for name in layers}
    return sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name not in own)
