"""Calibration: likelihood and expected calibration error, counted by hand."""

import math

import pytest
import torch

from luthier.evaluation.calibration import calibration_error, negative_log_likelihood


def test_calibration_is_measured_as_defined():
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.2, 0.8]])
    labels = torch.tensor([0, 1, 1, 1])
    nll = -sum(math.log(v) for v in (0.9, 0.1, 0.7, 0.8)) / 4
    assert negative_log_likelihood(p, labels) == pytest.approx(nll, rel=1e-6)
    # Bins of a tenth: 0.7 alone (right), 0.8 alone (right), twice 0.9 (half right).
    ece = (abs(1 - 0.7) + abs(1 - 0.8) + abs(1 - 2 * 0.9)) / 4
    assert calibration_error(p, labels, bins=10) == pytest.approx(ece, rel=1e-5)


def test_a_sure_and_right_prediction_has_no_error():
    p = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert calibration_error(p, torch.tensor([0, 1])) == 0
    assert calibration_error(p, torch.tensor([1, 0])) == 1
    assert negative_log_likelihood(p, torch.tensor([1, 0])) == pytest.approx(-math.log(1e-30), rel=1e-6)
