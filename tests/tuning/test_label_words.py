"""Words of classes: the regression on states, and the words whose rows point along it."""

import torch

from luthier.tuning.label_words import fit_probe, label_word_scores


def test_words_whose_rows_point_along_a_class_are_its_words():
    dice = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(16, 3, generator=dice)).Q.T  # (classes, d)
    classes = torch.arange(90) % 3
    states = 3 * directions[classes] + 0.1 * torch.randn(90, 16, generator=dice)
    output = torch.randn(40, 16, generator=dice) * 0.1
    output[[5, 11, 23]] = directions
    weight, bias = fit_probe(states, classes, 3)
    assert (states @ weight.T + bias).argmax(1).equal(classes)
    scores = label_word_scores(weight, bias, output)
    assert scores.argmax(1).tolist() == [5, 11, 23]


def test_scores_are_a_distribution_over_classes():
    scores = label_word_scores(torch.randn(3, 8), torch.randn(3), torch.randn(20, 8))
    assert torch.allclose(scores.exp().sum(0), torch.ones(20))
