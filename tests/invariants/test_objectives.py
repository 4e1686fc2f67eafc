"""Every tuning method learns under every objective there is. A new one of either joins by existing."""

import json

import pytest
import tiny
import torch
from tuning_methods import METHODS, base, config

import luthier
from luthier import checks, taxonomy

# Rows of each objective, and a model for it.
TEXT = [{"text": f"Order {i} arrived on Monday, but the box was empty."} for i in range(8)]
ASKED = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(8)]
CLASSES = [{"text": f"Order {i} arrived.", "label": i % 3} for i in range(9)]
PROBLEMS = {
    "pretrain": (TEXT, tiny.llama),
    "sft": (ASKED, tiny.llama),
    "classification": (CLASSES, tiny.bert),
    "seq2seq": (ASKED, tiny.t5),
}
GOALS = {"pretrain": {"max_length": 64}}  # several blocks: a search splits them
OBJECTIVES = [m.name for m in taxonomy.methods("alignment") if m.origin == "luthier"]
# Pairs that are refused in words.
REFUSED = {
    ("linear_probe", "seq2seq"): "always ties its head",
    ("coda", "pretrain"): "writes token by token",
    ("coda", "sft"): "writes token by token",
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", METHODS)
def test_two_steps_move_what_learns(name, objective, tmp_path):
    rows, make = PROBLEMS[objective]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
    }

    def made():
        goal = luthier.method(objective)(**GOALS.get(objective, {}))
        method, model = config(name, make), base(name, make)
        return luthier.trainer(goal, model, file, method=method, args=args, tokenizer=tiny.tokenizer())

    if (name, objective) in REFUSED:
        with pytest.raises(luthier.errors.MethodError, match=REFUSED[name, objective]):
            made()
        return
    trainer = made()
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    with checks.collect() as lines:
        trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert moved <= {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert [line for line in lines if not line.passed] == []
