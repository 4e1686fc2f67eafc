"""Gradients of calibration data: one sequence at a time gives what one loss over all targets gives."""

import pruned_models
import pytest
import tiny
import torch

from luthier.compression import gradients
from luthier.errors import DataError, MethodError

NAME = "model.layers.0.mlp.down_proj.weight"


def test_joint_gradient_is_that_of_the_mean_over_all_targets(tiny_llama):
    batches = pruned_models.batches(count=2, rows=3)
    joint, _ = gradients.gradients(tiny_llama, batches, {NAME})
    losses = count = 0
    for batch in batches:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        logits = tiny_llama(**batch).logits[:, :-1]
        targets = labels[:, 1:]
        losses = losses + torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="sum"
        )
        count += int((targets != -100).sum())
    weight = tiny_llama.get_parameter(NAME)
    (expected,) = torch.autograd.grad(losses / count, [weight])
    torch.testing.assert_close(joint[NAME], expected, atol=1e-7, rtol=1e-4)


def test_fisher_is_the_mean_square_of_each_sequence_alone(tiny_llama):
    batches = pruned_models.batches(count=1, rows=3)
    _, fisher = gradients.gradients(tiny_llama, batches, {NAME}, squares=True)
    squares = []
    for ids, mask in zip(batches[0]["input_ids"], batches[0]["attention_mask"], strict=True):
        row = ids[mask.bool()][None]
        loss = tiny_llama(input_ids=row, labels=row).loss
        squares.append(torch.autograd.grad(loss, [tiny_llama.get_parameter(NAME)])[0].square())
    torch.testing.assert_close(fisher[NAME], torch.stack(squares).mean(0), atol=1e-9, rtol=1e-4)


def test_the_model_is_left_as_it_was(tiny_llama):
    tiny_llama.train()
    tiny_llama.model.norm.weight.requires_grad_(False)
    gradients.gradients(tiny_llama, pruned_models.batches(count=1, rows=2), {NAME})
    assert tiny_llama.training
    assert all(p.grad is None for p in tiny_llama.parameters())
    assert [n for n, p in tiny_llama.named_parameters() if not p.requires_grad] == ["model.norm.weight"]


def test_a_classifier_needs_labels(tiny_bert):
    batch = {"input_ids": torch.arange(10, 22).reshape(2, 6)}
    with pytest.raises(MethodError, match="labels"):
        gradients.sequences(tiny_bert, [batch])
    rows = gradients.sequences(tiny_bert, [{**batch, "labels": torch.tensor([2, 0])}])
    assert [row["labels"].tolist() for row in rows] == [[2], [0]]


def test_no_data_is_said():
    with pytest.raises(DataError, match="no calibration data"):
        gradients.sequences(tiny.llama(), [])
