"""Faults of today's stack (torch, transformers, PEFT, TRL, datasets), planted, beside what happens here.

Each test first shows that the plain stack goes on with a wrong result, so that it fails on the day that the
stack is mended; then that ours refuses, or gets it right and leaves its line of proof.
"""

import importlib
import inspect
import json
import sys

import peft
import planted
import pytest
import quantised_models
import rendering
import small_training as training
import tiny
import torch
from datasets import Dataset, load_dataset
from planted import MESSAGES, by_name, effect_lost, far, lora, plain_lora, plants, silence
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    GenerationConfig,
    LlamaForCausalLM,
    Trainer,
)

import luthier
from luthier import checks
from luthier.data import cache, tokenize
from luthier.data.load import load
from luthier.data.packing import PackedCollator, PaddedCollator, pack
from luthier.data.tokenize import encode
from luthier.errors import CheckError, DataError, MethodError, ModelError, RecipeError
from luthier.evaluation.generation import generate
from luthier.models.saving import verify_export
from luthier.recipe.source import load_recipe
from luthier.tuning.merge import combine, merge

IDS = torch.tensor([[5, 6, 7, 8]])


def test_every_fault_is_planted_or_comes_with_a_later_method():
    assert list(planted.FAULTS) == [f"A{n}" for n in range(1, 22)]
    assert set(planted.PLANTED) == {id for id, fault in planted.FAULTS.items() if fault.ours}
    assert all(fault.later for id, fault in planted.FAULTS.items() if id not in planted.PLANTED)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def rows(tmp_path):
    def write(*found):
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
        return load(path)

    return write


@pytest.fixture
def encoded(rows):
    def run(tokenizer, found, max_length=None, **settings):
        return encode(rows(*found), tokenizer, max_length=max_length, use_cache=False, **settings)

    return run


@pytest.fixture
def base(tmp_path):
    return luthier.save(tiny.llama(), tmp_path / "base", tiny.tokenizer())


# A1: tied embeddings -------------------------------------------------------------------------------------


@plants("A1")
@pytest.mark.parametrize(
    "options", [{"target_modules": ["lm_head"]}, {"target_modules": ["embed_tokens", "lm_head"],
    "ensure_weight_tying": True}], ids=["head", "both"],
)  # fmt: skip
def test_merging_on_tied_weights_changes_the_model(tmp_path, options):
    plain = lora(tiny.llama(), **options)
    expected = training.logits(plain)
    assert far(training.logits(plain.merge_and_unload()), expected) > 0.1
    with checks.collect() as lines:
        merged = merge(lora(tiny.llama(), **options))
    luthier.save(merged, tmp_path / "merged")
    assert far(training.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected) < 1e-5
    assert by_name(lines)["merged = unmerged (lora, float32)"].value < 1e-4


# A2: methods that do nothing -----------------------------------------------------------------------------


@plants("A2")
def test_a_misspelt_target_is_left_out():
    with silence():
        plain = peft.get_peft_model(tiny.llama(), plain_lora(target_modules=["q_proj", "vproj"]))
    assert not any("v_proj" in name for name, p in plain.named_parameters() if p.requires_grad)
    with pytest.raises(MethodError, match=r"'vproj' matches no layer.*'v_proj'"):
        luthier.attach(tiny.llama(), luthier.method("lora")(target_modules=["q_proj", "vproj"]))


@plants("A2")
def test_experts_stay_frozen():
    """They are stacked parameters: no module is called down_proj."""
    with silence():
        plain = peft.get_peft_model(planted.mixtral(), plain_lora(target_modules=["q_proj", "down_proj"]))
    assert not any("experts" in name for name, p in plain.named_parameters() if p.requires_grad)
    with pytest.raises(MethodError, match=r"stay frozen.*target_parameters: \[experts.down_proj\]"):
        luthier.attach(planted.mixtral(), luthier.method("lora")(target_modules=["q_proj", "down_proj"]))
    with checks.collect() as lines:
        luthier.attach(planted.mixtral(), luthier.method("lora")(target_modules=["q_proj"]))
    share = by_name(lines)["share of the weights adapted"]
    assert share.value < 0.1
    assert "experts stay frozen" in share.detail


@plants("A2")
def test_an_adapter_outside_the_forward_pass_never_learns(tmp_path):
    def model():
        made = tiny.llama()
        made.model.register_module("spare_proj", torch.nn.Linear(32, 32))
        return made

    config = plain_lora(target_modules=["q_proj", "spare_proj"], task_type="CAUSAL_LM")
    plain = training.train(peft.get_peft_model(model(), config), tmp_path)
    [untouched] = [p for n, p in plain.named_parameters() if "spare_proj.lora_B" in n]
    assert not untouched.any()
    trainer = luthier.trainer(
        "sft", model(), Dataset.from_list(training.rows(tiny.llama())), method=config,
        tokenizer=tiny.tokenizer(), args={"output_dir": str(tmp_path / "o"), "max_steps": 2},
    )  # fmt: skip
    with pytest.raises(CheckError, match=r"gradients where declared.*spare_proj"):
        trainer.train()


@plants("A2")
def test_adalora_never_allocates_under_a_plain_trainer(tmp_path):
    options = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "target_modules": ["q_proj", "v_proj"]}
    config = peft.AdaLoraConfig(**options, total_step=4, task_type="CAUSAL_LM")
    plain = training.train(peft.get_peft_model(tiny.llama(), config), tmp_path / "plain", max_steps=4)
    assert all(p.all() for n, p in plain.named_parameters() if "lora_E" in n)  # nothing was taken away
    trainer = luthier.trainer(
        "sft", tiny.llama(), Dataset.from_list(training.rows(tiny.llama())),
        method=luthier.method("adalora")(**options), tokenizer=tiny.tokenizer(),
        args={"output_dir": str(tmp_path / "ours"), "max_steps": 4},
    )  # fmt: skip
    trainer.train()
    kept = [(p != 0).sum() for n, p in trainer.model.named_parameters() if "lora_E" in n]
    assert sum(kept) == 2 * len(kept)


# A3, A5: what is trained ---------------------------------------------------------------------------------


@plants("A3")
def test_turns_of_the_user_are_trained(encoded, tmp_path):
    with silence():
        [plain] = planted.trained_by_trl([{"messages": MESSAGES}], tmp_path)
    assert "Please send my money back." in plain
    with checks.collect() as lines:
        [labels] = encoded(tiny.tokenizer(), [{"messages": MESSAGES}]).dataset["labels"]
    learnt = tiny.tokenizer().decode([token for token in labels if token >= 0])
    assert learnt == "Answer: 42.<|im_end|>The box was empty.<|im_end|>"
    assert 0 < by_name(lines)["trained share"].value < 1


@plants("A3")
def test_mask_of_a_template_without_generation_marks_is_empty(encoded):
    tokenizer = rendering.tokenizer(rendering.CHATML)
    plain = tokenizer.apply_chat_template(MESSAGES, return_assistant_tokens_mask=True, return_dict=True)
    assert not any(plain["assistant_masks"]), "the plain stack trains on nothing"
    [labels] = encoded(tokenizer, [{"messages": MESSAGES}]).dataset["labels"]
    learnt = tokenizer.decode([token for token in labels if token >= 0])
    assert learnt == "Answer: 42.<|im_end|>The box was empty.<|im_end|>"


@plants("A5")
def test_rows_whose_answer_is_cut_off_disappear(encoded, tmp_path):
    short = {"prompt": "Say 1.", "completion": "It is 1."}
    found = [short, {"prompt": "x " * 100, "completion": "It is 2."}]
    with silence():
        assert planted.trained_by_trl(found, tmp_path, max_length=40) == ["It is 1.<|im_end|>"]
    with pytest.raises(DataError, match=r"1 of 2 examples lose all their trained.*a\.jsonl:2") as caught:
        encoded(tiny.tokenizer(), found, max_length=40)
    enough = int(caught.value.fix.split("max_length to ")[1].split(",")[0])
    assert len(encoded(tiny.tokenizer(), found, max_length=enough)) == 2
    with checks.collect() as lines:
        kept = encoded(tiny.tokenizer(), found, max_length=40, allow_empty=True)
    assert (len(kept), kept.report.emptied) == (1, 1)
    assert by_name(lines)["truncated examples"].value == by_name(lines)["emptied examples"].value == 1


@plants("A5")
def test_truncation_that_hides_the_answer_gives_a_loss_of_nan(encoded):
    tokenizer = rendering.tokenizer(rendering.CHATML)
    long = [{"role": "user", "content": "x " * 100}, MESSAGES[1]]
    ids = tokenizer.apply_chat_template(long, return_dict=False, truncation=True, max_length=32)
    with torch.no_grad():
        loss = tiny.llama()(input_ids=torch.tensor([ids]), labels=torch.full((1, 32), -100)).loss
    assert loss.isnan(), "the plain stack goes on with it"
    with pytest.raises(DataError, match=r"1 of 1 examples lose all their trained tokens .* max_length 32"):
        encoded(tokenizer, [{"messages": long}], max_length=32)


# A4, A10: templates and end tokens -----------------------------------------------------------------------


@plants("A4")
def test_an_adapter_is_served_with_the_template_of_its_base(tmp_path):
    base = luthier.save(tiny.llama(), tmp_path / "base", tiny.tokenizer(template=rendering.ZEPHYR))
    model, tokenizer = luthier.load(base)
    tokenizer.chat_template = rendering.CHATML  # what it was trained with
    expected = tokenizer.apply_chat_template(MESSAGES, return_dict=False)
    adapted = lora(model)
    adapted.save_pretrained(tmp_path / "plain")
    config = peft.PeftConfig.from_pretrained(tmp_path / "plain")
    plain = AutoTokenizer.from_pretrained(config.base_model_name_or_path)
    assert plain.apply_chat_template(MESSAGES, return_dict=False) != expected
    _, served = luthier.load(luthier.save(adapted, tmp_path / "ours", tokenizer))
    assert served.apply_chat_template(MESSAGES, return_dict=False) == expected


@plants("A4")
def test_a_template_that_changed_after_training_is_found(tmp_path):
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    path = luthier.save(model, tmp_path / "m", tokenizer)
    template = path / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>", "</s>"))
    plain = AutoTokenizer.from_pretrained(path)
    assert plain.apply_chat_template(MESSAGES) != tokenizer.apply_chat_template(MESSAGES)
    with checks.collect() as lines, pytest.raises(CheckError, match="token ids after reload"):
        verify_export(path, model, tokenizer, IDS)
    assert by_name(lines)["logits after reload"].passed
    assert not by_name(lines)["token ids after reload"].passed


@plants("A10")
def test_generation_does_not_stop_at_the_end_of_a_turn(tmp_path):
    """A base model's end token is not its template's."""
    model, tokenizer = tiny.llama(eos_token_id=tiny.END_OF_TEXT), tiny.tokenizer(eos="<|endoftext|>")
    path = luthier.save(model, tmp_path / "m", tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(path)
    assert plain.generation_config.eos_token_id == tiny.END_OF_TEXT
    with checks.collect() as lines:
        loaded, _ = luthier.load(path, dtype="float32")
    assert tiny.IM_END in loaded.generation_config.eos_token_id
    assert "<|im_end|>" in by_name(lines)["generation stops where a turn ends"].detail
    with pytest.raises(CheckError, match=r"stops where a turn ends.*eos_token_id to 3"):
        verify_export(path, plain, tokenizer, IDS)


@plants("A10")
def test_end_token_is_masked_where_it_is_the_pad_token(encoded):
    tokenizer = rendering.tokenizer(rendering.CHATML, pad="eos")
    ids = tokenizer.apply_chat_template(MESSAGES[:2], return_dict=False)
    plain = DataCollatorForLanguageModeling(tokenizer, mlm=False)([{"input_ids": ids}])["labels"][0]
    assert tokenizer.eos_token_id not in plain, "the plain collator hides every end token"
    with checks.collect() as lines:
        data = encoded(tokenizer, [{"messages": MESSAGES[:2]}]).dataset
    labels = PaddedCollator(tokenizer.pad_token_id)([data[0]])["labels"][0]
    assert labels[labels >= 0][-1] == tokenizer.eos_token_id
    assert by_name(lines)["end token trained"].value == 1.0


# A6: merging into low precision --------------------------------------------------------------------------

SMALL = 0.0005  # the size of an adapter whose effect bfloat16 weights cannot hold


@plants("A6")
def test_rounding_to_bfloat16_loses_a_small_adapter(tmp_path):
    base = training.logits(training.half(tiny.llama()).float())
    adapted = training.logits(lora(training.half(tiny.llama()).float(), SMALL))
    with silence():
        plain = lora(training.half(tiny.llama()), SMALL).merge_and_unload().float()
    assert effect_lost(training.logits(plain), adapted, base) > 0.1
    with checks.collect() as lines, pytest.raises(CheckError) as caught:
        merge(lora(training.half(tiny.llama()), SMALL))
    assert by_name(lines)["merged = unmerged (lora, float32)"].passed
    assert by_name(lines)["merged = unmerged (lora, bfloat16)"].value > 0.1
    for way_out in ("Keep the adapter separate", "format: adapter", "into float32", "dtype: float32"):
        assert way_out in str(caught.value)
    merged = merge(lora(training.half(tiny.llama()), SMALL), dtype=torch.float32)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert effect_lost(training.logits(merged), adapted, base) < 5e-3


@plants("A6")
def test_a_merge_that_is_refused_costs_no_training(tmp_path, base):
    """The recipe's export is refused; with the way out that the error names, only the export runs."""
    (tmp_path / "t.jsonl").write_text('{"prompt": "Say 1.", "completion": "It is 1."}\n' * 2)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"name: r\nmodel: {{name: {base}, dtype: bfloat16, device: cpu}}\noutput: {tmp_path}\nstages:\n"
        "  - tune: {data: t.jsonl, method: lora, training: {max_steps: 1}}\n"
        "  - export: {}\n"
    )
    with pytest.raises(CheckError, match=r"merged = unmerged \(lora, bfloat16\).*dtype: float32"):
        luthier.run(recipe)
    again = luthier.run(recipe, overrides=["export.dtype=float32"])
    assert [stage.status for stage in again.stages] == ["unchanged", "done"]
    assert "merged = unmerged (lora, float32)" in {check["name"] for check in again.checks}
    assert again.passed


@plants("A6")
def test_a_quantised_base_is_no_place_to_merge():
    model = lora(tiny.llama())
    model.get_base_model().is_quantized = True
    with pytest.raises(MethodError, match=r"quantised.*original precision"):
        merge(model)


@plants("A6")
def test_merging_back_into_4_bits_loses_the_adapter():
    model = lora(quantised_models.load(tiny.llama), 0.02)
    adapted = training.logits(model)
    with model.disable_adapter():
        base = training.logits(model)
    with pytest.warns(UserWarning, match="rounding errors"):  # it says so, and goes on
        plain = lora(quantised_models.load(tiny.llama), 0.02).merge_and_unload()
    assert effect_lost(training.logits(plain), adapted, base) > 0.1
    with checks.collect() as lines:
        merged = merge(model)
    assert by_name(lines)["dequantised = in 4 bits"].passed
    assert effect_lost(training.logits(merged), adapted, base) < 5e-3


# A7: weights that never load -----------------------------------------------------------------------------


@plants("A7")
@pytest.mark.parametrize(
    ("wrong", "fix"),
    [
        ("base.", r"Replace the prefix 'base\.' by 'base_model\.model\.'.*all of them"),
        ("model.", r"Put the prefix 'base_model\.' before the names.*all of them"),
        ("", r"Put the prefix 'base_model\.model\.' before the names.*all of them"),
        ("module.base_model.model.", r"Take the prefix 'module\.' off.*all of them"),
    ],
)
def test_an_adapter_with_other_names_stays_at_its_start(base, tmp_path, wrong, fix):
    path = luthier.save(lora(luthier.load(base, dtype="float32")[0]), tmp_path / "adapter")
    file, right = path / "adapter_model.safetensors", "base_model.model."
    tensors = {wrong + name.removeprefix(right): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    (path / "luthier.json").unlink()  # the checksums would tell at once
    plain = AutoModelForCausalLM.from_pretrained(base)
    expected = training.logits(plain)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        plain = peft.PeftModel.from_pretrained(plain, path)
    assert torch.equal(training.logits(plain), expected), "the base, as if nothing had been learnt"
    with pytest.raises(ModelError, match=rf"28 weights are missing.*lora_A.*no place.*{fix}"):
        luthier.load(path)


@plants("A7")
def test_the_head_of_a_classifier_is_random_after_loading(base, tmp_path):
    """PEFT saves the new head only where the config names the task."""
    options = {"target_modules": ["q_proj"], "init_lora_weights": True}

    def plain():
        torch.manual_seed(len(list(tmp_path.iterdir())))
        return AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)

    tuned = training.disturb(peft.get_peft_model(plain(), plain_lora(**options)))
    tuned.save_pretrained(tmp_path / "plain")
    loaded = peft.PeftModel.from_pretrained(plain(), tmp_path / "plain").eval()
    assert far(loaded(IDS).logits, tuned.eval()(IDS).logits) > 0.1
    model, tokenizer = luthier.load(base, task="classification", num_labels=3, dtype="float32")
    tuned = training.disturb(luthier.attach(model, plain_lora(**options))).eval()
    path = luthier.save(tuned, tmp_path / "ours", tokenizer)
    with checks.collect() as lines:
        loaded, _ = luthier.load(path, task="classification", dtype="float32")
    assert torch.equal(loaded(IDS).logits, tuned(IDS).logits)
    assert by_name(lines)["adapter loaded whole"].passed


# A8: sparsity --------------------------------------------------------------------------------------------


def half_pruned():
    model = tiny.llama()
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (m for m in layer.modules() if isinstance(m, torch.nn.Linear)):
                linear.weight[linear.weight.abs() < linear.weight.abs().median()] = 0
    return model


def zeros(model):
    weight = model.model.layers[0].self_attn.q_proj.weight
    return (weight == 0).float().mean().item()


@plants("A8")
def test_a_merge_that_fills_the_zeros_of_a_pruned_model():
    assert zeros(half_pruned()) == pytest.approx(0.5, abs=0.01)
    with silence():
        assert zeros(lora(half_pruned()).merge_and_unload()) < 0.01
    with pytest.raises(CheckError, match=r"sparsity kept.*Keep the adapter separate"):
        merge(lora(half_pruned()))
    other = luthier.attach(half_pruned(), luthier.method("top_layers")(k=1))
    assert merge(other) is other  # no adapter: nothing is filled
    head = training.disturb(luthier.attach(half_pruned(), peft.LoraConfig(target_modules=["lm_head"])), 0.2)
    with checks.collect() as lines:
        merged = merge(head)
    assert by_name(lines)["sparsity kept"].passed
    assert zeros(merged) == pytest.approx(0.5, abs=0.01)


# A9: padding ---------------------------------------------------------------------------------------------


@plants("A9")
@pytest.mark.parametrize("pad", ["eos", "none"])
def test_the_end_token_has_no_say_in_the_class_where_it_pads(tmp_path, pad):
    path = luthier.save(tiny.llama(pad_token_id=tiny.IM_END), tmp_path / "m", tiny.tokenizer(pad=pad))
    plain = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
    without, with_end = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 6, 7, tiny.IM_END]])
    assert torch.allclose(plain(without).logits, plain(with_end).logits, atol=1e-5)
    model, tokenizer = luthier.load(path, task="classification", num_labels=2, dtype="float32")
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert not torch.allclose(model(without).logits, model(with_end).logits, atol=1e-2)
    padded = torch.tensor([[5, 6, 7, tiny.IM_END, tokenizer.pad_token_id, tokenizer.pad_token_id]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    found = model(padded, attention_mask=mask).logits
    torch.testing.assert_close(found, model(with_end).logits, rtol=1e-4, atol=1e-5)


@plants("A9")
def test_an_answer_depends_on_its_neighbours_in_the_batch():
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    texts = ["Say 1.", "Order 4711 arrived on Monday, but the box was empty."]
    options = {"max_new_tokens": 6, "do_sample": False}

    def plain(*found):
        batch = tokenizer(list(found), return_tensors="pt", padding=True)
        new = model.generate(**batch, **options)[0, batch["input_ids"].shape[1] :]
        return tokenizer.decode(new)

    assert plain(*texts) != plain(texts[0]), "tokenizers pad on the right unless told"
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    assert generate(model, tokenizer, prompts, options=options)[0].text == plain(texts[0])


# A11, A12, A14: texts ------------------------------------------------------------------------------------


@plants("A11")
def test_rendering_and_tokenising_doubles_the_begin_token(encoded):
    tokenizer = rendering.tokenizer(rendering.LLAMA3, bos=True)
    plain = tokenizer(tokenizer.apply_chat_template(MESSAGES, tokenize=False))["input_ids"]
    assert plain[:2] == [tiny.BOS, tiny.BOS]
    with checks.collect() as lines:
        [ids] = encoded(tokenizer, [{"messages": MESSAGES}]).dataset["input_ids"]
    assert ids[0] == tiny.BOS != ids[1]
    assert ids == plain[1:]
    assert by_name(lines)["one beginning-of-text token"].value == 1


@plants("A12")
def test_concatenated_documents_see_each_other(encoded):
    tokenizer, model = rendering.tokenizer(rendering.CHATML), tiny.llama()
    found = [{"messages": MESSAGES[:2]}, {"messages": MESSAGES[2:]}]
    data = encoded(tokenizer, found).dataset
    batch = PackedCollator()(list(pack(data, 128)))
    alone = [PaddedCollator(tiny.PAD)([row]) for row in data]
    with torch.no_grad():
        packed = model(**batch, use_cache=False).loss
        plain = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        counts = [(a["labels"][:, 1:] >= 0).sum() for a in alone]
        expected = sum(model(**a).loss * n for a, n in zip(alone, counts, strict=True)) / sum(counts)
    assert abs(plain - expected) > 1e-3, "without restarting positions the loss is another"
    assert abs(packed - expected) < 1e-5


@plants("A14")
def test_mask_by_prefixes_is_wrong_where_the_template_rewrites_history(encoded):
    """The usual recipe: the mask of turn 1 reaches from len(prompt) to len(prompt + answer)."""
    tokenizer = rendering.tokenizer(rendering.FORGETFUL)
    whole = tokenizer.apply_chat_template(MESSAGES, return_dict=False)
    prompt = tokenizer.apply_chat_template(MESSAGES[:1], return_dict=False, add_generation_prompt=True)
    after = tokenizer.apply_chat_template(MESSAGES[:2], return_dict=False)
    assert "Please" in tokenizer.decode(whole[len(prompt) : len(after)] + whole[len(after) :][:8])
    assert tokenizer.decode(whole[len(prompt) : len(after)]) != tokenizer.decode(after[len(prompt) :])
    with checks.collect() as lines:
        found = encoded(tokenizer, [{"messages": MESSAGES}])
    for turn, (ids, labels) in zip(
        (1, 3), zip(found.dataset["input_ids"], found.dataset["labels"], strict=True), strict=True
    ):
        served = tokenizer.apply_chat_template(MESSAGES[:turn], return_dict=False, add_generation_prompt=True)
        assert ids[: len(served)] == served
        assert all(label == -100 for label in labels[: len(served)])
        learnt = tokenizer.decode([t for t in labels if t >= 0])
        assert learnt == f"<think>\n\n</think>\n\n{MESSAGES[turn]['content']}<|im_end|>"
    assert "1 conversations are one example a turn" in by_name(lines)["template prefix property"].detail


# A13: accumulation ---------------------------------------------------------------------------------------

ONE_STEP = {
    "use_cpu": True, "bf16": False, "max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0,
    "lr_scheduler_type": "constant", "weight_decay": 0.0, "save_strategy": "no",
}  # fmt: skip


@plants("A13")
def test_accumulating_multiplies_the_gradient_of_a_classifier(rows, tmp_path):
    """transformers leaves the division to the model's loss, and that of classifiers does none."""
    found = [{"text": "The box was empty. " * (1 + i % 2), "label": i % 3} for i in range(4)]
    tokenizer = tiny.tokenizer()
    prepared = [{**tokenizer(row["text"]), "labels": row["label"]} for row in found]
    start = tiny.bert().classifier.weight

    def plain(size):
        model, steps = tiny.bert(), {"gradient_accumulation_steps": 4 // size}
        options = ONE_STEP | steps | {"per_device_train_batch_size": size}
        trainer = Trainer(
            model, training.arguments(tmp_path, **options), train_dataset=prepared, processing_class=tokenizer
        )
        trainer.train()
        return model.classifier.weight - start

    assert far(plain(1), plain(4)) > 2.5, "four times the gradient"

    def ours(size):
        args = ONE_STEP | {"gradient_accumulation_steps": 4 // size, "per_device_train_batch_size": size}
        trainer = luthier.trainer(
            "classification", tiny.bert(), rows(*found), tokenizer=tokenizer,
            args=args | {"output_dir": str(tmp_path / "o")},
        )  # fmt: skip
        trainer.train()
        return trainer.model.classifier.weight - start

    assert far(ours(1), ours(4)) < 1e-5


@plants("A13")
def test_the_loss_of_an_evaluation_depends_on_its_batches(tmp_path):
    tokenizer = tiny.tokenizer()
    found = [
        {"input_ids": list(range(5, 5 + n)), "labels": [-100, *range(6, 5 + n)]} for n in (4, 30, 6, 20)
    ]  # fmt: skip
    args = {"use_cpu": True, "report_to": "none", "bf16": False, "output_dir": str(tmp_path)}

    def plain(size):
        options = training.arguments(tmp_path, per_device_eval_batch_size=size)
        collator = DataCollatorForSeq2Seq(tokenizer)
        data = Dataset.from_list(found)
        return Trainer(tiny.llama(), options, collator, eval_dataset=data).evaluate()["eval_loss"]

    def ours(size):
        trainer = luthier.trainer(
            "sft", tiny.llama(), Dataset.from_list(found), eval_data=Dataset.from_list(found),
            tokenizer=tokenizer, args=args | {"per_device_eval_batch_size": size},
        )  # fmt: skip
        return trainer.evaluate()["eval_loss"]

    assert abs(plain(1) - plain(4)) > 1e-3
    assert ours(1) == pytest.approx(ours(4), abs=1e-5)


# A16: combining adapters ---------------------------------------------------------------------------------


@plants("A16")
def test_an_adapter_of_weight_one_is_not_itself():
    def model():
        torch.manual_seed(0)
        return training.disturb(peft.get_peft_model(tiny.llama(), plain_lora(use_rslora=True), "one"))

    plain, expected = model(), training.logits(model())
    plain.add_weighted_adapter(["one"], [1.0], "sum", combination_type="svd")
    plain.set_adapter("sum")
    assert far(training.logits(plain), expected) > 0.01
    assert far(training.logits(combine(model(), {"one": 1.0})), expected) < 1e-5


# A15: prefixes -------------------------------------------------------------------------------------------


@plants("A15")
def test_a_prefix_in_the_cache_is_lost_where_there_is_none():
    ids = torch.randint(10, 200, (2, 9), generator=torch.Generator().manual_seed(0))

    def gradient(model, checkpointing):
        model.train()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    def answers(model, **options):
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return model.eval().generate(**given, max_new_tokens=6, do_sample=False, **options)

    def plain():
        config = peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
        return peft.get_peft_model(tiny.llama(), config)

    with pytest.raises(RuntimeError):
        gradient(plain(), checkpointing=True)
    with pytest.raises(RuntimeError):
        answers(plain(), use_cache=False)

    def ours():
        torch.manual_seed(0)
        return luthier.attach(tiny.llama(), luthier.method("prefix")(num_virtual_tokens=4))

    torch.testing.assert_close(gradient(ours(), checkpointing=True), gradient(ours(), checkpointing=False))
    assert torch.equal(answers(ours(), use_cache=False), answers(ours()))


# A19, A20, A21: caches, seeds, keys ----------------------------------------------------------------------


@plants("A19")
def test_a_change_of_the_masking_code_is_answered_from_the_cache(rows, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    file, code = tmp_path / "my_masks.py", "def mask(row):\n    return {{'labels': [{}]}}\n"
    (tmp_path / "d.jsonl").write_text('{"a": 1}\n')

    def plain(version):
        file.write_text(code.format(version))
        importlib.invalidate_caches()
        sys.modules.pop("my_masks", None)
        mask = importlib.import_module("my_masks").mask
        data = load_dataset("json", data_files=str(tmp_path / "d.jsonl"), cache_dir=str(tmp_path / "hf"))
        return data["train"].map(mask)["labels"][0]

    assert plain(1) == plain(100000) == [1], "a function of a module is known by its name"
    monkeypatch.delitem(sys.modules, "my_masks")

    built = []
    finish, read = tokenize._finish, inspect.getsource
    monkeypatch.setattr(tokenize, "_finish", lambda *a: built.append(1) or finish(*a))

    def ours():
        cache.code_version.cache_clear()
        encode(rows({"messages": MESSAGES}), tiny.tokenizer(), max_length=64)
        return len(built)

    assert (ours(), ours()) == (1, 1)
    monkeypatch.setattr(cache.inspect, "getsource", lambda module: read(module) + "\n# changed")
    assert ours() == 2
    cache.code_version.cache_clear()


@plants("A20")
def test_the_adapter_is_drawn_before_the_seed_is_set(tmp_path):
    def start(model):
        return next(p.detach().clone() for n, p in model.named_parameters() if "lora_A" in n)

    def plain(before):
        torch.manual_seed(before)  # whatever the process has drawn so far
        model = peft.get_peft_model(tiny.llama(), plain_lora(task_type="CAUSAL_LM"))
        return start(Trainer(model, training.arguments(tmp_path, seed=3)).model)

    def ours(before, seed=3):
        torch.manual_seed(before)
        trainer = luthier.trainer(
            "sft", tiny.llama(), Dataset.from_list(training.rows(tiny.llama())), method=plain_lora(),
            tokenizer=tiny.tokenizer(), args={"output_dir": str(tmp_path), "seed": seed},
        )  # fmt: skip
        return start(trainer.model)

    assert not torch.equal(plain(1), plain(2))
    assert torch.equal(ours(1), ours(2))
    assert not torch.equal(ours(1), ours(1, seed=4))


@plants("A21")
def test_an_unknown_key_changes_nothing(tmp_path, base):
    with silence():
        assert GenerationConfig(max_new_token=4).max_new_tokens is None
        plain = LlamaForCausalLM.config_class.from_pretrained(base, atention_dropout=0.5)
    assert plain.attention_dropout == 0.0
    (tmp_path / "t.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"name: r\nmodel: {base}\nstages:\n"
        "  - evaluate: {data: t.jsonl, metrics: [exact_match], generation: {max_new_token: 4}}\n"
    )
    with pytest.raises(RecipeError, match=r"r\.yaml:4: unknown key 'max_new_token'.*'max_new_tokens'"):
        load_recipe(recipe)
    with pytest.raises(MethodError, match=r"no option 'lora_dropuot'.*'lora_dropout'"):
        luthier.method("lora")(lora_dropuot=0.5)
