"""A plan says what a recipe takes, and refuses what does not fit with the cheapest change that would."""

import json

import pytest
import tiny
from typer.testing import CliRunner

from luthier.cli.main import app
from luthier.errors import CheckError, MethodError, ResourceError
from luthier.models.saving import save
from luthier.recipe import machine, planner
from luthier.recipe.planner import plan
from luthier.recipe.source import load_recipe

RECIPE = """\
name: small
model: {name: MODEL, dtype: float32}
output: OUT
stages:
  - evaluate: {data: data.jsonl, metrics: [exact_match, perplexity], samples: 5}
  - tune:
      data: data.jsonl
      method: {name: lora, r: 4}
      objective: {name: sft, max_length: 64}
      training: {max_steps: 10, per_device_train_batch_size: 8}
  - export: {}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    save(tiny.llama(), folder / "model", tiny.tokenizer())
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i}." * (1 + i % 3)} for i in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = RECIPE.replace("MODEL", str(folder / "model")).replace("OUT", str(folder / "runs"))
    (folder / "recipe.yaml").write_text(text)
    return folder


@pytest.fixture
def planned(folder):
    return lambda *overrides: plan(load_recipe(folder / "recipe.yaml", overrides))


def test_a_long_text_is_many_blocks_where_documents_are_cut(planned, folder):
    (folder / "book.txt").write_text("A long book of many words, all in one document. " * 200)
    data = ["stages.1.tune.data=book.txt", "stages.1.tune.objective={name: pretrain, max_length: 32}"]
    assert planned(*data).stages[1].detail == "10 steps of 8 x 32 tokens"


def test_every_stage_is_planned(planned):
    found = planned()
    evaluate, tune, export = found.stages
    # r (in + out) of the seven linear layers of a block: q, o 32 + 32; k, v 32 + 16; gate, up, down 32 + 64.
    assert tune.trainable == 2 * 4 * (2 * 64 + 2 * 48 + 3 * 96)
    assert tune.total == tune.trainable + export.total
    assert evaluate.total == export.total == sum(p.numel() for p in tiny.llama().parameters())
    assert tune.memory.weights == 4 * export.total
    assert tune.memory.adapter == tune.memory.gradients == 4 * tune.trainable
    assert tune.memory.optimizer == 8 * tune.trainable
    assert tune.artefact_bytes == 4 * tune.trainable
    assert export.artefact_bytes == 4 * export.total
    assert found.fits
    assert found.verdict.startswith("It fits")
    assert json.loads(json.dumps(found.as_dict()))["stages"][1]["memory_bytes"] == tune.memory.total


def test_an_evaluation_of_what_was_trained_on_is_refused_unless_it_comes_before(folder):
    recipe = load_recipe(folder / "recipe.yaml")
    assert plan(recipe).stages[0].proofs == ()
    turned = recipe.model_copy(update={"stages": [recipe.stages[1], recipe.stages[0]]})
    with pytest.raises(CheckError, match=r"leakage = 40 .*data\.jsonl:1"):
        plan(turned)
    tune = recipe.stages[1]
    tune = tune.model_copy(update={"data": tune.data.model_copy(update={"allow_leakage": True})})
    (proof,) = plan(recipe.model_copy(update={"stages": [tune, recipe.stages[0]]})).stages[1].proofs
    assert (proof.name, proof.value, proof.tolerance) == ("train/test leakage", 40, None)


def test_a_step_is_tried_once_for_all_runs_that_differ_elsewhere(planned, monkeypatch):
    tried = []

    def simulate(model, rows, *args, original=planner.footprint.simulate, **kwargs):
        tried.append(rows)
        return original(model, rows, *args, **kwargs)

    monkeypatch.setattr(planner, "_known", {})
    monkeypatch.setattr(planner.footprint, "simulate", simulate)
    first = planned().stages[1]
    other = planned("tune.training.learning_rate=1e-3", "tune.training.max_steps=20", "seed=1").stages[1]
    assert tried == [8]
    assert other.memory == first.memory
    assert other.seconds > first.seconds
    assert planned("tune.method.r=8").stages[1].memory.adapter == 2 * first.memory.adapter
    planned("tune.training.per_device_train_batch_size=4")
    assert tried == [8, 8, 4]


@pytest.mark.parametrize(
    ("optim", "bytes_each"), [("adamw_torch", 8), ("sgd", 0), ("adamw_8bit", 2), ("lion_32bit", 4)]
)
def test_optimizer_state_follows_the_optimizer(planned, optim, bytes_each):
    found = planned(f"tune.training.optim={optim}").stages[1]
    assert found.memory.optimizer == bytes_each * found.trainable


def test_full_fine_tuning_holds_more_and_writes_more(planned):
    lora, full = planned().stages[1], planned("tune.method=full").stages[1]
    assert full.trainable == full.total
    assert full.memory.gradients > lora.memory.gradients
    assert full.disk_bytes > 5 * lora.disk_bytes
    assert (
        planned("tune.method=full", "tune.training.save_strategy=no").stages[1].disk_bytes < full.disk_bytes
    )


def test_without_max_steps_the_epochs_count(planned):
    five = planned("tune.training.max_steps=-1", "tune.training.num_train_epochs=1").stages[1]
    assert five.detail.startswith("5 steps of 8 x")  # 40 rows in batches of 8
    by_default = planned("tune.training={per_device_train_batch_size: 8}").stages[1]
    assert by_default.detail.startswith("15 steps of 8 x")


def test_long_texts_are_measured_by_windows(planned, folder):
    (folder / "long.txt").write_text("A long text. " * 20_000)
    found = planned(
        "evaluate={data: long.txt, metrics: [perplexity]}".replace("evaluate=", "stages.0.evaluate=")
    )
    assert found.stages[0].memory.activations < 100e6


def test_an_adapter_that_the_export_could_not_merge_is_refused_before_it_is_trained(planned):
    method = "tune.method={name: krona, variant: krona_b}"
    with pytest.raises(MethodError, match=r"down_proj' cannot be merged.*format: adapter"):
        planned(method)
    planned(method, "export.format=adapter")


def test_time_follows_the_steps(planned):
    ten, twenty = planned().stages[1].seconds, planned("tune.training.max_steps=20").stages[1].seconds
    assert twenty - machine.START == pytest.approx(2 * (ten - machine.START), rel=0.01)


@pytest.fixture
def little_memory(monkeypatch):
    """The machine has `share` of the way from what the stage holds anyway to what it needs."""

    def have(stage, share):
        fixed = stage.memory.total - stage.memory.activations
        monkeypatch.setattr(
            planner, "_available", lambda device: int(fixed + share * stage.memory.activations)
        )

    monkeypatch.setattr(machine, "RUNTIME", 0)
    return have


def only_tune(folder, tmp_path, *overrides):
    text = (folder / "recipe.yaml").read_text()
    start, tune, end = (text.index(f"  - {k}:") for k in ("evaluate", "tune", "export"))
    path = tmp_path / "recipe.yaml"
    path.write_text(text[:start] + text[tune:end].replace("data.jsonl", str(folder / "data.jsonl")))
    return path


def test_what_does_not_fit_is_refused_with_the_cheapest_change(folder, tmp_path, little_memory):
    recipe = load_recipe(only_tune(folder, tmp_path))
    little_memory(plan(recipe).stages[0], 0.6)
    found = plan(recipe)
    assert not found.fits
    assert "Stage 'tune' needs about" in found.verdict
    assert "activations" in found.verdict
    assert "per_device_train_batch_size: 4, gradient_accumulation_steps: 2" in found.change


def test_a_change_is_named_only_if_it_would_fit(folder, tmp_path, little_memory):
    recipe = load_recipe(only_tune(folder, tmp_path))
    little_memory(plan(recipe).stages[0], -1)
    found = plan(recipe)
    assert "choose a smaller model" in found.change


def test_the_command_refuses_unless_forced(folder, tmp_path, little_memory):
    path = only_tune(folder, tmp_path)
    run = CliRunner()
    done = run.invoke(app, ["plan", str(path)])
    assert done.exit_code == 0
    assert "It fits" in done.output
    little_memory(plan(load_recipe(path)).stages[0], 0.6)
    refused = run.invoke(app, ["plan", str(path)])
    assert isinstance(refused.exception, ResourceError)
    assert "It would fit" in str(refused.exception)
    assert run.invoke(app, ["plan", str(path), "--force"]).exit_code == 0
    as_json = run.invoke(app, ["plan", str(path), "--force", "--json"])
    assert json.loads(as_json.stdout)["fits"] is False
