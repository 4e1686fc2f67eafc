"""Stages and runs share one loaded model, and each finds it as a fresh process would."""

import json
import logging
from types import SimpleNamespace

import pytest
import small_training
import tiny
import torch

import luthier
from luthier.models.saving import save
from luthier.recipe.context import Context, Models
from luthier.recipe.inputs import Upstream
from luthier.recipe.schema import ModelSpec
from luthier.tuning.attach import attach


@pytest.fixture
def context(tmp_path):
    save(tiny.llama(), tmp_path / "base", tiny.tokenizer())
    spec = ModelSpec(name=str(tmp_path / "base"), task="causal", dtype="float32")
    recipe = SimpleNamespace(model=spec, seed=0, stages=[])
    return Context(recipe, tmp_path, tmp_path / "work", Models())


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(5, 25)[None]).logits


def train(model, folder, **options):
    """A few steps as the stage's trainer takes them, with all that a trainer sets on a model."""
    args = small_training.arguments(folder, gradient_checkpointing=True, **options)
    small_training.HookedTrainer(model, args, train_dataset=small_training.rows(model)).train()


def tune(context, method, **options):
    config = luthier.method(method)(**options)
    full = method == "full"
    model, tokenizer = context.lend(train=full)
    model = attach(model, config)
    train(model, context.run_folder / "trainer")
    folder = save(model, context.run_folder / ("model" if full else "adapter"), tokenizer)
    output = Upstream(folder, "hash of the output", adapter=not full)
    context.settle(model, tokenizer, output, train=full)
    return output


class TestTheBase:
    def test_is_loaded_once_and_found_again_exactly_after_an_adapter(self, context):
        model, _ = context.model()
        before, config = logits(model), model.config.to_dict()
        tune(context, "lora", r=4)
        again, _ = context.model()
        assert again is model
        assert context.models.loads == 1
        assert torch.equal(logits(again), before)
        assert again.config.to_dict() == config
        assert not again.is_activation_checkpointing
        assert not again.training
        assert all(parameter.requires_grad for parameter in again.parameters())

    def test_is_loaded_again_after_its_own_weights_were_trained(self, context):
        before = logits(context.model()[0])
        tune(context, "full")
        assert torch.equal(logits(context.model()[0]), before)
        assert context.models.loads == 2

    def test_is_loaded_again_when_a_bit_of_it_changed_under_the_adapter(self, context, caplog):
        model, _ = context.model()
        before = logits(model)
        tune(context, "lora", r=4)
        weight = model.model.norm.weight
        weight.data[3] = torch.nextafter(weight.data[3], torch.tensor(9.0))
        with caplog.at_level(logging.WARNING, "luthier.recipe"):
            assert torch.equal(logits(context.model()[0]), before)
        assert "was changed" in caplog.text
        assert context.models.loads == 2

    def test_is_loaded_again_when_something_was_hung_on_it(self, context):
        model, _ = context.model()
        tune(context, "lora", r=4)
        model.model.layers[0].register_forward_hook(lambda module, args, output: None)
        assert context.model()[0] is not model

    def test_is_loaded_again_after_a_stage_that_did_not_finish(self, context):
        model, _ = context.model()
        before = logits(model)
        lent, _ = context.lend(train=False)
        attach(lent, luthier.method("lora")(r=4))
        assert torch.equal(logits(context.model()[0]), before)
        assert context.models.loads == 2

    def test_is_loaded_again_when_its_files_changed(self, context):
        context.model()
        save(tiny.llama(seed=1), context.run_folder / "base", tiny.tokenizer())
        assert torch.equal(logits(context.model()[0]), logits(tiny.llama(seed=1)))

    def test_gives_every_stage_a_tokenizer_of_its_own(self, context):
        first = context.model()[1]
        first.padding_side = "left"
        first.pad_token = "<s>"
        second = context.model()[1]
        assert second.padding_side == "right"
        assert second.pad_token == "<pad>"


class TestWhatWasTuned:
    @pytest.mark.parametrize(("method", "options"), [("lora", {"r": 4}), ("dora", {"r": 4}), ("full", {})])
    def test_needs_no_new_base_and_equals_what_a_fresh_process_loads(self, context, method, options):
        context.upstream = tune(context, method, **options)
        live, _ = context.model()
        loads = context.models.loads
        fresh, _ = luthier.load(context.upstream.artefact, dtype="float32")
        assert context.models.loads == loads
        assert torch.equal(logits(live), logits(fresh.eval()))
        one, two = (
            model.get_base_model() if hasattr(model, "get_base_model") else model for model in (live, fresh)
        )
        assert one.generation_config.to_dict() == two.generation_config.to_dict()
        assert not live.training

    def test_is_a_base_by_the_name_that_it_has_now(self, context):
        """An adapter on what a stage before left belongs to that stage's folder, as for a fresh process."""
        context.upstream = tune(context, "full")
        tuned = context.upstream.artefact
        adapter = tune(context, "lora", r=4).artefact
        record = json.loads((adapter / "luthier.json").read_text())["base"]
        fresh, _ = luthier.load(tuned, dtype="float32")
        assert record == fresh.luthier_origin
        config = json.loads((adapter / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == fresh.name_or_path == str(tuned)
        luthier.load(adapter, dtype="float32")

    def test_two_methods_one_after_the_other_give_what_each_gives_alone(self, context):
        for _ in range(2):
            alone = Context(context.recipe, context.run_folder, context.work, Models())
            torch.manual_seed(0)
            expected = tune(alone, "dora", r=4)
            weights = [p.detach().clone() for p in alone.models._model.parameters()]
            torch.manual_seed(1)
            tune(context, "lora", r=8)
            torch.manual_seed(0)
            assert tune(context, "dora", r=4) == expected
            for one, two in zip(weights, context.models._model.parameters(), strict=True):
                assert torch.equal(one, two)


def test_a_new_classification_head_comes_from_the_seed(tmp_path):
    save(tiny.llama(), tmp_path / "base", tiny.tokenizer())

    def head(seed: int) -> torch.Tensor:
        spec = ModelSpec(name=str(tmp_path / "base"), task="classification", num_labels=3)
        recipe = SimpleNamespace(model=spec, seed=seed, stages=[])
        torch.manual_seed(99)  # whatever ran before
        return Context(recipe, tmp_path, tmp_path, Models()).model()[0].score.weight

    assert torch.equal(head(0), head(0))
    assert not torch.equal(head(0), head(1))
