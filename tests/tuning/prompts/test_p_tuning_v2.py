"""P-tuning v2: its start, its dropout, its range of layers, and the heads of classifiers and taggers."""

import json

import peft
import prompt_models as models
import pytest
import small_training as training
import tiny
import torch
from peft import PeftModel, get_peft_model
from transformers import BertForTokenClassification

import luthier
from luthier import method
from luthier.errors import MethodError
from luthier.tuning import soft_prompts
from luthier.tuning.attach import attach, trainable
from luthier.tuning.attention_prompts import AttentionPrompt

P = 5


def adapted(base, **options):
    torch.manual_seed(0)
    return attach(base, method("p_tuning_v2")(**({"num_virtual_tokens": P} | options)))


def prompts(model):
    return [m for m in model.modules() if isinstance(m, AttentionPrompt)]


def test_starts_small_where_pefts_starts_at_one(tiny_bert):
    tables = [layer.table["default"] for layer in prompts(adapted(tiny_bert, num_virtual_tokens=200))]
    assert [tuple(t.shape) for t in tables] == [(200, 64)] * 2
    assert torch.cat(tables).std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize(("make", "head"), [(tiny.bert, 99), (models.roberta, 32 * 33 + 99)])
def test_learns_the_prompts_and_the_head_alone(make, head):
    """2 P L d numbers of prompts, and C (d + 1) of BERT's head; RoBERTa's has a layer more. No pooler."""
    model = adapted(make())
    assert trainable(model)[0] == 2 * P * 2 * 32 + head
    assert not any("pooler" in n for n, p in model.named_parameters() if p.requires_grad)


class TestDropout:
    def test_drops_and_scales_every_number_for_every_text_anew(self, tiny_bert):
        model = adapted(tiny_bert, prompt_dropout=0.5, num_virtual_tokens=100)
        layer = prompts(model)[0]
        whole = layer.table["default"].detach()
        layer.train()
        key, value = layer(torch.empty(3))
        for part, numbers in ((key, whole[:, :32]), (value, whole[:, 32:])):
            rows = part.transpose(1, 2).flatten(2).detach()  # (batch, P, heads * dim)
            assert rows.shape[0] == 3
            kept = rows != 0
            assert torch.allclose(rows[kept], (2 * numbers.expand(3, -1, -1))[kept])
            assert kept.float().mean().item() == pytest.approx(0.5, abs=0.03)
            assert not torch.equal(kept[0], kept[1])

    def test_is_all_that_is_random_in_training(self, tiny_bert):
        model = adapted(tiny_bert)
        training.disturb(model, 0.5)
        inputs = training.batch(model)
        model.train()
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
        model.eval()
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)


class TestLayers:
    def test_below_the_first_nothing_changes_and_nothing_is_kept(self, tiny_bert):
        inputs = training.batch(tiny_bert)
        before = tiny_bert(**inputs, output_hidden_states=True).hidden_states
        model = adapted(tiny_bert, first_layer=1)
        assert [layer.site.layer for layer in prompts(model)] == [1]
        model = training.disturb(model, 0.5)
        after = model(**inputs, output_hidden_states=True).hidden_states
        assert not after[1].requires_grad
        assert after[2].requires_grad
        model.disable_adapter_layers()
        assert torch.equal(model(**inputs, output_hidden_states=True).hidden_states[2], before[2])

    def test_without_a_shift_the_layers_below_are_the_bases(self, tiny_bert):
        inputs = training.batch(tiny_bert)
        before = models_states(tiny_bert, inputs)
        model = training.disturb(adapted(tiny_bert, first_layer=1, shift_positions=False), 0.5)
        after = models_states(model, inputs)
        assert torch.equal(after[1], before[1])
        assert not torch.allclose(after[2], before[2], atol=1e-3)

    def test_the_last_is_the_highest_with_prompts(self):
        model = adapted(tiny.llama(num_hidden_layers=4), first_layer=1, last_layer=2)
        assert [layer.site.layer for layer in prompts(model)] == [1, 2]

    def test_of_an_encoder_decoder_are_counted_in_each_stack(self):
        model = adapted(models.deep_t5(), first_layer=1)
        found = [(layer.site.kind, layer.site.layer) for layer in model.base_model.attentions]
        assert found == [("encoder", 1), ("encoder", 2), ("decoder", 1), ("cross", 1)]

    @pytest.mark.parametrize(
        "options", [{"first_layer": 2}, {"last_layer": 2}, {"first_layer": 1, "last_layer": 0}]
    )
    def test_that_do_not_exist_are_refused(self, tiny_bert, options):
        with pytest.raises(MethodError, match=r"of a stack of 2 layers.*from 0 to 1"):
            adapted(tiny_bert, **options)

    def test_of_a_range_are_saved_as_our_own_type(self, tiny_bert, tmp_path):
        model = training.disturb(adapted(tiny_bert, first_layer=1), 0.5)
        inputs = training.batch(model)
        expected = models.forward(model, **inputs)
        soft_prompts.save(model, tmp_path / "a")
        assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"] == "P_TUNING_V2"
        again = PeftModel.from_pretrained(tiny.bert(), tmp_path / "a")
        assert torch.equal(models.forward(again, **inputs), expected)


def models_states(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs, output_hidden_states=True).hidden_states


class TestHeads:
    def test_of_a_tagger_has_one_answer_a_token(self, tmp_path):
        def tagger():
            return tiny._build(BertForTokenClassification, tiny.bert().config, 0)

        model = adapted(tagger(), task_type="TOKEN_CLS")
        labels = torch.randint(3, (2, 7), generator=torch.Generator().manual_seed(0))
        labels[:, 3:] = -100
        inputs = {"input_ids": models.ids(2, 7), "labels": labels}
        out = model.eval()(**inputs)
        assert out.logits.shape == (2, 7, 3)
        expected = torch.nn.functional.cross_entropy(out.logits[:, :3].flatten(0, 1), labels[:, :3].flatten())
        assert torch.allclose(out.loss, expected)
        out.loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        assert any("classifier" in n for n, p in model.named_parameters() if p.requires_grad)
        model.save_pretrained(tmp_path / "a")
        again = PeftModel.from_pretrained(tagger(), tmp_path / "a").eval()
        assert torch.equal(again(**inputs).logits, out.logits)

    def test_of_a_classifier_is_in_the_file_that_peft_loads(self, tmp_path):
        luthier.save(tiny.bert(), tmp_path / "base", tiny.tokenizer())
        base, tokenizer = luthier.load(tmp_path / "base", task="classification", dtype="float32")
        model = training.disturb(adapted(base), 0.5)
        inputs = models.padded([models.ids(1, n, seed=n)[0] for n in (4, 7)], "right")
        expected = models.forward(model, **inputs)
        luthier.save(model, tmp_path / "a", tokenizer)
        theirs = PeftModel.from_pretrained(tiny.bert(), tmp_path / "a")
        assert isinstance(theirs.peft_config["default"], peft.PrefixTuningConfig)
        assert torch.allclose(models.forward(theirs, **inputs), expected, atol=1e-6)


def test_pefts_prefix_on_an_encoder_is_this(tmp_path):
    """The authors' model and PEFT's class were found equal; this holds ours against the latter."""
    torch.manual_seed(0)
    config = peft.PrefixTuningConfig(num_virtual_tokens=P, task_type="SEQ_CLS")
    theirs = get_peft_model(tiny.bert(), config)
    inputs = models.padded([models.ids(1, n, seed=n)[0] for n in (4, 7)], "right")
    model = adapted(tiny.bert())
    table = theirs.prompt_encoder["default"].embedding.weight.detach()
    model.base_model.from_peft("default", table)
    head = theirs.base_model.classifier.modules_to_save["default"]
    model.get_base_model().classifier.modules_to_save["default"].load_state_dict(head.state_dict())
    assert torch.allclose(models.forward(model, **inputs), models.forward(theirs, **inputs), atol=1e-6)


def test_with_the_projection_it_is_prefix_tuning(tiny_bert):
    model = adapted(tiny_bert, prefix_projection=True, encoder_hidden_size=8, prompt_dropout=0.0)
    torch.manual_seed(0)
    same = method("prefix")(num_virtual_tokens=P, encoder_hidden_size=8)
    inputs = training.batch(model)
    assert torch.equal(models.forward(model, **inputs), models.forward(attach(tiny.bert(), same), **inputs))


def test_beats_the_head_alone(tmp_path):
    """On labels that a frozen encoder's first token does not separate."""
    rows = training.rows(tiny.bert(), count=16)
    batch = {k: torch.tensor([row[k] for row in rows]) for k in rows[0]}
    losses = {}
    for name, model in {
        "head": attach(tiny.bert(), method("linear_probe")()),
        "prompts": adapted(tiny.bert(), prompt_dropout=0.0),
    }.items():
        options = {"max_steps": 150, "learning_rate": 3e-2, "per_device_train_batch_size": 16}
        training.train(model, tmp_path / name, rows, **options, weight_decay=0.0)
        losses[name] = model.eval()(**batch).loss.item()
    assert losses["prompts"] < 0.5 * losses["head"]
