"""Options of ours on a config of PEFT's, without losing what PEFT notes on its fields."""

import dataclasses
from types import MappingProxyType
from typing import TypeVar

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
