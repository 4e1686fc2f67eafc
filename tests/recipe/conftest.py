"""Fixtures of the recipe tests."""

import pytest


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A recipe of three stages that only note that they ran (`recipe_bench.Bench`)."""
    import recipe_bench

    return recipe_bench.make(tmp_path, monkeypatch)
