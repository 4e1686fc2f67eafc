"""A causal language model's loss with logits only where there is a label.

The model runs its trunk; of the head's inputs only the rows whose next token has a label go on to
`luthier.acceleration.losses`. The model's `forward` is replaced for the time of one call, so wrappers around
it (PEFT, DDP, FSDP) see an ordinary call, and generation, saving and copies see the model as it is.

Some architectures scale or cap their logits. What is known is read from the config; whether the result is the
model's own loss is not assumed but tried, once for each model, on a few tokens (`why_not`).
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutput

from luthier.acceleration.losses import IGNORED, linear_cross_entropy, module_cross_entropy
from luthier.acceleration.replaced import stood_in
from luthier.models import structure
from luthier.tuning.probe import evaluating

log = logging.getLogger("luthier.acceleration")

# In half precision the model's own logits are rounded, and ours are not.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
TOLERANCE_HALF = 2e-2
PROBE_TOKENS = 8


def why_not(model: nn.Module) -> str | None:
    """Why the loss cannot be computed from labelled rows alone, or None.

    Runs the model twice on a few tokens: the loss must be the model's own.
    """
    base = structure.base(model)
    # A class whose name transformers does not know the loss of (GPT-2's) gets the causal one.
    loss = LOSS_MAPPING.get(getattr(base, "loss_type", None), ForCausalLMLoss)
    if structure.task(base) != "causal" or loss is not ForCausalLMLoss:
        return f"{type(base).__name__} has a loss of its own"
    if base.get_output_embeddings() is None or base.base_model is base:
        return f"{type(base).__name__} has no head apart from its trunk"
    if getattr(base.config.get_text_config(), "output_router_logits", False):
        return "the router's auxiliary loss needs the model's own forward"
    found, expected = _probe(base)
    error = abs(found - expected) / abs(expected)
    if error > TOLERANCE.get(base.dtype, TOLERANCE_HALF):
        return (
            f"{type(base).__name__} changes its logits in a way that is not known (loss off by {error:.1e})"
        )
    return None


def _probe(base: PreTrainedModel) -> tuple[float, float]:
    """The loss of a few tokens: ours, and from the model's own logits."""
    table = base.get_input_embeddings().weight
    ids = torch.arange(1, PROBE_TOKENS + 1, device=table.device)[None] * 7 % table.shape[0]  # (1, seq)
    with evaluating(base):
        with label_only(base):
            found = base(input_ids=ids, labels=ids).loss
        logits = base(input_ids=ids, use_cache=False).logits.float()
    return found.item(), F.cross_entropy(logits[0, :-1], ids[0, 1:]).item()


@contextmanager
def label_only(model: nn.Module) -> Iterator[None]:
    """Inside, `model(..., labels=..., num_items_in_batch=...)` returns the loss alone, without logits.

    The loss is the sum over the labelled tokens divided by `num_items_in_batch`, or by their number.
    """
    with stood_in(structure.base(model), _forward):
        yield


def _forward(
    self: PreTrainedModel,
    input_ids: Tensor | None = None,
    *,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    **kwargs: Any,
) -> CausalLMOutput:
    # With a cache, packed rows lose their block-diagonal mask; in training nobody needs one.
    outputs = self.base_model(input_ids, **{**kwargs, "use_cache": False})
    hidden = outputs.last_hidden_state  # (batch, seq, hidden)
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).to(hidden.device)  # position i predicts token i + 1
    total = _summed(self, hidden, targets)
    count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return CausalLMOutput(loss=total / torch.as_tensor(count, device=total.device).clamp(min=1))


def _summed(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    head: Any = model.get_output_embeddings()
    scale, softcap = logit_transform(model)
    plain = type(head) is nn.Linear and not (head._forward_hooks or head._forward_pre_hooks)
    if plain and "forward" not in head.__dict__:
        return linear_cross_entropy(
            hidden, head.weight, targets, bias=head.bias, scale=scale, softcap=softcap
        )
    # An adapter on the head, or a quantised one: reading its weight would leave the adapter untrained.
    return module_cross_entropy(head, hidden, targets, scale=scale, softcap=softcap)


def logit_transform(model: PreTrainedModel) -> tuple[float, float | None]:
    """Factor and soft cap of the logits, as the architectures call them in their configs."""
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name)), softcap
    scaling = getattr(config, "logits_scaling", None)
    return (1.0 if scaling is None else 1 / scaling), softcap
