"""MOELoRA: what experts and the gate compute, how tasks come with the rows, one task cut out or merged."""

import copy
import json
import math

import peft
import pytest
import small_training as training
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

import luthier
from luthier import method
from luthier.data.load import load
from luthier.errors import DataError, MethodError
from luthier.evaluation.perplexity import sequences
from luthier.tuning.attach import attach, trainable
from luthier.tuning.convert import to_lora
from luthier.tuning.lowrank.moelora import cut, set_task
from luthier.tuning.merge import merge
from luthier.tuning.tuner import DeltaLayer

TASKS = ["mails", "sums", "poems"]
SMALL = {"r": 6, "experts": 3, "alpha": 9, "task_dim": 8}
KINDS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert, "t5": tiny.t5}


def moelora(model, **options):
    torch.manual_seed(0)
    return attach(model, method("moelora")(**{**SMALL, "tasks": TASKS} | options))


def learnt(make=tiny.llama, **options):
    """With tasks that differ and an effect, as if trained."""
    return training.disturb(moelora(make(), **options), 0.3).eval()


def gate(model, name="default"):
    return model.base_model.moelora_shared[name]["gate"]


def changes(model):
    return {
        name.removeprefix("base_model.model."): module.deltas["default"]
        for name, module in model.named_modules()
        if isinstance(module, DeltaLayer)
    }


def weights(model, task):
    """w from its definition."""
    e = gate(model).embedding.weight[task]
    logits = gate(model).W.weight @ e
    return logits.exp() / logits.exp().sum()


@torch.no_grad()
def answers(model, *tasks, **batch):
    return model(**batch, moe_task_ids=torch.tensor(tasks)).logits


def batch(model, count=2):
    found = training.batch(model, count)
    return {name: found[name] for name in ("input_ids", "attention_mask")} | (
        {"decoder_input_ids": found["input_ids"]} if model.config.is_encoder_decoder else {}
    )


# The formula -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_adds_the_weighted_sum_of_its_experts(kind):
    model = learnt(KINDS[kind])
    name, delta = next(iter(changes(model).items()))
    layer = model.get_base_model().get_submodule(name)
    x = torch.randn(3, 5, delta.A.shape[1], generator=torch.Generator().manual_seed(0))
    gate(model).ids = torch.tensor([2, 1, 3])
    found = layer(x)
    for row, task in enumerate([2, 1, 3]):
        expected = layer.base_layer(x)[row]
        for i, w in enumerate(weights(model, task)):
            a, b = delta.A[2 * i : 2 * i + 2], delta.B[:, 2 * i : 2 * i + 2]
            expected = expected + 9 / 6 * w * (x[row] @ a.T @ b.T)
        assert torch.allclose(found[row], expected, atol=1e-4)


def test_the_gate_is_one_for_all_layers_and_counts_once(tmp_path):
    model = moelora(tiny.llama())
    layers = {n: m for n, m in tiny.llama().named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    expected = sum(6 * (m.in_features + m.out_features) for m in layers.values()) + 4 * 8 + 3 * 8
    assert trainable(model)[0] == expected
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == expected
    assert sum("shared.gate" in name for name in tensors) == 2


def test_weights_sum_to_one_and_equal_embeddings_answer_alike():
    model = learnt()
    w = gate(model).of(torch.tensor([1, 2, 3]))
    assert torch.allclose(w.sum(1), torch.ones(3))
    assert not torch.allclose(w[0], w[1], atol=1e-3)
    with torch.no_grad():
        gate(model).embedding.weight[2] = gate(model).embedding.weight[1]
    inputs = batch(model)
    assert torch.equal(answers(model, 1, 1, **inputs), answers(model, 2, 2, **inputs))
    assert not torch.allclose(answers(model, 1, 1, **inputs), answers(model, 3, 3, **inputs), atol=1e-3)


@pytest.mark.parametrize(("experts", "share"), [(1, 1), (3, 1 / 3)])
def test_with_a_uniform_gate_it_is_a_lora(experts, share):
    model = learnt(experts=experts)
    with torch.no_grad():
        gate(model).W.weight.zero_()
    other = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=6, lora_alpha=9, target_modules="all-linear"))
    for name, delta in changes(model).items():
        layer = other.get_base_model().get_submodule(name)
        layer.lora_A["default"].weight.data = delta.A.data
        layer.lora_B["default"].weight.data = share * delta.B.data
    inputs = batch(model)
    assert torch.allclose(answers(model, 1, 3, **inputs), other(**inputs).logits, atol=1e-4)


def test_a_row_of_several_tasks_has_the_mean_of_their_embeddings():
    model = learnt()
    e = gate(model).embedding.weight
    found = gate(model).of(torch.tensor([[1, 3, 0], [2, 0, 0]]))
    mean = gate(model).W((e[1] + e[3]) / 2).softmax(-1)
    assert torch.allclose(found[0], mean, atol=1e-6)
    assert torch.allclose(found[1], weights(model, 2), atol=1e-6)


def test_only_what_a_batch_names_learns():
    model = learnt().train()
    model(**training.batch(model), moe_task_ids=torch.tensor([1, 3])).loss.backward()
    gradient = gate(model).embedding.weight.grad
    assert [bool(row.any()) for row in gradient] == [False, True, False, True]
    assert gate(model).W.weight.grad.any()


# Tasks of a batch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_is_its_rows_alone(kind):
    model = learnt(KINDS[kind])
    inputs = batch(model)
    together = answers(model, 2, 3, **inputs)
    for row, task in enumerate([2, 3]):
        alone = answers(model, task, **{name: value[row : row + 1] for name, value in inputs.items()})
        assert torch.allclose(together[row], alone[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_keeps_the_task_of_each_row(kind, beams):
    model = learnt(KINDS[kind])
    inputs = {"input_ids": batch(model)["input_ids"], "attention_mask": batch(model)["attention_mask"]}
    length = {"min_new_tokens": 4, "max_new_tokens": 4, "do_sample": False, "num_beams": beams}
    together = model.generate(**inputs, moe_task_ids=torch.tensor([3, 1]), **length)
    for row, task in enumerate([3, 1]):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        found = model.generate(**alone, moe_task_ids=torch.tensor([task]), **length)
        assert torch.equal(found[0], together[row])
    assert gate(model).ids is None


def test_with_checkpointed_activations_the_tasks_are_still_there():
    losses = []
    for checkpointing in (False, True):
        model = learnt().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**training.batch(model), moe_task_ids=torch.tensor([1, 3])).loss.backward()
        losses.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in losses[0].items():
        assert torch.allclose(gradient, losses[1][name], atol=1e-6), name


def test_in_training_a_batch_must_name_its_tasks():
    model = learnt().train()
    with pytest.raises(MethodError, match=r"names no task, and the adapter has 3.*moe_task_ids"):
        model(**training.batch(model))
    with model.disable_adapter():
        assert torch.isfinite(model(**training.batch(model)).loss)
    set_task(model, "sums")
    assert torch.isfinite(model(**training.batch(model)).loss)


@pytest.mark.parametrize("ids", [[0, 1], [4, 1], [-1, 1], [[0, 0], [1, 2]]])
def test_numbers_that_are_no_tasks_are_refused(ids):
    model = learnt()
    with pytest.raises(MethodError, match=r"numbered from 1 to 3.*mails"):
        model(**batch(model), moe_task_ids=torch.tensor(ids))


def test_as_many_tasks_as_rows_are_wanted():
    model = learnt()
    with pytest.raises(MethodError, match="3 rows, and the batch 2"):
        answers(model, 1, 2, 3, **batch(model))


# From the rows to the model --------------------------------------------------------------------------------


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ASKED = [{"prompt": f"What is {i}?", "completion": f"It is {i}.", "task": TASKS[i % 3]} for i in range(9)]
CLASSES = [{"text": f"Order {i} arrived.", "label": i % 3, "task": TASKS[i % 3]} for i in range(9)]
TEXT = [{"text": f"Order {i} arrived on Monday.", "task": TASKS[i % 3]} for i in range(9)]
PROBLEMS = {
    "sft": (ASKED, tiny.llama, {}),
    "pretrain": (TEXT, tiny.llama, {"packing": False}),
    "classification": (CLASSES, tiny.bert, {}),
    "seq2seq": (ASKED, tiny.t5, {}),
}


@pytest.mark.parametrize("objective", PROBLEMS)
def test_every_objective_hands_the_task_of_each_row_on(objective, tmp_path):
    rows, make, options = PROBLEMS[objective]
    file = written(tmp_path / "rows.jsonl", rows)
    args = {"output_dir": str(tmp_path / "out"), "max_steps": 2, "per_device_train_batch_size": 3}
    goal = luthier.method(objective)(**options)
    trainer = luthier.trainer(goal, moelora(make()), file, args=args, tokenizer=tiny.tokenizer())
    found = trainer.data_collator([trainer.train_dataset[i] for i in (1, 5, 0)])["moe_task_ids"]
    assert found.tolist() == [2, 3, 1]
    before = training.weights(trainer.model)
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in trainer.model.named_parameters() if p.requires_grad}


def test_rows_of_unknown_tasks_are_refused_with_the_nearest(tmp_path):
    wrong = [*ASKED[:3], ASKED[3] | {"task": "sum"}]
    with pytest.raises(DataError, match=r"rows.jsonl:4: There is no task 'sum'.*sums"):
        luthier.trainer(
            "sft", moelora(tiny.llama()), written(tmp_path / "rows.jsonl", wrong), tokenizer=tiny.tokenizer()
        )
    none = [{k: v for k, v in ASKED[0].items() if k != "task"}]
    with pytest.raises(DataError, match=r"none.jsonl:1: The row names no task.*columns"):
        luthier.trainer(
            "sft", moelora(tiny.llama()), written(tmp_path / "none.jsonl", none), tokenizer=tiny.tokenizer()
        )


def test_a_column_of_another_name_can_be_the_task(tmp_path):
    rows = [{"kind" if k == "task" else k: v for k, v in row.items()} for row in ASKED]
    file = written(tmp_path / "rows.jsonl", rows)
    loaded = load({"path": str(file), "columns": {"task": "kind"}})
    assert [row["task"] for row in loaded.records[:3]] == TASKS


def test_evaluation_asks_each_row_under_its_task(tmp_path):
    model = learnt()
    file = written(tmp_path / "rows.jsonl", ASKED)
    options = {"tokenizer": tiny.tokenizer(), "generation": {"max_new_tokens": 6}}
    found = luthier.evaluate(model, file, metrics=["exact_match", "perplexity"], **options)
    alone, logs, counts = [], [], []
    for task in TASKS:
        rows = [{k: v for k, v in row.items() if k != "task"} for row in ASKED if row["task"] == task]
        other = copy.deepcopy(model)
        set_task(other, task)
        file = written(tmp_path / f"{task}.jsonl", rows)
        part = luthier.evaluate(other, file, metrics=["exact_match", "perplexity"], **options)
        alone += [(p["prompt"], p["prediction"]) for p in part.predictions]
        counts.append(sum(len(positions) for _, positions in sequences(load(file), tiny.tokenizer())[0]))
        logs.append(counts[-1] * math.log(part.metrics["perplexity"].value))
    assert {(p["prompt"], p["prediction"]) for p in found.predictions} == set(alone)
    assert found.metrics["perplexity"].value == pytest.approx(math.exp(sum(logs) / sum(counts)), rel=1e-4)


def test_a_classifier_is_asked_under_the_task_of_each_row(tmp_path):
    model = learnt(tiny.bert)
    file = written(tmp_path / "rows.jsonl", CLASSES)
    found = luthier.evaluate(model, file, metrics=["accuracy"], tokenizer=tiny.tokenizer())
    for prediction, row in zip(found.predictions, CLASSES, strict=True):
        ids = torch.tensor([tiny.tokenizer()(row["text"])["input_ids"]])
        logits = answers(model, TASKS.index(row["task"]) + 1, input_ids=ids)
        assert prediction["prediction"] == str(int(logits.argmax()))


def test_choices_are_ranked_under_the_task_of_each_row(tmp_path):
    model = learnt()
    rows = [
        {"prompt": f"What is {i}?", "choices": ["One.", "Two."], "label": 0, "task": TASKS[i]}
        for i in range(3)
    ]
    file = written(tmp_path / "rows.jsonl", rows)
    found = luthier.evaluate(model, file, metrics=["multiple_choice"], tokenizer=tiny.tokenizer())
    for i, task in enumerate(TASKS):
        other = copy.deepcopy(model)
        set_task(other, task)
        bare = [{k: v for k, v in rows[i].items() if k != "task"}]
        file = written(tmp_path / f"{task}.jsonl", bare)
        alone = luthier.evaluate(other, file, metrics=["multiple_choice"], tokenizer=tiny.tokenizer())
        expected = alone.predictions[0]["log_likelihoods"]
        assert found.predictions[i]["log_likelihoods"] == pytest.approx(expected, rel=1e-4)


# One task --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS)
def test_a_task_cut_out_or_merged_answers_as_before(kind, task, tmp_path):
    model = training.disturb(moelora(KINDS[kind]()), 0.15).eval()
    inputs = batch(model)
    number = TASKS.index(task) + 1
    expected = answers(model, number, number, **inputs)
    cut(model, task, tmp_path / "cut")
    plain = PeftModel.from_pretrained(KINDS[kind](), tmp_path / "cut")
    assert plain.peft_config["default"].peft_type == "LORA"
    assert torch.allclose(plain.eval()(**inputs).logits, expected, atol=1e-4)
    set_task(model, task)
    assert torch.allclose(model(**inputs).logits, expected, atol=1e-6)
    assert torch.allclose(merge(model)(**inputs).logits, expected, atol=1e-4)


def test_cut_out_it_needs_peft_alone(tmp_path):
    cut(learnt(), "sums", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(config) <= set(peft.LoraConfig.__dataclass_fields__) | {"peft_version"}
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)


def test_of_several_tasks_one_must_be_chosen_before_merging():
    model = learnt()
    for attempt in (merge, lambda m: m.merge_and_unload(), lambda m: to_lora(m, 6)):
        with pytest.raises(MethodError, match=r"3 tasks, and one can be merged.*set_task"):
            attempt(model)
    set_task(model, "poems")
    model.merge_adapter()
    with pytest.raises(MethodError, match="unmerge_adapter"):
        set_task(model, "sums")


def test_the_chosen_task_is_kept_with_the_adapter(tmp_path):
    model = learnt(task="sums")
    expected = training.logits(model)
    assert torch.allclose(expected, answers(model, 2, 2, **batch(model)), atol=1e-5)
    luthier.save(model, tmp_path / "saved")
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "saved")
    assert torch.equal(training.logits(loaded), expected)
    assert torch.allclose(training.logits(merge(loaded)), expected, atol=1e-5)


def test_tasks_that_disagree_are_told_apart(tmp_path):
    """The same inputs with other answers: what one LoRA cannot learn."""
    ids = training.rows(tiny.llama(), count=2, length=6)
    data = [row | {"labels": [5 + 10 * task] * 6, "moe_task_ids": task} for row in ids for task in (1, 2)]
    found = {}
    for name, options in [("moelora", {**SMALL, "tasks": ["a", "b"]}), ("lora", {"r": 6, "lora_alpha": 9})]:
        torch.manual_seed(0)
        model = attach(tiny.llama(), method(name)(**options))
        rows = (
            data if name == "moelora" else [{k: v for k, v in r.items() if k != "moe_task_ids"} for r in data]
        )
        training.train(
            model, tmp_path / name, rows, max_steps=100, per_device_train_batch_size=4,
            remove_unused_columns=False, lr_scheduler_type="constant", learning_rate=1e-2,
        )  # fmt: skip
        with torch.no_grad():
            logits = model.eval()(**{k: torch.tensor([r[k] for r in rows]) for k in rows[0]}).logits
        right = logits[:, :-1].argmax(-1) == torch.tensor([row["labels"][1:] for row in rows])
        found[name] = float(right.float().mean())
    assert found["moelora"] == 1
    assert found["lora"] <= 0.5


# Wrong use -------------------------------------------------------------------------------------------------


def test_wrong_options_say_what_fits():
    with pytest.raises(MethodError, match=r"experts: 4 does not divide.*\[1, 2, 3, 6\]"):
        method("moelora")(r=6, experts=4)
    with pytest.raises(MethodError, match=r"no task 'sum'.*sums"):
        method("moelora")(tasks=TASKS, task="sum")
    with pytest.raises(MethodError, match="twice"):
        method("moelora")(tasks=["a", "a"])
    with pytest.raises(MethodError, match=r"no task 'mail'.*mails"):
        set_task(learnt(), "mail")
    with pytest.raises(MethodError, match="no MOELoRA adapter"):
        set_task(attach(tiny.llama(), method("lora")()), "sums")
