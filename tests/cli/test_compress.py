"""`luthier compress`: a recipe of one command, budgets that are kept, and help where they cannot be."""

import json
import re

import pytest
import tiny
from typer.testing import CliRunner

from luthier.cli.main import app
from luthier.errors import LuthierError
from luthier.models.saving import save
from luthier.recipe.source import load_recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compress")
    save(tiny.llama(), folder / "base", tiny.tokenizer())
    (folder / "text.txt").write_text("\n".join(tiny.SENTENCES * 30))
    return folder


@pytest.fixture
def compress(place, monkeypatch):
    """Run the command in the folder with small windows; returns its output."""
    monkeypatch.chdir(place)

    def call(*words: str) -> str:
        size = ["--samples", "8", "--max-length", "32"]
        done = CliRunner().invoke(app, ["compress", "base", "text.txt", *size, *words])
        if isinstance(done.exception, LuthierError):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.output

    return call


def size(folder) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_writes_the_recipe_that_it_runs(place, compress):
    compress("--method", "smoothquant,gptq", "--bits", "8", "--name", "two", "--group-size", "16")
    recipe = load_recipe(place / "runs" / "two.yaml")
    assert [str(spec) for spec in recipe.stages[0].method] == ["smoothquant", "gptq(bits=8, group_size=16)"]
    assert (place / "runs" / "two" / "01-compress" / "model" / "config.json").is_file()


def test_fits_a_size_with_bits_for_each_layer(place, compress):
    with pytest.raises(LuthierError, match="falls short by") as caught:
        compress("--fit", "1kB", "--method", "rtn", "--name", "least", "--group-size", "32")
    short, unit = re.search(r"by ([0-9.]+) (k?B)", str(caught.value)).groups()
    budget = int(1.2 * (1000 + float(short) * (1000 if unit == "kB" else 1)))
    compress("--fit", f"{budget}B", "--method", "rtn", "--name", "fit", "--group-size", "32")
    folder = place / "runs" / "fit" / "01-compress"
    layers = json.loads((folder / "manifest.json").read_text())["details"]["layers"]
    assert len({layer["bits"] for layer in layers}) > 1
    # Names and shapes of the tensors lie in the file too.
    assert size(folder / "model") < budget + 12_000
    assert f"At most {budget}B" in (place / "runs" / "fit.yaml").read_text()


def test_keeps_perplexity_within_a_share(place, compress):
    words = ["--max-perplexity-increase", "20%", "--method", "rtn", "--test", "text.txt", "--name", "share"]
    compress(*words, "--group-size", "32")
    text = (place / "runs" / "share.yaml").read_text()
    assert "20% were allowed" in " ".join(text.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--fit", "1kB", "--group-size", "32"], "falls short"),
        (["--fit", "many"], "is no size"),
        (["--max-perplexity-increase", "-1"], "is no share"),
        (["--fit", "1MB", "--bits", "4"], "--bits"),
        (["--fit", "1MB", "--max-perplexity-increase", "2%"], "exclude each other"),
        (["--fit", "1MB", "--method", "wanda"], "no layer_bits"),
        (["--method", "gptk"], "gptq"),
        (["--fit", "1MB", "--group-size", "48"], "does not divide"),
    ],
)
def test_says_what_is_wrong(compress, words, said):
    with pytest.raises(LuthierError, match=said):
        compress(*words, "--name", "bad")
