"""Options of ours on a config of PEFT's, without losing what PEFT notes on its fields."""

import dataclasses
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

from luthier.errors import MethodError
from luthier.options import option

Kind = TypeVar("Kind", bound=type)


def peft_options(cls: Kind) -> Kind:
    """Class decorator, above `@dataclass`: fields declared anew with `option(...)` keep PEFT's metadata too.

    PEFT reads some of it at run time (which fields choose a variant of LoRA's layers).
    """
    for field in dataclasses.fields(cls):
        noted: dict = {}
        for base in reversed(cls.__mro__):
            declared = base.__dict__.get("__dataclass_fields__", {}).get(field.name)
            noted.update(declared.metadata if declared is not None else {})
        field.metadata = MappingProxyType(noted)
    return cls


@dataclass
class Where:
    """Where adapters stand and what learns beside them: options of every tuner that changes layers."""

    layers_to_transform: list[int] | int | None = option(None, "indices of the blocks to adapt; default: all")
    exclude_modules: list[str] | str | None = option(
        None, "layers to leave as they are: names, or a regular expression"
    )
    modules_to_save: list[str] | None = option(
        None, "modules that learn whole beside the adapters, such as [layers.29]"
    )

    def require_where(self, target_modules: list[str] | str | None) -> None:
        """Raise MethodError where layers are named in two ways."""
        if self.layers_to_transform is not None and isinstance(target_modules, str):
            raise MethodError(
                f"layers_to_transform does not go with target_modules: {target_modules}.",
                fix="List the names of the layers, such as [q_proj, v_proj].",
            )
