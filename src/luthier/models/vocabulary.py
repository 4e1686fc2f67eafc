"""Adapters on a base whose vocabulary was changed (tokens added): the embedding is in the adapter's file.

The rows of added tokens are in no folder of the base. PEFT writes the resized layers where it notices, which
it does not without the base's config at hand, nor for an untied head beside an adapted embedding; and it
loads them onto a base only that was resized by hand before. Here the file always holds them, and the base is
given the size that it finds there.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from luthier import checks
from luthier.errors import ModelError
from luthier.models import keys, structure

# What PEFT puts into the name of a base's weight where it wraps the layer.
WRAPPERS = re.compile(r"\.(base_layer|original_module|token_adapter)(?=\.)")
_COPY = re.compile(r"\.modules_to_save(?=\.)")


def rows(model: nn.Module) -> int:
    """How many tokens the embedding has a row for."""
    return int(structure.embeddings(model).weight.shape[0])


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's own weights with a row a token: of the embedding, and of a head that is not tied to it."""
    base = structure.base(model)
    layers = {base.get_input_embeddings(), base.get_output_embeddings()} - {None}
    paths = tuple(f".{name}" for name, module in base.named_modules() if module in layers)
    found = {}
    for name, parameter in model.named_parameters():
        layer, _, own = f".{WRAPPERS.sub('', name)}".rpartition(".")
        if layer.endswith(paths) and own in ("weight", "bias"):
            found[name] = parameter
    return found


def complete(model: PeftModel, folder: Path) -> None:
    """Put what a saved adapter lacks of the resized layers into its file."""
    found = load_file(str(folder / keys.ADAPTER))
    lacks = {
        name: p.detach().cpu().contiguous() for name, p in parameters(model).items() if name not in found
    }
    if lacks:
        save_file(found | lacks, str(folder / keys.ADAPTER), metadata={"format": "pt"})


def fit(model: PreTrainedModel, folder: Path, name: str) -> None:
    """Give the base the size that the embedding has in an adapter's file, where that holds one of another.

    Raises:
        ModelError: the file lacks a resized layer, whose new rows would be random.
    """
    shapes = _shapes(folder)
    own = dict(model.named_parameters())
    resized = [n for n in parameters(model) if n in shapes and shapes[n][0] != len(own[n])]
    if not resized:
        return
    size, before = shapes[resized[0]][0], rows(model)
    lacks = [n for n in parameters(model) if n not in shapes]
    if lacks:
        raise ModelError(
            f"Adapter '{name}' was trained with {size} rows in the embedding and its base has {before}, but "
            f"its file lacks {keys.shown(lacks)}.",
            fix="Save it again with luthier.save from the model that was trained.",
        )
    model.resize_token_embeddings(size, mean_resizing=False)
    detail = f"the base has {before}; the others are the adapter's"
    checks.record("before", "rows of the embedding as trained", rows(model) == size, size, detail=detail)


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the base's weights in an adapter's file, by the base's names for them."""
    found = {}
    with safe_open(str(folder / keys.ADAPTER), framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            plain = _COPY.sub("", WRAPPERS.sub("", key))
            for name in _inner(plain):
                found[name] = tuple(file.get_slice(key).get_shape())
    return found


def _inner(key: str) -> Iterable[str]:
    """The names that a base may have for a weight: PEFT's prefix is one or two words long."""
    parts = key.split(".")
    return (".".join(parts[1:]), ".".join(parts[2:]))
