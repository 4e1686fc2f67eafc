"""Training logs are read in plain words: healthy ones calmly, sick ones with the number that shows it."""

import made_runs
import pytest

from luthier.report.notices import read_curves


def log(**series: list[float]) -> list[dict[str, float]]:
    return [
        {"step": step, name: value}
        for name, values in series.items()
        for step, value in enumerate(values, start=1)
    ]


def test_a_healthy_training_raises_nothing():
    found = read_curves(made_runs.history())
    assert found
    assert not any(alarm for alarm, _ in found)


@pytest.mark.parametrize(
    ("history", "words"),
    [
        (log(loss=[2.0, float("nan"), 1.0]), "not finite at step 2"),
        (log(loss=[2.0] * 5 + [2.5] * 5), "rose from 2 to 2.5"),
        (log(loss=[2.0] + [0.001] * 9), "known by heart"),
        (log(eval_loss=[2.0, 1.0, 1.5]), "lowest (1) at step 2 and rose to 1.5"),
        (log(grad_norm=[0.0] * 8), "nothing learns"),
        (log(grad_norm=[1.0] * 20 + [90.0] + [1.0] * 9), "jumped to 90 at step 21"),
    ],
)
def test_each_sickness_is_named_with_its_number(history, words):
    assert any(alarm and words in sentence for alarm, sentence in read_curves(history))


def test_an_empty_log_says_nothing():
    assert read_curves([]) == []
