"""Where the feed-forward network (FFN) of each block begins and ends, found by structure."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.errors import MethodError
from luthier.models import structure


def features(layer: nn.Module, name: str) -> tuple[int, int]:
    """(out, in) of a linear layer, quantised or not; GPT-2's `Conv1D` stores its weight as (in, out).

    Raises:
        MethodError: the layer is no linear one.
    """
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    if isinstance(layer, nn.Embedding) or not hasattr(layer, "in_features"):
        raise MethodError(
            f"'{name}' is a {type(layer).__name__}, not a linear layer: the method cannot be put on it.",
            fix="Name linear layers in target_modules, or write all-linear.",
        )
    return layer.out_features, layer.in_features


def feed_forwards(model: nn.Module, layers: list[int] | None = None) -> dict[str, str]:
    """Name of the last linear layer of each FFN, to that of its first: `down_proj` to `gate_proj`.

    What the first reads is the FFN's input (batch, seq, width), and what the last writes is its output, also
    where the block has no module for its FFN (BERT, BART).

    Args:
        layers: indices of the blocks, within encoder and decoder each; default: all.

    Raises:
        MethodError: a block has no FFN of this kind, such as one with experts.
    """
    linears = structure.linears(model, with_head=True)
    found = {}
    for stack, blocks in structure.stacks(model):
        for index, block in enumerate(blocks):
            if layers is None or index in layers:
                place = f"{stack}.{index}"
                attention = [n for n, m in block.named_modules() if "attention" in type(m).__name__.lower()]
                inside = [n for n in linears if n.startswith(f"{place}.") and not _below(n, place, attention)]
                first, last = _ends(model, place, inside)
                found[last] = first
    if not found:
        raise MethodError(f"layers_to_transform {layers} names no block of {type(model).__name__}.")
    return found


def _below(name: str, place: str, parts: list[str]) -> bool:
    return any(name.startswith(f"{place}.{part}.") for part in parts if part)


def _ends(model: nn.Module, place: str, names: list[str]) -> tuple[str, str]:
    fault = ""
    if any("expert" in name for name, _ in model.get_submodule(place).named_parameters()):
        fault = "has experts"
    elif not names:
        fault = "has no linear layer beside its attention"
    elif _features(model, names[0])[1] != _features(model, names[-1])[0]:
        fault = f"does not lead from one width back to it ({', '.join(names)})"
    if fault:
        raise MethodError(
            f"The feed-forward part of '{place}' in {type(structure.base(model)).__name__} {fault}: "
            "nothing can be put beside it.",
            fix="Choose a method that adapts linear layers.",
        )
    return names[0], names[-1]


def _features(model: nn.Module, name: str) -> tuple[int, int]:
    layer = model.get_submodule(name)
    return features(layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer, name)
