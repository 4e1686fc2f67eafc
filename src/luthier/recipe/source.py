"""From a recipe file to a `Recipe`: YAML with line numbers, overrides, and all faults at once."""

import copy
import io
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from luthier.errors import RecipeError, did_you_mean, nearest
from luthier.recipe.schema import KINDS, ModelSpec, Recipe, StageItem
from luthier.recipe.validate import Draft, problems

Place = tuple[str | int, ...]  # keys and indices from the top of the recipe: ("stages", 0, "tune", "method")

# Keys that may be written as one string, and what it is.
_WRITTEN = {
    "data": "a path", "eval_data": "a path", "model": "a name", "method": "a name", "objective": "a name",
}  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """One fault of a recipe: where it stands, what is wrong, what to write instead."""

    where: str
    place: Place
    message: str
    fix: str | None = None

    @property
    def line(self) -> int:
        """The line in the file; overrides come after it."""
        number = self.where.rpartition(":")[2]
        return int(number) if number.isdigit() else sys.maxsize

    def __str__(self) -> str:
        text = f"{self.where}: {self.message.rstrip('.')}."
        return f"{text} {self.fix}" if self.fix else text


@dataclass
class Source:
    """A recipe as plain values, and where each of them was written.

    Attributes:
        values: dicts, lists and scalars.
        origin: place -> 'recipe.yaml:12', or the override that set it.
        faults: what was wrong already while reading.
    """

    label: str
    values: dict[str, Any] = field(default_factory=dict)
    origin: dict[Place, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def where(self, place: Place) -> str:
        """Where `place` was written; for what is not there, where its nearest parent was."""
        while place not in self.origin and place:
            place = place[:-1]
        return self.origin.get(place, self.label)

    def fault(self, place: Place, message: str, fix: str | None = None) -> None:
        self.faults.append(Fault(self.where(place), place, message, fix))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        overrides: `key=value` with a dotted key, the value read as YAML: 'seed=1', 'tune.method.r=4' (every
            stage of that kind or name), 'stages.1.tune.training.max_steps=10' (the second stage).

    Raises:
        RecipeError: with every fault of file and overrides, each with its line (`error.faults`).
    """
    path = Path(path)
    source = read(path)
    for text in overrides:
        apply_override(source, text)
    recipe = _validated(source, path.resolve().parent)
    if recipe is not None:
        recipe._file = path.resolve()
    if source.faults:
        raise recipe_error(str(path), source.faults)
    assert recipe is not None
    return recipe


def write_recipe(file: Path, recipe: dict[str, Any], comment: str) -> None:
    """Write a recipe that a command has made, under a comment that says why it is so.

    Raises:
        RecipeError: the file holds another recipe.
    """
    yaml = YAML()
    yaml.default_flow_style = False
    stream = io.StringIO()
    stream.writelines(f"# {line}\n" for line in textwrap.wrap(comment, 110))
    yaml.dump(recipe, stream)
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists() and file.read_text(encoding="utf-8") != stream.getvalue():
        raise RecipeError(f"{file} is another recipe already.", fix="Give --name another, or remove it.")
    file.write_text(stream.getvalue(), encoding="utf-8")


def recipe_error(label: str, faults: Sequence[Fault]) -> RecipeError:
    """All faults in one error, in the order of the file."""
    unique = sorted(dict.fromkeys(faults), key=lambda fault: fault.line)
    if len(unique) == 1:
        error = RecipeError(f"{unique[0].where}: {unique[0].message.rstrip('.')}.", fix=unique[0].fix)
    else:
        lines = "\n".join(f"  {fault}" for fault in unique)
        error = RecipeError(f"{label} has {len(unique)} faults:\n{lines}")
    error.faults = unique
    return error


def read(path: Path) -> Source:
    """The values of a YAML file with their lines; a duplicate key is a fault: no line is ignored in silence.

    Raises:
        RecipeError: no such file, not UTF-8, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise RecipeError(f"There is no recipe {path}.", fix=_nearby(path)) from error
    except IsADirectoryError as error:
        found = sorted(str(file) for file in path.glob("*.y*ml"))[:8]
        fix = f"Give one of its files: {', '.join(found)}." if found else "Give the path of a YAML file."
        raise RecipeError(f"{path} is a folder, not a recipe.", fix=fix) from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"Recipe {path} cannot be read: {error}.", fix="Give a YAML file in UTF-8."
        ) from error
    source = Source(str(path))
    try:
        node = YAML(typ="safe", pure=True).compose(text)
        values = _Reader(source, str(path)).value(node, ()) if node is not None else {}
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise RecipeError(f"{where}: not YAML: {error.problem or error.context}.") from error
    except YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}.") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is not a mapping of keys.", fix="A recipe begins with 'name: ...'.")
    source.values = values
    return source


class _Reader:
    """YAML nodes to plain values, noting the line of each."""

    def __init__(self, source: Source, label: str):
        self.source = source
        self.label = label
        self.open: set[int] = set()

    def value(self, node: Node, place: Place) -> Any:
        self.source.origin.setdefault(place, f"{self.label}:{node.start_mark.line + 1}")
        if isinstance(node, ScalarNode):
            return self._scalar(node)
        if str(node.tag).removeprefix("tag:yaml.org,2002:") not in ("map", "seq"):
            raise ConstructorError(None, None, f"the tag {node.tag} is not part of recipes", node.start_mark)
        if id(node) in self.open:
            raise ConstructorError(None, None, "an alias that contains itself", node.start_mark)
        self.open.add(id(node))
        try:
            if isinstance(node, SequenceNode):
                return [self.value(child, (*place, i)) for i, child in enumerate(node.value)]
            assert isinstance(node, MappingNode)
            return self._mapping(node, place)
        finally:
            self.open.discard(id(node))

    def _mapping(self, node: MappingNode, place: Place) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, child in node.value:
            if not isinstance(key, ScalarNode):
                raise ConstructorError(None, None, "a key that is no plain word", key.start_mark)
            here = (*place, key.value)
            where = f"{self.label}:{key.start_mark.line + 1}"
            if str(key.tag).endswith(":merge"):
                raise ConstructorError(None, None, "merge keys (<<) are not part of recipes", key.start_mark)
            if key.value in found:
                first = self.source.origin[here]
                self.source.faults.append(
                    Fault(where, here, f"key '{key.value}' stands here twice, first at {first}", "Keep one.")
                )
                continue
            self.source.origin[here] = where
            found[key.value] = self.value(child, here)
        return found

    @staticmethod
    def _scalar(node: ScalarNode) -> Any:
        if str(node.tag).endswith(":timestamp"):  # nothing in a recipe is a date; a name may look like one
            return node.value
        return _constructor().construct_object(node)


@cache
def _constructor() -> Any:
    return YAML(typ="safe", pure=True).constructor


def apply_override(source: Source, text: str) -> None:
    """Set one `key=value` in the values; what cannot be placed becomes a fault."""
    key, equals, written = text.partition("=")
    label = f"override '{text}'"
    parts = tuple(key.strip().split("."))
    if not equals or not all(parts):
        source.faults.append(Fault(label, (), "is not key=value", "Write tune.training.max_steps=20, say."))
        return
    try:
        # A reader of its own: its places are those of the override. The origin of all is noted below.
        node = YAML(typ="safe", pure=True).compose(written)
        value = _Reader(Source(label), label).value(node, ()) if node is not None else None
    except YAMLError as error:
        problem = getattr(error, "problem", None) or error
        source.faults.append(Fault(label, (), f"its value is not YAML: {problem}"))
        return
    for place in _addressed(source, parts, label):
        _set(source, place, value, label)


def _addressed(source: Source, parts: tuple[str, ...], label: str) -> list[Place]:
    """The places that a dotted key names: a key of the recipe, or of each stage of that kind or name."""
    head, rest = parts[0], parts[1:]
    if head in Recipe.model_fields and head != "stages":
        return [parts]
    if head == "stages":
        item = _step(source.values.get("stages") or [], rest[0]) if rest else None
        if rest[1:] and isinstance(item, dict) and rest[1] not in item:
            message = f"stages.{rest[0]} is '{', '.join(item)}', not '{rest[1]}'"
            source.faults.append(Fault(label, (), message, "Stages are counted from 0."))
            return []
        return [parts]
    stages = [
        (index, kind, body)
        for index, item in enumerate(source.values.get("stages") or [])
        if isinstance(item, dict)
        for kind, body in item.items()
    ]
    named = {
        str(body["name"]): (i, kind) for i, kind, body in stages if isinstance(body, dict) and "name" in body
    }
    kinds = {kind for _, kind, _ in stages}
    if head in kinds:
        found: list[Place] = [("stages", i, kind, *rest) for i, kind, _ in stages if kind == head]
    elif head in named:
        found = [("stages", named[head][0], named[head][1], *rest)]
    else:
        fix = did_you_mean(head, {*Recipe.model_fields, *kinds, *named})
        if head in KINDS:
            fix = f"The recipe has no {head} stage."
        source.faults.append(Fault(label, (), f"nothing in the recipe is called '{head}'", fix))
        return []
    if not rest:
        source.faults.append(Fault(label, (), "replaces a whole stage", f"Write {head}.KEY=VALUE."))
        return []
    return found


def _set(source: Source, place: Place, value: Any, label: str) -> None:
    """Put `value` at `place`, making mappings on the way; a method written as a name becomes a mapping."""
    target: Any = source.values
    for depth, part in enumerate(place[:-1]):
        below = _step(target, part)
        if below is _ABSENT:
            source.faults.append(Fault(label, place, _no_index(target, part, place[:depth]), None))
            return
        if isinstance(below, str) and part in ("method", "objective", "model"):
            below = {"name": below}
        elif isinstance(below, str) and part in ("data", "eval_data"):
            below = {"path": below}
        elif below is None:
            below = {}
            source.origin[_normal(place[: depth + 1])] = label
        if not isinstance(below, dict | list):
            message = f"'{dotted(place[: depth + 1])}' is {below!r} and has no key '{place[depth + 1]}'"
            source.faults.append(Fault(label, place, message))
            return
        target[_index(target, part)] = below
        target = below
    last = place[-1]
    if isinstance(target, list) and _step(target, last) is _ABSENT:
        source.faults.append(Fault(label, place, _no_index(target, last, place[:-1]), None))
        return
    target[_index(target, last)] = value
    normal = _normal(place)
    for known in [p for p in source.origin if p[: len(normal)] == normal]:
        del source.origin[known]
    source.origin[normal] = label


_ABSENT = object()


def _normal(place: Place) -> Place:
    """With indices as numbers."""
    return tuple(int(p) if isinstance(p, str) and p.isdigit() else p for p in place)


def _step(target: Any, part: str | int) -> Any:
    if isinstance(target, dict):
        return target.get(str(part))
    index = _index(target, part)
    return target[index] if isinstance(index, int) and 0 <= index < len(target) else _ABSENT


def _index(target: Any, part: str | int) -> str | int:
    return int(part) if isinstance(target, list) and str(part).isdigit() else part


def _no_index(target: list[Any], part: str | int, place: Place) -> str:
    return f"'{dotted(place)}' is a list of {len(target)}, counted from 0; it has no '{part}'"


def _validated(source: Source, folder: Path) -> Recipe | None:
    """The recipe, or None; the faults of schema and cross-checks are added to `source`."""
    context = {"folder": folder}
    recipe = None
    try:
        recipe = Recipe.model_validate(source.values, context=context)
        draft = Draft(recipe.model, list(recipe.stages), folder)
    except ValidationError as error:
        for detail in error.errors():
            source.faults.append(_translate(source, detail))
        draft = _draft(source.values, folder)
    for place, message, fix in problems(draft):
        source.fault(place, message, fix)
    return recipe


def _draft(values: dict[str, Any], folder: Path) -> Draft:
    """What of a faulty recipe can be read, so that missing files are told in the same message."""
    stages = values.get("stages")
    items = [_readable(StageItem, item) for item in stages] if isinstance(stages, list) else []
    model = _readable(ModelSpec, values.get("model"))
    return Draft(
        model if isinstance(model, ModelSpec) else None,
        [
            next((s for s in (i.tune, i.evaluate, i.export) if s), None) if isinstance(i, StageItem) else None
            for i in items
        ],
        folder,
    )


def _readable(type_: type[BaseModel], value: Any) -> BaseModel | None:
    """`value` without the keys that the schema refuses, or None where too little is left."""
    value = copy.deepcopy(value)
    for _ in range(4):  # a method whose name is refused, say, is missing in the next round
        try:
            return type_.model_validate(value)
        except ValidationError as error:
            places = [detail["loc"] for detail in error.errors() if detail["type"] != "missing"]
        if sum(_remove(value, place) for place in places) == 0:
            return None
    return None


def _remove(value: Any, place: Place) -> bool:
    for part in place[:-1]:
        value = value.get(part) if isinstance(value, dict) else None
    if place and isinstance(value, dict) and place[-1] in value:
        del value[place[-1]]
        return True
    return False


def _translate(source: Source, detail: ErrorDetails) -> Fault:
    """A fault of pydantic in our words, with its line."""
    place, kind, found = detail["loc"], detail["type"], detail["input"]
    context = detail.get("ctx", {})
    name = dotted(place)
    if kind == "luthier":
        message, fix = str(context["message"]), context["fix"]
        # A fault that names its key itself needs no subject; one that begins with a verb does.
        message = f"{name} {message}" if message.startswith(("must ", "is ")) else message
        return Fault(source.where(place), place, message, fix)
    if kind == "missing":
        return Fault(source.where(place), place, f"'{name}' is missing", _described(place))
    if kind == "extra_forbidden":
        key = str(place[-1])
        parent = dotted(place[:-1]) or "the recipe"
        return Fault(
            source.where(place),
            place,
            f"unknown key '{key}' in {parent}",
            did_you_mean(key, _fields_at(place[:-1])),
        )
    if found is None:
        return Fault(
            source.where(place), place, f"'{name}' is empty", "Give it a value, or leave the key out."
        )
    if kind == "string_too_short":
        return Fault(source.where(place), place, f"'{name}' is empty", _described(place))
    expected = detail["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    expected = re.sub(
        "^(valid )?(dictionary|boolean) or instance of .*|^dictionary.*", "a mapping of keys", expected
    )
    if expected == "a mapping of keys" and place[-1] in _WRITTEN:
        expected = f"{_WRITTEN[str(place[-1])]} or a mapping of keys"
    shown = repr(found) if len(repr(found)) <= 60 else f"{repr(found)[:57]}..."
    fix = None
    if kind == "bool_type" and str(found).lower() in ("yes", "no", "on", "off", "true", "false"):
        fix = "YAML writes true or false, without quotes."
    if kind == "literal_error" and isinstance(found, str):
        choices = re.findall("'([^']+)'", str(context.get("expected", "")))
        fix = did_you_mean(found, near) if (near := nearest(found, choices)) else None
    return Fault(source.where(place), place, f"{name} must be {expected}, not {shown}", fix)


def _described(place: Place) -> str | None:
    """The key's name with its sentence in the schema."""
    field_ = _fields_at(place[:-1]).get(str(place[-1]))
    return f"{place[-1]}: {field_.description}" if field_ and field_.description else None


def _fields_at(place: Place) -> dict[str, FieldInfo]:
    """The keys that the schema knows at a place."""
    model: Any = Recipe
    for part in place:
        if isinstance(part, int):
            model = StageItem  # stages are the only list of mappings
        elif isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            annotation = model.model_fields[part].annotation
            inner = [annotation, *get_args(annotation)]
            model = next((a for a in inner if isinstance(a, type) and issubclass(a, BaseModel)), None)
        else:
            return {}
    return dict(model.model_fields) if model is not None else {}


def dotted(place: Place) -> str:
    """The place as overrides write it: 'stages.1.tune.method.r'."""
    return ".".join(map(str, place))


def _nearby(path: Path) -> str:
    folder = path.parent
    found = sorted(p.name for p in folder.glob("*.y*ml")) if folder.is_dir() else []
    close = nearest(path.name, found)
    if close:
        return did_you_mean(path.name, close)
    return (
        f"Folder {folder} does not exist." if not folder.is_dir() else f"There is none like it in {folder}."
    )
