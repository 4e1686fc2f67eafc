"""Numbers are written as they are read aloud."""

import pytest

from luthier.evaluation.names import METRICS
from luthier.report import wording


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (wording.significant, 1234567, "1,234,567"),
        (wording.significant, 0.00012345, "0.000123"),
        (wording.significant, 1.5e-7, "1.5e-7"),
        (wording.significant, 9.42, "9.42"),
        (wording.significant, float("inf"), "inf"),
        (wording.significant, 0, "0"),
        (wording.percent, 0.8649, "86.5%"),
        (wording.count, 4_884_480, "4.88M"),
        (wording.count, 12_345, "12,345"),
        (wording.count, None, "–"),
        (wording.size, 1_930_000_000, "1.93 GB"),
        (wording.size, 19_560_000, "19.6 MB"),
        (wording.size, 999, "999 B"),
        (wording.duration, 4.21, "4.2 s"),
        (wording.duration, 214.3, "3 min 34 s"),
        (wording.duration, 59.8, "60 s"),
        (wording.duration, 7800, "2 h 10 min"),
        (wording.plain, True, "yes"),
        (wording.plain, None, ""),
        (wording.plain, 1500, "1,500"),
    ],
)
def test_written(write, value, text):
    assert write(value) == text


def test_shares_are_percentages_and_others_are_not():
    assert wording.show("exact_match", 0.5) == "50.0%"
    assert wording.show("perplexity", 9.42) == "9.42"
    assert wording.interval("exact_match", 0.1, 0.25) == "10.0 – 25.0%"
    assert wording.interval("perplexity", None, 2.0) == ""


def test_a_metric_of_a_named_stage_keeps_its_meaning():
    assert wording.meaning("after/exact_match") is wording.meaning("exact_match")


def test_an_unknown_metric_is_shown_under_its_own_name():
    assert wording.meaning("bleu_4").title == "Bleu 4"


def test_metrics_that_a_recipe_can_name_have_a_sentence_and_the_right_direction():
    for name, metric in METRICS.items():
        meaning = wording.meaning(name)
        assert meaning.sentence != wording.meaning("no such metric").sentence
        assert meaning.better == ("higher" if metric.higher_is_better else "lower")
