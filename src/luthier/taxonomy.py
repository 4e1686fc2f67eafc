"""The tree of methods, read from the folders: `tuning/lowrank/lora.py` is the method
`tuning/lowrank/lora`.

Nothing is imported to list, describe or validate: title, paper and advice come from the file's docstring,
options from its `Config` class, both read with `ast` (torch takes seconds to import; the command line
answers at once). The module is imported when a method is used.

The docstring of a method file:

    LoRA: low-rank adaptation.                       <- title, the first line

    Paper: Hu et al., 2021, "LoRA: ...", arXiv 2106.09685.
    Pick it when the adapter must be small and merge away.
    Cost: r(in + out) parameters a layer.
    Family: tuning/lowrank                           <- only in files outside this package
    Also: tuning                                     <- where a method does the work of another branch too

    Equations, what is trained, what differs from the authors' code ...

A marked line may go on over several lines, up to the next marked or blank one.
"""

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from luthier.errors import MethodError, did_you_mean, nearest
from luthier.options import Option, check_options, read_options

BRANCHES = ("tuning", "compression", "alignment", "acceleration")
MARKS = {"Paper:": "paper", "Pick it when": "when", "Cost:": "cost", "Family:": "family", "Also:": "also"}
_root = Path(__file__).parent
_added: dict[str, "Method"] = {}


@dataclass(frozen=True)
class Method:
    """What is known of a method without importing it. Calling it makes its config: `method("lora")(r=8)`.

    Attributes:
        path: place in the tree, such as 'tuning/lowrank/lora'; `name` is its last part.
        fault: why the file cannot be read, or ''. A broken file is listed, and refused when used.
        origin: 'luthier', or the entry point or file that brought it.
        searches: its `Config` has a function `search`: it trains no weights but finds something for a model
            that stays as it is (`luthier.tuning.search`).
        needs_data: a compression method looks at calibration data; its `Config` says where it does not.
        also: another branch whose work it does: PEQA quantises, and is a way to tune what is quantised.
    """

    path: str
    source: Path
    module: str = ""
    title: str = ""
    paper: str = ""
    when: str = ""
    cost: str = ""
    doc: str = ""
    fault: str = ""
    origin: str = "luthier"
    searches: bool = False
    needs_data: bool = True
    also: str = ""
    family: str = field(default="", repr=False)

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def branch(self) -> str:
        return self.path.split("/", 1)[0]

    def serves(self, branch: str) -> bool:
        """Whether it can be named where a method of that branch is asked for."""
        return branch in (self.branch, self.also)

    def options(self) -> list[Option]:
        """The options of its `Config`, read without importing. Raises MethodError for a broken file."""
        if self.fault:
            raise MethodError(
                f"Method '{self.path}' cannot be read: {self.fault}.", fix=f"See {self.source}."
            )
        return read_options(self.source)

    def load(self) -> ModuleType:
        """Import the method's module.

        Raises:
            MethodError: the import failed; the cause is chained.
        """
        try:
            return importlib.import_module(self.module) if self.module else _import_file(self.source)
        except Exception as error:
            raise MethodError(
                f"Method '{self.path}' fails to import: {type(error).__name__}: {error}.",
                fix=f"See {self.source}.",
            ) from error

    def __call__(self, **options: Any) -> Any:
        """The method's config, with every option checked against its declared range.

        Options that the class has but does not declare (PEFT's rarer fields) pass through unchecked.
        """
        config = self.load().Config
        declared = {o.name for o in self.options()}
        inherited = set(getattr(config, "__dataclass_fields__", {})) - declared
        check_options(
            self.options(), {k: v for k, v in options.items() if k not in inherited}, f"Method '{self.name}'"
        )
        return config(**options)


def methods(path: str = "") -> list[Method]:
    """The methods at or below `path` ('', 'tuning', 'tuning/lowrank', 'tuning/lowrank/lora'), in tree order.

    Raises:
        MethodError: nothing stands there; names the nearest places.
    """
    everything = sorted([*_own(), *_entry_points(), *_added.values()], key=lambda m: _order(m.path))
    path = path.strip("/")
    found = [m for m in everything if not path or m.path == path or m.path.startswith(path + "/")]
    if not found:
        places = {p for m in everything for p in _parents(m.path)} | {m.name for m in everything}
        raise MethodError(f"There is no method or family '{path}'.", fix=did_you_mean(path, places))
    return found


def serving(branch: str) -> list[Method]:
    """The methods that do the work of a branch, in tree order: its own, and others that do it too."""
    return [method for method in methods() if method.serves(branch)]


def find(name: str, branch: str = "") -> Method:
    """The method of that name or full path; of those that serve `branch` only, where given.

    Raises:
        MethodError: unknown or ambiguous name; names the nearest ones.
    """
    choices = [m for m in methods() if not branch or m.serves(branch)]
    found = [m for m in choices if name in (m.name, m.path)]
    if len(found) == 1:
        return found[0]
    where = f" in {branch}" if branch else ""
    if found:
        raise MethodError(
            f"'{name}' names {len(found)} methods{where}.",
            fix="Write one of " + ", ".join(m.path for m in found) + ".",
        )
    elsewhere = [m.path for m in methods() if m.name == name]
    if elsewhere:
        raise MethodError(f"'{name}' is not a method of {branch}, but {', '.join(elsewhere)} is.")
    names = [m.name for m in choices]
    close = nearest(name, names)
    raise MethodError(
        f"There is no method '{name}'{where}.",
        fix=did_you_mean(name, names) if close else "`luthier methods` lists them.",
    )


def add_file(source: Path | str) -> Method:
    """Put a method file of the user's own into the tree; its docstring names the family it joins.

    Raises:
        MethodError: no such file, no docstring, or no `Family:` line.
    """
    source = Path(source)
    if not source.is_file():
        raise MethodError(f"There is no method file {source}.", fix="Give the path of a Python file.")
    method = _read(source, "", str(source), path="")
    if not method.fault and (not method.family or method.family.split("/")[0] not in BRANCHES):
        raise MethodError(
            f"{source} does not say where it belongs.",
            fix="Add a line such as 'Family: tuning/lowrank' to its docstring; branches are "
            + ", ".join(BRANCHES)
            + ".",
        )
    path = f"{method.family or 'tuning'}/{source.stem}"
    if any(m.path == path and m.source.resolve() != source.resolve() for m in [*_own(), *_entry_points()]):
        raise MethodError(f"{source} would replace the method {path}.", fix="Rename the file.")
    _added[path] = _read(source, "", str(source), path=path)
    return _added[path]


@cache
def _own() -> tuple[Method, ...]:
    found = []
    for branch in BRANCHES:
        for source in sorted((_root / branch).glob("*/*.py")):
            if source.stem.startswith("_"):
                continue
            path = source.relative_to(_root).with_suffix("").as_posix()
            found.append(_read(source, "luthier." + path.replace("/", "."), "luthier", path))
    return tuple(found)


@cache
def _entry_points() -> tuple[Method, ...]:
    found = []
    for entry in entry_points(group="luthier.methods"):
        package = entry.value.split(".")[0]
        try:
            # find_spec of a dotted name imports its parents; locate the file from the top package instead.
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):
            spec = None
        source = _locate(spec, entry.value)
        if source is None:
            fault = f"its module {entry.value} is not installed"
            found.append(Method(entry.name, Path(entry.value), entry.value, fault=fault, origin=package))
        else:
            found.append(_read(source, entry.value, package, entry.name))
    return tuple(found)


def _locate(spec: Any, module: str) -> Path | None:
    if spec is None:
        return None
    parts = module.split(".")[1:]
    if not parts:
        return Path(spec.origin) if spec.origin else None
    for folder in spec.submodule_search_locations or []:
        base = Path(folder, *parts)
        for candidate in (base.with_suffix(".py"), base / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


def _read(source: Path, module: str, origin: str, path: str) -> Method:
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
        doc = ast.get_docstring(tree) or ""
    except (SyntaxError, UnicodeDecodeError) as error:
        return Method(path, source, module, fault=f"{type(error).__name__}: {error}", origin=origin)
    if not doc:
        return Method(path, source, module, fault="it has no docstring with title and paper", origin=origin)
    return Method(
        path,
        source,
        module,
        title=doc.splitlines()[0].rstrip("."),
        doc=doc,
        origin=origin,
        searches=_searches(tree),
        needs_data=_needs_data(tree),
        **_marked(doc),
    )


def _searches(tree: ast.Module) -> bool:
    """Whether the class `Config` of a method file defines `search`."""
    return any(isinstance(node, ast.FunctionDef) and node.name == "search" for node in _config_body(tree))


def _needs_data(tree: ast.Module) -> bool:
    """False where the class `Config` of a method file says `needs_data: ClassVar[bool] = False`."""
    stated = [ast.unparse(node) for node in _config_body(tree) if isinstance(node, ast.AnnAssign)]
    return not any(text.startswith("needs_data:") and text.endswith("= False") for text in stated)


def _config_body(tree: ast.Module) -> list[ast.stmt]:
    return [
        statement
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "Config"
        for statement in node.body
    ]


def _marked(doc: str) -> dict[str, str]:
    """The marked lines of a docstring, with their continuation lines joined."""
    found: dict[str, str] = {}
    current = ""
    for line in doc.splitlines()[1:]:
        mark = next((m for m in MARKS if line.startswith(m)), "")
        if mark:
            current = MARKS[mark]
            found[current] = line.removeprefix(mark).strip()
        elif not line.strip():
            current = ""
        elif current:
            found[current] += " " + line.strip()
    return found


def _import_file(source: Path) -> ModuleType:
    name = f"luthier_user_method_{source.stem}"
    if name in sys.modules and sys.modules[name].__file__ == str(source):
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while they are made
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _parents(path: str) -> Iterable[str]:
    parts = path.split("/")
    return ("/".join(parts[: i + 1]) for i in range(len(parts)))


def _order(path: str) -> tuple[int, str]:
    branch = path.split("/")[0]
    return (BRANCHES.index(branch) if branch in BRANCHES else len(BRANCHES), path)
