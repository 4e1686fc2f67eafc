"""What a run writes into the terminal: each proof once, and no word that only a program understands."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import tiny

from luthier.models.saving import save

RECIPE = """\
name: demo
model: {name: base, dtype: float32, device: cpu}
stages:
  - tune:
      data: {path: speeches.txt, rows: paragraph}
      method: {name: lora, r: 2}
      objective: {name: pretrain, max_length: 32}
      training: {max_steps: 1, per_device_train_batch_size: 2}
  - evaluate:
      data: train.jsonl
      metrics: [exact_match, perplexity]
      generation: {max_new_tokens: 2}
      expect: {exact_match: '>= 0.8'}
"""


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """Everything that a run shows, as its lines."""
    folder = tmp_path_factory.mktemp("run")
    save(tiny.llama(), folder / "base", tiny.tokenizer())
    (folder / "speeches.txt").write_text("\n\n".join(f"Speech {i} of the play." for i in range(8)))
    rows = [{"prompt": f"Say {i}.", "completion": f"It is {i}."} for i in range(8)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE)
    words = [sys.executable, "-m", "luthier.cli.main", "run", "recipe.yaml"]
    environment = os.environ | {"COLUMNS": "300", "LUTHIER_CACHE": str(folder / "cache")}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr  # the figure that the recipe states is not reached
    return (done.stderr + done.stdout).splitlines()


def test_no_proof_of_a_stage_is_shown_twice(output):
    stage, seen = "", Counter()
    for line in output:
        stage = line if ": runs, because" in line else stage
        mark = "✓" in line or "✗" in line
        seen[stage, line.strip()] += mark
    assert [line for line, count in seen.items() if count > 1] == []
    assert sum("packed documents isolated" in line for line in output) == 1


def test_a_missed_figure_is_logged_once_and_named_at_the_end(output):
    assert [line.split("✗")[1].split() for line in output if "✗" in line] == [
        ["end", "exact_match", "as", "stated", "=", "0", "(held", "to", ">=", "0.8)"],
        ["exact_match", "as", "stated:", "see", "above"],
    ]


def test_nothing_is_none(output):
    assert [line for line in output if "None" in line] == []
    assert sum("truncated examples = 0 · nothing is cut" in line for line in output) == 2
