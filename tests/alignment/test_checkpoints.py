"""A checkpoint is held to the record of its files; what differs is named with the way on."""

import json

import pytest

from luthier.alignment.checkpoints import require_whole, seal
from luthier.errors import TrainingError


@pytest.fixture
def checkpoint(tmp_path):
    for step in (2, 9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "inner").mkdir(parents=True)
        (folder / "optimizer.pt").write_bytes(b"state" * 100)
        (folder / "inner" / "shard").write_bytes(b"shard")
        seal(folder)
    return tmp_path / "checkpoint-10"


def test_a_whole_one_passes_and_so_does_one_without_record(checkpoint):
    require_whole(checkpoint)
    listed = json.loads((checkpoint / "luthier.json").read_text())["files"]
    assert set(listed) == {"optimizer.pt", "inner/shard"}
    (checkpoint / "luthier.json").unlink()
    (checkpoint / "optimizer.pt").write_bytes(b"of another program")
    require_whole(checkpoint)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("optimizer.pt", b"stale" + b"state" * 99, r"optimizer\.pt is not as it was saved.*checksum"),
        ("optimizer.pt", b"state" * 50, r"optimizer\.pt is not as it was saved.*250 bytes, not 500"),
        ("inner/shard", None, r"inner/shard is missing"),
        ("luthier.json", b'{"files": {', r"luthier\.json cannot be read"),
    ],
)
def test_damage_is_named_with_the_checkpoint_before(checkpoint, file, content, message):
    path = checkpoint / file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(TrainingError, match=message) as caught:
        require_whole(checkpoint)
    assert caught.value.fix == f"Delete the folder {checkpoint} to go on from checkpoint-9."


def test_the_first_one_leaves_the_beginning(checkpoint):
    first = checkpoint.with_name("checkpoint-2")
    (first / "optimizer.pt").unlink()
    with pytest.raises(TrainingError, match="start again from the beginning"):
        require_whole(first)
