"""A comparison runs every combination once, shares what does not vary, and loses nothing that is done."""

import json

import pytest

from luthier.errors import RecipeError, ResourceError, TrainingError
from luthier.recipe.compare import compare
from luthier.recipe.manifest import locked


@pytest.fixture
def again(bench):
    def call(vary=None, seeds=None, **options):
        bench.ran.clear()
        vary = {"export.dtype": ["float32", "bfloat16"]} if vary is None else vary
        return compare(bench.folder / "recipe.yaml", vary, seeds, **options)

    return call


def record(result) -> dict:
    return json.loads((result.folder / "comparison.json").read_text())


class TestRows:
    def test_are_all_combinations_of_values_and_seeds(self, again):
        result = again({"export.dtype": ["float32", "bfloat16"], "evaluate.samples": [1, 2]}, [0, 1])
        assert len(result.rows) == 8
        assert {
            (r.settings["export.dtype"], r.settings["evaluate.samples"], r.seed) for r in result.rows
        } == {(d, s, k) for d in ("float32", "bfloat16") for s in (1, 2) for k in (0, 1)}
        assert len(result.summary) == 4
        assert all(row.status == "done" for row in result.rows)

    def test_share_the_stages_that_do_not_depend_on_what_is_varied(self, again, bench):
        again()
        assert bench.ran == ["01-evaluate", "02-out", "03-after", "02-out", "03-after"]

    def test_evaluations_of_the_same_model_do_not_depend_on_the_seed(self, again, bench):
        again({}, [0, 1])
        assert bench.ran == ["01-evaluate", "02-out", "03-after"]  # an export has no seed either

    def test_hold_what_the_contract_names(self, again):
        result = again()
        found = record(result)
        assert found["status"] == "done"
        assert found["vary"] == {"export.dtype": ["float32", "bfloat16"]}
        row = found["rows"][0]
        assert row["settings"] == {"export.dtype": "float32"}
        assert row["metrics"] == {"perplexity": {"value": 2.0}}
        assert row["artefact_bytes"] == len("float32")
        assert row["peak_memory_bytes"] > 0
        assert (result.folder / row["run"] / "run.json").is_file()
        assert result.report == result.folder / "report.html"

    def test_values_may_be_mappings(self, again, bench):
        result = again({"evaluate.data": ["data.jsonl", {"path": "data.jsonl", "limit": 1}]})
        assert [row.status for row in result.rows] == ["done", "done"]
        assert result.rows[1].run.startswith("data-path-data.jsonl")

    def test_a_summary_gives_mean_and_spread_over_seeds(self, again, bench, monkeypatch):
        values = iter([9.0, 1.0, 9.0, 4.0])  # before and after, for each seed
        original = bench.stage

        def stage(kind):
            def work(stage, context):
                found = original(kind)(stage, context)
                if kind == "evaluate":
                    value = next(values)
                    found.metrics = {"perplexity": {"value": value, "low": value - 1, "high": value + 1}}
                else:
                    (context.work / "model" / "config.json").write_text(str(context.recipe.seed))
                return found

            return work

        monkeypatch.setattr("luthier.recipe.stages.find", stage)
        monkeypatch.setattr("luthier.recipe.inputs._is_random", lambda recipe, stage, upstream: True)
        (summary,) = again({"export.dtype": ["float32"]}, [0, 1]).summary
        assert summary.seeds == [0, 1]
        after = summary.metrics["perplexity"]
        assert after == {"mean": 2.5, "spread": pytest.approx(2.1213203), "low": 1.5, "high": 3.5}


class TestKeepsWhatIsDone:
    def test_a_finished_comparison_runs_nothing(self, again, bench):
        again()
        again()
        assert bench.ran == []

    def test_a_failing_row_takes_no_other_with_it_and_is_tried_again(self, again, bench):
        bench.broken["out"] = TrainingError("The loss is not finite.")
        result = again()
        assert [(row.status, row.error) for row in result.failed] == [
            ("failed", "The loss is not finite.")
        ] * 2
        assert record(result)["status"] == "failed"
        bench.broken.clear()
        result = again()
        assert bench.ran == ["02-out", "03-after"] * 2
        assert not result.failed

    def test_an_unforeseen_error_of_a_row_is_kept_too(self, again, bench):
        bench.broken["after"] = RuntimeError("shapes do not fit")
        assert again().failed[0].error == "RuntimeError: shapes do not fit"

    def test_goes_on_where_it_was_interrupted(self, again, bench):
        original, count = bench.stage, 0

        def stage(kind):
            nonlocal count
            count += kind == "export"
            if count == 2:
                bench.broken["out"] = KeyboardInterrupt()
            return original(kind)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("luthier.recipe.stages.find", stage)
            with pytest.raises(KeyboardInterrupt):
                again()
        found = json.loads((bench.output / "demo-compare" / "comparison.json").read_text())
        assert found["status"] == "interrupted"
        assert [row["status"] for row in found["rows"]] == ["done", "interrupted"]
        bench.broken.clear()
        again()
        assert bench.ran == ["02-out", "03-after"]


class TestRefuses:
    def test_a_combination_that_is_no_valid_recipe_before_anything_runs(self, again, bench):
        with pytest.raises(RecipeError, match="float31"):
            again({"export.dtype": ["float32", "float31"]})
        assert bench.ran == []
        assert not bench.output.exists()

    @pytest.mark.parametrize(
        ("vary", "seeds"),
        [({}, [0]), ({"export.dtype": []}, [0]), ({"export.dtype": "float32"}, [0]), ({"seed": [1, 2]}, [0]),
         ({"export.dtype": ["float32", "float32"]}, [0])],
    )  # fmt: skip
    def test_nothing_to_vary_or_the_same_twice(self, again, vary, seeds):
        with pytest.raises(RecipeError):
            again(vary, seeds)

    def test_two_comparisons_in_one_folder(self, again, bench):
        (bench.output / "demo-compare").mkdir(parents=True)
        with locked(bench.output / "demo-compare"), pytest.raises(ResourceError, match="Another run"):
            again()


class TestCommandLine:
    def test_ends_with_one_table_and_status_1_when_a_row_failed(self, bench):
        from typer.testing import CliRunner

        from luthier.cli.main import app

        words = ["compare", str(bench.folder / "recipe.yaml"), "--vary", "export.dtype=float32,bfloat16"]
        result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        assert "bfloat16" in result.output
        assert "perplexity" in result.output
        bench.broken["after"] = TrainingError("The loss is not finite.")
        result = CliRunner().invoke(app, [*words, "evaluate.samples=1"], env={"COLUMNS": "200"})
        assert result.exit_code == 1
        assert "The loss is not finite." in result.output

    def test_values_are_yaml(self):
        from luthier.cli.compare import _varied

        assert _varied("tune.method=lora,{name: dora, r: 4}") == (
            "tune.method",
            ["lora", {"name": "dora", "r": 4}],
        )
        with pytest.raises(RecipeError, match="not KEY=VALUE"):
            _varied("tune.method")
