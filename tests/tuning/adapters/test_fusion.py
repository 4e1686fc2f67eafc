"""AdapterFusion: the attention over frozen adapters, its wiring, its penalty, and one folder for all."""

import copy

import fused_sources
import pytest
import small_training as training
import tiny
import torch
from peft import PeftModel
from torch import nn

from luthier import method
from luthier.errors import MethodError, ModelError
from luthier.tuning.adapters.fusion import Fusion
from luthier.tuning.attach import attach, trainable
from luthier.tuning.hooks import callbacks, parameter_groups
from luthier.tuning.merge import merge

PFEIFFER = {"placement": "pfeiffer", "bottleneck_dim": 4}
HOULSBY = {"placement": "houlsby", "bottleneck_dim": 4, "train_layernorm": False}
MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert, "t5": tiny.t5}
# Families that change hidden states.
SOURCES = {
    "pfeiffer": ("serial", PFEIFFER),
    "houlsby": ("serial", HOULSBY),
    "parallel": ("parallel", {"bottleneck_dim": 4, "dropout": 0.0}),
    "attention": ("parallel", {"bottleneck_dim": 4, "dropout": 0.0, "attention_dim": 3}),
    "krona": ("krona", {"target_modules": "all-linear"}),
    "krona_b": ("krona", {"variant": "krona_b"}),
    "lora": ("lora", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
}


def fusion(model, folders, **options):
    torch.manual_seed(0)
    return attach(model, method("fusion")(adapters=folders, **options))


def places(model):
    return [m for m in model.modules() if isinstance(m, Fusion)]


def random_attention(model, seed=5):
    """W_Q and W_K that tell the adapters apart, and a W_V of its own."""
    generator = torch.Generator().manual_seed(seed)
    for place in places(model):
        for name, p in place.named_parameters():
            p.data = (torch.eye(32) if name == "value.weight" and p.shape[0] == 32 else 0) + (
                0.3 * torch.randn(p.shape, generator=generator)
            )
    return model


def adapter_of(folder, build):
    return PeftModel.from_pretrained(build(), folder)


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("source", SOURCES)
def test_of_one_adapter_with_w_v_the_identity_it_is_that_adapter(source, kind, tmp_path):
    name, options = SOURCES[source]
    folder = fused_sources.save(MODELS[kind](), name, tmp_path / "one", **options)
    model = fusion(MODELS[kind](), [folder])
    for place in places(model):
        place.value.weight.data = torch.eye(len(place.value.weight))
    expected = adapter_of(folder, MODELS[kind])
    if kind == "bert":  # heads stay behind
        state = expected.get_base_model().classifier.modules_to_save["default"].state_dict()
        model.get_base_model().classifier.modules_to_save["default"].load_state_dict(state)
    assert torch.allclose(training.logits(model), training.logits(expected), atol=1e-5)
    assert not torch.allclose(training.logits(model), training.logits(MODELS[kind]()), atol=1e-3)


@torch.no_grad()
def test_the_formula_of_a_place():
    model = random_attention(fusion(tiny.llama(), fused_sources.pfeiffer(tiny.llama, 3), fusion_dropout=0.1))
    place, x = places(model.eval())[0], torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))
    assert place.key.bias is not None
    q = x @ place.query.weight.T + place.query.bias
    zs = []
    for adapter in place.adapters:
        inner = torch.relu(x @ adapter.down.weight.T + adapter.down.bias)
        zs.append(inner @ adapter.up.weight.T + adapter.up.bias)
    scores = [(q * (z @ place.key.weight.T + place.key.bias)).sum(-1) for z in zs]
    largest = torch.stack(scores).max(0).values
    shares = [torch.exp(e - largest) for e in scores]
    whole = sum(shares)
    assert torch.allclose(sum(s / whole for s in shares), torch.ones(2, 5))
    values = [z @ place.value.weight.T for z in zs]  # before the softmax mixes them
    expected = sum((s / whole)[..., None] * v for s, v in zip(shares, values, strict=True))
    assert torch.allclose(place(x, None), expected, atol=1e-5)
    assert (shares[0] / whole).std() > 0.05


@torch.no_grad()
def test_the_wiring_of_a_post_norm_block():
    model = random_attention(fusion(tiny.bert(), fused_sources.pfeiffer(tiny.bert))).eval()
    layer, h = tiny.bert().bert.encoder.layer[0], torch.randn(2, 5, 32)
    a = layer.attention(h)[0]
    v = layer.output.dense(layer.intermediate(a))
    norm = layer.output.LayerNorm
    expected = norm(places(model)[0](norm(v + a), None) + v + a)
    assert torch.allclose(model.get_base_model().bert.encoder.layer[0](h), expected, atol=1e-5)


@torch.no_grad()
def test_beside_an_ffn_no_skip_is_added_twice(tmp_path):
    folder = fused_sources.save(tiny.bert(), "parallel", tmp_path, bottleneck_dim=4)
    model = fusion(tiny.bert(), [folder, folder])
    for place in places(model):
        for adapter in place.adapters:
            adapter.up.weight.zero_()
            adapter.up.bias.zero_()
    assert torch.equal(training.logits(model), training.logits(tiny.bert()))


def test_equal_adapters_are_as_one():
    folders = fused_sources.pfeiffer(tiny.llama)
    many = random_attention(fusion(tiny.llama(), [folders[0]] * 3))
    one = random_attention(fusion(tiny.llama(), folders[:1]))
    assert torch.allclose(training.logits(many), training.logits(one), atol=1e-5)


def test_the_order_of_the_adapters_does_not_count():
    folders = fused_sources.pfeiffer(tiny.llama)
    found = [training.logits(random_attention(fusion(tiny.llama(), f))) for f in (folders, folders[::-1])]
    assert torch.allclose(*found, atol=1e-5)
    other = random_attention(fusion(tiny.llama(), folders[:1]))
    assert not torch.allclose(found[0], training.logits(other), atol=1e-3)


def test_starts_as_about_the_mean_of_the_adapters():
    place = places(fusion(tiny.llama(), fused_sources.pfeiffer(tiny.llama)))[0]
    weight = place.value.weight.detach()
    assert torch.equal(weight.diagonal(), torch.ones(32))
    assert torch.equal(weight[0, 1:], torch.full((31,), 1e-6))
    assert 0.015 < place.query.weight.std() < 0.025
    x = torch.randn(4, 32)
    mean = sum(adapter(x, None) for adapter in place.adapters) / 2
    assert torch.allclose(place(x, None), mean, rtol=0.1, atol=0.1 * float(mean.abs().max()))


@pytest.mark.parametrize(("dropout", "biases"), [(0.0, 1), (0.1, 2)])
def test_trains_as_many_parameters_as_the_formula_says(dropout, biases):
    model = fusion(tiny.llama(), fused_sources.pfeiffer(tiny.llama), fusion_dropout=dropout)
    assert trainable(model)[0] == 2 * (3 * 32 * 32 + biases * 32)


def test_dropout_is_by_default_that_of_attention():
    folders = fused_sources.pfeiffer(tiny.bert)
    found = fusion(tiny.bert(attention_probs_dropout_prob=0.25), folders)
    assert {place.dropout.p for place in places(found)} == {0.25}
    assert {place.dropout.p for place in places(fusion(tiny.bert(), folders))} == {0.0}


@pytest.mark.parametrize("kind", MODELS)
def test_the_adapters_stay_bit_for_bit_and_decay_leaves_w_v(kind, tmp_path):
    model = fusion(MODELS[kind](), fused_sources.pfeiffer(MODELS[kind]))
    before = {n: b.clone() for n, b in model.named_buffers() if ".adapters." in n}
    assert len(before) == 4 * 2 * len(places(model))
    training.train(model, tmp_path, weight_decay=0.5)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers() if n in before)
    groups = parameter_groups(model, training.arguments(tmp_path, weight_decay=0.5))
    values = {id(place.value.weight) for place in places(model)}
    for group in groups:
        held = [p for p in group["params"] if id(p) in values]
        assert not held or group["weight_decay"] == 0.0
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)


# The penalty --------------------------------------------------------------------------------------------


def test_the_penalty_is_zero_at_the_identity_and_its_gradient_that_of_the_formula():
    model = random_attention(fusion(tiny.llama(), fused_sources.pfeiffer(tiny.llama)))
    tuner = model.base_model
    expected = 0.01 * sum(((torch.eye(32) - p.value.weight) ** 2).sum() for p in places(model))
    assert torch.allclose(tuner.penalty(), expected)
    tuner.add_penalty()
    weight = places(model)[0].value.weight
    assert torch.allclose(weight.grad, -2 * 0.01 * (torch.eye(32) - weight))
    for place in places(model):
        place.value.weight.data = torch.eye(32)
    assert tuner.penalty() == 0


def test_the_trainer_takes_the_step_of_a_loss_with_the_penalty_in_it(tmp_path):
    """Two micro-batches a step, plain SGD: the same weights as by hand."""
    folders, strength = fused_sources.pfeiffer(tiny.llama), 0.7
    model = random_attention(fusion(tiny.llama(), folders, value_regularization=strength))
    by_hand = random_attention(fusion(tiny.llama(), folders, value_regularization=strength))
    data = training.rows(model, 4)
    options = {"max_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
    options |= {"optim": "sgd", "learning_rate": 0.1, "weight_decay": 0.0, "max_grad_norm": 0.0}
    options |= {"lr_scheduler_type": "constant", "logging_strategy": "steps", "logging_steps": 1}
    one = training.trainer(model, tmp_path, data, **options)
    order = [int(row["input_ids"][0, 0]) for row in one.get_train_dataloader()]
    one.train()
    assert all(entry["value_penalty"] > 0 for entry in one.state.log_history if "loss" in entry)

    rows = {row["input_ids"][0]: row for row in data}
    assert len(rows) == 4
    learns = [p for p in by_hand.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learns, lr=0.1)
    by_hand.train()
    by_hand.base_model.driven = True
    for step in range(2):
        loss = by_hand.base_model.penalty()
        for first in order[2 * step : 2 * step + 2]:
            batch = {k: torch.tensor([v]) for k, v in rows[first].items()}
            loss = loss + by_hand(**batch).loss / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    free = random_attention(fusion(tiny.llama(), folders))
    for found, expected, start in zip(places(model), places(by_hand), places(free), strict=True):
        assert torch.allclose(found.value.weight, expected.value.weight, atol=1e-5)
        assert (start.value.weight - found.value.weight).norm() > 0.1


def test_in_a_loop_of_ones_own_the_models_loss_holds_it():
    model = random_attention(fusion(tiny.llama(), fused_sources.pfeiffer(tiny.llama)))
    batch = training.batch(model)
    model.eval()
    plain = model(**batch).loss
    model.train()
    penalty = model.base_model.penalty()
    assert penalty > 0
    assert torch.allclose(model(**batch).loss, plain + penalty)
    untyped = random_attention(PeftModel(model.unload(), model.peft_config["default"]))
    assert type(untyped) is PeftModel, "its forward is the model's own"
    plain = untyped.eval()(**batch).loss
    assert torch.allclose(untyped.train()(**batch).loss, plain + untyped.base_model.penalty())


def test_sharded_weights_are_refused():
    model = fusion(tiny.llama(), fused_sources.pfeiffer(tiny.llama))
    sharded = type("Args", (), {"deepspeed": None, "fsdp": "full_shard"})
    with pytest.raises(MethodError, match="whole weights"):
        callbacks(model)[0].on_train_begin(sharded, None, None)


# Files --------------------------------------------------------------------------------------------------


def test_one_folder_holds_all_that_is_needed(tmp_path):
    folders = [
        fused_sources.save(tiny.bert(), "serial", tmp_path / str(i), seed=i, **PFEIFFER) for i in (1, 2)
    ]
    model = random_attention(fusion(tiny.bert(), folders))
    expected = training.logits(model)
    model.save_pretrained(tmp_path / "fused")
    for folder in folders:
        (tmp_path / folder / "adapter_model.safetensors").unlink()
    loaded = PeftModel.from_pretrained(tiny.bert(), tmp_path / "fused")
    assert torch.equal(training.logits(loaded), expected)
    records = loaded.peft_config["default"].sources
    assert [record["config"]["peft_type"] for record in records] == ["SERIAL", "SERIAL"]
    assert records[0]["sha256"] != records[1]["sha256"]


def test_without_adapters_it_says_how_to_get_some():
    with pytest.raises(MethodError, match=r"needs adapters.*placement: pfeiffer"):
        fusion(tiny.llama(), [])


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("serial", {"bottleneck_dim": 4}, "train_layernorm: false"),
        ("parallel", {"bottleneck_dim": 4, "prefix_length": 3}, "a prefix in attention"),
        ("prefix", {"num_virtual_tokens": 3, "layers": 1}, "no change of hidden states"),
        ("dora", {"r": 2}, "DoRA"),
    ],
)
def test_adapters_that_are_more_than_changes_are_refused(name, options, reason, tmp_path):
    options.pop("layers", None)
    folder = fused_sources.save(tiny.t5(), name, tmp_path, **options)
    with pytest.raises(MethodError, match=reason):
        fusion(tiny.t5(), [folder])


def test_a_fusion_is_no_part_of_another(tmp_path):
    model = fusion(tiny.llama(), fused_sources.pfeiffer(tiny.llama))
    model.save_pretrained(tmp_path)
    with pytest.raises(MethodError, match="a fusion itself"):
        fusion(tiny.llama(), [str(tmp_path)])


def test_adapters_at_different_places_are_refused(tmp_path):
    other = fused_sources.save(tiny.llama(), "serial", tmp_path, **HOULSBY)
    with pytest.raises(MethodError, match="Adapters 1 and 2 stand at different places"):
        fusion(tiny.llama(), [fused_sources.pfeiffer(tiny.llama)[0], other])


def test_adapters_of_another_model_are_refused():
    with pytest.raises(ModelError, match="does not fit the model"):
        fusion(tiny.gpt2(), fused_sources.pfeiffer(tiny.llama))
    with pytest.raises(ModelError, match="no such file"):
        fusion(tiny.gpt2(), ["./nowhere"])


def test_adapters_of_different_widths_can_be_mixed(tmp_path):
    wide = fused_sources.save(tiny.llama(), "serial", tmp_path, placement="pfeiffer", bottleneck_dim=16)
    model = fusion(tiny.llama(), [fused_sources.pfeiffer(tiny.llama)[0], wide])
    assert [len(adapter.down.weight) for adapter in places(model)[0].adapters] == [4, 16]


def test_nothing_is_merged_and_disabling_gives_the_base():
    model = fusion(tiny.llama(), fused_sources.pfeiffer(tiny.llama))
    with model.disable_adapter():
        assert torch.equal(training.logits(model), training.logits(tiny.llama()))
    with pytest.raises(MethodError, match="cannot be merged"):
        merge(model)


def test_padding_changes_nothing_on_real_tokens():
    model = random_attention(fusion(tiny.bert(), fused_sources.pfeiffer(tiny.bert))).eval()
    ids = torch.arange(5, 11)[None]
    with torch.no_grad():
        alone = model(input_ids=ids).logits
        padded = nn.functional.pad(ids, (0, 3))
        found = model(input_ids=padded, attention_mask=(padded != tiny.PAD).long()).logits
    assert torch.allclose(found, alone, atol=1e-5)


def test_the_dropout_of_the_adapters_own_training_is_over(tmp_path):
    folder = fused_sources.save(tiny.llama(), "serial", tmp_path, dropout=0.5, **PFEIFFER)
    model = fusion(tiny.llama(), [folder])
    expected = training.logits(model)
    model.train()
    assert torch.allclose(model(**training.batch(model)).logits, expected, atol=1e-6)
    assert copy.deepcopy(places(model)[0]).train().adapters[0].training is False
