"""Help, lists and validation answer at once because they import nothing heavy."""

import json
import resource
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "numpy", "matplotlib", "pandas")
PROBE = """
import json, sys
from luthier.cli.main import app
try:
    app(sys.argv[1:])
except SystemExit as end:
    code = end.code
print()
print(json.dumps([code, [name for name in HEAVY if name in sys.modules]]))
"""

RECIPE = """\
name: small
model: {name: MODEL}
stages:
  - tune: {data: train.jsonl, method: lora, training: {max_steps: 2}}
  - export: {}
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("MODEL", str(tmp_path / "model")))
    return path


def run(*arguments):
    probe = PROBE.replace("HEAVY", repr(HEAVY))
    done = subprocess.run([sys.executable, "-c", probe, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code, heavy = json.loads(done.stdout.splitlines()[-1])
    return code or 0, heavy, done.stdout


@pytest.mark.parametrize(
    "arguments", [("--help",), ("methods",), ("methods", "show", "lora"), ("run", "--help"), ("schema",)]
)
def test_answers_without_heavy_imports(arguments):
    code, heavy, out = run(*arguments)
    assert code == 0
    assert heavy == []
    assert len(out) > 100


def test_validate_does_not_import_them_either(recipe):
    settings = ("tune.method.r=4", "model.device=cuda:1", "model.attn=flash_attention_2")
    code, heavy, out = run("validate", recipe, *settings)
    assert code == 0
    assert heavy == []
    assert "lora(r=4) by sft on train.jsonl" in out


@pytest.mark.parametrize(
    "words", [("--help",), ("methods",), ("schema",), ("validate", "RECIPE")], ids=" ".join
)
def test_answers_in_under_a_second(recipe, words):
    """Of processor time, which the other work of the machine does not lengthen; the better of two starts."""
    words = [str(recipe) if word == "RECIPE" else word for word in words]
    command = [sys.executable, "-m", "luthier.cli.main", *words]
    seconds = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 1.0


def test_a_faulty_recipe_is_status_2_without_traceback(recipe):
    done = subprocess.run(
        [sys.executable, "-m", "luthier.cli.main", "validate", str(recipe), "tune.method.r=-1", "sed=3"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "must be >= 1, not -1" in done.stderr
    assert "Did you mean 'seed'?" in done.stderr
    assert "Traceback" not in done.stderr
