"""A stage runs when something that it depends on changed, and only then; what it leaves is whole."""

import errno
import json
import subprocess
import sys

import pytest
import tiny
from recipe_bench import RECIPE, plan
from typer.testing import CliRunner

from luthier.cli.main import app
from luthier.errors import RecipeError, ResourceError, TrainingError
from luthier.models.saving import save
from luthier.recipe import runner
from luthier.recipe.manifest import locked


def record(bench) -> dict:
    return json.loads((bench.place / "run.json").read_text())


ALL = ["01-evaluate", "02-out", "03-after"]


class TestWhatRuns:
    def test_all_stages_in_order_each_with_its_folder_and_manifest(self, bench):
        result = bench.again()
        assert bench.ran == ALL
        assert sorted(p.name for p in bench.place.iterdir()) == [".lock", *ALL, "run.json"]
        manifest = json.loads((bench.place / "02-out" / "manifest.json").read_text())
        assert manifest["status"] == "done"
        assert manifest["total"] == 7
        assert manifest["checks"][0]["name"] == "seen"
        assert manifest["artefact_bytes"] == len("auto")
        assert manifest["peak_memory_bytes"] > 0
        assert [s.status for s in result.stages] == ["done"] * 3
        assert result.metrics == {"perplexity": {"value": 2.0}}
        assert result.artefact == bench.place / "02-out" / "model"
        assert result.stages[2].manifest.details == {"of": "02-out"}
        assert record(bench)["status"] == "done"
        assert record(bench)["recipe"]["name"] == "demo"

    def test_nothing_when_nothing_changed_and_then_no_plan_is_needed(self, bench):
        bench.again()
        bench.plan = plan(fits=False)
        assert [s.status for s in bench.again().stages] == ["unchanged"] * 3
        assert bench.ran == []

    def test_where_nothing_runs_the_record_keeps_the_plan_of_these_stages(self, bench):
        bench.again()
        bench.plan = plan(fits=False)
        bench.again()
        bench.again()
        assert record(bench)["plan"] == {"fits": True}
        bench.write(RECIPE.rpartition("  - evaluate")[0])  # fewer stages: their numbers would not match
        bench.again()
        assert bench.ran == []
        assert record(bench)["plan"] is None

    def test_a_changed_data_file_reruns_what_reads_it(self, bench):
        bench.again()
        (bench.folder / "data.jsonl").write_text('{"text": "two"}\n')
        result = bench.again()
        assert bench.ran == ["01-evaluate", "03-after"]
        assert result.stages[0].reason == "data changed"

    def test_a_changed_setting_reruns_the_stage_and_those_that_read_its_output(self, bench):
        bench.again()
        bench.write(dtype="bfloat16")
        result = bench.again()
        assert bench.ran == ["02-out", "03-after"]
        assert result.stages[1].reason == 'dtype: "auto" → "bfloat16"'
        assert result.stages[2].reason == "upstream changed"

    def test_a_changed_base_model_reruns_all(self, bench):
        bench.again()
        save(tiny.llama(seed=1), bench.folder / "base", tiny.tokenizer())
        result = bench.again()
        assert bench.ran == ALL
        assert result.stages[0].reason == "model changed"

    def test_a_library_of_another_version_reruns_all_and_says_which(self, bench, monkeypatch):
        bench.again()
        found = {"torch": "99"}
        monkeypatch.setattr("luthier.recipe.inputs.versions", lambda: found)
        result = bench.again()
        assert bench.ran == ALL
        assert "→ 99" in result.stages[0].reason

    def test_a_harmed_artefact_is_made_again(self, bench):
        bench.again()
        (bench.place / "02-out" / "model" / "config.json").write_text("tuna")
        result = bench.again()
        assert bench.ran == ["02-out"]  # what comes out is what it was, so 03 still holds
        assert "model/config.json is not as it was saved" in result.stages[1].reason

    @pytest.mark.parametrize("name", ["out", "2", "02-out", "export"])
    def test_from_a_stage_named_in_any_way(self, bench, name):
        bench.again()
        bench.again(from_stage=name)
        assert bench.ran == ["02-out", "03-after"]

    def test_force_runs_all(self, bench):
        bench.again()
        bench.again(force=True)
        assert bench.ran == ALL

    def test_an_unknown_or_ambiguous_stage_is_refused(self, bench):
        with pytest.raises(RecipeError, match=r"has no stage 'aftr'.*Did you mean 'after'"):
            bench.again(from_stage="aftr")
        text = RECIPE.replace(", name: after", "")
        bench.write(text)
        with pytest.raises(RecipeError, match=r"names 2 stages.*01-evaluate, 03-evaluate"):
            bench.again(from_stage="evaluate")

    def test_a_stage_put_in_front_moves_the_others_without_running_them_again(self, bench):
        bench.again()
        head, tail = RECIPE.split("stages:\n")
        bench.write(
            f"{head}stages:\n  - evaluate: {{{{data: {{data}}, metrics: [perplexity], samples: 1}}}}\n{tail}"
        )
        result = bench.again()
        assert bench.ran == ["01-evaluate"]
        assert [s.status for s in result.stages] == ["done", "shared", "shared", "shared"]
        assert [p.name for p in sorted((bench.place / "superseded").iterdir())] == ["02-out", "03-after"]
        bench.write()  # and taking it away again runs nothing
        assert [s.status for s in bench.again().stages] == ["shared"] * 3
        assert bench.ran == []

    def test_overrides_and_output_reach_the_recipe(self, bench, tmp_path):
        result = bench.again(overrides=["export.dtype=float32"], output=tmp_path / "elsewhere")
        assert result.folder == tmp_path / "elsewhere" / "demo"
        assert result.stages[1].manifest.config["dtype"] == "float32"

    def test_stages_of_another_run_with_the_same_inputs_are_taken_over(self, bench, tmp_path):
        first = bench.again()
        other = bench.again(output=tmp_path / "elsewhere", reuse=[first.folder])
        assert bench.ran == []
        assert [s.status for s in other.stages] == ["shared"] * 3


class TestWhatStops:
    def test_a_failed_stage_keeps_those_before_it(self, bench):
        bench.broken["out"] = TrainingError("The loss is not finite.")
        with pytest.raises(TrainingError):
            bench.again()
        found = record(bench)
        assert (found["status"], found["error"]) == ("failed", "The loss is not finite.")
        assert [s["status"] for s in found["stages"]] == ["done", "failed", "pending"]
        assert found["stages"][1]["checks"][0]["name"] == "seen"
        bench.broken.clear()
        bench.again()
        assert bench.ran == ["02-out", "03-after"]
        assert record(bench)["error"] is None

    def test_an_interruption_is_told_apart(self, bench):
        bench.broken["after"] = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            bench.again()
        assert record(bench)["status"] == "interrupted"
        bench.broken.clear()
        assert bench.again().stages[2].reason == "it was interrupted"
        assert bench.ran == ["03-after"]

    @pytest.mark.parametrize(
        ("error", "words"),
        [
            (TrainingError("The loss is not finite."), "The run failed in 02-out. The loss is not finite."),
            (KeyError("tail"), "The run failed in 02-out. KeyError: &#39;tail&#39;"),
            (KeyboardInterrupt(), "Interrupted in 02-out. It was stopped by hand (Ctrl-C)."),
        ],
    )
    def test_its_page_is_written_too(self, bench, monkeypatch, error, words):
        monkeypatch.delitem(sys.modules, "luthier.report.report")
        bench.broken["out"] = error
        with pytest.raises(type(error)):
            bench.again()
        page = (bench.place / "report.html").read_text().replace("</strong>", "")
        assert words in page
        assert "Done and kept: 01-evaluate." in page

    def test_a_page_that_cannot_be_written_does_not_hide_the_error(self, bench, monkeypatch):
        monkeypatch.setattr(sys.modules["luthier.report.report"], "write_report", lambda folder: 1 / 0)
        bench.broken["out"] = TrainingError("The loss is not finite.")
        with pytest.raises(TrainingError):
            bench.again()

    def test_a_full_disk_met_in_a_stage_is_told_in_words(self, bench):
        bench.broken["out"] = OSError(errno.ENOSPC, "No space left on device")
        with pytest.raises(ResourceError, match="disk is full"):
            bench.again()

    def test_memory_that_ran_out_is_told_in_words(self, bench):
        bench.broken["out"] = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 GB")
        with pytest.raises(ResourceError, match=r"memory did not do.*per_device_train_batch_size"):
            bench.again()

    def test_before_anything_runs_the_folder_must_be_writable(self, bench):
        bench.output.write_text("a file where the folder should be")
        with pytest.raises(ResourceError, match="is a file"):
            bench.again()
        assert bench.ran == []

    def test_before_anything_runs_the_disk_must_hold_it(self, bench):
        bench.plan = plan(disk=10**18)
        with pytest.raises(ResourceError, match="writes up to"):
            bench.again()
        assert bench.ran == []

    def test_a_plan_that_does_not_fit_is_refused_unless_told(self, bench):
        bench.plan = plan(fits=False)
        shown = []
        with pytest.raises(ResourceError, match=r"needs 9 GB.*--ignore-memory"):
            bench.again(show_plan=shown.append)
        assert shown == [bench.plan]
        assert bench.ran == []
        bench.again(ignore_memory=True)
        assert bench.ran == ALL

    def test_two_runs_in_one_folder_are_refused(self, bench):
        bench.place.mkdir(parents=True)
        with locked(bench.place), pytest.raises(ResourceError, match="Another run"):
            bench.again()

    def test_a_fault_of_the_recipe_comes_before_any_folder_is_made(self, bench):
        with pytest.raises(RecipeError):
            bench.again(overrides=["export.dtype=float31"])
        assert not bench.output.exists()


def test_importing_the_runner_loads_no_torch():
    code = (
        "import sys, luthier.recipe.runner; assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_runner_is_what_the_package_offers():
    import luthier

    assert luthier.run is runner.run


class TestCommandLine:
    def luthier(self, bench, *words):
        return CliRunner().invoke(
            app, ["run", str(bench.folder / "recipe.yaml"), *words], env={"COLUMNS": "200"}
        )

    def test_shows_the_stages_and_what_came_out(self, bench, monkeypatch):
        monkeypatch.setattr("luthier.cli.plan.show", lambda plan, console: console.print("the plan"))
        result = self.luthier(bench)
        assert result.exit_code == 0, result.output
        for text in ("the plan", *ALL, "perplexity 2", "02-out/model", "report.html"):
            assert text in result.output
        assert "unchanged" in self.luthier(bench).output
        self.luthier(bench, "--from", "after")
        assert bench.ran[3:] == ["03-after"]

    def test_status_1_when_a_stated_figure_was_missed(self, bench, monkeypatch):
        monkeypatch.setattr("luthier.cli.plan.show", lambda plan, console: None)
        bench.missed = True
        result = self.luthier(bench)
        assert result.exit_code == 1
        assert result.output.count("seen = 1 (held to 2)") == len(ALL), "logged once a stage, and not again"
        assert "✗ seen: see above" in result.output
        assert "✗ seen: 1 (held to 2)" in self.luthier(bench).output, "of a stage that did not run again"
        assert record(bench)["status"] == "done"

    def test_an_unwritable_folder_is_one_paragraph_and_status_2(self, bench):
        bench.output.write_text("")
        words = [sys.executable, "-m", "luthier.cli.main", "run", str(bench.folder / "recipe.yaml")]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("error: Cannot make the folder")
        assert "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
