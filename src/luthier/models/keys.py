"""Names of weights in a file against names in a model: what differs, and the prefix that would mend it."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import nn

ADAPTER = "adapter_model.safetensors"
SHOWN = 5


def of(model: nn.Module, part: nn.Module | None) -> set[str]:
    """Names, in the whole model, of the parameters of one of its parts."""
    inside = set() if part is None else {id(p) for p in part.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in inside}


def in_file(folder: Path) -> set[str]:
    """Names of the weights in an adapter's file."""
    with safe_open(str(folder / ADAPTER), framework="pt") as file:
        return set(file.keys())


def adapter_difference(model: PeftModel, folder: Path) -> tuple[list[str], list[str]]:
    """Names that the adapter on the model has and its file lacks, and those that only the file has.

    The file may hold the embedding or the head besides, where the vocabulary was extended.
    """
    found = in_file(folder)
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    base = set(model.state_dict()) | set(get_peft_model_state_dict(model, save_embedding_layers=True))
    more = {key for key in found - wanted if key not in base and key.replace(".base_layer.", ".") not in base}
    return sorted(wanted - found), sorted(more)


def shown(names: Iterable[Any]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(str(name) for name in names[:SHOWN]) + rest


def difference(missing: list[str], unexpected: list[str]) -> str:
    """One or two sentences that list what is missing in the file, and what the model has no place for."""
    parts = []
    if missing:
        parts.append(f"{len(missing)} weights are missing in the file: {shown(missing)}.")
    if unexpected:
        parts.append(f"{len(unexpected)} weights of the file have no place in it: {shown(unexpected)}.")
    return " ".join(parts)


def prefix_fix(missing: list[str], unexpected: list[str]) -> str | None:
    """The change of prefix that would give most of the unexpected names a place, in words; None without one.

    For each unexpected name the missing name with the longest common ending is sought, part by part; what
    differs in front of it is the pair (wrong prefix, right prefix).
    """
    by_ending: dict[str, list[list[str]]] = {}
    for name in missing:
        parts = name.split(".")
        by_ending.setdefault(".".join(parts[-2:]), []).append(parts)
    pairs: Counter[tuple[str, str]] = Counter()
    for name in unexpected:
        parts = name.split(".")
        candidates = by_ending.get(".".join(parts[-2:]), [])
        best = max(candidates, key=lambda c: _common_ending(parts, c), default=None)
        if best is not None:
            same = _common_ending(parts, best)
            pairs[".".join(parts[: len(parts) - same]), ".".join(best[: len(best) - same])] += 1
    if not pairs:
        return None
    (wrong, right), count = pairs.most_common(1)[0]
    scope = "all" if count == len(unexpected) else f"{count} of {len(unexpected)}"
    if not wrong:
        return f"Put the prefix '{right}.' before the names: that fits {scope} of them."
    if not right:
        return f"Take the prefix '{wrong}.' off the names: that fits {scope} of them."
    return f"Replace the prefix '{wrong}.' by '{right}.': that fits {scope} of them."


def _common_ending(a: list[str], b: list[str]) -> int:
    count = 0
    while count < min(len(a), len(b)) and a[-1 - count] == b[-1 - count]:
        count += 1
    return count
