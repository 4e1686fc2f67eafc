"""Tuners whose changes share parameters: what lies beside the layers, kept as the layers' own is.

    class Tuner(SharedTuner):
        prefix, delta = "mine_", Change
        def make_delta(self, config, layer, name, adapter):
            return Change(config, layer, Held(self.shared(adapter, "pool", lambda: Pool(config))))

The shared modules are the tuner's, by adapter and kind, so that they are counted and saved once. A change
keeps the one that it uses behind `Held`: as a plain attribute it would be a submodule of every layer.

PEFT switches, deletes and casts what it finds in layers; here the same is done for what lies beside them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from luthier.tuning.tuner import DeltaTuner


class Held:
    """A module that belongs to someone else: copied with it, but no submodule of the one who holds it."""

    def __init__(self, module: nn.Module):
        self.module = module


class SharedTuner(DeltaTuner):
    """A `DeltaTuner` with modules beside the layers that the changes of an adapter use together."""

    uses_shared_state = True  # PEFT then refuses to put the layers on a model without the tuner

    @property
    def pools(self) -> nn.ModuleDict:
        """The shared modules: by the name of their adapter, then by kind."""
        name = f"{self.prefix}shared"  # PEFT and the proofs know an adapter's tensors by the prefix
        if name not in self._modules:
            setattr(self, name, nn.ModuleDict())
        return getattr(self, name)

    def shared(self, adapter: str, kind: str, make: Callable[[], nn.Module]) -> Any:
        """The module of a kind that the changes of `adapter` share, made when it is first asked for."""
        if adapter not in self.pools:
            self.pools[adapter] = nn.ModuleDict()
        found = self.pools[adapter]
        if kind not in found:
            double = next(self.model.parameters()).dtype == torch.float64
            found[kind] = make().to(torch.float64 if double else torch.float32)
        return found[kind]

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode)
        chosen = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for name, pool in self.pools.items():
            pool.requires_grad_(name in chosen and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.pools:
                self.pools[name].requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        del self.pools[adapter_name]

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        own = next(iter(self.layers()))[1].deltas[adapter_name]
        self.pools[adapter_name].to(next(own.parameters()).dtype)
