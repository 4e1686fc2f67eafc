"""Lines of proof are collected where they arise, and a failed one refuses to go on."""

import pytest

from luthier import checks
from luthier.errors import CheckError


def test_lines_reach_every_enclosing_collection():
    with checks.collect() as outer:
        checks.record("data", "one", True, 1)
        with checks.collect() as inner:
            checks.record("merge", "two", True, 2.0, 3.0)
    assert [c.name for c in inner] == ["two"]
    assert [c.name for c in outer] == ["one", "two"]
    assert inner[0].as_dict()["tolerance"] == 3.0


def test_a_failed_proof_refuses_and_still_leaves_its_line():
    with checks.collect() as lines:
        with pytest.raises(CheckError, match=r"merged.*Keep the adapter"):
            checks.record("merge", "merged", False, 0.5, 1e-5, fix="Keep the adapter apart.")
        checks.record("end", "estimate", False, 2.0, refuse=False)
    assert [(c.name, c.passed) for c in lines] == [("merged", False), ("estimate", False)]


def test_each_line_is_said_once(caplog):
    """What the error says is not logged before it."""
    caplog.set_level("INFO", logger="luthier.checks")
    checks.record("data", "one", True)
    checks.record("end", "estimate", False, refuse=False)
    with pytest.raises(CheckError):
        checks.record("merge", "merged", False)
    assert [(r.levelname, "estimate" in r.message) for r in caplog.records] == [("INFO", 0), ("WARNING", 1)]


def test_a_line_reads_as_text():
    line = checks.Check("merge", "equal", True, 1.23456e-7, 1e-5, "probe of 16 tokens").line()
    assert line == "✓ merge      equal = 1.23e-07 (held to 1e-05) · probe of 16 tokens"
