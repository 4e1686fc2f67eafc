"""Top layers: the two ends are full fine-tuning and the linear probe; nothing is computed backwards below."""

import pytest
import small_training as training
import tiny
import torch
from peft import PeftModel

from luthier import method
from luthier.errors import MethodError, ModelError
from luthier.tuning.attach import attach
from luthier.tuning.delta import load_delta, save_delta
from luthier.tuning.hooks import save_adapter
from luthier.tuning.merge import merge


def top(model, **options):
    return attach(model, method("top_layers")(**options))


def same(a, b):
    return all(
        torch.allclose(x, b.get_parameter(n), rtol=0, atol=1e-6) for n, x in training.weights(a).items()
    )


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.bert])
def test_all_blocks_with_embeddings_is_full_fine_tuning(make, tmp_path):
    depth = make().config.num_hidden_layers
    model = training.train(top(make(), k=depth, train_embeddings=True), tmp_path)
    assert same(model, training.train(attach(make(), method("full")()), tmp_path))


def test_no_block_is_the_linear_probe(tmp_path):
    model = training.train(top(tiny.bert(), k=0, train_final_norm=False), tmp_path)
    assert same(model, training.train(attach(tiny.bert(), method("linear_probe")()), tmp_path))


def test_no_gradient_graph_below_the_lowest_open_block():
    model = top(tiny.llama(num_hidden_layers=4), k=1)
    model.train()
    states = model(**training.batch(model), output_hidden_states=True).hidden_states
    # states[i] enters block i; the last entry is the output.
    assert [state.requires_grad for state in states] == [False, False, False, False, True]


def test_more_blocks_than_there_are_is_refused():
    with pytest.raises(MethodError, match=r"has 2.*between 0 and 2"):
        top(tiny.llama(), k=3)


def test_a_tied_head_stays_with_the_embeddings():
    model = top(tiny.llama(), k=1)
    assert not model.get_output_embeddings().weight.requires_grad


def test_an_untied_head_learns_alone_and_survives_saving(tmp_path):
    model = top(tiny.llama(), k=1, untie_head=True)
    embeddings = model.get_input_embeddings().weight.detach().clone()
    training.train(model, tmp_path / "run")
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    assert not torch.equal(model.get_output_embeddings().weight, embeddings)
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.get_output_embeddings().weight, model.get_output_embeddings().weight)
    assert torch.equal(loaded.get_input_embeddings().weight, embeddings)


def test_dropout_is_off_in_the_trunk_and_on_above():
    model = top(tiny.bert(hidden_dropout_prob=0.5), k=1)
    model.train()
    model(**training.batch(model))
    first, second = model.bert.encoder.layer
    assert not first.output.dropout.training
    assert not model.bert.embeddings.dropout.training
    assert second.output.dropout.training
    assert model.dropout.training


def test_trunk_dropout_can_stay_on():
    model = top(tiny.bert(hidden_dropout_prob=0.5), k=1, trunk_dropout=True)
    model.train()
    model(**training.batch(model))
    assert model.bert.encoder.layer[0].output.dropout.training


def test_a_later_method_takes_the_trunk_off_again():
    model = top(tiny.bert(hidden_dropout_prob=0.5), k=1)
    attach(model, method("full")())
    model.train()
    model(**training.batch(model))
    assert model.bert.encoder.layer[0].output.dropout.training


@pytest.mark.parametrize("untie_head", [False, True])
def test_a_delta_file_holds_the_changed_weights_and_restores_the_model(untie_head, tmp_path):
    model = training.train(top(tiny.llama(), k=1, untie_head=untie_head), tmp_path)
    save_delta(model, tmp_path / "delta.safetensors")
    restored = load_delta(tiny.llama(), tmp_path / "delta.safetensors")
    assert torch.equal(training.logits(restored), training.logits(model))
    changed = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (tmp_path / "delta.safetensors").stat().st_size < 4 * changed + 4096


def test_a_delta_file_is_refused_on_another_base(tmp_path):
    save_delta(top(tiny.llama(), k=1), tmp_path / "delta.safetensors")
    with pytest.raises(ModelError, match="another base"):
        load_delta(tiny.llama(seed=1), tmp_path / "delta.safetensors")
    with pytest.raises(ModelError, match="lacks"):
        load_delta(tiny.gpt2(), tmp_path / "delta.safetensors")


@pytest.mark.parametrize(
    ("make", "block"), [(tiny.llama, "layers.1"), (tiny.gpt2, "h.1"), (tiny.bert, "layer.1")]
)
def test_top_blocks_learn_whole_above_lora(make, block, tmp_path):
    """`modules_to_save` trains whole blocks beside an adapter: in one file, merged into one model."""
    below = rf".*{block[:-1].replace('.', '[.]')}0[.].*(q_proj|v_proj|c_attn|query|value)"
    model = attach(make(), method("lora")(r=2, target_modules=below, modules_to_save=[block]))
    before = training.weights(model)
    training.train(model, tmp_path / "out", max_steps=4)
    moved = {n for n, w in training.weights(model).items() if not torch.equal(before[n], w)}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(f"{block}.modules_to_save" in name for name in moved)
    assert any("lora_A" in name and f"{block}." not in name for name in moved)
    expected = training.logits(model)
    save_adapter(model, tmp_path / "saved")
    loaded = PeftModel.from_pretrained(make(), tmp_path / "saved")
    assert torch.equal(training.logits(loaded), expected)
    merged = merge(loaded)
    assert type(merged) is type(make())
    assert torch.allclose(training.logits(merged), expected, rtol=0, atol=1e-5)
