"""Scores of single answers."""

from decimal import Decimal

import numpy as np
import pytest

from luthier.evaluation.text_metrics import (
    exact_match,
    f1,
    field_counts,
    final_number,
    number_match,
    rouge,
    total,
)  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "gold", "score"),
    [
        ('{"b": 1, "a": null}', '{"a":null,"b":1}', 1),  # records are compared, not their spelling
        ('{"a": 1.0}', '{"a": 1}', 1),
        ('{"a": true}', '{"a": 1}', 0),
        ('{"a": "1"}', '{"a": 1}', 0),
        ('{"a": 1, "b": null}', '{"a": 1}', 0),
        ('{"a": 2, "a": 1}', '{"a": 1}', 0),  # a key that stands twice is no record
        ('{"a": [1, 2]}', '{"a": [2, 1]}', 0),
        ('```json\n{"a": 1}\n```', '{"a": 1}', 0),
        ('{"a": 1} and more', '{"a": 1}', 0),
        ("no json", '{"a": 1}', 0),
        ("[" * 100_000, '{"a": 1}', 0),
        ("NaN", "NaN", 1),
        (" yes\n  sir", "yes sir", 1),
        ("Yes", "yes", 0),
        ("cafe\u0301", "caf\u00e9", 1),
        ("", "a", 0),
    ],
)
def test_exact_match(answer, gold, score):
    assert exact_match(answer, gold) == score


def test_fields_are_right_predicted_and_wanted():
    gold = '{"a": 1, "b": 2, "c": null, "d": {"e": 5}}'
    found = field_counts('{"a": 1, "b": 3, "c": null, "d": {"e": 5, "f": 6}}', gold)
    assert {key: counts.tolist() for key, counts in found.items()} == {
        "a": [1, 1, 1],
        "b": [0, 1, 1],
        "d.e": [1, 1, 1],
        "d.f": [0, 1, 0],
    }
    # precision 2/4, recall 2/3
    assert f1(total(found.values())) == pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))


def test_an_answer_that_is_no_record_has_no_field():
    assert total(field_counts("broken {", '{"a": 1, "b": 2}').values()).tolist() == [0, 0, 2]
    assert total(field_counts("[1]", '{"a": 1, "b": 2}').values()).tolist() == [0, 0, 2]


def test_nulls_earn_nothing_and_nothing_wanted_nothing_said_is_right():
    assert f1(total(field_counts('{"a": null}', '{"a": 1}').values())) == 0
    assert f1(total(field_counts('{"a": null}', '{"a": null}').values())) == 1
    assert f1(np.array([[0.0, 0, 2], [1, 1, 1]])).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So 3 + 4 = 7.\n#### 7", 7),
        ("#### 1,234", 1234),
        ("The answer is $18.50.", Decimal("18.5")),
        ("first 3, then -12", -12),
        ("#### 5 apples and 3 pears", 5),
        ("3 of 4.0", 4),
        ("none", None),
        ("#### none", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number


def test_numbers_are_compared_by_value_and_no_number_is_never_right():
    assert number_match("it makes 7.00", "3 + 4 = <<3+4=7>>7\n#### 7") == 1
    assert number_match("it makes 8", "#### 7") == 0
    assert number_match("no idea", "no idea") == 0


def test_rouge_by_hand():
    # "the cat sat" against "the dog sat": unigrams 2 of 3, bigrams 0 of 2, LCS 2 of 3
    found = rouge("the cat sat", "the dog sat")
    assert found["rouge1"] == pytest.approx(2 / 3)
    assert found["rouge2"] == 0
    assert found["rougeL"] == pytest.approx(2 / 3)
