"""How a method declares its options: `r: int = option(8, "rank of the update", ge=1)` in its `Config`
dataclass.

The declaration is the only place where an option's default, help and valid range stand. Python reads it as
a dataclass field; the recipe schema, the command line and the docs read it with `ast`, without importing
the method (and torch with it), so its arguments must be literals.
"""

import ast
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from luthier.errors import MethodError, did_you_mean

PACKAGE = Path(__file__).parent


def option(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple | None = None,
    artefacts: bool = False,
) -> Any:
    """A dataclass field with its sentence of help and its valid range.

    Args:
        artefacts: a list of folders; in a recipe also of names of earlier stages, whose output is meant.
    """
    metadata = {"help": help, "ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices}
    metadata["artefacts"] = artefacts
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Option:
    """One option of a method, as read from its source."""

    name: str
    type: str
    default: Any
    help: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: tuple | None = None
    artefacts: bool = False
    line: int = 0

    @property
    def annotation(self) -> Any:
        """The type as a Python object; annotations are limited to builtins, `Literal` and `Any`."""
        names = {
            "int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict, "Any": Any,
            "Literal": Literal,
        }  # fmt: skip
        try:
            return eval(self.type, {"__builtins__": {}}, names)  # the method's own source, no user input
        except NameError as error:
            raise MethodError(
                f"Option '{self.name}' is annotated '{self.type}', which cannot be read without importing.",
                fix="Annotate options with int, float, str, bool, list, dict, None, Literal or Any.",
            ) from error

    def range(self) -> str:
        """The valid range in words, for help and errors: '>= 1', 'one of a, b', or ''."""
        if self.choices:
            return "one of " + ", ".join(map(str, self.choices))
        bounds = [(">=", self.ge), (">", self.gt), ("<=", self.le), ("<", self.lt)]
        return " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)

    def check(self, value: Any) -> str | None:
        """Why `value` lies outside the range, or None. Types are pydantic's business."""
        if value is None or isinstance(value, bool):
            return None
        if self.choices and value not in self.choices:
            return f"must be {self.range()}, not {value!r}"
        if isinstance(value, int | float):
            tests = [
                (self.ge, lambda b: value >= b), (self.gt, lambda b: value > b),
                (self.le, lambda b: value <= b), (self.lt, lambda b: value < b),
            ]  # fmt: skip
            if math.isnan(value) or any(bound is not None and not test(bound) for bound, test in tests):
                return f"must be {self.range() or 'a number'}, not {value!r}"
        return None


def read_options(source: Path | str, class_name: str = "Config") -> list[Option]:
    """The options that class `class_name` of a Python file declares with `option(...)`, in order.

    Those of its base classes come after, where they are classes of the same file, or of this package and
    imported by name; what the class declares anew is its own.

    Raises:
        MethodError: the file has no such class, or an option is not written with literals.
    """
    path = Path(source)
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if class_name not in classes:
        raise MethodError(
            f"{path} declares no class '{class_name}'.",
            fix="A method file declares its options in a dataclass named Config.",
        )
    found = {
        node.target.id: _read_option(path, node)
        for node in classes[class_name].body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
        and node.value.func.id == "option"
    }
    for base in classes[class_name].bases:
        for file, name in _ours(path, tree, base):
            found = found | {option.name: option for option in _inherited(file, name)} | found
    return list(found.values())


@cache
def _inherited(file: Path, class_name: str) -> tuple[Option, ...]:
    return tuple(read_options(file, class_name))


def _ours(path: Path, tree: ast.Module, base: ast.expr) -> Iterator[tuple[Path, str]]:
    """File and name of a base class of the same file, or imported from this package."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and isinstance(base, ast.Name) and node.name == base.id:
            yield path, base.id
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("luthier."):
            for alias in node.names:
                if isinstance(base, ast.Name) and base.id == (alias.asname or alias.name):
                    yield PACKAGE.joinpath(*node.module.split(".")[1:]).with_suffix(".py"), alias.name


def _read_option(path: Path, node: ast.AnnAssign) -> Option:
    assert isinstance(node.value, ast.Call)
    assert isinstance(node.target, ast.Name)
    try:
        default, help = (ast.literal_eval(argument) for argument in node.value.args)
        ranges = {
            keyword.arg: ast.literal_eval(keyword.value) for keyword in node.value.keywords if keyword.arg
        }
    except ValueError as error:
        raise MethodError(
            f"{path}:{node.lineno}: option '{node.target.id}' must be written with literals: {error}.",
            fix="Write option(default, help, ge=..., choices=...).",
        ) from error
    return Option(node.target.id, ast.unparse(node.annotation), default, help, line=node.lineno, **ranges)


def check_options(options: list[Option], given: dict[str, Any], owner: str) -> None:
    """Refuse unknown names and values out of range; used where options do not pass the recipe's schema.

    Raises:
        MethodError: naming the option, what was found, what is valid and the nearest name.
    """
    known = {o.name: o for o in options}
    for name, value in given.items():
        if name not in known:
            raise MethodError(f"{owner} has no option '{name}'.", fix=did_you_mean(name, known))
        if fault := known[name].check(value):
            raise MethodError(f"{owner}: {name} {fault}.", fix=f"{name}: {known[name].help}.")
