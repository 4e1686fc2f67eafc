"""The table of a comparison can be read in a terminal of any width."""

from types import SimpleNamespace

import pytest
from rich.console import Console

from luthier.cli.compare import _show


def comparison(settings):
    quality = {"mean": 0.612345, "spread": 0.0471, "low": 0.529, "high": 0.69}
    costs = {"trainable": 4884480, "peak_memory_bytes": 1.5e9, "seconds": 86.0, "artefact_bytes": None}
    return SimpleNamespace(
        vary={"tune.method": settings},
        summary=[
            SimpleNamespace(
                settings={"tune.method": name}, seeds=[0, 1], failed=0, others=costs,
                metrics={"exact_match": quality, "field_f1": quality, "perplexity": quality},
            )
            for name in settings
        ],
    )  # fmt: skip


@pytest.mark.parametrize("width", [80, 200])
def test_no_cell_is_cut(width):
    console = Console(width=width)
    with console.capture() as shown:
        _show(comparison(["lora", "dora"]), console)
    text = shown.get()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for word in (
        "tune.method",
        "dora",
        "exact_match",
        "0.6123 ± 0.047 [0.529, 0.69]",
        "4,884,480",
        "86 s",
        "-",
    ):
        assert word in text
