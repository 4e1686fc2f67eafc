"""A stage's folder appears whole or not at all, and a manifest knows why its stage must run again."""

import json
import multiprocessing
import os
import signal
import time

import pytest

from luthier.errors import ResourceError
from luthier.recipe import manifest
from luthier.recipe.manifest import Manifest, StageFolder, differences, hash_once, locked, write_json


def make(folder: StageFolder, identity: dict, content: str) -> Manifest:
    """Do a stage's work: one artefact with `content`."""
    session = folder.begin(identity)
    (session.folder / "model").mkdir(exist_ok=True)
    (session.folder / "model" / "weights").write_text(content)
    return Manifest("tune", "tune", artefacts=manifest.record_artefacts(session.folder), **parts(identity))


def parts(identity: dict) -> dict:
    return {key: value for key, value in identity.items() if key != "stage"}


def identity(**changes) -> dict:
    base = {"stage": "tune", "config": {"lr": 0.1}, "inputs": {}, "versions": {"torch": "2"}, "seed": 0}
    return base | changes


class Killed(BaseException):
    pass


@pytest.fixture
def folder(tmp_path):
    return StageFolder(tmp_path / "run", 2, "tune")


class TestAppearsWhole:
    def test_is_invisible_while_in_work_and_whole_afterwards(self, folder):
        result = make(folder, identity(), "new")
        assert not folder.final.exists()
        folder.publish(result)
        assert not folder.partial.exists()
        assert (folder.final / "model" / "weights").read_text() == "new"
        assert folder.manifest() == result

    def test_checkpoints_do_not_stay(self, folder):
        result = make(folder, identity(), "new")
        (folder.partial / "checkpoints" / "checkpoint-3").mkdir(parents=True)
        folder.publish(result)
        assert sorted(p.name for p in folder.final.iterdir()) == ["manifest.json", "model"]

    @pytest.mark.parametrize("step", range(6))
    def test_a_kill_at_any_step_of_the_replacement_leaves_the_old_state_or_the_new(
        self, folder, step, monkeypatch
    ):
        """Each file operation of publishing is in turn the one that never happens."""
        folder.publish(make(folder, identity(), "old"))
        result = make(folder, identity(seed=1), "new")
        (folder.partial / "checkpoints").mkdir()
        count = 0

        def dies(operation):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count > step:
                    raise Killed
                return operation(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dies(os.replace))
            patch.setattr(manifest.Path, "rename", dies(manifest.Path.rename))
            patch.setattr(manifest.Path, "unlink", dies(manifest.Path.unlink))
            patch.setattr(manifest.shutil, "rmtree", dies(manifest.shutil.rmtree))
            with pytest.raises(Killed):
                folder.publish(result)
        folder.recover()
        content = (folder.final / "model" / "weights").read_text()
        assert content == ("old" if folder.manifest().seed == 0 else "new")
        assert not folder.old.exists()
        if content == "new":
            assert folder.manifest() == result
        else:  # the work is kept, for the session that resumes it
            assert folder.begin(identity(seed=1)).number == 2

    def test_a_folder_half_removed_is_not_resumed(self, folder, monkeypatch):
        make(folder, identity(), "half")
        monkeypatch.setattr(manifest.shutil, "rmtree", lambda path, **_: None)  # killed before it removes
        folder.discard()
        assert not folder.partial.exists()


class TestResume:
    def test_keeps_work_with_the_same_inputs_and_counts_its_time(self, folder):
        folder.begin(identity())
        checkpoint = folder.partial / "checkpoints" / "checkpoint-5"
        checkpoint.mkdir(parents=True)
        os.utime(checkpoint, (time.time() + 40, time.time() + 40))
        session = folder.begin(identity())
        assert session.has_checkpoint
        assert session.number == 2
        assert 39 < session.seconds_before < 42

    def test_drops_work_with_other_inputs_or_when_told_to(self, folder):
        for inputs, resume in ((identity(seed=1), True), (identity(seed=1), False)):
            folder.begin(identity(seed=1))
            (folder.partial / "checkpoints" / "checkpoint-5").mkdir(parents=True)
            session = folder.begin(identity() if resume else inputs, resume=resume)
            assert not session.has_checkpoint
            assert session.number == 1


class TestReasons:
    def test_names_what_changed(self):
        old = identity(inputs={"data": {"path": "a.jsonl", "sha256": "1"}})
        new = identity(
            inputs={"data": {"path": "a.jsonl", "sha256": "2"}}, config={"lr": 0.2}, versions={"torch": "3"}
        )
        assert differences(old, new) == ["lr: 0.1 → 0.2", "data changed", "torch 2 → 3"]
        assert differences(old, old) == []

    def test_a_manifest_survives_its_file(self, tmp_path):
        first = Manifest("tune", "t", {"a": [1]}, {"data": {"sha256": "x"}}, {"torch": "2"}, 0, seconds=1.5)
        write_json(tmp_path / "manifest.json", first.as_dict())
        second = Manifest.from_dict(json.loads((tmp_path / "manifest.json").read_text()))
        assert second == first
        assert second.output_hash() == first.output_hash()

    def test_harm_to_an_artefact_is_found(self, folder):
        folder.publish(make(folder, identity(), "abcd"))
        result = folder.manifest()
        assert manifest.damage(folder.final, result) is None
        weights = folder.final / "model" / "weights"
        weights.write_text("abcX")  # same size, one byte flipped
        assert "model/weights is not as it was saved" in manifest.damage(folder.final, result)
        weights.unlink()
        assert "model/weights is missing" in manifest.damage(folder.final, result)


def test_a_hash_follows_the_content(tmp_path):
    path = tmp_path / "data"
    path.write_text("one")
    first = hash_once(path)
    path.write_text("two!")
    assert hash_once(path) != first
    path.write_text("one")
    os.utime(path, ns=(1, 1))
    assert hash_once(path) == first


def test_copying_a_stage_of_another_run_gives_a_whole_folder(folder, tmp_path):
    folder.publish(make(folder, identity(), "shared"))
    second = StageFolder(tmp_path / "other", 1, "tune")
    second.copy(folder.final)
    assert not second.final.exists()
    second.recover()
    assert second.manifest() == folder.manifest()
    assert (second.final / "model" / "weights").read_text() == "shared"


def _hold(folder, ready):
    with locked(folder):
        if os.fork() == 0:  # a forked worker, as data loaders have, must not keep the lock
            time.sleep(30)
            os._exit(0)
        ready.set()
        time.sleep(30)


class TestLock:
    def test_refuses_a_second_process_and_not_after_the_first_was_killed(self, tmp_path):
        context = multiprocessing.get_context("fork")
        ready = context.Event()
        holder = context.Process(target=_hold, args=(tmp_path, ready))
        holder.start()
        assert ready.wait(10)
        with (
            pytest.raises(ResourceError, match=f"Another run is working .*process {holder.pid}"),
            locked(tmp_path),
        ):
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
        with locked(tmp_path):
            pass

    def test_refuses_a_second_run_in_the_same_process(self, tmp_path):
        with locked(tmp_path), pytest.raises(ResourceError, match="in this process"), locked(tmp_path):
            pass
        with locked(tmp_path):
            pass
