"""SFT: the loss is one mean over the trained tokens of the batch; packing and accumulation change nothing."""

import pytest
import sft_problems as problems
import tiny
import torch
from torch.nn import functional as F


def first_loss(folder, **options):
    trainer = problems.sft(tiny.llama(), folder, max_steps=1, **options)
    trainer.train()
    return problems.losses(trainer)[0]


def test_loss_is_the_mean_over_trained_tokens(tmp_path):
    data = problems.rows(2)
    model = tiny.llama()
    total, count = 0.0, 0
    for row in data:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        total += F.cross_entropy(logits[:-1], labels[1:], reduction="sum").item()
        count += (labels[1:] != -100).sum().item()
    assert first_loss(tmp_path, data=data) == pytest.approx(total / count, rel=1e-4)


def test_packing_and_accumulation_are_the_same_batch(tmp_path):
    data = problems.rows(4)
    plain = first_loss(tmp_path / "a", data=data, per_device_train_batch_size=4, packing=False)
    packed = first_loss(tmp_path / "b", data=data, per_device_train_batch_size=4, packing=True)
    parts = first_loss(
        tmp_path / "c", data=data, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    assert packed == pytest.approx(plain, abs=1e-4)
    assert parts == pytest.approx(plain, abs=1e-4)


def test_an_adapter_learns_and_its_base_does_not(tmp_path):
    model = tiny.llama()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = problems.sft(model, tmp_path, method=problems.lora(), max_steps=12)
    trainer.train()
    losses = problems.losses(trainer)
    assert losses[-1] < losses[0]
    after = {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if "lora_" not in n}
    assert all(torch.equal(after[n], before[n]) for n in before)
