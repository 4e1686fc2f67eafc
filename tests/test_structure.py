"""The shape of the house: every method is one documented file with its test and recipe, and no file
outgrows a reader."""

import ast
import re
from pathlib import Path

import pytest

from luthier import taxonomy

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "luthier"
OWN = [method for method in taxonomy.methods() if method.origin == "luthier"]

# Exceptions to the limits, each with its reason: {"path[::function]": "reason"}.
LONGER: dict[str, str] = {}


def files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("method", OWN, ids=lambda m: m.path)
class TestMethod:
    def test_states_title_paper_and_advice(self, method):
        assert not method.fault
        assert method.title
        assert method.when, "write a line 'Pick it when ...'"
        assert re.search(r"\b(19|20)\d\d\b", method.paper), "the Paper: line gives authors and year"

    def test_has_its_test(self, method):
        family = ROOT / "tests" / Path(method.path).parent
        assert (family / f"test_{method.name}.py").is_file()

    def test_has_a_recipe_that_runs_it_and_says_what_comes_out(self, method):
        recipe = ROOT / "recipes" / f"{method.path}.yaml"
        assert recipe.is_file()
        text = recipe.read_text()
        assert re.search(rf"\b{method.name}\b", text)
        assert "expect:" in text, "a recipe states its figure"

    def test_options_read_without_importing_are_those_of_the_class(self, method):
        fields = method.load().Config.__dataclass_fields__
        ours = {name for name, f in fields.items() if "choices" in f.metadata}
        assert {option.name for option in method.options()} == ours, "inherited ones, too"
        for option in method.options():
            assert option.name in fields
            assert fields[option.name].metadata["help"] == option.help
            assert option.help.strip()
            assert option.check(option.default) is None, f"default of {option.name} lies outside its range"
            option.annotation  # noqa: B018  (raises where the type cannot be read)

    def test_stays_short(self, method):
        assert len(method.source.read_text().splitlines()) <= 350 or method.path in LONGER


@pytest.mark.parametrize("path", files(), ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_files_and_functions_fit_a_reader(path):
    name = path.relative_to(SOURCE).as_posix()
    text = path.read_text()
    assert len(text.splitlines()) <= 600 or name in LONGER
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            where = f"{name}::{node.name}"
            assert length <= 60 or where in LONGER, f"{where} has {length} lines"


def test_exceptions_are_still_needed():
    for where in LONGER:
        path, _, function = where.partition("::")
        text = (SOURCE / path).read_text()
        if not function:
            assert len(text.splitlines()) > 600
        else:
            nodes = [n for n in ast.walk(ast.parse(text)) if getattr(n, "name", "") == function]
            assert any((n.end_lineno or 0) - n.lineno + 1 > 60 for n in nodes)


def test_no_method_imports_another_methods_file():
    modules = {method.module for method in OWN}
    for method in OWN:
        for node in ast.walk(ast.parse(method.source.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
            assert not (modules - {method.module}) & set(names), f"{method.path} imports another method"


def test_every_recipe_belongs_to_a_method_or_is_the_quickstart():
    paths = {method.path for method in OWN} | {"quickstart"}
    for recipe in (ROOT / "recipes").rglob("*.yaml"):
        assert recipe.relative_to(ROOT / "recipes").with_suffix("").as_posix() in paths
