"""Any adapter that changes weights, as a LoRA: for servers that load nothing else, and for another rank.

Source: Eckart & Young, 1936, "The approximation of one matrix by another of lower rank": of all matrices of
rank k the truncated singular value decomposition is nearest to a change D (out, in),

    D = U S V^T,    B = U_k sqrt(S_k) (out, k),    A = sqrt(S_k) V_k^T (k, in)
    |D - B A|^2 = sum_{i > k} S_i^2

The change is what merging adds to the weight, so it is right for DoRA too, whose factors alone are not it.
"""

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier import checks
from luthier.compression.linear import QuantizedLinear
from luthier.errors import MethodError
from luthier.models.quantized import is_4bit
from luthier.terminal import track
from luthier.tuning.lora_factors import FactorVariant, unit_config
from luthier.tuning.merge import require_mergeable
from luthier.tuning.probe import distance, probe_logits
from luthier.tuning.tuner import DeltaLayer

log = logging.getLogger("luthier.tuning")


@dataclass(frozen=True)
class Factors:
    """Of one layer: A (k, in), B (out, k), and the share of the change's squared norm that they leave out."""

    a: Tensor
    b: Tensor
    lost: float


def to_lora(model: PeftModel, rank: int | float) -> PeftModel:
    """The base with an ordinary LoRA in the place of the active adapter. The model given is used up.

    What is lost is recorded: on a probe, relative to what the adapter does there.

    Args:
        rank: of every layer; or as a number between 0 and 1 the share of each change's squared norm to keep,
            with the least rank that does.

    Raises:
        MethodError: a rank out of range, or an adapter that is no change of linear layers.
    """
    if not (rank >= 1 and rank == int(rank)) and not 0 < rank < 1:
        raise MethodError(
            f"rank: {rank} is neither a whole number from 1 nor a share between 0 and 1.",
            fix="Write rank: 16, say, or rank: 0.99 to keep 99% of every change.",
        )
    require_mergeable(model)
    adapter = model.active_adapter
    if getattr(model.peft_config[adapter], "bias", "none") != "none":
        raise MethodError(
            "The adapter trains biases of the base, which a LoRA does not hold.",
            fix="Merge it into the model instead (export: {format: safetensors}).",
        )
    adapted = probe_logits(model)
    with model.disable_adapter():
        base = probe_logits(model)
    found = {
        name: factorise(change(layer, adapter, name), rank)
        for name, layer in track(list(_layers(model, adapter)), "layers")
    }
    ranks = {name: len(factors.a) for name, factors in found.items()}
    transposed = isinstance(model.get_base_model().get_submodule(min(ranks)).get_base_layer(), Conv1D)
    config = unit_config(ranks, model.peft_config[adapter], fan_in_fan_out=transposed)
    plain = model.unload()
    dtypes = {parameter: parameter.dtype for parameter in plain.parameters()}
    converted = get_peft_model(plain, config, adapter_name=adapter)
    for parameter, dtype in dtypes.items():
        parameter.data = parameter.data.to(dtype)
    _fill(converted, found, adapter)
    effect = adapted - base
    error = distance(probe_logits(converted), adapted, effect)
    lost = max(factors.lost for factors in found.values())
    checks.record(
        "export",
        "as a LoRA",
        math.isfinite(error),
        error,
        detail="error on a probe relative to the adapter's effect; rank "
        f"{min(ranks.values())} to {max(ranks.values())}, {lost:.2%} of a change's squared norm lost at most",
    )
    return converted


@torch.no_grad()
def change(layer: BaseTunerLayer, adapter: str, name: str = "the layer") -> Tensor:
    """What merging `adapter` adds to the weight of a layer: (out, in), in fp32.

    Raises:
        MethodError: the layer is not linear.
    """
    base = layer.get_base_layer()
    if is_4bit(base) or isinstance(base, QuantizedLinear):
        return _change_of_codes(layer, adapter, name)
    if not isinstance(base, nn.Linear | Conv1D):
        raise MethodError(
            f"The adapter changes '{name}', a {type(base).__name__}; a LoRA is made of linear layers only.",
            fix="Merge it into the model instead (export: {format: safetensors}).",
        )
    weight, bias = base.weight.data, None if base.bias is None else base.bias.data.clone()
    base.weight.data = weight.float()
    try:
        layer.merge(safe_merge=True, adapter_names=[adapter])
        added = base.weight.data - weight.float()
        same = bias is None or torch.equal(bias, base.bias.data)
    finally:
        base.weight.data = weight  # not unmerge: it would add its own rounding
        if bias is not None:
            base.bias.data = bias
        layer.merged_adapters.clear()
    if not same:
        raise MethodError(
            f"The adapter changes the bias of '{name}', which a LoRA does not hold.",
            fix="Merge it into the model instead (export: {format: safetensors}).",
        )
    return added.T if isinstance(base, Conv1D) else added


def _change_of_codes(layer: Any, adapter: str, name: str) -> Tensor:
    """`change` on a weight that cannot be merged into: the change by its own formula."""
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    of_weight = variant is not None and not isinstance(variant, FactorVariant)
    biased = isinstance(layer, DeltaLayer) and layer.deltas[adapter].bias() is not None
    if of_weight or biased:
        raise MethodError(
            f"The change of '{name}' depends on its weight or adds to its bias: no LoRA on codes.",
            fix="Merge it into the model instead (export: {format: safetensors}).",
        )
    delta: Tensor = layer.get_delta_weight(adapter)
    return delta.float()


def factorise(matrix: Tensor, rank: int | float) -> Factors:
    """The nearest product of two factors of a rank, or that keeps a share of the squared norm."""
    left, values, right = torch.linalg.svd(matrix.float(), full_matrices=False)
    energy = values.square().cumsum(0)  # (min(out, in),)
    if rank < 1:
        rank = int((energy < rank * energy[-1]).sum()) + 1
    rank = min(int(rank), len(values))
    root = values[:rank].sqrt()
    lost = 1 - float(energy[rank - 1] / energy[-1]) if energy[-1] > 0 else 0.0
    return Factors(root[:, None] * right[:rank], left[:, :rank] * root, max(lost, 0.0))


def _layers(model: PeftModel, adapter: str) -> list[tuple[str, BaseTunerLayer]]:
    """The layers that carry the adapter, by their name in the base model."""
    base = model.get_base_model()
    return [
        (name, module)
        for name, module in base.named_modules()
        if isinstance(module, BaseTunerLayer)
        and any(adapter in getattr(module, store) for store in module.adapter_layer_names)
    ]


@torch.no_grad()
def _fill(model: PeftModel, found: dict[str, Factors], adapter: str) -> None:
    base = model.get_base_model()
    for name, factors in found.items():
        layer = base.get_submodule(name)
        assert isinstance(layer, LoraLayer)
        layer.lora_A[adapter].weight.copy_(factors.a)
        layer.lora_B[adapter].weight.copy_(factors.b)
