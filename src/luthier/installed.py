"""What the source of an installed package says, read without importing it: transformers takes seconds."""

import ast
import importlib.util
from functools import cache
from pathlib import Path

from luthier.errors import ResourceError


@cache
def source(package: str, file: str) -> ast.Module:
    """One file of a package, parsed.

    Raises:
        ResourceError: the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ResourceError(f"The package {package} is not installed.", fix=f"pip install {package}")
    return ast.parse((Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8"))


def class_in(tree: ast.Module, name: str) -> ast.ClassDef:
    """The definition of a class at the top of a module."""
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def keys_of(body: list[ast.stmt], name: str) -> tuple[str, ...]:
    """The string keys of the dictionary literal that `name` is set to in a module or class."""
    for node in body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
            assert isinstance(node.value, ast.Dict)
            return tuple(str(key.value) for key in node.value.keys if isinstance(key, ast.Constant))
    raise KeyError(name)
