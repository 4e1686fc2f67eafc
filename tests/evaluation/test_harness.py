"""Tasks of the lm-evaluation-harness run offline on a model in memory, and agree with our own scores."""

import json
import sys

import numpy as np
import pytest
import tiny
from peft import LoraConfig, get_peft_model

from luthier.data.load import load
from luthier.errors import DataError, ResourceError
from luthier.evaluation.choices import rank
from luthier.evaluation.harness import run_tasks

ROWS = [
    {
        "prompt": "The printer of the second floor does not",
        "choices": ["print any more.", "sing."],
        "label": 0,
    },
    {
        "prompt": "Order 4711 arrived on",
        "choices": ["Monday, but the box was empty.", "the card"],
        "label": 1,
    },
    {"prompt": "Please send my money", "choices": ["back to the card.", "luthier", "what is 12"], "label": 0},
    {"prompt": "Question: what is 12 + 30? Answer:", "choices": ["42.", "30."], "label": 1},
]
TASK = """
task: tiny_choices
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{prompt}}"
doc_to_target: "{{label}}"
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture
def task(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    path = tmp_path / "tiny_choices.yaml"
    path.write_text(TASK.replace("DATA", str(data)))
    return path


def with_adapter():
    return get_peft_model(tiny.llama(), LoraConfig(target_modules="all-linear", init_lora_weights=False))


@pytest.mark.parametrize("build", [tiny.llama, with_adapter])
def test_a_local_task_agrees_with_our_own_choices(build, task):
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    model, tokenizer = build().train(), tiny.tokenizer(template=None)
    found = run_tasks(model, tokenizer, [task], batch_size=2)
    assert model.training
    ranked = rank(model, tokenizer, load(task.parent / "rows.jsonl"))
    for name, normalised in (("acc", False), ("acc_norm", True)):
        metric = found[f"tiny_choices/{name}"]
        assert metric.value == np.mean([question.right(normalised) for question in ranked])
        assert metric.n == len(ROWS)
        assert metric.low <= metric.value <= metric.high


def test_a_task_that_does_not_exist_is_refused(tiny_llama, tiny_tokenizer):
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    with pytest.raises(DataError, match="no task file"):
        run_tasks(tiny_llama, tiny_tokenizer, ["nowhere.yaml"])


def test_without_the_extra_the_error_says_what_to_install(tiny_llama, tiny_tokenizer, task, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ResourceError, match=r"luthier\[lm-eval\]"):
        run_tasks(tiny_llama, tiny_tokenizer, [task])
