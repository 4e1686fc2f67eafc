"""The stages on a tiny model: what each leaves, and that sharing a process changes nothing."""

import json
from pathlib import Path

import killing
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import luthier
from luthier.errors import CheckError, RecipeError
from luthier.models.saving import save
from luthier.recipe.runner import run

EVALUATE = "evaluate: {data: test.jsonl, metrics: [exact_match, perplexity], generation: {max_new_tokens: 8}}"
TUNE = (
    "tune: {data: train.jsonl, method: METHOD, training: {max_steps: 6, logging_steps: 1, "
    "save_strategy: 'no', learning_rate: 1.0e-2, per_device_train_batch_size: 4}}"
)
LORA = "{name: lora, r: 4, lora_dropout: 0.1}"


def rows(first: int, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"Say {i}.", "completion": f"It is {i}."} for i in range(first, first + count)]


def write_rows(path: Path, found: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("stages")
    save(tiny.llama(), folder / "base", tiny.tokenizer())
    write_rows(folder / "train.jsonl", rows(0, 24))
    write_rows(folder / "test.jsonl", rows(100, 6))
    return folder


@pytest.fixture(scope="module")
def tuned(place):
    """Evaluate, tune, evaluate in this process."""
    return run(recipe(place, EVALUATE, TUNE, EVALUATE, name="tuned"))


def recipe(place: Path, *stages: str, name: str = "demo", method: str = LORA) -> Path:
    settings = {"name": str(place / "base"), "dtype": "float32", "device": "cpu"}
    lines = [f"name: {name}", f"model: {json.dumps(settings)}", f"output: {place / 'runs'}", "stages:"]
    lines += [f"  - {stage}".replace("METHOD", method) for stage in stages]
    path = place / f"{name}.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def weights(stage) -> dict[str, str]:
    files = stage.manifest.artefacts
    return {path: entry["sha256"] for path, entry in files.items() if path.endswith(".safetensors")}


def predictions(stage) -> list[dict]:
    return [json.loads(line) for line in (stage.folder / "predictions.jsonl").read_text().splitlines()]


def test_a_tuning_states_what_it_cost_on_general_text(tuned):
    found = [c for c in tuned.stages[1].manifest.checks if c["name"] == "forgetting on general text"]
    assert len(found) == 1
    assert found[0]["value"] != 1
    assert found[0]["passed"]


class TestOneProcess:
    @pytest.mark.parametrize("method", [LORA, "full"])
    def test_equals_a_process_for_each_stage(self, place, method):
        """The first evaluation sees the base, the second what the tuned folder holds."""
        stages, name = [EVALUATE, TUNE, EVALUATE], "full" if method == "full" else "lora"
        together = run(recipe(place, *stages, name=f"together-{name}", method=method))
        for count in (1, 2, 3):
            path = recipe(place, *stages[:count], name=f"apart-{name}", method=method)
            assert killing.finish(path) == 0
        apart = run(path)
        assert [s.status for s in apart.stages] == ["unchanged"] * 3
        for one, two in zip(together.stages, apart.stages, strict=True):
            assert one.manifest.metrics == two.manifest.metrics or one.kind == "tune"
            assert weights(one) == weights(two)
        for i in (0, 2):
            assert predictions(together.stages[i]) == predictions(apart.stages[i])
        assert together.stages[0].manifest.metrics != together.stages[2].manifest.metrics

    def test_a_tuned_model_is_the_same_whatever_ran_before(self, place, tuned):
        assert weights(run(recipe(place, TUNE, name="alone")).stages[0]) == weights(tuned.stages[1])

    def test_the_seed_decides_what_is_learnt(self, place, tuned):
        other = run(recipe(place, TUNE, name="seed"), overrides=["seed=1"])
        assert weights(other.stages[0]) != weights(tuned.stages[1])


class TestTune:
    def test_leaves_an_adapter_and_what_was_measured(self, tuned):
        stage = tuned.stages[1]
        found = stage.manifest
        assert sorted(p.name for p in stage.folder.iterdir()) == ["adapter", "manifest.json"]
        model, _ = luthier.load(stage.artefact)
        assert found.trainable == sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
        assert found.total == sum(p.numel() for p in model.parameters())
        assert [entry["step"] for entry in found.history if "loss" in entry] == [1, 2, 3, 4, 5, 6]
        assert found.metrics["steps"] == 6
        assert found.metrics["tokens"] > 0
        assert found.metrics["tokens_per_second"] > 0
        assert found.artefact_bytes == sum(p.stat().st_size for p in stage.artefact.iterdir())
        assert found.peak_memory_bytes > 0
        assert all(check["passed"] for check in found.checks)
        placement = found.details["placement"]
        assert (placement["dtype"], placement["device"], placement["attn"]) == ("float32", "cpu", "sdpa")
        assert placement["reason"] == "float32 (as asked) on cpu (as asked), sdpa attention"
        assert {"before", "step1", "data"} <= {check["when"] for check in found.checks}

    def test_leaves_a_whole_model_where_its_own_weights_were_trained(self, place):
        stage = run(recipe(place, TUNE, method="full", name="whole")).stages[0]
        assert stage.artefact.name == "model"
        AutoModelForCausalLM.from_pretrained(stage.artefact)

    def test_a_second_method_needs_the_first_one_merged(self, place):
        with pytest.raises(RecipeError, match=r"carries the adapter of stage 'tune' already.*export"):
            run(recipe(place, TUNE, TUNE, name="twice"))


def bad_rows(place: Path, name: str, count: int, **changes) -> str:
    """A spec of a file with good rows and two bad ones, which are set aside."""
    write_rows(place / name, [*rows(0, count), {"prompt": "No answer."}, {"prompt": "Nor here."}])
    return json.dumps({"path": name, "on_bad": "quarantine", "max_bad": 0.5} | changes)


class TestData:
    def test_what_became_of_the_data_is_kept_and_bad_records_lie_in_the_stages_folder(self, place):
        spec = bad_rows(place, "bad.jsonl", 12, duplicates="drop")
        write_rows(place / "held.jsonl", rows(200, 4))
        text = TUNE.replace("train.jsonl", spec).replace("method:", "eval_data: held.jsonl, method:")
        stage = run(recipe(place, text, name="bad")).stages[0]
        aside = stage.folder / "rejected.jsonl"
        assert len(aside.read_text().splitlines()) == 2
        account = stage.manifest.details["data"]
        assert (account["read"], account["rows"], account["duplicates"]) == (14, 12, 0)
        assert sum(account["rejected"].values()) == 2
        assert account["rejected_file"] == str(aside)
        assert account["leaked"] == 0
        assert account["encoding"]["examples"] == 12
        assert account["encoding"]["truncated"] == account["encoding"]["emptied"] == 0
        assert stage.manifest.details["eval_data"]["encoding"]["examples"] == 4
        assert ".partial" not in json.dumps([stage.manifest.checks, stage.manifest.details])
        assert sorted(p.name for p in place.glob("*rejected*")) == []  # none beside the data
        assert "eval_loss" in {key for entry in stage.manifest.history for key in entry}

    def test_of_an_evaluation_too(self, place):
        text = EVALUATE.replace("test.jsonl", bad_rows(place, "test-bad.jsonl", 3))
        stage = run(recipe(place, text, name="bad-test")).stages[0]
        assert stage.manifest.details["data"]["rows"] == 3
        assert (stage.folder / "rejected.jsonl").exists()

    def test_leaks_into_the_held_out_data_are_left_out_by_quarantine(self, place):
        write_rows(place / "held.jsonl", rows(2, 4))
        spec = "{path: train.jsonl, on_bad: quarantine, max_bad: 0.5}"
        text = TUNE.replace("train.jsonl", spec).replace("method:", "eval_data: held.jsonl, method:")
        account = run(recipe(place, text, name="held")).stages[0].manifest.details["data"]
        assert (account["rejected"], account["rows"]) == ({"W_LEAK": 4}, 20)

    def test_what_was_trained_on_is_not_measured_and_nothing_runs_before_that_is_known(self, place):
        write_rows(place / "mixed.jsonl", [*rows(20, 6), *rows(100, 2)])
        after = EVALUATE.replace("test.jsonl", "mixed.jsonl")
        with pytest.raises(
            CheckError, match=r"leakage = 4 .*train\.jsonl:21.*allow_leakage: true.*'evaluate'"
        ):
            run(recipe(place, EVALUATE, TUNE, after, name="leak"))
        assert not list((place / "runs" / "leak").glob("0*"))
        allowed = after.replace("mixed.jsonl", "{path: mixed.jsonl, allow_leakage: true}")
        stages = run(recipe(place, after, TUNE, EVALUATE, allowed, name="leak")).stages
        lines = [[c for c in s.manifest.checks if c["name"] == "train/test leakage"] for s in stages]
        assert [[c["value"] for c in found] for found in lines] == [[], [], [0], [4]]
        assert lines[2][0]["tolerance"] == 0
        ends = {c["name"] for c in stages[3].manifest.checks if c["when"] == "end"}
        assert "perplexity not worse than before" in ends  # the first stage measured the same rows


class TestEvaluate:
    def test_leaves_a_prediction_for_each_row(self, tuned):
        stage = tuned.stages[0]
        found = predictions(stage)
        assert [row["index"] for row in found] == list(range(6))
        assert found[0].keys() >= {"prompt", "gold", "prediction", "scores"}
        assert set(stage.manifest.metrics) >= {"exact_match", "perplexity"}
        assert stage.manifest.metrics["perplexity"].keys() >= {"value", "low", "high", "n"}

    def test_holds_the_result_against_the_stated_figure(self, place):
        text = EVALUATE.replace("metrics:", "expect: {perplexity: 'BOUND'}, metrics:")
        missed = run(recipe(place, text.replace("BOUND", "< 1.5"), name="missed"))
        assert not missed.passed
        (line,) = [check for check in missed.checks if check["when"] == "end"]
        assert (line["name"], line["passed"], line["tolerance"]) == ("perplexity as stated", False, "< 1.5")
        assert run(recipe(place, text.replace("BOUND", "< 1.0e9"), name="met")).passed

    def test_says_what_tuning_changed(self, tuned):
        before, _, after = tuned.stages
        lines = {check["name"]: check for check in after.manifest.checks if check["when"] == "end"}
        line = lines["perplexity not worse than before"]
        assert line["tolerance"] == before.manifest.metrics["perplexity"]["value"]
        assert line["value"] == after.manifest.metrics["perplexity"]["value"] < line["tolerance"]
        assert line["passed"]


def test_an_adapter_leaves_as_a_lora_of_another_rank(place):
    result = run(recipe(place, TUNE, "export: {format: lora, rank: 2}", name="rank"))
    stage = result.stages[1]
    config = json.loads((stage.folder / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 2)
    names = {check["name"]: check for check in stage.manifest.checks}
    assert 0 < names["as a LoRA"]["value"] < 1
    assert names["logits after reload"]["passed"]


def test_exports_stand_alone_and_are_what_later_stages_read(place):
    """An adapter is merged, the merged model is tuned again, and that adapter is exported as one."""
    chain = (TUNE, "export: {dtype: bfloat16}", TUNE, "export: {format: adapter}")
    result = run(recipe(place, *chain, name="chain"))
    merged, adapter = result.stages[1], result.stages[3]
    assert AutoModelForCausalLM.from_pretrained(merged.artefact, dtype="auto").dtype == torch.bfloat16
    assert {check["when"] for check in merged.manifest.checks} >= {"merge", "export"}
    assert merged.manifest.details["merged"]
    assert result.artefact == adapter.artefact == adapter.folder / "adapter"
    base = json.loads((adapter.artefact / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(merged.artefact)
    assert weights(adapter) == weights(result.stages[2])


def test_classes_are_counted_in_the_data(place):
    write_rows(place / "labels.jsonl", [{"text": f"t {i}", "label": "abc"[i % 3]} for i in range(12)])
    stage = "tune: {data: labels.jsonl, method: METHOD, objective: classification, training: {max_steps: 2}}"
    evaluate = "evaluate: {data: {path: labels.jsonl, allow_leakage: true}, metrics: [accuracy]}"
    result = run(recipe(place, evaluate, stage, evaluate, name="classes"))
    model, _ = luthier.load(result.artefact, task="classification")
    assert model.config.num_labels == 3
    assert result.metrics["accuracy"]["n"] == 12
