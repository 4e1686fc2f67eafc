"""Means over seeds, the front and the findings are what their definitions say."""

import itertools
import random
import statistics

import made_runs
import pytest

from luthier.errors import DataError
from luthier.report import comparison
from luthier.report.read import read_comparison
from luthier.report.report import write_comparison


def row(label: str, seed: int = 0, *, exact: float | None = None, half: float = 0.05, **cost: float) -> dict:
    metrics = {} if exact is None else {"exact_match": made_runs.metric(exact, half)}
    return {"settings": {"tune.method": label}, "seed": seed, "status": "done", "metrics": metrics} | cost


def settings(*rows: dict) -> list[comparison.Setting]:
    return comparison.read_settings({"vary": {"tune.method": []}, "rows": list(rows)})


def test_seeds_give_mean_spread_and_an_interval_that_holds_every_seed():
    [found] = settings(row("lora", 0, exact=0.8), row("lora", 1, exact=0.9), row("lora", 2, exact=0.6))
    quality = found.quality["exact_match"]
    values = [0.8, 0.9, 0.6]
    assert quality.value == pytest.approx(statistics.fmean(values))
    assert quality.spread == pytest.approx(statistics.stdev(values))
    assert quality.low == pytest.approx(0.6)  # below the mean of the lower bounds
    assert quality.high == pytest.approx(0.9)


def test_the_front_is_every_setting_that_no_other_beats():
    draw = random.Random(3)
    rows = [row(f"m{i}", exact=draw.randint(1, 9) / 10, seconds=draw.randint(1, 9)) for i in range(40)]
    found = comparison.front(settings(*rows), "exact_match", "seconds")
    for one in rows:
        value, cost = one["metrics"]["exact_match"]["value"], one["seconds"]
        beaten = any(
            other["metrics"]["exact_match"]["value"] >= value
            and other["seconds"] <= cost
            and (other["metrics"]["exact_match"]["value"], other["seconds"]) != (value, cost)
            for other in rows
        )
        assert (one["settings"]["tune.method"] in found) is not beaten


def test_a_lower_perplexity_is_better():
    rows = [
        {
            "settings": {"tune.method": name},
            "status": "done",
            "metrics": {"perplexity": value},
            "seconds": cost,
        }
        for name, value, cost in (("a", 2.0, 1), ("b", 1.5, 2), ("c", 3.0, 3))
    ]
    found = settings(*rows)
    assert comparison.front(found, "perplexity", "seconds") == {"a", "b"}
    assert comparison.findings(found, "perplexity")[0] == "b has the best perplexity: 1.50."


class TestFindings:
    def test_what_lies_within_the_bests_interval_is_its_equal_and_the_cheapest_of_them_is_named(self):
        found = comparison.findings(
            settings(
                row("full", exact=0.90, trainable=100e6, tune_seconds=400),
                row("lora", exact=0.87, trainable=5e6, tune_seconds=200),
                row("probe", exact=0.10, trainable=1e6, tune_seconds=50),
            ),
            "exact_match",
        )
        assert found[0] == "full has the best exact match: 90.0% (95% interval 85.0 – 95.0%)."
        assert found[1].startswith("lora lies within that interval")
        assert found[2] == (
            "Of these, lora trains the fewest parameters (5.00M, 5% of full's) "
            "and tunes the fastest (3 min 20 s, 50% of full's)."
        )
        assert not any("probe" in sentence for sentence in found)

    def test_a_clear_lead_is_called_one(self):
        found = comparison.findings(settings(row("a", exact=0.9), row("b", exact=0.5)), "exact_match")
        assert found[1] == "No other lies within that interval, so the lead is more than chance."

    def test_what_is_beaten_in_everything_is_said(self):
        found = comparison.findings(
            settings(
                row("a", exact=0.9, tune_seconds=10),
                row("b", exact=0.5, tune_seconds=20),
                row("c", exact=0.2, tune_seconds=5),
            ),
            "exact_match",
        )
        assert any(sentence.startswith("b is on no front") for sentence in found)

    def test_seeds_that_move_more_than_the_test_data_are_said(self):
        rows = [row("a", seed, exact=value, half=0.01) for seed, value in enumerate((0.6, 0.9))]
        assert any(
            "the seed moves exact match" in s for s in comparison.findings(settings(*rows), "exact_match")
        )


def test_labels_say_what_differs():
    keys = ["tune.method", "tune.training.learning_rate"]
    given = {"tune.method": {"name": "dora", "r": 4}, "tune.training.learning_rate": 0.001}
    assert comparison.label_of(given, keys) == "dora r=4, learning_rate=0.001"
    assert comparison.label_of({}, []) == "as written"
    both = {"compress.method": ["smoothquant", {"name": "gptq", "bits": 3}]}
    assert comparison.label_of(both, ["compress.method"]) == "smoothquant + gptq bits=3"


def test_failed_runs_are_in_the_table_and_out_of_the_means(tmp_path):
    folder = made_runs.comparison(tmp_path)
    html = write_comparison(folder).read_text()
    assert "2 of 2 failed" in html
    assert html.count("The loss is not finite at step 12.") == 3
    by_label = {s.label: s for s in comparison.read_settings(read_comparison(folder))}
    assert by_label["dora"].quality["exact_match"].seeds == 1
    assert by_label["gradual_unfreezing"].quality == {}


def test_rows_yet_to_come_do_not_stop_the_page(tmp_path):
    rows = [row("lora", exact=0.8, tune_seconds=3), row("dora") | {"status": "pending"}]
    made_runs.write(tmp_path / "comparison.json", {"vary": {"tune.method": ["lora", "dora"]}, "rows": rows})
    html = write_comparison(tmp_path).read_text()
    assert "1 of 1 to come" in html
    made_runs.write(tmp_path / "comparison.json", {"vary": {}, "rows": []})
    assert "No run has ended" in write_comparison(tmp_path).read_text()


def test_a_comparison_without_rows_is_refused(tmp_path):
    made_runs.write(tmp_path / "comparison.json", {"name": "x"})
    with pytest.raises(DataError, match="holds no rows"):
        write_comparison(tmp_path)


def test_runs_are_linked_where_their_report_is(tmp_path):
    made_runs.write(tmp_path / "method-lora_seed-0" / "report.html", "")
    rows = [row("lora", exact=0.8) | {"run": "method-lora_seed-0"}, row("dora", exact=0.7) | {"run": "gone"}]
    made_runs.write(tmp_path / "comparison.json", {"vary": {"tune.method": []}, "rows": rows})
    html = write_comparison(tmp_path).read_text()
    assert 'href="method-lora_seed-0/report.html"' in html
    assert "gone" not in html


def test_every_pair_of_settings_is_ordered_one_way_or_none():
    """The front is an antichain: of two settings on it, the better is the dearer."""
    draw = random.Random(5)
    rows = [row(f"m{i}", exact=draw.random(), seconds=draw.random()) for i in range(30)]
    found = comparison.front(settings(*rows), "exact_match", "seconds")
    points = [
        (r["metrics"]["exact_match"]["value"], r["seconds"])
        for r in rows
        if r["settings"]["tune.method"] in found
    ]
    for (v, c), (w, d) in itertools.combinations(points, 2):
        assert (v < w) == (c < d)
