"""How our tuners become tuners of PEFT: the one place that extends PEFT's closed enum of types.

A method file ends with one call at its top level, the name being a literal:

    register("krona", Config, Tuner)

- `Config` is a dataclass below `peft.PeftConfig`. Its `__post_init__` sets `self.peft_type =
  registered_type(type(self))`; the bases of the engines (`tuning/tuner.py`, `tuning/prompts/`) do so.
- `Tuner` is what `get_peft_model` puts around the model: a `BaseTuner` with a `prefix` of its own, or for a
  config with `is_prompt_learning` PEFT's kind of prompt encoder.
- The name in capitals is the `peft_type` in `adapter_config.json`. A method whose files are those of a type
  that PEFT has (its LoRA, its prefix tuning) sets that type and does not register.

`import luthier.tuning` makes PEFT know every such type. It imports no method file for that: the calls are
read with `ast`, and a file is imported when PEFT first asks for its config class, as
`PeftModel.from_pretrained` does, or when the method is used. So `luthier.tuning.x` may be imported from
anywhere, and a broken method breaks its own adapters only.
"""

import ast
from typing import Any

from peft import PeftConfig, PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import register_peft_method

from luthier import taxonomy
from luthier.errors import MethodError

_ours: dict[type, PeftType] = {}


def register(name: str, config: type[PeftConfig], tuner: type) -> None:
    """Make `config` and `tuner` the PEFT method `name`; a module that is imported anew replaces itself.

    Args:
        name: lower case; `name.upper()` becomes a member of `PeftType`.
        tuner: its `prefix` marks the adapter's parameters; without one it is `name_`.

    Raises:
        MethodError: PEFT, or another file of ours, has a method of that name.
    """
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(name.upper())
    same = (config.__module__, config.__qualname__)
    if isinstance(known, Deferred) or (known in _ours and (known.__module__, known.__qualname__) == same):
        for table in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
            table.pop(name.upper(), None)
    elif name.upper() in PeftType.__members__:
        owner = known.__module__ if known is not None else "peft"
        raise MethodError(
            f"{config.__module__} registers '{name}', a name that {owner} has.", fix="Choose another name."
        )
    member = _member(name.upper())
    register_peft_method(
        name=name, config_cls=config, model_cls=tuner, prefix=getattr(tuner, "prefix", f"{name}_")
    )
    _ours[config] = member


def registered_type(config: type) -> PeftType:
    """The `PeftType` under which `config`, or a class that it extends, was registered.

    Raises:
        MethodError: there is none.
    """
    for cls in config.__mro__:
        if cls in _ours:
            return _ours[cls]
    raise MethodError(
        f"{config.__module__}.{config.__qualname__} is not registered in PEFT.",
        fix="End its file with register(name, Config, Tuner).",
    )


def is_ours(peft_type: PeftType | str | None) -> bool:
    """Whether an adapter of this type needs `import luthier.tuning` where it is loaded."""
    return peft_type in _ours.values() or isinstance(PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type), Deferred)


def register_all() -> None:
    """Give PEFT the name of every method of the tree that registers itself, without importing any.

    Done when `luthier.tuning` is imported; again it finds the files that were added to the tree since.
    """
    for method in taxonomy.serving("tuning"):
        name = "" if method.fault else declared(method)
        if name and name.upper() not in PeftType.__members__:
            PEFT_TYPE_TO_CONFIG_MAPPING[_member(name.upper())] = Deferred(method)


def declared(method: taxonomy.Method) -> str:
    """The name in the method file's call of `register`, or ''."""
    text = method.source.read_text(encoding="utf-8")
    if "\nregister(" not in text:
        return ""
    calls = [node.value for node in ast.parse(text).body if isinstance(node, ast.Expr)]
    for call in calls:
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "register":
            return str(ast.literal_eval(call.args[0]))
    return ""


class Deferred:
    """Stands in PEFT's table for a config class until PEFT asks for it; then its file is imported."""

    def __init__(self, method: taxonomy.Method):
        self._method = method

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._method.load().Config, name)

    def __call__(self, **options: Any) -> PeftConfig:
        # Not the class itself: this leaves out, with a warning, what a later version has written.
        return self._method.load().Config.from_peft_type(**options)


def _member(name: str) -> PeftType:
    """`PeftType.<name>`, made where it does not exist: what `enum` does for the members in a class body."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member
