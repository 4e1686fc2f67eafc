"""Seq2seq: an encoder-decoder learns the completions of its prompts."""

import json

import sft_problems as problems
import tiny

import luthier


def test_the_loss_on_completions_falls(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"count {i}", "completion": "one two three"} for i in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = {**problems.ARGUMENTS, "output_dir": str(tmp_path / "out"), "max_steps": 30}
    trainer = luthier.trainer("seq2seq", tiny.t5(), path, tokenizer=tiny.tokenizer(), args=arguments)
    trainer.train()
    losses = problems.losses(trainer)
    assert losses[-1] < losses[0] - 0.5
