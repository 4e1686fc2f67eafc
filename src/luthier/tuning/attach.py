"""Make a model trainable by a tuning method, and prove before the first step that it is what was asked for.

A PEFT config goes through `peft.get_peft_model`; a partial method chooses among the model's own weights
(`config.apply(model)`). Either way the same is proven: every target pattern matches, exactly the declared
weights learn, and the model still computes what it did.
"""

import copy
import logging
import re
from collections import Counter
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from luthier import checks
from luthier.errors import LuthierError, MethodError, did_you_mean
from luthier.models.quantized import held
from luthier.models.structure import blocks, linears, match_targets
from luthier.terminal import no_peft_warnings
from luthier.tuning.probe import distance, probe_logits
from luthier.tuning.whole_modules import learn_in_float32

log = logging.getLogger("luthier.tuning")

# Initialisations that split the base weight (PiSSA, OLoRA) round once; all others are exact.
IDENTITY = {torch.float32: 1e-5, torch.float64: 1e-9}
IDENTITY_HALF = 0.05


def attach(model: nn.Module, config: Any) -> nn.Module:
    """The model with the tuning method on it; nothing but the method's weights learns afterwards.

    Args:
        model: a transformers model without an adapter.
        config: a `PeftConfig`, or the config of a partial method. It is copied: PEFT writes into the one it
            gets, and the caller's may serve several models.

    Returns:
        A `PeftModel` around `model`, or `model` itself for a partial method.

    Raises:
        MethodError: a pattern matches nothing, or the method cannot be put on this model.
        CheckError: the proof before step 1 failed.
    """
    if isinstance(model, PeftModel):
        raise MethodError(
            f"The model already carries an adapter ({type(tuning_of(model)).__name__}).",
            fix="Merge it first (luthier.tuning.merge.merge), or start from the base model.",
        )
    if hasattr(config, "search"):
        raise MethodError(
            f"{type(config).__module__.rpartition('.')[2]} trains no weights: there is nothing to attach.",
            fix="Call config.search(model, tokenizer, data), or name it in a recipe's tune stage.",
        )
    config = copy.deepcopy(config)
    before = probe_logits(model)
    if isinstance(config, PeftConfig):
        model = adapt(model, config)
        exact = not is_prompt(config) and getattr(config, "starts_as_base", True)
    elif hasattr(config, "apply"):
        if getattr(model, "is_quantized", False):
            raise MethodError(
                "The weights of a quantised model cannot learn.",
                fix="Choose a method that adds some of its own, such as qlora.",
            )
        model = config.apply(model)
        model.luthier_tuning = config
        exact = True
    else:
        raise MethodError(
            f"{type(config).__name__} is not the config of a tuning method.",
            fix="Make one with luthier.method('lora')(r=8), or give a PEFT config.",
        )
    if hasattr(config, "attached"):
        config.attached(model)
    _prove_trainable(model, config)
    if exact:
        _prove_identity(model, before)
    log.info("trainable weights:\n%s", "\n".join(f"{r[1]:>14,} of {r[2]:>14,}  {r[0]}" for r in table(model)))
    return model


def tuning_of(model: nn.Module) -> Any:
    """The config of the tuning method that the model carries, or None."""
    if isinstance(model, PeftModel):
        return model.peft_config[model.active_adapter]
    return getattr(model, "luthier_tuning", None)


def is_prompt(config: PeftConfig) -> bool:
    """Whether the method learns a prompt: no change of weights, and no identity at the start."""
    return config.is_prompt_learning or getattr(config, "is_soft_prompt", False)


def trainable(model: nn.Module) -> tuple[int, int]:
    """Number of parameters that learn, and of all weights, in codes too; tied ones count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad), sum(held(model).values())


def table(model: nn.Module) -> list[tuple[str, int, int]]:
    """Rows (name, trainable, total) of the parameters that learn, blocks joined as `layers.*`."""
    rows: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        row = rows.setdefault(re.sub(r"\.\d+\.", ".*.", name), [0, 0])
        row[0] += parameter.numel() * parameter.requires_grad
        row[1] += parameter.numel()
    return [(name, learns, total) for name, (learns, total) in rows.items() if learns]


def adapt(model: nn.Module, config: PeftConfig) -> PeftModel:
    """`attach` for a PEFT config without the proofs that need numbers: also for a model on the meta device.

    Raises:
        MethodError: a pattern matches nothing, or the method cannot be put on this model.
    """
    _check_options(model, config)
    total = sum(held(model).values())
    if config.task_type is None:
        config.task_type = task_type(model)
    patterns = _check_patterns(model, config)
    # Every tuner decides here how GPT-2's transposed weights are stored; PEFT would warn and do the same.
    if getattr(config, "fan_in_fan_out", None) is False:
        names = {name for matched in patterns.values() for name in matched}
        config.fan_in_fan_out = bool(names) and all(
            isinstance(model.get_submodule(name), Conv1D) for name in names
        )
    try:
        with no_peft_warnings():
            adapted = get_peft_model(model, config)
    except LuthierError:
        raise
    except ValueError as error:
        raise MethodError(f"PEFT cannot put {type(config).__name__} on this model: {error}.") from error
    learn_in_float32(adapted)
    if not is_prompt(config):
        _report_coverage(adapted, config, patterns, total)
    return adapted


def task_type(model: nn.Module) -> TaskType | None:
    """What PEFT must know of the model: a classifier's new head is trained and saved with the adapter."""
    name = type(model).__name__
    if name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return TaskType.CAUSAL_LM
    if name in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values():
        return TaskType.SEQ_2_SEQ_LM
    if name in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        return TaskType.SEQ_CLS
    return None


def _check_options(model: nn.Module, config: PeftConfig) -> None:
    """Let the method refuse a model in its own words."""
    check = getattr(config, "check_model", None)
    if check:
        check(model)


def _check_patterns(model: nn.Module, config: PeftConfig) -> dict[str, list[str]]:
    """Names of the modules that each pattern of `target_modules` matches, read as PEFT reads it.

    A name in a list matches the modules that end in it; a string is 'all-linear' or a regular expression.
    """
    wanted = getattr(config, "target_modules", None)
    if not wanted:
        return {}
    _check_target_parameters(model, config)
    if isinstance(wanted, str):
        if wanted.lower() == "all-linear":
            return {"all-linear": list(linears(model))}
        names = [name for name, _ in model.named_modules()]
        try:
            matched = [name for name in names if re.fullmatch(wanted, name)]
        except re.error as error:
            raise MethodError(f"target_modules '{wanted}' is not a regular expression: {error}.") from error
        if not matched:
            raise MethodError(
                f"target_modules '{wanted}' matches no module of {type(model).__name__}. A string is a "
                "regular expression over whole names.",
                fix=did_you_mean(wanted, {name.rsplit(".", 1)[-1] for name in linears(model)}),
            )
        return {wanted: matched}
    try:
        return match_targets(model, sorted(wanted))
    except MethodError as error:
        stacked = expert_parameters(model)
        inside = sorted(n for n in stacked if any(w.split(".")[-1] in n for w in wanted))
        if not inside:
            raise
        raise MethodError(
            f"{error.message} The experts of {type(model).__name__} are stacked parameters, not modules: "
            "they would stay frozen.",
            fix="Reach them with target_parameters: ["
            + ", ".join(sorted({".".join(n.split(".")[-2:]) for n in inside}))
            + "], or write target_modules: all-linear.",
        ) from error


def _check_target_parameters(model: nn.Module, config: PeftConfig) -> None:
    names = [name for name, _ in model.named_parameters()]
    for wanted in getattr(config, "target_parameters", None) or []:
        if not any(name == wanted or name.endswith("." + wanted) for name in names):
            ends = {".".join(name.split(".")[-2:]) for name in names}
            raise MethodError(
                f"target_parameters '{wanted}' names no parameter of {type(model).__name__}.",
                fix=did_you_mean(wanted, ends),
            )


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The stacked weights of mixture-of-experts layers: (experts, out, in), held by no linear module."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and "expert" in name
    }


def _report_coverage(
    model: PeftModel, config: PeftConfig, patterns: dict[str, list[str]], total: int
) -> None:
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    counts = Counter(name.rsplit(".", 1)[-1] for name in model.targeted_module_names)
    shown = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    checks.record(
        "before", "target patterns matched", bool(layers), len(patterns) or len(counts), detail=shown
    )
    if getattr(config, "beside_ffn", False):
        # What adapters of hidden states stand at need not have weights: a dropout, say.
        detail = f"in {_blocks_reached(model)} of {len(blocks(model))} blocks"
        checks.record("before", "places adapted", bool(layers), len(layers), "> 0", detail)
        return
    adapted = {key: n for layer in layers for key, n in held(layer.get_base_layer()).items()}
    experts = expert_parameters(model)
    # A wrapper of one stacked parameter holds its neighbours too: count what is named, not what is held.
    reached = {name.rsplit(".", 1)[-1] for name in getattr(model, "targeted_parameter_names", [])}
    frozen = {n: p.numel() for n, p in experts.items() if n.rsplit(".", 1)[-1] not in reached}
    for name in frozen:
        adapted.pop(id(experts[name]), None)
    detail = f"experts stay frozen: {sum(frozen.values()) / total:.0%} of the weights" if frozen else ""
    share = sum(adapted.values()) / total
    checks.record("before", "share of the weights adapted", share > 0, share, "> 0", detail)


def _blocks_reached(model: PeftModel) -> int:
    """In how many blocks a tuner has put something."""
    return sum(any(isinstance(m, BaseTunerLayer) for m in block.modules()) for block in blocks(model))


def _prove_trainable(model: nn.Module, config: Any) -> None:
    """The weights that learn are exactly those that the method declares."""
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    declared = config.trained(model) if hasattr(config, "trained") else _adapter_parameters(model, config)
    wrong = sorted(learns ^ declared)
    count, total = trainable(model)
    checks.record(
        "before",
        "trainable as declared",
        not wrong and bool(learns),
        count,
        detail=f"{count / total:.2%} of {total:,}" + (f"; not as declared: {wrong[:5]}" if wrong else ""),
        fix="Report this as a fault of the method.",
    )


def _adapter_parameters(model: PeftModel, config: PeftConfig) -> set[str]:
    """Names of the parameters that the adapter brings, plus biases where the config trains them."""
    prefix = getattr(model.base_model, "prefix", "prompt_encoder")
    bias = getattr(config, "bias", "none")
    frozen = set(getattr(config, "frozen", lambda _: ())(model))
    return {
        name
        for name, _ in model.named_parameters()
        if (
            f".{prefix}" in name
            or name.startswith(prefix)
            or ".modules_to_save." in name
            or (name.endswith(".bias") and bias == "all")
            or (name.endswith(".base_layer.bias") and bias == "lora_only")
        )
        and name not in frozen
    }


def _prove_identity(model: nn.Module, before: torch.Tensor) -> None:
    found = distance(probe_logits(model), before)
    dtype = next(model.parameters()).dtype
    tolerance = IDENTITY.get(dtype, IDENTITY_HALF)
    checks.record(
        "before",
        "identity at step 0",
        found <= tolerance,
        found,
        tolerance,
        "logits on a probe, relative to the base's",
        fix="Load the model in float32, or choose an initialisation that leaves the output unchanged.",
    )
