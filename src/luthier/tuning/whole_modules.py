"""Modules that learn whole beside an adapter (`modules_to_save`, the head of a new classifier), in float32.

PEFT leaves them in the precision of the base. In bfloat16, whose neighbouring numbers lie 2^-8 of a weight
apart, AdamW's step of 1e-4 on a weight of 0.1 is rounded away: the head hardly learns. Here their weights are
float32 and their products bfloat16, as under `torch.autocast`; what they return has the precision of the
base, so that nothing after them is touched. Saved files hold float32; loaded for use, by PEFT alone too, the
weights are rounded to the base's precision, with which they were multiplied in training.
"""

from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.utils._pytree import tree_map

HALF = (torch.float16, torch.bfloat16)


def learn_in_float32(model: nn.Module) -> None:
    """Hold the modules that learn whole in float32, those of adapters added later too."""
    for module in model.modules():
        if type(module) is ModulesToSaveWrapper and _precision(module.original_module) in HALF:
            module.__class__ = WholeModule
            module.modules_to_save.float()


def _precision(module: nn.Module) -> torch.dtype | None:
    """Of the module's weights, where all have one."""
    found = {p.dtype for p in module.parameters() if p.is_floating_point()}
    return found.pop() if len(found) == 1 else None


class WholeModule(ModulesToSaveWrapper):
    """PEFT's wrapper around a half-precision module, its learning copies in float32."""

    def update(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().update(adapter_name, *args, **kwargs)
        self.modules_to_save[adapter_name].float()

    def _forward_wrapped(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active_adapters:
            return super()._forward_wrapped(*args, **kwargs)
        precision = _precision(self.original_module)
        weight = next(self.original_module.parameters())
        with torch.autocast(weight.device.type, precision, enabled=precision in HALF):
            found = super()._forward_wrapped(*args, **kwargs)

        def back(value: Any) -> Any:
            narrow = isinstance(value, torch.Tensor) and value.dtype == torch.float32
            return value.to(precision) if narrow else value

        return tree_map(back, found)

    def unload_and_optionally_merge_module(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The copy as a part of the base, in its precision."""
        found = super().unload_and_optionally_merge_module(*args, **kwargs)
        return found.to(_precision(self.original_module))
