"""Errors name the nearest valid choice, and the command line shows them as one paragraph with status 2."""

import subprocess
import sys

import pytest

from luthier.errors import LuthierError, MethodError, did_you_mean, nearest
from luthier.options import Option, read_options


def test_nearest_finds_typos_and_parts():
    assert nearest("lorra", ["dora", "lora", "full"])[0] == "lora"
    assert nearest("proj", ["q_proj", "mlp"]) == ["q_proj"]
    assert did_you_mean("zzz", ["b", "a"]) == "Choose from: a, b."


def test_an_error_is_also_the_standard_one():
    with pytest.raises(ValueError):
        raise MethodError("wrong")
    assert str(LuthierError("What.", fix="Do this.")) == "What. Do this."


@pytest.mark.parametrize(
    ("arguments", "traceback"), [(["methods", "lorra"], False), (["--debug", "methods", "lorra"], True)]
)
def test_the_command_line_gives_one_paragraph_and_status_2(arguments, traceback):
    done = subprocess.run(
        [sys.executable, "-m", "luthier.cli.main", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "error: There is no method or family 'lorra'." in done.stderr
    assert ("Traceback" in done.stderr) is traceback


def test_options_must_be_literals(tmp_path):
    file = tmp_path / "m.py"
    file.write_text("class Config:\n    r: int = option(2 * 4, 'rank')\n")
    with pytest.raises(MethodError, match=r"m.py:2.*literals"):
        read_options(file)
    file.write_text("x = 1\n")
    with pytest.raises(MethodError, match="no class 'Config'"):
        read_options(file)


def test_options_of_our_base_classes_come_after_a_methods_own(tmp_path):
    file = tmp_path / "m.py"
    start = "from luthier.tuning.peft_options import Where as W\nclass Config(W, object):\n"
    file.write_text(
        start + "    r: int = option(2, 'rank')\n    exclude_modules: str = option('x', 'mine')\n"
    )
    found = {option.name: option for option in read_options(file)}
    assert list(found) == ["r", "exclude_modules", "layers_to_transform", "modules_to_save"]
    assert found["exclude_modules"].help == "mine"
    assert found["modules_to_save"].default is None


def test_ranges_refuse_nan_and_bounds():
    option = Option("p", "float", 0.1, "share", ge=0, lt=1)
    assert option.check(0) is None
    assert option.check(1.0) == "must be >= 0 and < 1, not 1.0"
    assert "nan" in (option.check(float("nan")) or "")
    assert option.annotation is float
    with pytest.raises(MethodError, match="cannot be read"):
        _ = Option("x", "torch.dtype", None, "").annotation
