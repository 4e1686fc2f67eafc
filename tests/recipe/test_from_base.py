"""A stage may start from the recipe's model again, and a method may name stages whose adapters it takes."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file

from luthier.errors import RecipeError
from luthier.models.saving import save
from luthier.recipe.planner import plan
from luthier.recipe.runner import run
from luthier.recipe.source import load_recipe

TUNE = "data: {path: rows.jsonl}, objective: classification, training: {max_steps: 2, learning_rate: 1.0e-2}"
SERIAL = "{name: serial, placement: pfeiffer, bottleneck_dim: 4}"
RECIPE = f"""\
name: mixed
model: {{name: base, task: classification, dtype: float32, device: cpu}}
stages:
  - tune: {{name: one, {TUNE}, method: {SERIAL}}}
  - tune: {{name: two, from_base: true, {TUNE}, method: {SERIAL}}}
  - tune: {{name: both, from_base: true, {TUNE}, method: {{name: fusion, adapters: [one, two]}}}}
  - evaluate: {{data: rows.jsonl, metrics: [accuracy]}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tiny.bert(), tmp_path / "base", tiny.tokenizer())
    rows = [{"text": f"Order {i} arrived.", "label": i % 3} for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        RECIPE.replace("data: rows.jsonl,", "data: {path: rows.jsonl, allow_leakage: true},")
    )
    return tmp_path


def weights(folder):
    found = load_file(folder / "adapter" / "adapter_model.safetensors")
    return {name: tensor for name, tensor in found.items() if ".layer." in name}


def test_a_method_takes_the_adapters_of_the_stages_that_it_names(folder):
    result = run("recipe.yaml", overrides=["two.training.learning_rate=3.0e-2"])
    stages = {stage.name: stage for stage in result.stages}
    mixed = weights(stages["both"].folder)
    for number, name in enumerate(("one", "two")):
        for key, tensor in weights(stages[name].folder).items():
            start, _, inside = key.partition(".serial_delta.")
            own = f"{start}.fusion_delta.adapter.adapters.{number}.{inside.removeprefix('adapter.')}"
            assert torch.equal(mixed[own], tensor), key
    planned = plan(load_recipe("recipe.yaml"))
    assert [s.trainable for s in planned.stages] == [s.manifest.trainable for s in result.stages]


def test_what_a_named_stage_left_decides_whether_the_stage_runs_again(folder):
    run("recipe.yaml")
    again = run("recipe.yaml")
    assert {stage.status for stage in again.stages} == {"unchanged"}
    changed = run("recipe.yaml", overrides=["one.training.max_steps=3"])
    assert [s.status for s in changed.stages] == ["done", "unchanged", "done", "done"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("from_base: true, ", "", "carries the adapter of stage 'one' already"),
        ("[one, two]", "[one, tow]", "no adapter 'tow'"),
        ("[one, two]", "[one, both]", "no adapter 'both'"),
    ],
)
def test_what_cannot_stand_is_refused_before_anything_loads(folder, old, new, message):
    file = folder / "recipe.yaml"
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(RecipeError, match=message):
        load_recipe(file)
