"""Pretraining: every token of a text after its first is trained, and the loss on it falls."""

import sft_problems as problems
import tiny

import luthier
from luthier.alignment.sl.pretrain import Config


def test_the_loss_on_raw_text_falls(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"The fox number {i} jumps over the lazy dog." for i in range(30)))
    arguments = {**problems.ARGUMENTS, "output_dir": str(tmp_path / "out"), "max_steps": 20}
    trainer = luthier.trainer(
        Config(max_length=32), tiny.llama(), path, tokenizer=tiny.tokenizer(), args=arguments
    )
    trainer.train()
    losses = problems.losses(trainer)
    assert losses[-1] < losses[0] - 0.5
