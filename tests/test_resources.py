"""Peak memory is that of its block; a folder that cannot be written and a full disk are found beforehand."""

import errno
import mmap
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier import resources
from luthier.errors import ResourceError
from luthier.resources import (
    PeakMemory,
    kept_heap,
    not_needed_now,
    replaces_weights,
    require_space,
    require_writable,
    resident_memory,
    trim_heap,
)

MB = 1024 * 1024
SLACK = MB  # the kernel counts pages in batches
linux = pytest.mark.skipif(sys.platform != "linux", reason="the peak of a block needs /proc")


def take(megabytes: int) -> None:
    # Mapped afresh: the heap could hand out a hole of another test, which is resident already.
    with mmap.mmap(-1, megabytes * MB) as block:
        block[::4096] = b"\1" * (megabytes * MB // 4096)  # touch each page, or it is never resident


@linux
class TestPeakMemory:
    def test_counts_memory_that_was_freed_inside(self):
        with PeakMemory() as peak:
            take(200)
        assert peak.exact
        assert 200 * MB - SLACK <= peak.bytes - peak.start_bytes < 260 * MB

    def test_does_not_count_what_came_before(self):
        take(300)
        with PeakMemory() as peak:
            take(20)
        assert peak.bytes - peak.start_bytes < 100 * MB

    def test_a_block_inside_leaves_the_outer_peak_right(self):
        with PeakMemory() as outer:
            take(300)
            with PeakMemory() as inner:
                take(50)
        assert outer.bytes - outer.start_bytes >= 300 * MB - SLACK
        assert inner.bytes - inner.start_bytes < 150 * MB

    def test_a_peak_of_the_inner_block_counts_for_the_outer(self):
        with PeakMemory() as outer, PeakMemory() as inner:
            take(200)
        assert outer.bytes >= inner.bytes >= 200 * MB - SLACK

    def test_can_be_read_while_it_runs(self):
        with PeakMemory() as peak:
            take(100)
            assert peak.now() - peak.start_bytes >= 100 * MB - SLACK

    def test_says_so_where_the_mark_cannot_be_reset(self, monkeypatch, tmp_path):
        monkeypatch.setattr(resources, "_CLEAR", tmp_path)  # a folder: writing to it fails
        with PeakMemory() as peak:
            pass
        assert not peak.exact
        assert peak.bytes > 0


class TestWritable:
    def test_takes_a_folder_that_does_not_exist_yet_and_leaves_nothing(self, tmp_path):
        require_writable(tmp_path / "a" / "b")
        assert list(tmp_path.iterdir()) == []

    def test_refuses_a_path_through_a_file(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ResourceError, match="file is a file"):
            require_writable(tmp_path / "file" / "runs")

    def test_refuses_a_read_only_folder(self, tmp_path):
        (tmp_path / "locked").mkdir(mode=0o555)
        if os.geteuid() == 0:  # permissions do not bind root: ask as someone else
            if sys.platform != "linux":
                pytest.skip("needs a user who is not root")
            os.seteuid(65534)
        try:
            with pytest.raises(ResourceError, match=r"Cannot write in .*: Permission denied"):
                require_writable(tmp_path / "locked" / "runs")
        finally:
            if os.getuid() == 0:
                os.seteuid(0)


class TestSpace:
    def test_refuses_what_does_not_fit_and_says_both_numbers(self, monkeypatch, tmp_path):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(100, 99, 1_500_000))
        with pytest.raises(ResourceError, match=r"1\.5 MB free, and the run writes up to 2\.0 GB"):
            require_space(tmp_path / "runs", 2_000_000_000)
        require_space(tmp_path / "runs", 1_000_000)

    def test_a_full_disk_met_while_writing_is_told_in_words(self, tmp_path):
        error = OSError(errno.ENOSPC, "No space left on device")
        assert resources.is_resource(error)
        assert "disk is full" in str(resources.explain(error, tmp_path))
        assert not resources.is_resource(FileNotFoundError(errno.ENOENT, "no such file"))


def test_importing_it_loads_no_torch():
    code = "import sys, luthier.resources; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@linux
def test_freed_memory_stays_at_hand_inside_a_kept_heap_and_is_given_back_after_it():
    trim_heap()
    before = resident_memory()
    with kept_heap():
        tensors = [torch.ones(250_000) for _ in range(100)]
        del tensors
        assert resident_memory() - before > 80 * MB
    assert resident_memory() - before < 20 * MB


@linux
class TestReplacedWeights:
    @pytest.fixture
    def layer(self, tmp_path):
        """A layer of 40 MB in a mapped file, all of it read."""
        save_file({"weight": torch.ones(1000, 10_000)}, tmp_path / "model.safetensors")
        layer = torch.nn.Linear(10_000, 1000, bias=False)
        layer.weight.data = load_file(tmp_path / "model.safetensors")["weight"]
        assert float(layer.weight.data.sum()) == 1e7
        trim_heap()
        return layer

    def test_leave_memory_and_can_still_be_read(self, layer):
        old, before = layer.weight.data, resident_memory()
        with replaces_weights(layer):
            layer.weight.data = torch.zeros(1, 1)
        assert before - resident_memory() > 35 * MB
        assert float(old.sum()) == 1e7

    def test_that_are_not_needed_leave_memory_for_a_while(self, layer):
        before = resident_memory()
        not_needed_now(layer.parameters())
        assert before - resident_memory() > 35 * MB
        assert float(layer.weight.data.sum()) == 1e7
        assert before - resident_memory() < 5 * MB

    def test_that_were_written_to_stay_as_they_are(self, layer):
        """The file has other numbers by now."""
        layer.weight.data[500] = 7
        not_needed_now(layer.parameters())
        assert float(layer.weight.data.sum()) == 1e7 + 6 * 10_000

    def test_of_no_file_are_never_paged_out(self, monkeypatch):
        """The heap may have given them to somebody else, who would find them on the swap device."""
        asked = []
        monkeypatch.setattr(resources, "_page_out", lambda *span: asked.append(span))
        layer = torch.nn.Linear(1000, 1000)
        not_needed_now(layer.parameters())
        with replaces_weights(layer):
            layer.weight.data = torch.zeros(1, 1)
        assert not asked

    def test_that_are_none_stay(self, layer):
        before = resident_memory()
        with replaces_weights(layer):
            pass
        assert before - resident_memory() < 5 * MB
