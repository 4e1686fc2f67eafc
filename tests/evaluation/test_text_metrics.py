"""Scores of single answers."""

import numpy as np
import pytest

from luthier.evaluation.text_metrics import exact_match, f1_of_counts, field_counts, rouge_l


@pytest.mark.parametrize(
    ("answer", "gold", "score"),
    [
        ('{"b": 1, "a": null}', '{"a":null,"b":1}', 1.0),  # records are compared, not their spelling
        ('{"a": 1}', '{"a": 2}', 0.0),
        ("no json", '{"a": 1}', 0.0),
        (" yes\n", "yes", 1.0),
        ("Yes", "yes", 0.0),
        ("7.0", "7", 0.0),  # a plain answer is text
    ],
)
def test_exact_match(answer, gold, score):
    assert exact_match(answer, gold) == score


def test_fields_right_given_and_wanted():
    gold = '{"a": 1, "b": 2, "c": null}'
    assert field_counts('{"a": 1, "b": 3, "c": null, "d": 4}', gold) == (1, 3, 2)
    assert field_counts("broken {", gold) == (0, 0, 2)
    # precision 1/3, recall 1/2
    assert f1_of_counts(np.array([[1.0, 3.0, 2.0]]))[0] == pytest.approx(
        2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)
    )
    assert f1_of_counts(np.zeros((1, 3)))[0] == 0.0


def test_rouge_l_is_the_longest_common_subsequence():
    # "the cat sat" against "the dog sat": LCS 2 of 3 and 3
    assert rouge_l("the cat sat", "the dog sat") == pytest.approx(2 / 3)
