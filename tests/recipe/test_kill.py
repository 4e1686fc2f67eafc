"""kill -9 at any moment leaves the old state or one that resumes, and Ctrl-C stops cleanly.

Each run is a process that is really killed. What the resumed run ends with equals, loss by loss and bit by
bit, what an uninterrupted one ends with: dropout is on, so that the random streams count too.
"""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import killing
import pytest
import tiny

from luthier.files import hash_file
from luthier.models.saving import save
from luthier.recipe.manifest import Manifest

RECIPE = """\
name: demo
model: {{name: {folder}/base, dtype: float32, device: cpu}}
output: {folder}/{output}
seed: 3
stages:
  - tune:
      data: {folder}/data.jsonl
      method: {method}
      training:
        max_steps: 12
        save_steps: 3
        logging_steps: 1
        learning_rate: 1.0e-3
        per_device_train_batch_size: 2
"""
METHODS = {
    "lora": "{name: lora, r: 4, lora_dropout: 0.1}",
    "full": "full",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Base model and data."""
    folder = tmp_path_factory.mktemp("kill")
    save(tiny.llama(attention_dropout=0.1), folder / "base", tiny.tokenizer())
    rows = [{"prompt": f"Question {i}?", "completion": f"Answer {i * 7}."} for i in range(24)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def straight(place):
    """{method: (manifest, number of file changes)} of runs that nobody disturbed."""
    found = {}
    for method in METHODS:
        count = place / f"{method}.count"
        assert killing.finish(recipe(place, method, f"straight-{method}"), count_in=count) == 0
        found[method] = (manifest(place, f"straight-{method}"), int(count.read_text()))
    return found


def recipe(place: Path, method: str, output: str) -> Path:
    path = place / f"{output}.yaml"
    path.write_text(RECIPE.format(folder=place, method=METHODS[method], output=output))
    return path


def manifest(place: Path, output: str) -> Manifest:
    return Manifest.from_dict(json.loads((place / output / "demo/01-tune/manifest.json").read_text()))


def losses(found: Manifest) -> list[float]:
    return [entry["loss"] for entry in found.history if "loss" in entry]


def weights(found: Manifest) -> dict[str, str]:
    return {path: entry["sha256"] for path, entry in found.artefacts.items() if path.endswith(".safetensors")}


def assert_whole_or_absent(folder: Path) -> None:
    """A finished stage's folder has all that its manifest lists, as it was written."""
    for stage in folder.glob("[0-9][0-9]-*"):
        if stage.suffix in (".partial", ".old"):
            continue
        found = Manifest.from_dict(json.loads((stage / "manifest.json").read_text()))
        for path, entry in found.artefacts.items():
            assert hash_file(stage / path) == entry["sha256"]


@pytest.mark.parametrize("method", METHODS)
def test_killed_again_and_again_it_ends_as_if_undisturbed(place, straight, method):
    expected, changes = straight[method]
    assert len(losses(expected)) == 12
    output = f"killed-{method}"
    path = recipe(place, method, output)
    # Later and later: in the first steps, in a checkpoint, in the last save, in putting the folder in place.
    moments = [
        changes // 5,
        changes // 4,
        changes // 3,
        changes // 2,
        changes // 2 + 1,
        changes - 8,
        changes - 4,
    ]
    sessions = 0
    for moment in moments:
        sessions += 1
        code = killing.finish(path, die_at=moment)
        assert_whole_or_absent(place / output / "demo")
        if code == 0:  # a resumed run has fewer changes to make
            break
        assert code == -signal.SIGKILL
    assert sessions > 3
    assert killing.finish(path) == 0
    found = manifest(place, output)
    assert losses(found) == losses(expected)
    assert weights(found) == weights(expected)


@pytest.fixture(scope="module")
def changes_when_forced(place, straight):
    """The number of file changes of a run that replaces a finished one."""
    path, count = finished(place, "forced"), place / "forced.count"
    assert killing.finish(path, count_in=count, force=True) == 0
    return int(count.read_text())


def finished(place: Path, output: str) -> Path:
    """A recipe whose run is done already."""
    shutil.copytree(place / "straight-lora", place / output)
    return recipe(place, "lora", output)


@pytest.mark.parametrize("back", [0, 1, 2, 4, 6])
def test_killed_while_a_new_result_takes_the_old_ones_place(place, straight, changes_when_forced, back):
    """Forced to run again, and killed at one of the last changes: the old result or the new, never none."""
    path = finished(place, f"replaced-{back}")
    assert killing.finish(path, die_at=changes_when_forced - back, force=True) == -signal.SIGKILL
    assert killing.finish(path) == 0
    assert_whole_or_absent(place / f"replaced-{back}" / "demo")
    assert weights(manifest(place, f"replaced-{back}")) == weights(straight["lora"][0])


def test_killed_from_outside_while_training(place, straight):
    expected, _ = straight["lora"]
    path = recipe(place, "lora", "outside")
    process = killing.start(path)
    wait_for(place / "outside/demo/01-tune.partial/checkpoints", "checkpoint-3")
    process.kill()
    process.join()
    assert not (place / "outside/demo/01-tune").exists()
    assert killing.finish(path) == 0
    found = manifest(place, "outside")
    assert losses(found) == losses(expected)
    assert found.sessions == 2


def test_ctrl_c_stops_with_a_checkpoint_and_status_130(place, straight):
    expected, _ = straight["lora"]
    path = recipe(place, "lora", "interrupted")
    process = killing.start(path)
    checkpoints = place / "interrupted/demo/01-tune.partial/checkpoints"
    wait_for(checkpoints, "checkpoint-3")
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    steps = [int(path.name.split("-")[1]) for path in checkpoints.glob("checkpoint-*")]
    record = json.loads((place / "interrupted/demo/run.json").read_text())
    assert record["status"] == "interrupted"
    assert record["stages"][0]["status"] == "interrupted"
    assert max(steps) >= 3
    assert killing.finish(path) == 0
    assert losses(manifest(place, "interrupted")) == losses(expected)


def wait_for(folder: Path, name: str) -> None:
    deadline = time.monotonic() + 60
    while not (folder / name).exists():
        assert time.monotonic() < deadline, f"{name} does not come"
        time.sleep(0.002)
