"""Classification: a separable problem is learnt, and the class names stay with the model."""

import json

import sft_problems as problems
import tiny

import luthier
from luthier.evaluation.evaluate import evaluate


def test_a_separable_problem_is_learnt(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"text": f"{word} {i}", "label": word} for i in range(16) for word in ("good", "bad")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, tokenizer = tiny.bert(num_labels=2), tiny.tokenizer()
    arguments = {**problems.ARGUMENTS, "output_dir": str(tmp_path / "out"), "max_steps": 60}
    trainer = luthier.trainer(
        "classification",
        model,
        path,
        tokenizer=tokenizer,
        args={**arguments, "per_device_train_batch_size": 8},
    )
    trainer.train()
    assert set(model.config.id2label.values()) == {"good", "bad"}
    assert evaluate(model, path, ["accuracy"], tokenizer=tokenizer).metrics["accuracy"].value == 1.0
