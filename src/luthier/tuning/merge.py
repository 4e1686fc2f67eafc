"""Fold an adapter into the weights of its base, and prove that the merged model is the unmerged one.

Everything is added in fp32 and rounded once; where that loses more than a tenth of the adapter's effect, as
bfloat16 does with a small one, the merge is refused (huggingface/peft#2321). Weights that share one storage
(a head tied to the embeddings) are merged each by what its own adapter adds; if the results differ, the
storage is split and the config says so. Plain PEFT adds a tied adapter twice and loses the sharing of an
untied one (huggingface/peft#2777).
"""

import copy
import warnings
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.merge_utils import dare_linear, dare_ties, task_arithmetic, ties
from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier import checks
from luthier.compression.linear import quantized_layers
from luthier.errors import CheckError, MethodError, did_you_mean
from luthier.models import quantized
from luthier.terminal import no_peft_warnings
from luthier.tuning.attach import is_prompt, tuning_of
from luthier.tuning.groups import require_untieable
from luthier.tuning.probe import distance, probe_logits
from luthier.tuning.tuner import DeltaTuner

WAYS: dict[str, Any] = {
    "linear": task_arithmetic,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
}
EXACT = 1e-3
ROUNDED = 0.1
# An error below this share of the logits is fp32 arithmetic, however small the adapter's effect.
NOISE = 1e-5
SPARSE = 0.25  # share of exact zeros from which a weight counts as pruned; rounding to 4 bits makes fewer


def merge(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The base model with the adapter folded in; a model without adapter is returned as it is.

    The model given is used up.

    Args:
        dtype: of the merged weights; default: the base's own.

    Raises:
        MethodError: the base is quantised, or the adapter is not one that folds into weights.
        CheckError: the merged model differs from the unmerged one by more than 1e-3 of the adapter's
            effect in fp32, or by more than 10% of it after rounding to `dtype`; or weights that were pruned
            would be dense again.
    """
    if not isinstance(model, PeftModel):
        return model
    require_mergeable(model)
    title = _title(tuning_of(model))
    model = _on_plain_base(model)
    own = _to_float32(model)
    adapted = probe_logits(model)
    base = _base_logits(model)
    pruned = _pruned(model.get_base_model())

    shared = _split_shared(model)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise CheckError(f"The adapter cannot be merged: {error}.") from error
    _join_equal(merged, shared)
    _prove(probe_logits(merged), adapted, base, title)
    _prove_sparse(merged, pruned)
    return _finish(merged, own, dtype, adapted, base, title)


def combine(
    model: PeftModel,
    weights: dict[str, float],
    dtype: torch.dtype | None = None,
    *,
    how: str = "linear",
    density: float = 0.5,
    seed: int = 0,
) -> nn.Module:
    """The base plus what several adapters change, D_i = W_i - W, put together in one of four ways.

        linear       sum_i w_i D_i
        ties         of each D_i its largest values; in each place the mean of those that have the sign of the
                     sum (Yadav et al., 2023, "TIES-Merging", arXiv 2306.01708)
        dare_linear  linear, after random values of each D_i are dropped and the rest grown to the same mean
                     (Yu et al., 2024, "Language Models are Super Mario", arXiv 2311.03099)
        dare_ties    ties, on what is left after such dropping

    Taking the changes, not the factors, keeps the identity that {name: 1.0} is the adapter itself; PEFT's
    `add_weighted_adapter` breaks it for rsLoRA, biases and DoRA. The model given is used up.

    Args:
        weights: adapter's name to its weight w_i.
        dtype: of the result; default: the base's own.
        density: share of the values that ties and DARE keep, above 0 and at most 1.
        seed: of what DARE drops.

    Raises:
        MethodError: an unknown adapter or way, a density out of range, a quantised base, or adapters that
            also replace whole modules.
        CheckError: an adapter's change is not what the adapter does, or rounding loses the sum.
    """
    _require_combinable(model, weights, how, density)
    own = _to_float32(model)
    base = _base_logits(model)
    pruned = _pruned(model.get_base_model())
    shared = _split_shared(model)
    layers = [m for m in model.get_base_model().modules() if isinstance(m, BaseTunerLayer)]
    start = {p: p.detach().clone() for layer in layers for p in layer.get_base_layer().parameters()}
    changes: dict[nn.Parameter, list[torch.Tensor]] = {p: [] for p in start}
    for name in weights:
        model.set_adapter(name)
        adapted = probe_logits(model)
        for layer in layers:
            layer.merge(safe_merge=True, adapter_names=[name])
        _prove(probe_logits(model), adapted, base, name)
        for p, original in start.items():
            changes[p].append(p.detach() - original)
            p.data = original.clone()  # not unmerge: it would add its own rounding
        for layer in layers:
            layer.merged_adapters.clear()
    shares = torch.tensor(list(weights.values()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for p, several in changes.items():
            p.data += _together(several, shares.to(p.device), how, density)
    merged = model.unload()
    _join_equal(merged, shared)
    _prove_sparse(merged, pruned)
    return _finish(merged, own, dtype, probe_logits(merged), base, " + ".join(weights))


def _require_combinable(model: PeftModel, weights: dict[str, float], how: str, density: float) -> None:
    if how not in WAYS:
        raise MethodError(f"Adapters cannot be combined by '{how}'.", fix=did_you_mean(how, WAYS))
    if not 0 < density <= 1:
        raise MethodError(f"density: {density} is no share of the values.", fix="Write 0.5, say.")
    for name in weights:
        if name not in model.peft_config:
            raise MethodError(f"There is no adapter '{name}'.", fix=did_you_mean(name, model.peft_config))
        if model.peft_config[name].modules_to_save:
            raise MethodError(
                f"Adapter '{name}' replaces whole modules: {model.peft_config[name].modules_to_save}.",
                fix="Merge it alone.",
            )
    require_mergeable(model)
    if quantized_layers(model):
        raise MethodError(
            "The base is quantised: a sum of changes has no place in its codes.", fix="Merge one adapter."
        )


def _together(changes: list[torch.Tensor], weights: torch.Tensor, how: str, density: float) -> torch.Tensor:
    """The changes of one weight, each (out, in), put together; PEFT's functions."""
    if how == "linear":
        return task_arithmetic(changes, weights)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The density 1")  # it is asked for
        return WAYS[how](changes, weights, density)


def _title(config: PeftConfig) -> str:
    """The method's name: that of its file, or PEFT's for a config of PEFT's, as a loaded adapter has."""
    module = type(config).__module__
    return str(config.peft_type.value).lower() if module.startswith("peft.") else module.rpartition(".")[2]


def _to_float32(model: PeftModel) -> dict[str, torch.dtype]:
    """Compute in fp32 from now on; returns the precision of each base parameter before.

    Not model.float(): buffers such as RoPE's have a precision of their own.
    """
    own = {n.replace(".base_layer.", "."): p.dtype for n, p in model.get_base_model().named_parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    for name, layer in quantized_layers(model.get_base_model()).items():
        own[_scale(name)], layer.dtype = layer.dtype, torch.float32
    return own


def _scale(name: str) -> str:
    """What stands for the scales of a quantised layer among the names of parameters."""
    return f"{name.removesuffix('.base_layer')}.scale"


def _base_logits(model: PeftModel) -> torch.Tensor:
    with model.disable_adapter():
        return probe_logits(model)


def _finish(
    merged: nn.Module,
    own: dict[str, torch.dtype],
    dtype: torch.dtype | None,
    adapted: torch.Tensor,
    base: torch.Tensor,
    title: str,
) -> nn.Module:
    """Round to the final precision, once, and prove that the adapter survives it."""
    merged.requires_grad_(True)  # an ordinary model, whatever the adapter had frozen
    merged.luthier_tuning = None
    common = next(iter(own.values()))
    # Weights that the architecture keeps in another precision than the rest stay in it.
    final = {
        n: dtype or common if own.get(n, common) == common else own[n] for n, _ in merged.named_parameters()
    }
    if set(final.values()) != {torch.float32}:
        # Rounded, but still computed with in fp32: the probe sees the rounding alone.
        for n, parameter in merged.named_parameters():
            parameter.data = parameter.data.to(final[n]).float()
        _round_scales(merged, own, dtype, computed=torch.float32)
        _prove(probe_logits(merged), adapted, base, title, dtype or common)
        for n, parameter in merged.named_parameters():
            parameter.data = parameter.data.to(final[n])
    _round_scales(merged, own, dtype)
    return merged


def _round_scales(
    model: nn.Module,
    own: dict[str, torch.dtype],
    dtype: torch.dtype | None,
    computed: torch.dtype | None = None,
) -> None:
    """Put the scales of quantised layers into their model's precision; weights are made in `computed`."""
    for name, layer in quantized_layers(model).items():
        final = dtype or own[_scale(name)]
        layer.scale, layer.dtype = layer.scale.to(final), computed or final


def require_mergeable(model: PeftModel) -> None:
    """Raise MethodError, with the reason, where the adapter is no change of the weights at hand."""
    if is_prompt(model.peft_config[model.active_adapter]):
        raise MethodError("A prompt is no change of weights; it cannot be merged.", fix="Export the adapter.")
    # A base in 4 bits is made plain first.
    if getattr(model.get_base_model(), "is_quantized", False) and quantized.of(model) is None:
        raise MethodError(
            "The base is quantised: merging would round most of the adapter away.",
            fix="Load the base in its original precision with the adapter, and merge there.",
        )
    if isinstance(model.base_model, DeltaTuner):
        model.base_model.require_mergeable()


def _on_plain_base(model: PeftModel) -> PeftModel:
    """The active adapter on the base with plain weights, where it is held in 4 bits; else the model itself.

    Raises:
        CheckError: the model then computes something else.
    """
    if quantized.of(model) is None:
        return model
    expected, adapter = _logits_in_float32(model), model.active_adapter
    config = copy.deepcopy(model.peft_config[adapter])
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    base = model.unload()
    products = {name: layer.weight.quant_state.dtype for name, layer in quantized.layers(base).items()}
    plain = quantized.dequantize(base, torch.float32)
    weights = [(plain.get_submodule(name).weight, dtype) for name, dtype in products.items()]
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = any(isinstance(m, Conv1D) for m in plain.modules())
    with no_peft_warnings():
        found = get_peft_model(plain, config, adapter_name=adapter)
    set_peft_model_state_dict(found, state, adapter_name=adapter)
    error = distance(_logits_in_float32(found), expected)
    checks.record(
        "merge",
        "dequantised = in 4 bits",
        error <= NOISE,
        error,
        NOISE,
        "logits on a probe, relative to those of the model that was trained",
        fix="Keep the adapter separate (export: {format: adapter}).",
    )
    for weight, dtype in weights:
        weight.data = weight.data.to(dtype)  # as the products used it
    return found


def _logits_in_float32(model: PeftModel) -> torch.Tensor:
    """The logits on the probe, nothing rounded but weights in 4 bits to these; the model stays as it was."""
    own = {p: p.dtype for p in model.parameters() if p.is_floating_point()}
    layers = quantized.layers(model).values()
    computed = [(layer.compute_dtype, layer.compute_type_is_set) for layer in layers]
    try:
        for p in own:
            p.data = p.data.float()
        for layer in layers:
            layer.compute_dtype, layer.compute_type_is_set = torch.float32, True
        return probe_logits(model)
    finally:
        for p, dtype in own.items():
            p.data = p.data.to(dtype)
        for layer, (dtype, known) in zip(layers, computed, strict=True):
            layer.compute_dtype, layer.compute_type_is_set = dtype, known


def _split_shared(model: PeftModel) -> list[list[str]]:
    """Give each adapted layer a weight of its own. Returns the names of the modules that shared one."""
    base = model.get_base_model()
    holders: dict[int, list[str]] = {}
    for name, module in base.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            holders.setdefault(id(weight), []).append(name)
    adapted = {id(module.get_base_layer()) for module in base.modules() if isinstance(module, BaseTunerLayer)}
    shared = []
    for names in holders.values():
        modules = [base.get_submodule(name) for name in names]
        if len(modules) > 1 and any(id(module) in adapted for module in modules):
            for module in modules[1:]:
                module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
            shared.append([name.removesuffix(".base_layer") for name in names])
    return shared


def _join_equal(model: nn.Module, shared: list[list[str]]) -> None:
    """Tie again what stayed equal; untie the rest in the config too.

    Raises:
        MethodError: the architecture cannot be saved untied.
    """
    for names in shared:
        first, *others = (model.get_submodule(name) for name in names)
        if all(torch.allclose(first.weight, other.weight, rtol=1e-5, atol=1e-7) for other in others):
            for other in others:
                other.weight = first.weight
            model.config.tie_word_embeddings = True
        else:
            require_untieable(model)
            model.config.tie_word_embeddings = False
            model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _pruned(model: nn.Module) -> dict[str, float]:
    """Share of exact zeros of each matrix that has many, by the name that it has without adapters."""
    shares = {n.replace(".base_layer.", "."): _zeros(p) for n, p in model.named_parameters() if p.dim() == 2}
    return {name: share for name, share in shares.items() if share >= SPARSE}


def _zeros(weight: torch.Tensor) -> float:
    return 1 - torch.count_nonzero(weight).item() / weight.numel()


def _prove_sparse(merged: nn.Module, pruned: dict[str, float]) -> None:
    """Hold the zeros of pruned weights against what they were; nothing is said where none was pruned."""
    now = {name: _zeros(p) for name, p in merged.named_parameters() if name in pruned}
    if not now:
        return
    lost = [name for name, share in now.items() if share < pruned[name] - 1e-6]
    checks.record(
        "merge",
        "sparsity kept",
        not lost,
        min(now.values()),
        min(pruned[name] for name in now),
        f"lowest share of zeros of {len(now)} pruned weights" + (f"; lost in {lost[0]}" if lost else ""),
        fix="Keep the adapter separate (export: {format: adapter}), or adapt layers that are not pruned.",
    )


def _prove(
    merged: torch.Tensor,
    adapted: torch.Tensor,
    base: torch.Tensor,
    title: str,
    rounded: torch.dtype | None = None,
) -> None:
    """Hold the logits of the merged model, perhaps rounded already, against those of the unmerged one."""
    tolerance = EXACT if rounded is None else ROUNDED
    least = NOISE / tolerance
    effect = adapted - base if distance(adapted, base) > least else least * base
    error = distance(merged, adapted, effect)
    fix = "Keep the adapter separate (export: {format: adapter}, or luthier.save instead of merge)"
    if rounded is not None:
        fix += ", or merge into float32 (export: {dtype: float32}, or merge(model, dtype=torch.float32))"
    checks.record(
        "merge",
        f"merged = unmerged ({title}, {str(rounded or torch.float32).removeprefix('torch.')})",
        error <= tolerance,
        error,
        tolerance,
        "error on a probe relative to the adapter's effect",
        fix=f"{fix}.",
    )
