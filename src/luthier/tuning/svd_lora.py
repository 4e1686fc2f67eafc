"""PEFT's LoRA in the form of a singular value decomposition, mended: what AdaLoRA's schedule stands on.

    y = W x + b + s P (l * (Q D(x))),    P (out, r), l (r), Q (r, in),    s = alpha / (r + 1e-5)

PEFT calls P, l and Q `lora_B`, `lora_E` (r, 1) and `lora_A`. Its layers compute, merge and switch; here is
what its tuner lacks:

- the state of a schedule lies beside the factors, and so in every checkpoint;
- a training without a schedule is noticed: it goes no further, and is not saved or merged;
- several adapters may learn, one at a time; a loaded one takes labels;
- on a half-precision base the constant r stays one (PEFT casts it to a new parameter, which learns);
- `to_lora` writes an ordinary LoRA.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.adalora.layer import AdaLoraLayer, SVDConv2d
from peft.tuners.lora import LoraModel
from torch import Tensor, nn

from luthier.errors import MethodError
from luthier.tuning.lora_factors import unit_config

FACTORS = ("lora_A", "lora_B", "lora_E")
# Of a schedule, by adapter: numbers for each entry of the factors (2, r, in + out + 1), in rows [Q, P^T, l],
# and which of the r triplets are kept (r).
STATE = ("lora_scores", "lora_kept")


class SvdTuner(AdaLoraModel):
    """A subclass runs a schedule, between `begin` and `end`.

    Attributes:
        scheduled: it runs.
    """

    def __init__(self, model: nn.Module, config: Any, adapter_name: str, **options: Any):
        LoraModel.__init__(self, model, config, adapter_name, **options)  # without PEFT's allocator
        self.end()

    def begin(self) -> None:
        self.scheduled = True

    def end(self) -> None:
        self.scheduled = False
        self._seen: Tensor | None = None  # all l in the first forward without a schedule

    def _check_new_adapter_config(self, config: Any) -> None:
        LoraModel._check_new_adapter_config(self, config)

    def _create_and_replace(self, lora_config: Any, adapter_name: str, *place: Any, **options: Any) -> None:
        super()._create_and_replace(lora_config, adapter_name, *place, **options)
        layer: Any = self.model.get_submodule(options["current_key"])
        if isinstance(layer, SVDConv2d):
            raise MethodError(
                f"'{options['current_key']}' is a convolution; only linear layers are adapted.",
                fix="Leave it out of target_modules.",
            )
        for name in () if hasattr(layer, STATE[0]) else STATE:
            setattr(layer, name, BufferDict(persistent=True))
            layer.other_param_names = (*layer.other_param_names, name)
        value = layer.lora_E[adapter_name]
        shape = (2, len(value), layer.in_features + layer.out_features + 1)
        layer.lora_scores[adapter_name] = torch.zeros(shape, device=value.device)
        layer.lora_kept[adapter_name] = torch.ones(len(value), device=value.device, dtype=torch.bool)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for _, layer in self.layers(adapter_name):
            layer.ranknum[adapter_name].requires_grad_(False)

    @property
    def adapter(self) -> str:
        """The adapter that learns."""
        return self.active_adapters[0]

    def layers(self, adapter: str) -> Iterator[tuple[str, Any]]:
        """The layers that carry `adapter`, by their name in the base model."""
        for name, module in self.model.named_modules():
            if isinstance(module, AdaLoraLayer) and adapter in module.lora_E:
                yield name, module

    def ranks(self) -> dict[str, int]:
        """Number of triplets that are not zero now, by layer."""
        name = self.adapter
        return {path: int((layer.lora_E[name] != 0).sum()) for path, layer in self.layers(name)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.forward(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # Entered in each forward of a PeftModel; one without a task type calls the base past our `forward`.
        watches = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if watches and not self.scheduled:
            self.require_schedule()
            self._seen = self._values() if self._seen is None else self._seen
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def _values(self) -> Tensor:
        """All l, which every step of an optimiser moves (a fused one leaves no trace in their versions)."""
        return torch.cat(
            [layer.lora_E[self.adapter].detach().cpu() for _, layer in self.layers(self.adapter)]
        )

    def require_schedule(self) -> None:
        """Raise MethodError where weights moved after a forward in training, and no schedule ran."""
        if not self.scheduled and self._seen is not None and not torch.equal(self._values(), self._seen):
            raise MethodError(
                "The adapter learns without its schedule, as a LoRA of one rank. It goes no further, and is "
                "not saved as what it is not.",
                fix="Give the trainer callbacks=luthier.tuning.hooks.callbacks(model), as luthier.trainer "
                "does.",
            )

    @classmethod
    def _get_adapter_state_dict(cls, model: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        tuner = model if isinstance(model, SvdTuner) else model.base_model
        if not isinstance(tuner, SvdTuner):
            raise MethodError(
                f"The adapter was put into the {type(model).__name__} by its add_adapter, where no schedule "
                "reaches it.",
                fix="Put it on with luthier.attach, or with PEFT's get_peft_model.",
            )
        tuner.require_schedule()
        found: dict[str, Tensor] = super()._get_adapter_state_dict(model, *args, **kwargs)
        return found

    def _check_merge_allowed(self) -> None:
        self.require_schedule()
        super()._check_merge_allowed()


def to_lora(model: PeftModel) -> tuple[peft.LoraConfig, dict[str, Tensor]]:
    """The active adapter as an ordinary LoRA of the triplets that are not zero: its config and tensors.

    A = sqrt(s |l|) Q (r_k, in) and B = sign(l) sqrt(s |l|) P (out, r_k) at the scale 1, also for loaders that
    know one rank and alpha only. Layers without a triplet are left out.
    """
    tuner: Any = model.base_model
    name, old = tuner.adapter, model.peft_config[tuner.adapter]
    state = get_peft_model_state_dict(model, adapter_name=name)
    fresh = not any(tuner.ranks().values())  # all are zero, and all are kept
    ranks = {}
    for path, layer in tuner.layers(name):
        key = f"base_model.model.{path}."
        for part in STATE:
            del state[key + part]
        q, p, value = (state.pop(key + part) for part in FACTORS)
        kept = (value[:, 0] != 0) | fresh
        size = (value[kept].abs() * layer.scaling[name] / (layer.ranknum[name] + 1e-5)).sqrt()  # (r_k, 1)
        if len(size):
            ranks[path] = len(size)
            state[key + "lora_A.weight"] = size * q[kept]
            state[key + "lora_B.weight"] = p[:, kept] * (size * value[kept].sign()).T
    config = unit_config(ranks, old, fan_in_fan_out=old.fan_in_fan_out)
    config.bias, config.inference_mode = old.bias, True
    return config, {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
