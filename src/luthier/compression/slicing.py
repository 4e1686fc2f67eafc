"""Cut units out of a model, so that a smaller dense one is left; and prove that it computes what it must.

    1. the config of the smaller model is made, and from it a twin without weights (on the meta device): every
       parameter must have the shape that it will have after the cut. So the class that will reload it fits.
    2. the units' outputs are set to zero in place (columns of the layers that read them); the model answers
       a probe;
    3. the rows and columns are taken out, and the model must answer the same.

*uniform* widths are those of the model's own class, which transformers loads without us. Where blocks differ
(*per_layer*) the model becomes one of `luthier.models.per_layer`.

Channels of the stream differ in one point: a norm divides by the mean over all channels, and the cut model
by the mean over those that are left. The zeroed model is asked with its norms scaled to that: sqrt(C'/C) on
the weight, C'/C on the epsilon.
"""

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from luthier import checks
from luthier.compression.records import Record
from luthier.compression.units import ATTENTION, CHANNEL, MLP, TITLES, Units, removed, spread
from luthier.errors import MethodError
from luthier.models import per_layer, structure
from luthier.tuning.places import is_norm
from luthier.tuning.probe import distance, evaluating, probe_logits

log = logging.getLogger("luthier.compression")

Kept = Mapping[Units, Tensor]  # indices of the units that stay
Batch = Mapping[str, Tensor]

# Fields of a config that state a width, as architectures name them; those that a config has are set together.
FIELDS = {
    MLP: ("intermediate_size", "ffn_dim", "n_inner"),
    ATTENTION: ("num_attention_heads", "num_key_value_heads"),
    CHANNEL: ("hidden_size",),
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
TOLERANCE_HALF = 0.05


def cut(model: nn.Module, kept: Kept, *, widths: str = "uniform") -> None:
    """Take out of the model, in place, all units that are not in `kept`.

    Args:
        widths: "uniform" or "per_layer".

    Raises:
        MethodError: the model's class cannot have these widths; nothing was changed.
        CheckError: the cut model does not compute what the zeroed one did.
    """
    kept = {units: indices for units, indices in kept.items() if len(indices) < units.count}
    if not kept:
        return
    assert isinstance(model, PreTrainedModel)
    _require_rms(model, kept)
    new = config_after(model, {u: len(indices) for u, indices in kept.items()}, widths)
    twin = _twin(model, new, widths)
    _require_shapes(model, kept, twin)
    with torch.no_grad():
        expected = _answer_of_zeroed(model, kept)
        _take_out(model, kept)
    _become(model, twin, new)
    error = distance(probe_logits(model), expected)
    checks.record(
        "end",
        "cut model computes what the zeroed one did",
        error <= TOLERANCE.get(model.dtype, TOLERANCE_HALF),
        error,
        TOLERANCE.get(model.dtype, TOLERANCE_HALF),
        f"{sum(u.count - len(i) for u, i in kept.items())} units taken out",
        fix="Do not use the model; report this with its architecture.",
    )


def valid_count(model: nn.Module, group: Iterable[Units], count: int) -> int:
    """The least number of units, from `count` on, that the model's own config allows in all blocks alike.

    Llama's, say, wants a number of query heads that divides the hidden size.
    """
    group = list(group)
    for number in range(count, group[0].count):
        try:
            config_after(model, dict.fromkeys(group, number), "uniform")
        except MethodError:
            continue
        return number
    return group[0].count


def targets(model: nn.Module, found: Sequence[Units], ratio: float, widths: str) -> dict[Units, int]:
    """How many units each place keeps where a ratio of them goes.

    Raises:
        MethodError: the ratio is above 0, and no place has so many units that one would go.
    """
    counts = {u: u.count - removed(u, ratio) for u in found}
    for kind in {u.kind for u in found} if widths == "uniform" else ():
        group = [u for u in found if u.kind == kind]
        counts |= dict.fromkeys(group, valid_count(model, group, counts[group[0]]))
    if ratio and all(count == u.count for u, count in counts.items()):
        sizes = ", ".join(sorted({f"{u.count} {TITLES[u.kind]}" for u in found}))
        raise MethodError(
            f"ratio: {ratio:g} takes nothing out of the {sizes or 'units'} of a block.",
            fix="Write a larger ratio, or units with more in a block.",
        )
    return counts


def config_after(model: nn.Module, counts: Mapping[Units, int], widths: str) -> Any:
    """The config of the model with so many units in each place.

    Raises:
        MethodError: the class of the config does not allow it.
    """
    blocks = len(structure.blocks(model))
    if widths == "per_layer":
        if any(u.kind == CHANNEL for u in counts):
            raise MethodError(
                "The stream has one width in all blocks.", fix="Write widths: uniform with units: [channel]."
            )
        differences: dict[int, dict[str, int]] = {index: {} for index in range(blocks)}
        if per_layer.is_per_layer(model):
            for index, own in enumerate(model.config.per_layer_config):
                differences[index] = {
                    f: getattr(own, f) for fs in FIELDS.values() for f in fs if hasattr(own, f)
                }
        for units, count in counts.items():
            differences[units.block].update(_fields(model, units, count))
        return per_layer.config_with(model.config, differences)
    fields: dict[str, int] = {}
    for kind in {u.kind for u in counts}:
        found = {u.block: count for u, count in counts.items() if u.kind == kind}
        if len(set(found.values())) > 1 or (kind != CHANNEL and len(found) < blocks):
            raise MethodError(
                f"The blocks of {type(model).__name__} would differ in their {kind} width, which its class "
                "cannot hold.",
                fix="Write widths: per_layer, and load the model with luthier.",
            )
        units = next(u for u in counts if u.kind == kind)
        fields |= _fields(model, units, counts[units])
    return _changed(model.config, fields)


def output_errors(model: nn.Module, kept: Kept, batches: Iterable[Batch]) -> dict[Units, float]:
    """Of each reading layer's output on the batches: what comes from the units that go, as a share of its
    square.

    {} without batches, and nothing for channels.
    """
    parts = {u: i for u, i in kept.items() if u.kind != CHANNEL}
    sums = {u: torch.zeros(2, dtype=torch.float64) for u in parts}
    mask: Tensor | None = None

    def listen(units: Units) -> Any:
        gone = torch.ones(units.count, dtype=torch.bool)
        gone[parts[units].cpu()] = False
        columns = spread(gone.nonzero().flatten(), units.reads)

        def hook(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
            index = columns.to(weight.device)
            lost = nn.functional.linear(inputs[0][..., index], weight[:, index])
            for place, tensor in enumerate((lost, output)):
                rows = tensor.flatten(0, -2).float()
                rows = rows if mask is None else rows[mask.flatten().to(rows.device)]
                sums[units][place] += float(rows.square().sum())

        return hook

    with evaluating(model), ExitStack() as stack:
        for units in parts:
            stack.callback(model.get_submodule(units.name).register_forward_hook(listen(units)).remove)
        seen = False
        for batch in batches:
            seen = True
            inputs = {k: v.to(model.device) for k, v in batch.items() if k != "labels"}
            mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
            model.base_model(**inputs)
    return {u: float(s[0] / s[1].clamp_min(1e-30)) for u, s in sums.items()} if seen else {}


def records(kept: Kept, errors: Mapping[Units, float], seconds: float) -> list[Record]:
    """What became of each place; `after` is its error, `sparsity` the share of its units that are gone."""
    found = []
    for u, indices in kept.items():
        name = u.name if u.kind == CHANNEL else u.name.rpartition(".")[0]
        note = f"{len(indices)} of {u.count} {TITLES[u.kind]} kept"
        share = 1 - len(indices) / u.count
        found.append(
            Record(name, 0.0, errors.get(u, 0.0), sparsity=share, seconds=seconds / len(kept), note=note)
        )
    return found


def _fields(model: nn.Module, units: Units, count: int) -> dict[str, int]:
    """What a config says of a width, where there are `count` of the units."""
    config: Any = model.config
    names = [name for name in FIELDS[units.kind] if hasattr(type(config), name) or _has(config, name)]
    if units.kind != ATTENTION:
        return dict.fromkeys(names, count)
    last = units.parts[-1]
    queries = last.size // _head_dim(config)
    fields = {"num_attention_heads": count * queries, "num_key_value_heads": count}
    return {name: fields[name] for name in names}


def _has(config: Any, name: str) -> bool:
    return name in config.__dict__ or name in config.attribute_map


def _head_dim(config: Any) -> int:
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def _changed(config: Any, fields: Mapping[str, int]) -> Any:
    """A copy of the config with other widths, checked as when it is loaded."""
    values = config.to_dict() | {
        config.attribute_map.get(name, name): value for name, value in fields.items()
    }
    if "head_dim" in values:
        values["head_dim"] = _head_dim(config)  # of itself it would follow from the other two
    try:
        made = type(config).from_dict(values)
    except Exception as error:  # each class of config refuses in its own way
        raise MethodError(
            f"{type(config).__name__} refuses {', '.join(f'{k} = {v}' for k, v in fields.items())}: "
            f"{str(error).strip().splitlines()[-1].strip()}",
            fix="Choose another ratio, or widths: per_layer.",
        ) from error
    made._name_or_path = config._name_or_path
    made._attn_implementation = config._attn_implementation
    return made


def _twin(model: PreTrainedModel, config: Any, widths: str) -> PreTrainedModel:
    """The smaller model without weights."""
    kind = per_layer.class_of(model) if widths == "per_layer" else type(model)
    if kind is None:
        raise MethodError(f"There is no class for a {type(model).__name__} whose blocks differ.")
    try:
        with torch.device("meta"):
            twin = kind(copy.deepcopy(config))
    except (ValueError, RuntimeError) as error:
        raise MethodError(
            f"{type(model).__name__} cannot have these widths: {error}.", fix="Prune only units: [mlp]."
        ) from error
    return twin


def _require_shapes(model: nn.Module, kept: Kept, twin: nn.Module) -> None:
    """Raise MethodError where the smaller model's class would have other shapes than the cut gives."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    after = {name: list(shape) for name, shape in shapes.items()}
    for units, indices in kept.items():
        for part in units.parts:
            after[part.name][part.dim] = len(indices) * part.size
    found = {name: list(p.shape) for name, p in twin.named_parameters()}
    wrong = [name for name in after if found.get(name) != after[name]]
    if wrong:
        name = wrong[0]
        kinds = " and ".join(sorted({u.kind for u in kept}))
        raise MethodError(
            f"{type(model).__name__} cannot hold fewer {kinds} units: '{name}', now {shapes[name]}, would "
            f"be {tuple(after[name])}, and its class makes {found.get(name) and tuple(found[name])} of the "
            f"config ({len(wrong)} such weights).",
            fix="Prune only units: [mlp]: the size of its heads follows from the other widths.",
        )


@contextmanager
def _norms_over(model: nn.Module, units: Units, left: int) -> Iterator[None]:
    """Inside, norms of the stream divide by the mean over `left` channels: see the head of the file."""
    share = left / units.count
    names = {part.name.rpartition(".")[0] for part in units.parts}
    with ExitStack() as stack:
        for name in names:
            module: Any = model.get_submodule(name)
            if not is_norm(module):
                continue
            field = "variance_epsilon" if hasattr(module, "variance_epsilon") else "eps"
            stack.callback(setattr, module, field, getattr(module, field))
            setattr(module, field, getattr(module, field) * share)
            weight = module.weight.data
            stack.callback(setattr, module.weight, "data", weight)
            module.weight.data = weight * share**0.5
        yield


@torch.no_grad()
def _answer_of_zeroed(model: nn.Module, kept: Kept) -> Tensor:
    """Logits of the probe with the units that go at zero; their weights stay zero."""
    parameters = dict(model.named_parameters())
    with ExitStack() as stack:
        for units, indices in kept.items():
            # A wrong row of a making layer shows itself only if the rows are still what they were.
            for part in units.parts if units.kind == CHANNEL else units.parts[-1:]:
                parameter = parameters[part.name]
                gone = torch.ones(parameter.shape[part.dim], dtype=torch.bool, device=parameter.device)
                gone[spread(indices.to(parameter.device), part.size)] = False
                parameter.index_fill_(part.dim, gone.nonzero().flatten(), 0.0)
            if units.kind == CHANNEL:
                stack.enter_context(_norms_over(model, units, len(indices)))
        return probe_logits(model)


def _require_rms(model: nn.Module, kept: Kept) -> None:
    """Raise MethodError where a norm takes the mean off: without a channel it would take another one off."""
    parts = [part for units in kept if units.kind == CHANNEL for part in units.parts]
    for name in dict.fromkeys(part.name.rpartition(".")[0] for part in parts):
        module: Any = model.get_submodule(name)
        if is_norm(module) and (
            isinstance(module, nn.LayerNorm) or getattr(module, "bias", None) is not None
        ):
            raise MethodError(
                f"'{name}' is a {type(module).__name__}, which takes the mean over all channels off.",
                fix="Prune units: [mlp, attention]; channels of models with RMS norms only.",
            )


def _take_out(model: nn.Module, kept: Kept) -> None:
    """Replace every parameter that loses rows or columns, wherever it stands (tied ones stand twice)."""
    parameters = dict(model.named_parameters())
    new: dict[int, nn.Parameter] = {}
    for units, indices in kept.items():
        for part in units.parts:
            old = parameters[part.name]
            now: Tensor = new.get(id(old), old)
            index = spread(indices.to(old.device), part.size)
            new[id(old)] = nn.Parameter(now.index_select(part.dim, index), requires_grad=old.requires_grad)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in new:
                module._parameters[name] = new[id(parameter)]


def _become(model: PreTrainedModel, twin: PreTrainedModel, config: Any) -> None:
    """Give the model what the twin's modules say of widths (features, heads), its config and class."""
    old = model.config
    for path, smaller in twin.named_modules():
        module = model.get_submodule(path)
        for name, value in vars(smaller).items():
            if type(value) in (int, float, tuple) and not name.startswith("_") and name in vars(module):
                setattr(module, name, value)
        if getattr(module, "config", None) is old:
            module.config = config
    model.__class__ = type(twin)
