"""Pairs that cannot go together are refused before anything is loaded, with what to write instead."""

import json

import pytest

from luthier.errors import RecipeError
from luthier.recipe.source import load_recipe

ROW = '{"prompt": "a", "completion": "b"}\n'


@pytest.fixture
def problems(tmp_path):
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(ROW)

    def find(*stages, model="smollm2-135m", **top):
        path = tmp_path / "r.yaml"
        path.write_text(json.dumps({"name": "r", "model": model, "stages": list(stages), **top}))
        try:
            load_recipe(path)
        except RecipeError as error:
            return [(".".join(map(str, f.place)), f.message, f.fix) for f in error.faults]
        return []

    return find


def tune(**keys):
    return {"tune": {"data": "train.jsonl", "method": "lora", **keys}}


def evaluate(*metrics, **keys):
    return {"evaluate": {"data": "test.jsonl", "metrics": list(metrics) or ["perplexity"], **keys}}


def export(**keys):
    return {"export": keys}


CLASSIFY = tune(objective="classification")


@pytest.mark.parametrize(
    "stages",
    [
        (evaluate(), tune(), evaluate("exact_match", generation={"max_new_tokens": 8}), export()),
        (tune(), export(format="adapter")),
        (tune(method="full"), export(merge=False)),
        (tune(objective="classification"), evaluate("accuracy")),
        (evaluate("accuracy"),),
        (tune(eval_data="test.jsonl", training={"eval_strategy": "epoch", "load_best_model_at_end": True}),),
        (tune(method={"name": "top_layers", "cache_trunk": True}),),
    ],
)
def test_sound_recipes_pass(problems, stages):
    assert problems(*stages) == []


@pytest.mark.parametrize(
    ("stages", "place", "message"),
    [
        ((CLASSIFY, evaluate("exact_match")), "stages.1.evaluate.metrics.0", "exact_match cannot be"),
        ((CLASSIFY, evaluate()), "stages.1.evaluate.metrics.0", "perplexity cannot be measured"),
        ((tune(), evaluate("accuracy")), "stages.1.evaluate.metrics.0", "on a causal model"),
        ((tune(method="top_layers"), CLASSIFY), "stages.1.tune.objective", "the recipe's model is causal"),
        ((tune(method="full"), export(merge=True)), "stages.1.export.merge", "full leaves nothing to merge"),
        ((tune(method="full"), export(format="adapter")), "stages.1.export.format", "no adapter to export"),
        ((export(format="adapter"),), "stages.0.export.format", "no stage before it tunes"),
        ((tune(), export(format="adapter", merge=True)), "stages.1.export.merge", "as an adapter"),
        ((tune(), export(format="lora")), "stages.1.export", "needs a rank"),
        ((tune(), export(format="adapter", rank=8)), "stages.1.export", "has no rank"),
        ((tune(), export(format="lora", rank=1.5)), "stages.1.export.rank", "neither a whole"),
        ((tune(method="full"), export(format="lora", rank=8)), "stages.1.export.format", "no adapter to"),
        ((tune(), export(merge=False)), "stages.1.export.merge", "only if it is merged"),
        ((evaluate(expect={"rougeL": "> 0"}),), "stages.0.evaluate.expect.rougeL", "not measured by"),
        ((evaluate(generation={"max_new_tokens": 3}),), "stages.0.evaluate.generation", "generates text"),
        (
            (evaluate("exact_match", generation={"temperature": 0.5}),),
            "stages.0.evaluate.generation.temperature",
            "no effect without sampling",
        ),
        ((tune(training={"eval_strategy": "epoch"}),), "stages.0.tune.training.eval_strategy", "needs data"),
        (
            (tune(eval_data="test.jsonl", training={"load_best_model_at_end": True, "eval_strategy": "no"}),),
            "stages.0.tune.training.load_best_model_at_end",
            "not known without evaluation",
        ),
        ((tune(training={"bf16": True, "fp16": True}),), "stages.0.tune.training.fp16", "exclude"),
        (
            (tune(method={"name": "top_layers", "cache_trunk": True, "trunk_dropout": True}),),
            "stages.0.tune.method.trunk_dropout",
            "cache_trunk",
        ),
        (
            (tune(method={"name": "gradual_unfreezing", "cache_trunk": True}),),
            "stages.0.tune.method.cache_trunk",
            "no option 'cache_trunk'",
        ),
        (
            (tune(method={"name": "full", "fused_backward": True}, training={"max_grad_norm": 0,
             "gradient_accumulation_steps": 4}),),
            "stages.0.tune.training.gradient_accumulation_steps",
            "fused_backward",
        ),
        ((evaluate(name="a"), tune(name="a")), "stages.1.tune.name", "taken by stages.0"),
        ((evaluate(name="tune"),), "stages.0.evaluate.name", "cannot be called"),
        ((tune(data="nowhere/train.jsonl"),), "stages.0.tune.data", "nowhere/train.jsonl"),
    ],
)  # fmt: skip
def test_impossible_pairs_are_refused(problems, stages, place, message):
    found = problems(*stages)
    assert [f[0] for f in found] == [place], found
    assert message in found[0][1] + (found[0][2] or "")


def folder(path, **config):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(b"")
    return str(path)


def test_an_encoder_decoder_is_not_tuned_as_causal_nor_the_reverse(problems, tmp_path):
    t5 = folder(tmp_path / "t5", model_type="t5", is_encoder_decoder=True)
    llama = folder(tmp_path / "llama", model_type="llama")
    place, message, fix = problems(tune(), model=t5)[0]
    assert place == "model"
    assert "encoder-decoder" in message
    assert "seq2seq" in fix
    assert problems(tune(objective="seq2seq"), model=t5) == []
    assert "is no encoder-decoder" in problems(tune(objective="seq2seq"), model=llama)[0][1]
    assert problems(tune(), model=llama) == []


def test_an_unknown_model_names_the_nearest(problems):
    (found,) = problems(tune(), model="smollm-135m")
    assert found[0] == "model"
    assert "smollm2-135m" in found[2]
