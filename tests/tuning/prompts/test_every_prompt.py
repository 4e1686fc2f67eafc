"""What every learnt prompt keeps to, on four kinds of model. A new method joins by existing."""

import json
import math

import prompt_models as models
import pytest
import small_training as training
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file

import luthier
from luthier import checks, taxonomy
from luthier.acceleration import label_only
from luthier.data.load import load
from luthier.data.tokenize import encode
from luthier.errors import MethodError
from luthier.evaluation.evaluate import evaluate
from luthier.evaluation.perplexity import context_length
from luthier.models.placement import Placement
from luthier.recipe import footprint
from luthier.tuning.attach import attach, trainable
from luthier.tuning.soft_prompts import get_own_names

METHODS = [m.name for m in taxonomy.methods("tuning/prompts") if m.origin == "luthier" and not m.searches]
MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert, "t5": tiny.t5}
TASKS = {"llama": "causal", "gpt2": "causal", "bert": "classification", "t5": "seq2seq"}
OPTIONS: dict[str, dict] = {
    "prefix": {"num_virtual_tokens": 5, "encoder_hidden_size": 16},
    "prompt": {"num_virtual_tokens": 5},
    "p_tuning_v2": {"num_virtual_tokens": 5},
    "p_tuning": {"num_virtual_tokens": 5},
    "aprompt": {"num_virtual_tokens": 5, "kv_length": 3, "qk_rank": 2, "max_positions": 300},
}
CASES = [(name, kind) for name in METHODS for kind in MODELS]
every_case = pytest.mark.parametrize(("name", "kind"), CASES, ids=["-".join(case) for case in CASES])
generators = pytest.mark.parametrize(
    ("name", "kind"), [case for case in CASES if case[1] != "bert"], ids=lambda part: part
)


def config(name):
    return luthier.method(name)(**OPTIONS.get(name, {}))


def adapted(name, base):
    """As if trained: random changes of all that learns."""
    torch.manual_seed(0)
    return training.disturb(attach(base, config(name)), 0.2)


@pytest.fixture
def on_disk(tmp_path):
    """A model that was loaded from its folder, as a user's is."""

    def loaded(kind):
        folder = tmp_path / "base"
        if not folder.exists():
            luthier.save(MODELS[kind](), folder, tiny.tokenizer())
        return luthier.load(folder, task=TASKS[kind], dtype="float32")

    return loaded


@every_case
def test_only_the_prompt_and_a_new_head_learn(name, kind):
    with checks.collect() as lines:
        model = adapted(name, MODELS[kind]())
    assert all(line.passed for line in lines)
    model.train()
    model(**training.batch(model)).loss.backward()
    prompt = {n.replace("base_model.model.", "", 1) for n in get_own_names(model.base_model, "default")}
    for n, parameter in model.named_parameters():
        own = n.replace("base_model.model.", "", 1).replace(".default", "")
        assert (own in prompt or ".modules_to_save." in n) == parameter.requires_grad
        assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == parameter.requires_grad, n
    heads = [n for n, p in model.named_parameters() if p.requires_grad and ".modules_to_save." in n]
    assert bool(heads) == (kind == "bert")


@every_case
def test_disabled_is_the_base_exactly_and_enabled_again_is_not(name, kind):
    base = MODELS[kind]()
    inputs = training.batch(base)
    before = models.forward(base, **inputs)
    model = adapted(name, base)
    after = models.forward(model, **inputs)
    assert after.shape == before.shape
    assert not torch.allclose(after, before, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(models.forward(model, **inputs), before)
    assert torch.equal(models.forward(model, **inputs), after)


@every_case
def test_two_adapters_live_side_by_side(name, kind):
    model = adapted(name, MODELS[kind]())
    inputs = training.batch(model)
    first = models.forward(model, **inputs)
    model.add_adapter("second", config(name))
    assert torch.equal(models.forward(model, **inputs), first)
    model.set_adapter("second")
    training.disturb(model, 0.2, seed=2)
    second = models.forward(model, **inputs)
    assert not torch.allclose(first, second, atol=1e-3)
    model.set_adapter("default")
    assert torch.equal(models.forward(model, **inputs), first)
    model.delete_adapter("second")
    assert not any("second" in n for n, _ in model.named_parameters())
    assert torch.equal(models.forward(model, **inputs), first)


@every_case
def test_saved_and_loaded_again_computes_the_same(name, kind, on_disk, tmp_path):
    """By us; and by PEFT, with our types registered where the file's type is one of ours."""
    model, tokenizer = on_disk(kind)
    model = adapted(name, model)
    inputs = training.batch(model)
    expected = models.forward(model, **inputs)
    with checks.collect() as lines:
        luthier.save(model, tmp_path / "adapter", tokenizer)
        again, _ = luthier.load(tmp_path / "adapter", task=TASKS[kind], dtype="float32")
    assert all(line.passed for line in lines)
    assert type(again.base_model).__mro__[1] is type(model.base_model).__mro__[1]
    assert torch.allclose(models.forward(again, **inputs), expected, atol=1e-6)
    theirs = PeftModel.from_pretrained(on_disk(kind)[0], tmp_path / "adapter")
    found = models.forward(theirs, **inputs)[:, -expected.shape[1] :]  # PEFT's prompt has logits too
    assert torch.allclose(found, expected, atol=1e-5)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(t.numel() for t in stored.values()) <= trainable(model)[0]


@every_case
def test_trained_on_after_loading(name, kind, on_disk, tmp_path):
    model, _ = on_disk(kind)
    luthier.save(adapted(name, model), tmp_path / "adapter")
    again, _ = luthier.load(tmp_path / "adapter", task=TASKS[kind], dtype="float32", train=True)
    assert trainable(again)[0] > 0
    before = training.weights(again)
    training.train(again, tmp_path / "run", max_steps=2)
    moved = {n for n, p in training.weights(again).items() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in again.named_parameters() if p.requires_grad}


@generators
def test_generates_alike_with_cache_without_and_one_by_one(name, kind):
    model = adapted(name, MODELS[kind]()).eval()
    texts = [models.ids(1, n, seed=n)[0] for n in (3, 8)]
    batch = models.padded(texts, "right" if kind == "t5" else "left")
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": tiny.PAD}
    found = model.generate(**batch, **options)
    assert torch.equal(model.generate(**batch, **options, use_cache=False), found)
    for row, text in enumerate(texts):
        one = {"input_ids": text[None], "attention_mask": torch.ones_like(text[None])}
        assert torch.equal(model.generate(**one, **options)[0, -8:], found[row, -8:])
    beams = model.generate(**batch, **options, num_beams=2)
    assert torch.equal(model.generate(**batch, **options, num_beams=2, use_cache=False), beams)


@every_case
def test_padding_on_either_side_changes_nothing(name, kind):
    model = adapted(name, MODELS[kind]())
    texts = [models.ids(1, n, seed=n)[0] for n in (3, 8)]
    target = {"decoder_input_ids": models.ids(1, 4)} if kind == "t5" else {}
    for side in ("right",) if kind == "bert" else ("left", "right"):  # a classifier reads the first token
        many = {k: v.expand(2, -1) for k, v in target.items()}
        logits = models.forward(model, **models.padded(texts, side), **many)
        for row, text in enumerate(texts):
            alone = models.forward(model, input_ids=text[None], **target)[0]
            real = slice(-len(text), None) if side == "left" else slice(len(text))
            found = logits[row][real] if kind in ("llama", "gpt2") else logits[row]
            assert torch.allclose(found, alone, atol=1e-5), side


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", METHODS)
class TestDecoder:
    def test_later_tokens_do_not_reach_back(self, name, kind):
        model = adapted(name, MODELS[kind]())
        text = models.ids(1, 9)
        other = text.clone()
        other[0, 6] += 1
        logits, changed = (models.forward(model, input_ids=ids) for ids in (text, other))
        assert torch.equal(logits[:, :6], changed[:, :6])
        assert not torch.allclose(logits[:, 6], changed[:, 6], atol=1e-3)

    def test_compiles(self, name, kind):
        model = adapted(name, MODELS[kind]())
        text = models.ids(2, 9)
        expected = models.forward(model, input_ids=text)
        compiled = torch.compile(model, backend="eager")
        assert torch.allclose(models.forward(compiled, input_ids=text), expected, atol=1e-5)

    def test_the_loss_of_labelled_rows_alone_is_the_loss(self, name, kind):
        model = adapted(name, MODELS[kind]())
        assert label_only.why_not(model) is None
        inputs = training.batch(model)
        inputs["labels"][:, :4] = -100
        expected = model.eval()(**inputs).loss
        with label_only.label_only(model):
            assert torch.allclose(model(**inputs).loss, expected, atol=1e-5)

    def test_is_evaluated(self, name, kind, tmp_path):
        path = tmp_path / "data.jsonl"
        rows = [
            {"prompt": "Where is order 4711?", "completion": "Here."},
            {"prompt": "Why?", "completion": "So."},
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tokenizer = tiny.tokenizer()
        model = adapted(name, MODELS[kind]())
        found = evaluate(model, path, ["perplexity", "exact_match"], tokenizer=tokenizer)
        total = count = 0
        for row in encode(load(path), tokenizer, max_length=None).dataset:
            ids, labels = (torch.tensor([row[k]]) for k in ("input_ids", "labels"))
            kept = (labels != -100).sum().item()
            total += models_loss(model, ids, labels) * kept
            count += kept
        assert found.metrics["perplexity"].value == pytest.approx(math.exp(total / count), rel=1e-4)
        assert found.metrics["exact_match"].n == 2

    def test_texts_as_long_as_the_model_takes(self, name, kind):
        model = adapted(name, MODELS[kind]())
        limit = context_length(model)
        assert limit == 256 - config(name).num_virtual_tokens
        assert models.forward(model, input_ids=models.ids(1, limit)).isfinite().all()


def models_loss(model, ids, labels):
    logits = models.forward(model, input_ids=ids)[0, :-1]
    return torch.nn.functional.cross_entropy(logits, labels[0, 1:]).item()


@every_case
def test_is_planned_as_it_is(name, kind):
    """The planner's model without weights has the same parameters, and a step of it runs."""
    base = MODELS[kind]()
    labels = getattr(base.config, "num_labels", None)
    float32 = Placement(torch.float32, "cpu", "sdpa", "test")
    skeleton = footprint.skeleton(base.config.to_dict(), TASKS[kind], float32, labels)
    planned = footprint.attach(skeleton, config(name))
    assert trainable(planned) == trainable(attach(base, config(name)))
    step = footprint.simulate(planned, 2, 8, float32, labelled=16)
    assert 0 < step.kept <= step.peak


@every_case
def test_taken_off_leaves_the_base_as_it_was(name, kind):
    base = MODELS[kind]()
    names, attention = [n for n, _ in base.named_modules()], base.config._attn_implementation
    inputs = training.batch(base)
    before = models.forward(base, **inputs)
    model = attach(base, config(name))
    with pytest.raises(MethodError, match="cannot be merged"):
        model.merge_and_unload()
    back = model.unload()
    assert [n for n, _ in back.named_modules()] == names
    assert back.config._attn_implementation == attention
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in back.modules())
    assert torch.equal(models.forward(back, **inputs), before)
