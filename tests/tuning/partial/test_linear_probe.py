"""Linear probe: training the head is logistic regression on features that stay as they are."""

import pytest
import small_training as training
import tiny
import torch
import torch.nn.functional as F

from luthier import method
from luthier.errors import MethodError
from luthier.tuning.attach import attach
from luthier.tuning.groups import trained_names


def test_is_logistic_regression_on_the_features(tmp_path):
    model = attach(tiny.bert(), method("linear_probe")())
    data = training.rows(model, 8)
    ids = torch.tensor([row["input_ids"] for row in data])
    labels = torch.tensor([row["labels"] for row in data])
    with torch.no_grad():
        features = model.bert(ids, torch.ones_like(ids)).pooler_output  # (rows, hidden)
    weight = model.classifier.weight.detach().clone().requires_grad_()
    bias = model.classifier.bias.detach().clone().requires_grad_()
    for _ in range(5):
        loss = F.cross_entropy(features @ weight.T + bias, labels)
        for tensor, gradient in zip((weight, bias), torch.autograd.grad(loss, (weight, bias)), strict=True):
            tensor.data -= 0.5 * gradient
    settings = {"optim": "sgd", "learning_rate": 0.5, "weight_decay": 0.0, "max_grad_norm": 0}
    training.train(
        model,
        tmp_path,
        data,
        max_steps=5,
        per_device_train_batch_size=8,
        lr_scheduler_type="constant",
        **settings,
    )
    assert torch.allclose(model.classifier.weight, weight, rtol=0, atol=1e-6)
    assert torch.allclose(model.classifier.bias, bias, rtol=0, atol=1e-6)


def test_opens_the_head_alone():
    model = attach(tiny.bert(), method("linear_probe")())
    assert trained_names(model) == {"classifier.weight", "classifier.bias"}


def test_a_tied_head_is_refused_and_may_be_untied():
    with pytest.raises(MethodError, match=r"is its embeddings.*untie_head: true"):
        attach(tiny.llama(), method("linear_probe")())
    model = attach(tiny.llama(), method("linear_probe")(untie_head=True))
    assert trained_names(model) == {"lm_head.weight"}


def test_a_model_without_head_is_refused():
    with pytest.raises(MethodError, match="has no head"):
        method("linear_probe")().trained(tiny.bert().bert)
