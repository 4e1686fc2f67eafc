"""The tree of methods: read from files without importing, with helpful errors, open to third parties."""

import json
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
from typer.testing import CliRunner

from luthier import taxonomy
from luthier.errors import MethodError

MINE = '''"""Mine: a method of my own.

Paper: Me, 2026, "Mine".
Pick it when nothing else
helps.
Family: tuning/lowrank
"""
import dataclasses
from luthier.options import option

@dataclasses.dataclass
class Config:
    r: int = option(4, "rank", ge=1)
    targets: list[str] = option(["q_proj"], "layers")
    mode: str = option("a", "mode", choices=("a", "b"))
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.setattr(taxonomy, "_added", {})
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def test_the_path_is_the_name():
    lora = taxonomy.find("lora")
    assert lora.path == "tuning/lowrank/lora"
    assert lora.source.as_posix().endswith("tuning/lowrank/lora.py")
    assert taxonomy.find("tuning/lowrank/lora") == lora
    assert lora in taxonomy.methods("tuning/lowrank")
    assert lora not in taxonomy.methods("tuning/partial")


def test_unknown_names_get_the_nearest():
    with pytest.raises(MethodError, match="Did you mean 'lora'"):
        taxonomy.find("lorra")
    with pytest.raises(MethodError, match="tuning/lowrank"):
        taxonomy.methods("tuning/lowrnk")
    with pytest.raises(MethodError, match="not a method of alignment"):
        taxonomy.find("lora", branch="alignment")


def test_listing_and_describing_import_neither_torch_nor_peft():
    code = (
        "import sys, luthier\n"
        "[m.options() for m in luthier.methods()]\n"
        "assert not {'torch', 'peft', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_file_of_ones_own_joins_and_is_used(mine):
    method = taxonomy.add_file(mine)
    assert (method.path, method.title, method.when) == (
        "tuning/lowrank/mine", "Mine: a method of my own", "nothing else helps.",
    )  # fmt: skip
    assert taxonomy.find("mine") is method
    config = taxonomy.find("mine")(r=8)
    assert (config.r, config.targets, config.mode) == (8, ["q_proj"], "a")


@pytest.mark.parametrize(
    ("options", "says"),
    [({"r": 0}, "r must be >= 1, not 0"), ({"rr": 2}, "Did you mean 'r'"), ({"mode": "c"}, "one of a, b")],
)
def test_options_are_checked(mine, options, says):
    method = taxonomy.add_file(mine)
    with pytest.raises(MethodError, match=says):
        method(**options)


def test_a_file_must_say_where_it_belongs(mine):
    mine.write_text(MINE.replace("Family: tuning/lowrank", ""))
    with pytest.raises(MethodError, match="Family: tuning/lowrank"):
        taxonomy.add_file(mine)


def test_a_file_cannot_replace_a_method(mine):
    with pytest.raises(MethodError, match="would replace"):
        taxonomy.add_file(mine.rename(mine.with_name("lora.py")))


def test_a_broken_file_is_listed_by_name_and_refused_when_used(mine):
    mine.write_text(MINE + "\ndef broken(:\n")
    taxonomy.add_file(mine)
    found = taxonomy.find("mine")
    assert "SyntaxError" in found.fault
    with pytest.raises(MethodError, match="cannot be read"):
        found.options()


def test_a_failing_import_names_the_method(mine):
    mine.write_text(MINE + "\nimport no_such_module\n")
    taxonomy.add_file(mine)
    with pytest.raises(MethodError, match=r"tuning/lowrank/mine.*no_such_module"):
        taxonomy.find("mine")()


def test_entry_points_bring_methods(mine, monkeypatch):
    package = mine.parent / "thirdparty"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('listing must not import')")
    mine.rename(package / "mine.py")
    monkeypatch.syspath_prepend(mine.parent)
    entry = EntryPoint("tuning/lowrank/mine", "thirdparty.mine", "luthier.methods")
    gone = EntryPoint("tuning/lowrank/gone", "not_installed.gone", "luthier.methods")
    monkeypatch.setattr(taxonomy, "entry_points", lambda group: [entry, gone])
    taxonomy._entry_points.cache_clear()
    try:
        assert taxonomy.find("mine").origin == "thirdparty"
        assert "not installed" in taxonomy.find("gone").fault
    finally:
        taxonomy._entry_points.cache_clear()


def test_command_line_shows_tree_card_and_json(mine):
    from luthier.cli.main import app

    run = CliRunner().invoke
    tree = run(app, ["methods", "tuning", "--add", str(mine)])
    assert tree.exit_code == 0
    assert all(word in tree.output for word in ("lowrank", "lora", "dora", "partial", "mine"))
    card = run(app, ["methods", "show", "lora"])
    assert "2106.09685" in card.output
    assert "rank" in card.output
    record = json.loads(run(app, ["methods", "show", "lora", "--json"]).output)
    assert record["path"] == "tuning/lowrank/lora"
    assert {"name", "type", "default", "help", "range"} == set(record["options"][0])
    listing = json.loads(run(app, ["methods", "tuning/lowrank", "--json"]).output)
    assert "dora" in [row["name"] for row in listing]


def test_a_method_may_do_the_work_of_two_branches():
    peqa = taxonomy.find("peqa")
    assert peqa.branch == "compression"
    assert taxonomy.find("peqa", "tuning") == taxonomy.find("peqa", "compression") == peqa
    assert peqa in taxonomy.serving("tuning")
    assert peqa in taxonomy.serving("compression")
    assert peqa not in taxonomy.methods("tuning")
    with pytest.raises(MethodError, match="not a method of alignment"):
        taxonomy.find("peqa", "alignment")
