"""How far probabilities can be trusted: their likelihood, and confidence against accuracy."""

from torch import Tensor, zeros


def negative_log_likelihood(probabilities: Tensor, labels: Tensor) -> float:
    """Mean of -log p[label] over probabilities (n, classes) and labels (n)."""
    return float(-probabilities.gather(1, labels[:, None]).clamp_min(1e-30).log().mean())


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error: |accuracy - mean confidence| in equal bins of confidence, by their share.

    Source: Guo et al., 2017, "On Calibration of Modern Neural Networks", arXiv 1706.04599.
    """
    confidence, predicted = probabilities.max(-1)
    right = (predicted == labels).to(confidence)
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = zeros(bins, dtype=confidence.dtype, device=confidence.device)
    gaps.scatter_add_(0, place, right - confidence)
    return float(gaps.abs().sum() / len(labels))
