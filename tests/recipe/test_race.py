"""A race keeps the contenders that learn best within the budget, and holds nothing back from its account."""

import json
from unittest.mock import Mock

import pytest
import tiny
from ruamel.yaml import YAML

from luthier.cli import main
from luthier.errors import MethodError, RecipeError
from luthier.models.saving import save
from luthier.recipe.race import Contender, Lap, _count, _sizes, chosen, race, sized

ROWS = 40


@pytest.fixture
def place(tmp_path):
    save(tiny.llama(), tmp_path / "base", tiny.tokenizer())
    rows = [{"prompt": f"Say {i}.", "completion": f"It is {i}."} for i in range(ROWS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def model(place):
    return {"name": str(place / "base"), "task": "causal", "dtype": "float32", "device": "cpu"}


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_third_goes_on_and_the_account_is_whole(place, model):
    found = race(model, place / "rows.jsonl", folder=place / "race", methods=["lora", "prompt"], laps=[1, 2])
    assert [len(laps) for laps in found.laps] == [6, 2]
    losses = [[lap.loss for lap in laps] for laps in found.laps]
    assert all(one == sorted(one) for one in losses)
    assert {str(lap.contender) for lap in found.laps[1]} == {str(lap.contender) for lap in found.laps[0][:2]}
    assert found.winner == chosen(found.laps[1]).contender
    assert str(found.winner) in found.why
    record = json.loads((place / "race" / "race.json").read_text())
    assert record["winner"]["method"] == found.winner.method
    assert [len(laps) for laps in record["laps"]] == [6, 2]


def test_rows_are_held_out_of_the_data_and_of_no_other_file(place, model):
    file = place / "rows.jsonl"
    file.write_text(file.read_text() + json.dumps({"prompt": "say  3.", "completion": "Three."}) + "\n")
    race(model, file, folder=place / "race", methods=["top_layers"], laps=[1])
    held_out, train = (
        {row["prompt"].casefold().replace("  ", " ") for row in lines(place / "race" / f"{name}.jsonl")}
        for name in ("eval_data", "data")
    )
    assert not held_out & train
    assert held_out | train == {f"say {i}." for i in range(ROWS)}
    assert len(held_out) in (ROWS // 5, ROWS // 5 - 1)


def test_a_lap_measures_once_and_keeps_no_checkpoint(place, model):
    """At its end, on rows as many as suit its length; what a tuning costs elsewhere is the final run's."""
    file = place / "rows.jsonl"
    rows = [{"prompt": f"Say {i}.", "completion": f"It is {i}."} for i in range(200)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = race(model, file, folder=place / "race", methods=["lora"], laps=[3, 10])
    for laps, measured in zip(found.laps, (16, 20), strict=True):
        for lap in laps:
            name = f"{lap.contender.method}-{lap.contender.rate:g}-{lap.steps}"
            stage = place / "race" / name / "01-tune"
            manifest = json.loads((stage / "manifest.json").read_text())
            losses = [(e["step"], e["eval_loss"]) for e in manifest["history"] if "eval_loss" in e]
            assert losses == [(lap.steps, lap.loss)]
            assert manifest["details"]["eval_data"]["rows"] == measured
            assert "forgetting on general text" not in {check["name"] for check in manifest["checks"]}
            assert not list(stage.rglob("checkpoint-*"))


def test_what_is_done_is_not_done_again(place, model):
    settings = {"folder": place / "race", "methods": ["lora"], "laps": [1]}
    race(model, place / "rows.jsonl", **settings)
    manifests = sorted((place / "race").glob("*/*/manifest.json"))
    times = [file.stat().st_mtime_ns for file in manifests]
    assert len(manifests) == 3
    race(model, place / "rows.jsonl", **settings)
    assert [file.stat().st_mtime_ns for file in manifests] == times


def test_the_largest_size_within_the_budget_starts(model):
    whole = sized(model, "lora", None)
    one = sized(model, "lora", whole.trainable // whole_rank(whole) + 1)
    assert one.options == {"r": 1, "lora_alpha": 2}
    four = sized(model, "lora", 5 * one.trainable)
    assert four.options == {"r": 4, "lora_alpha": 8}
    assert four.trainable == 4 * one.trainable


def test_the_mlp_of_a_prefix_shrinks_before_the_prefix_does(model):
    whole = sized(model, "prefix", 10**9)
    assert whole.options == {"encoder_hidden_size": 512}
    less = sized(model, "prefix", whole.trainable // 4)
    assert less.options["encoder_hidden_size"] < 512
    least = sized(model, "prefix", 2000)  # W_2 alone: 64 x 16
    assert least.options["encoder_hidden_size"] == 16
    assert least.options["num_virtual_tokens"] < 20


def test_sizes_are_tried_from_the_largest_on(model):
    """Or halving the list would pass over one that fits."""
    base = {"model": model, "output": ".", "seed": 0, "tune": {"data": "-", "objective": "sft"}}
    for name in ("lora", "adalora", "kadaptation", "prefix", "p_tuning", "aprompt", "serial"):
        fitting = {"phm_dim": 8} if name == "kadaptation" else {}
        counts = [_count(base, name, options | fitting) for options in _sizes(name)]
        assert counts == sorted(counts, reverse=True)
        assert counts[0] > counts[-1]


def test_sizes_that_the_model_has_no_room_for_are_passed_over(model):
    assert sized(model, "top_layers", 10**9).options == {"k": 2}  # of the sizes 8, 4, 2, 1; it has two blocks


def whole_rank(contender):
    """LoRA's own default rank: with no budget no option is set."""
    import luthier

    assert contender.options == {}
    return luthier.method("lora")().r


def test_a_method_above_the_budget_does_not_start_and_says_why(place, model):
    found = race(
        model, place / "rows.jsonl", folder=place / "race", methods=["full", "lora"], laps=[1], budget=20_000
    )
    assert "smallest" in found.left_out["full"]
    assert "full" in found.why
    assert {lap.contender.method for lap in found.laps[0]} == {"lora"}
    with pytest.raises(MethodError, match="budget is 3"):
        race(model, place / "rows.jsonl", folder=place / "other", methods=["full"], laps=[1], budget=3)


def test_bad_laps_and_too_few_rows_are_refused(place, model):
    with pytest.raises(RecipeError, match="do not rise"):
        race(model, place / "rows.jsonl", folder=place / "race", laps=[3, 1])
    few = place / "few.jsonl"
    few.write_text("".join((place / "rows.jsonl").read_text().splitlines(keepends=True)[:3]))
    with pytest.raises(RecipeError, match="too few"):
        race(model, few, folder=place / "race", methods=["lora"], laps=[1])


def test_of_equals_the_faster_is_chosen():
    laps = [
        Lap(Contender(name, {}, 1e-3, 10), 5, loss, speed)
        for name, loss, speed in (("best", 1.0, 50.0), ("equal", 1.009, 90.0), ("worse", 1.2, 900.0))
    ]
    assert chosen(laps).contender.method == "equal"
    assert chosen([*laps, Lap(Contender("failed", {}, 1e-3, 10), 5)]).contender.method == "equal"


def test_classes_are_kept_where_few_rows_are_held_out(place):
    save(tiny.bert(), place / "encoder", tiny.tokenizer())
    rows = [{"text": f"Say {i}.", "label": "rare" if i == 7 else f"class {i % 2}"} for i in range(ROWS)]
    (place / "classes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = {"name": str(place / "encoder"), "task": "classification", "dtype": "float32", "device": "cpu"}
    found = race(model, place / "classes.jsonl", folder=place / "race", methods=["lora"], laps=[1])
    assert all(lap.loss is not None for lap in found.laps[0])


def test_a_change_that_fits_no_recipe_is_refused_before_the_race(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for change, code in (("before.samples=0", 2), ("tune.method.k=1", 0)):
        words = f"tune base rows.jsonl {change} --candidates top_layers,lora --laps 1 --steps 1 --seed 1"
        monkeypatch.setattr("sys.argv", ["luthier", *words.split()])
        monkeypatch.setattr("luthier.recipe.race.race", raced := Mock(side_effect=SystemExit(0)))
        with pytest.raises(SystemExit) as stopped:
            main.main()
        assert (stopped.value.code, raced.called) == (code, code == 0)
    assert "before" in capsys.readouterr().err


def test_the_command_leaves_a_recipe_that_says_why(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    words = "tune base rows.jsonl --candidates lora --laps 1 --steps 2 --budget 20k --test test.jsonl"
    (place / "test.jsonl").write_text('{"prompt": "Say more.", "completion": "It is more."}\n')
    monkeypatch.setattr("sys.argv", ["luthier", *words.split()])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert stopped.value.code == 0
    text = (place / "runs" / "tuned.yaml").read_text()
    recipe = YAML(typ="safe").load(text)
    assert "was chosen among 3 contenders" in " ".join(line[2:] for line in text.splitlines()[:3])
    assert recipe["stages"][0]["tune"]["method"]["name"] == "lora"
    assert recipe["stages"][0]["tune"]["training"]["max_steps"] == 2
    assert (place / "runs" / "tuned" / "report.html").is_file()
    assert "held-out loss" in capsys.readouterr().out
    (place / "runs" / "tuned.yaml").write_text(text + "# mine\n")
    for change, message in ((words, "another recipe already"), (f"{words} --method lora", "are of a race")):
        monkeypatch.setattr("sys.argv", ["luthier", *change.split()])
        with pytest.raises(SystemExit) as stopped:
            main.main()
        assert stopped.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert (place / "runs" / "tuned.yaml").read_text().endswith("# mine\n")
