"""`luthier data show|check` print what the model sees and what is wrong, and end with the right status."""

import json

import pytest
import rendering
from typer.testing import CliRunner

from luthier.cli.main import app

GREEN = "\x1b[1;32m"


@pytest.fixture
def luthier(monkeypatch, tmp_path):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))

    def run(*arguments, color=False):
        for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm-256color"), ("COLUMNS", "200")):
            if color or name == "COLUMNS":
                monkeypatch.setenv(name, value)
        result = CliRunner().invoke(app, ["data", *map(str, arguments)], color=color)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture
def file(tmp_path):
    def write(*rows, name="a.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def model(tmp_path):
    rendering.tokenizer(rendering.CHATML).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_show_colours_exactly_what_is_trained(luthier, file, model):
    shown = luthier(
        "show", file({"prompt": "Hi [b]", "completion": "Yo"}), "--model", model, color=True
    ).output
    assert f"{GREEN}Yo<|im_end|>\x1b[0m" in shown
    assert shown.count(GREEN) == 1
    assert "<|im_start|>user\nHi [b]<|im_end|>" in shown.replace("\x1b[2m", "").replace("\x1b[0m", "")


def test_show_marks_what_would_be_cut(luthier, file, model):
    path = file({"prompt": "x" * 100, "completion": "Yo"})
    shown = luthier("show", path, "--model", model, "--max-length", 40).output
    assert "cut after 40 tokens: nothing trained is left" in shown


def test_show_works_without_a_model_for_every_type(luthier, file):
    for row in (
        {"prompt": "Hi", "completion": "Yo"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]},
        {"prompt": "Hi", "chosen": "Yo", "rejected": "No"},
        {"text": "Yo", "label": 1},
        {"prompt": "Hi", "completions": ["Yo"], "labels": [True]},
    ):
        result = luthier("show", file(row))
        assert result.exit_code == 0
        assert "Yo" in result.output


def test_show_starts_where_asked_and_maps_columns(luthier, file):
    path = file({"q": "one", "a": "1"}, {"q": "two", "a": "2"})
    shown = luthier("show", path, "--column", "prompt=q", "--column", "completion=a", "--start", 1).output
    assert "two" in shown
    assert "one" not in shown


def test_long_record_is_shortened_on_the_screen(luthier, file, model):
    path = file({"prompt": "word " * 40_000, "completion": "Yo"})
    for options in ((), ("--model", model)):
        shown = luthier("show", path, *options).output
        assert len(shown) < 20_000
        assert "characters …" in shown
        assert "Yo" in shown


def test_check_ends_with_0_or_1(luthier, file, model):
    clean = luthier("check", file({"prompt": "Hi", "completion": "Yo"}), "--model", model, "--max-length", 50)
    assert clean.exit_code == 0
    assert "<|im_end|>" in clean.output
    path = file(
        {"prompt": "Hi", "completion": "Yo"}, {"prompt": "Hi"}, {"prompt": "x" * 99, "completion": "Yo"}
    )
    faulty = luthier("check", path, "--model", model, "--max-length", 50, "--eval", path.parent / "a.jsonl")
    assert faulty.exit_code == 1
    assert "'completion' is missing" in faulty.output
    assert "1 E_KEYS" in faulty.output
    assert "a.jsonl:3" in faulty.output
    assert not list(path.parent.glob("*.rejected.*")), "a check writes nothing unless asked"


def test_check_writes_bad_records_on_request(luthier, file, tmp_path):
    luthier(
        "check",
        file({"prompt": "Hi"}, {"prompt": "Hi", "completion": "Yo"}),
        "--rejected",
        tmp_path / "r.jsonl",
    )
    assert json.loads((tmp_path / "r.jsonl").read_text())["code"] == "E_KEYS"


def test_tickets_are_written(luthier, tmp_path):
    result = luthier("tickets", tmp_path / "out", "--train", 5, "--test", 2)
    assert result.exit_code == 0
    assert len((tmp_path / "out" / "train.jsonl").read_text().splitlines()) == 5
    assert (
        luthier(
            "check", tmp_path / "out" / "train.jsonl", "--eval", tmp_path / "out" / "test.jsonl"
        ).exit_code
        == 0
    )
