"""What a training step holds in memory, found by running it without numbers.

The model is built from its config on the meta device, the method is put on it, and one forward and backward
pass runs on fake tensors, which have shapes and no data. Every tensor that torch makes is counted while it
lives, and every matrix product: the figures follow from the operations that really run, for any architecture,
method, dtype, autocast and activation checkpointing. It takes seconds, and no memory to speak of.
"""

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import luthier.models.per_layer  # noqa: F401  (AutoConfig knows its model type by it)
from luthier import checks
from luthier.acceleration import fused_lora, fused_mlp, fused_norm
from luthier.acceleration.losses import BLOCK, CACHE_ROWS
from luthier.compression.calibration import choose_layers
from luthier.compression.linear import quantized_layers
from luthier.models import structure
from luthier.models.placement import Placement
from luthier.tuning.attach import adapt

CLASSES: dict[str, Any] = {
    "causal": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "classification": AutoModelForSequenceClassification,
    "masked": AutoModelForMaskedLM,
}


@dataclass(frozen=True)
class Step:
    """Bytes of one training step beside weights and optimizer state.

    Attributes:
        kept: what the forward pass leaves for the backward pass.
        peak: the most that is held at once, gradients made so far included.
        gradients: all gradients of the weights that learn.
        logits: a block of logits and what the head's gradient needs; nothing where `kept` has the whole loss.
        operations: floating-point operations of the step's matrix products and attention.
        written: bytes of all tensors that are made in the step, kept or not.
    """

    kept: int
    peak: int
    gradients: int
    logits: int
    operations: float
    written: int


def skeleton(
    config: dict[str, Any], task: str, placement: Placement, num_labels: int | None
) -> PreTrainedModel:
    """The model without weights, on the meta device."""
    fields = {key: value for key, value in config.items() if key != "model_type"}
    if task == "classification":
        fields["num_labels"] = num_labels or 2
    loaded = AutoConfig.for_model(config["model_type"], **fields)
    with torch.device("meta"):
        model = CLASSES[task].from_config(loaded, dtype=placement.dtype, attn_implementation=placement.attn)
    model.tie_weights()
    return model


def attach(model: PreTrainedModel, method: Any) -> nn.Module:
    """The skeleton with a tuning method on it: what learns is exactly what learns in training.

    Raises:
        MethodError: a pattern matches nothing, or the method cannot be put on this model.
    """
    method = copy.deepcopy(method)
    if not isinstance(method, PeftConfig):
        return method.apply(model)
    if hasattr(method, "init_lora_weights"):
        method.init_lora_weights = False  # some initialisations factorise the weights, which are not there
    with checks.collect():
        return adapt(model, method)


def sizes(model: nn.Module) -> tuple[int, int, int]:
    """Bytes of the base's weights (with the codes of quantised layers), of what the method adds, and of what
    learns."""
    base = added = learns = 0
    adapter = structure.base(model) is not model
    for parameter in model.parameters():
        size = parameter.numel() * parameter.element_size()
        learns += size if parameter.requires_grad else 0
        if adapter and parameter.requires_grad:
            added += size
        else:
            base += size
    base += sum(b.nbytes for layer in quantized_layers(model).values() for b in layer.buffers())
    return base, added, learns


def compressed_away(model: nn.Module, methods: Sequence[Any]) -> int:
    """Bytes that a saved model has less than the plain one.

    A weight on a grid keeps its bits and its part of a scale; a layer that loses units is counted by the
    share that stays; zeros are saved as they are.

    Raises:
        MethodError: `targets` or `exclude` name no layer.
    """
    layers = structure.linears(model)
    own = [choose_layers(model, getattr(m, "targets", []), getattr(m, "exclude", [])) for m in methods]
    total = 0.0
    for name in set().union(*own):
        weight: Any = layers[name].weight
        count, bits = float(weight.numel()), 8.0 * weight.element_size()
        for method in (m for m, names in zip(methods, own, strict=True) if name in names):
            count *= 1 - getattr(method, "ratio", 0)
            if (width := getattr(method, "bits", None)) is not None:
                bits = width + 16 / (getattr(method, "group_size", None) or weight.shape[-1])
            elif getattr(method, "quantizes", False):
                bits = 8
        total += weight.nbytes - count * bits / 8
    return round(total)


def simulate(
    model: nn.Module,
    rows: int,
    length: int,
    placement: Placement,
    *,
    labelled: int,
    checkpointing: bool = False,
) -> Step:
    """Run one step of `rows` x `length` tokens, of which `labelled` enter the loss, on fake tensors.

    `model` cannot be used for anything else afterwards.
    """
    _, _, gradients = sizes(model)
    inner = structure.base(model)
    if checkpointing:
        inner.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        inner.enable_input_require_grads()
    causal = inner.base_model is not inner and inner.get_output_embeddings() is not None
    with fused_lora.fused(model), fused_mlp.fused(model), fused_norm.fused(model), FakeTensorMode():
        _make_fake(model)
        model.train()
        with FlopCounterMode(display=False) as counter, _Ledger() as ledger:
            for tensor in [*model.parameters(), *model.buffers()]:
                ledger.hold(tensor)
            at_rest = ledger.now
            ids = torch.zeros(rows, length, dtype=torch.long)
            with torch.autocast(ids.device.type, placement.autocast, enabled=placement.autocast is not None):
                if causal:
                    out = inner.base_model(input_ids=ids, use_cache=False).last_hidden_state
                else:
                    out = inner(input_ids=ids, labels=_labels(inner, ids)).loss
            kept = ledger.now - at_rest
            if out.requires_grad:  # with a head alone there is nothing below it
                out.backward(torch.ones_like(out))
            peak = ledger.peak - at_rest
            written = ledger.made - at_rest
    operations = counter.get_total_flops()
    if not causal:
        return Step(kept, peak, gradients, 0, operations, written)
    head = inner.get_output_embeddings().weight  # (vocab, hidden)
    # Logits, the gradient of the rows, and the head's own where it learns.
    operations += 2 * labelled * head.numel() * (3 if head.requires_grad else 2)
    written += labelled * head.shape[0] * 4
    return Step(kept, peak, gradients, _logits_bytes(head, labelled, placement), operations, written)


def _labels(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return ids if model.config.is_encoder_decoder else ids[:, 0]


def _logits_bytes(weight: Tensor, labelled: int, placement: Placement) -> int:
    """Of `luthier.acceleration.losses`: one block of logits, the gradient of the rows, that of the head."""
    vocab, hidden = weight.shape
    products = placement.autocast or placement.dtype
    size = products.itemsize
    found = min(BLOCK, labelled) * vocab * size + 2 * CACHE_ROWS * vocab * 4 + 2 * labelled * hidden * size
    if weight.requires_grad:
        found += 2 * weight.numel() * 4  # the sum over blocks, and one block's share
    if products != weight.dtype:
        found += weight.numel() * size
    return found


def _make_fake(model: nn.Module) -> None:
    """Put a fake CPU tensor in the place of each meta tensor; tied ones stay tied."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # the original is kept alive, or its id would be used again
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = (tensor, fake)
                store[name] = made[id(tensor)][1]


class _Ledger(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.made = 0
        self._live: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.hold(tensor)
        return out

    def hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._live:
            self._live.add(key)
            self.now += size
            self.made += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.now -= size
