"""Predictions are matched by example, sorted by what changed, and differences are marked exactly."""

import re

import made_runs
import pytest
from markupsafe import escape

from luthier.report.predictions import SHOWN, compare_predictions, mark_differences, text_of
from luthier.report.read import Stage


def stage(rows: list[dict]) -> Stage:
    return Stage("01-x", "x", "evaluate", "done", predictions=rows)


def test_counts_are_those_of_the_scores():
    before, after = made_runs.predictions(False), made_runs.predictions(True)
    found = compare_predictions(stage(before), stage(after))
    assert found
    was, now = ([row["exact_match"] for row in rows] for rows in (before, after))
    pairs = list(zip(was, now, strict=True))
    assert found.counts == {
        "fixed": pairs.count((0.0, 1.0)),
        "broken": pairs.count((1.0, 0.0)),
        "right": pairs.count((1.0, 1.0)),
        "wrong": pairs.count((0.0, 0.0)),
    }
    assert found.total == 60
    assert sum(example.change == "fixed" for example in found.examples) == SHOWN
    assert found.examples[0].change == "broken"


def test_order_and_missing_rows_do_not_mix_examples_up():
    before, after = made_runs.predictions(False)[::-1], made_runs.predictions(True)[5:]
    found = compare_predictions(stage(before), stage(after))
    assert found
    assert found.total == 55
    twins = {row["index"]: row for row in before}
    for example in found.examples:
        assert example.before is not None
        assert re.sub(r"<del>.*?</del>|<[^>]+>", "", example.before) == escape(
            twins[example.index]["prediction"]
        )


def test_other_prompts_are_other_examples():
    before = [row | {"prompt": "another"} for row in made_runs.predictions(False)]
    assert compare_predictions(stage(before), stage(made_runs.predictions(True))) is None


def test_one_evaluation_alone():
    found = compare_predictions(None, stage(made_runs.predictions(True)))
    assert found
    assert not found.paired
    assert found.counts["fixed"] == found.counts["broken"] == 0


def test_without_scores_the_reference_decides():
    rows = [
        {"prompt": "a", "gold": "yes", "prediction": " yes\n"},
        {"prompt": "b", "gold": "yes", "prediction": "no"},
    ]
    found = compare_predictions(None, stage(rows))
    assert found
    assert (found.counts["right"], found.counts["wrong"]) == (1, 1)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("a b c d", "a x c d"),
        ("one two three", "one two"),
        ("<i> & x y", "<i> & z y"),
        ("", "text"),
        ("same", "same"),
    ],
)
def test_marks_added_to_an_answer_leave_its_text_and_the_references(gold, answer):
    marked = mark_differences(gold, answer)
    assert re.sub(r"<del>.*?</del>|</?mark>", "", marked) == escape(answer)
    if "<" in re.sub(r"&\w+;", "", marked):
        kept = re.sub(r"<mark>.*?</mark>|</?del>", "", marked)
        assert re.sub(r"\s+", "", kept) == re.sub(r"\s+", "", escape(gold))


def test_answers_with_little_in_common_are_not_marked():
    assert mark_differences('{"a": 1}', "I am sorry to hear that") == "I am sorry to hear that"


def test_prompts_may_be_messages():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert text_of(messages) == "system: Be brief.\n\nuser: Hi"
