"""Charts place data where their scales say, with round ticks, labels that do not collide, and no gaps."""

import re
from itertools import pairwise

import pytest

from luthier.report import charts


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.03, 0.04), (-3.0, 17.0), (1e-5, 2e-3), (900.0, 134e6)]
)
def test_ticks_are_few_round_and_inside(low, high):
    axis = charts.Axis([low, high], 0, 100)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 6
    steps = {round((b - a) / (ticks[1] - ticks[0]), 6) for a, b in pairwise(ticks)}
    assert steps == {1.0}
    mantissa = float(f"{ticks[1] - ticks[0]:.6e}".split("e")[0])
    assert round(mantissa, 6) in (1, 2, 5, 10)
    assert all(0 <= axis(t) <= 100 for t in ticks)


@pytest.mark.parametrize("values", [[5.0], [0.0], [], [float("nan")], [2.0, 2.0]])
def test_a_scale_of_one_value_or_none_is_still_a_scale(values):
    for log in (False, True):
        axis = charts.Axis(values, 0, 100, log=log)
        assert axis.b > axis.a
        assert axis.ticks()


def test_log_scales_are_even_in_ratios():
    axis = charts.Axis([1, 1000], 0, 90, log=True, pad=0.0)
    assert [axis(v) for v in (1, 10, 100, 1000)] == pytest.approx([0, 30, 60, 90])


def test_a_curve_passes_through_its_points():
    svg = charts.curves([charts.Series("loss", [(0, 2.0), (5, 1.0), (10, 0.0)])], title="loss", format_y=str)
    points = re.search(r'class="line main" d="M([^"]+)"', svg)
    assert points
    xs, ys = zip(*(map(float, p.split()) for p in points[1].split("L")), strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1])
    assert ys[1] - ys[0] == pytest.approx(ys[2] - ys[1], abs=0.15)
    assert ys[0] < ys[2]  # up is more


def test_names_are_escaped():
    svg = charts.interval_track([("<b>", 0.5, None, None, "main")], title='"<', share=True, format_x=str)
    assert "<b>" not in svg
    assert "&lt;b&gt;" in svg


def test_labels_of_near_points_do_not_overlap():
    marks = [charts.Mark(f"method_{i}", 1.0 + i / 100, 0.80 + i / 100, front=i == 3) for i in range(5)]
    svg = charts.pareto(
        marks, title="", x_title="", format_x=str, format_y=str, lower_is_better=False, share=True
    )
    boxes = []
    for x, y, anchor, text in re.findall(
        r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)" class="label[^"]*">(method_\d)<', svg
    ):
        start = float(x) - {"start": 0, "middle": 0.5, "end": 1}[anchor] * len(text) * 6
        boxes.append((start, float(y) - 9, start + len(text) * 6, float(y)))
    assert len(boxes) == 5
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
            assert apart


def test_noisy_curves_are_smoothed_by_a_mean_that_keeps_a_line_a_line():
    line = [(float(i), 3.0 - 0.01 * i) for i in range(100)]
    smooth = charts._running_mean(line)
    assert len(smooth) == 100
    assert smooth[50] == pytest.approx(line[50])
    assert charts._running_mean(line[:20]) == []
