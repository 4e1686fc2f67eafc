"""LoRA-FA: what A and B do, the corrected gradient from its formula, what is kept, and PEFT's optimiser."""

import copy
from contextlib import ExitStack

import peft
import pytest
import small_training as training
import tiny
import torch
from peft.optimizers import create_lorafa_optimizer, lorafa
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from luthier import method
from luthier.acceleration import fused_lora, fused_mlp, fused_norm
from luthier.errors import MethodError
from luthier.tuning import hooks
from luthier.tuning.attach import attach, trainable
from luthier.tuning.merge import merge


def lora_fa(model, **options):
    torch.manual_seed(0)
    return attach(model, method("lora_fa")(**{"r": 4, "lora_alpha": 6} | options))


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def factors(layer, name="default"):
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def gradients(model, seed=7):
    """Of the B's, and of the base weights that they change (out, in)."""
    for layer in layers(model).values():
        layer.get_base_layer().weight.requires_grad_(True)
    model.zero_grad()
    model(**training.batch(model, seed=seed)).loss.backward()
    found = {}
    for name, layer in layers(model).items():
        full = layer.get_base_layer().weight.grad
        found[name] = (factors(layer)[1].grad, full.T if layer.fan_in_fan_out else full)
        layer.get_base_layer().weight.requires_grad_(False)
    return found


# A and B ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.t5])
def test_trains_r_times_out_a_layer(make):
    model = lora_fa(make())
    assert trainable(model)[0] == sum(4 * layer.out_features for layer in layers(model).values()) > 0


def test_a_stays_as_it_was_drawn_to_the_bit(tmp_path):
    model = lora_fa(tiny.llama())
    before = {name: factors(layer)[0].detach().clone() for name, layer in layers(model).items()}
    training.train(model, tmp_path, weight_decay=0.1)
    for name, layer in layers(model).items():
        a, b = factors(layer)
        assert torch.equal(a, before[name])
        assert b.any()
        bound = a.shape[1] ** -0.5
        assert 0.5 * bound < a.abs().max() <= bound


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_the_update_lies_in_the_rows_of_a(make, tmp_path):
    model = training.train(lora_fa(make()), tmp_path)
    base = dict(make().named_parameters())
    rows = {
        name.removeprefix("base_model.model."): factors(layer)[0].detach()
        for name, layer in layers(model).items()
    }
    merged = merge(model)
    for name, a in rows.items():
        update = (merged.get_submodule(name).weight - base[f"{name}.weight"]).detach()
        update = update.T if make is tiny.gpt2 else update
        outside = update - update @ torch.linalg.pinv(a) @ a
        assert update.norm() > 1e-3
        assert outside.norm() < 1e-5


def test_switching_adapters_opens_no_a():
    model = lora_fa(tiny.llama())
    model.add_adapter("second", method("lora_fa")(r=2))
    for name in ("second", "default"):
        model.set_adapter(name)
        learns = {n for n, p in model.named_parameters() if p.requires_grad}
        assert learns == {n for n, _ in model.named_parameters() if f".lora_B.{name}." in n}
    with model.disable_adapter():
        pass
    assert not any(".lora_A." in n for n, p in model.named_parameters() if p.requires_grad)


# The gradient ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_corrected_gradient_moves_the_weight_nearest_to_its_own(make, use_rslora):
    model = training.disturb(lora_fa(make(), use_rslora=use_rslora))
    for name, (found, full) in gradients(model).items():
        layer = layers(model)[name]
        a = factors(layer)[0].detach()
        scale = 6 / 4**0.5 if use_rslora else 6 / 4
        best = torch.linalg.lstsq(scale * a.T, full.T).solution.T  # min over X of |s X A - G|
        assert torch.allclose(found, best, rtol=1e-3, atol=1e-5 * float(best.abs().max())), name


def test_without_projection_it_is_the_gradient_of_b():
    model = training.disturb(lora_fa(tiny.llama(), projection="none"))
    for name, (found, full) in gradients(model).items():
        a = factors(layers(model)[name])[0].detach()
        assert torch.allclose(found, 1.5 * full @ a.T, rtol=1e-3, atol=1e-6), name


def test_a_step_of_descent_projects_the_full_gradient():
    model = training.disturb(lora_fa(tiny.llama()))
    for name, (found, full) in gradients(model).items():
        a = factors(layers(model)[name])[0].detach()
        moved = -0.1 * found * 1.5 @ a
        assert torch.allclose(
            moved, -0.1 * full @ torch.linalg.pinv(a) @ a, atol=1e-5 * float(full.abs().max())
        )


@pytest.mark.parametrize(("projection", "grows"), [("full", 1), ("none", 9)])
def test_the_scale_of_a_does_not_matter_to_the_corrected_step(projection, grows):
    """A three times as large: what a step does to W is the same with the correction, and 9-fold without."""
    moved = []
    for factor in (1, 3):
        model = lora_fa(tiny.llama(), projection=projection)
        with torch.no_grad():
            for layer in layers(model).values():
                factors(layer)[0].mul_(factor)
        found = gradients(model)
        moved.append({name: b @ factors(layers(model)[name])[0].detach() for name, (b, _) in found.items()})
    for name, step in moved[0].items():
        assert torch.allclose(moved[1][name], grows * step, rtol=1e-3, atol=1e-5 * float(step.abs().max())), (
            name
        )


def test_with_orthonormal_rows_and_no_scale_both_gradients_are_one():
    found = []
    for projection in ("full", "none"):
        model = lora_fa(tiny.llama(), lora_alpha=4, projection=projection)
        with torch.no_grad():
            for layer in layers(model).values():
                nn.init.orthogonal_(factors(layer)[0], generator=torch.Generator().manual_seed(5))
        found.append(gradients(model))
    for name, (gradient, _) in found[0].items():
        assert torch.allclose(gradient, found[1][name][0], rtol=1e-4, atol=1e-6), name


def test_a_rank_above_the_width_is_corrected_by_the_pseudo_inverse():
    model = lora_fa(tiny.llama(), r=48, target_modules=["q_proj"])  # of 32 inputs
    for name, (found, full) in gradients(model).items():
        a = factors(layers(model)[name])[0].detach()
        assert torch.allclose(6 / 48 * found @ a, full, atol=1e-4 * float(full.abs().max())), name


@pytest.mark.parametrize("fused", [False, True])
def test_accumulated_fused_and_copied_it_is_the_same_gradient(fused):
    model = training.disturb(lora_fa(tiny.llama()))
    expected = gradients(model)
    twin = copy.deepcopy(model)
    report = fused_lora.fuse(twin) if fused else None
    assert report is None or report.fused == len(layers(twin))
    twin.zero_grad()
    batch = training.batch(twin)
    for row in range(2):
        (twin(**{k: v[row : row + 1] for k, v in batch.items()}).loss / 2).backward()
    for name, layer in layers(twin).items():
        assert torch.allclose(factors(layer)[1].grad, expected[name][0], rtol=1e-3, atol=1e-6), name


def test_a_that_is_loaded_is_what_the_gradient_is_corrected_for(tmp_path):
    other = lora_fa(tiny.llama())
    with torch.no_grad():
        for layer in layers(other).values():
            factors(layer)[0].copy_(torch.randn_like(factors(layer)[0]))
    other.save_pretrained(tmp_path)
    model = lora_fa(tiny.llama())
    gradients(model)  # the correction for the first A is known by now
    model.load_adapter(tmp_path, "default", is_trainable=True)
    expected = gradients(other)
    for name, (found, _) in gradients(model).items():
        assert torch.equal(found, expected[name][0])


def test_under_autocast_the_correction_is_in_float32():
    model = training.disturb(lora_fa(tiny.llama()))
    found = []
    for projection in ("none", "full"):
        model.peft_config["default"].projection = projection
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            model(**training.batch(model)).loss.backward()
        found.append({name: factors(layer)[1].grad.clone() for name, layer in layers(model).items()})
    for name, layer in layers(model).items():
        a = factors(layer)[0].detach()
        assert torch.allclose(
            found[1][name], found[0][name] @ torch.inverse(a @ a.T) / 1.5**2, rtol=1e-4, atol=1e-7
        )


# PEFT's optimiser ------------------------------------------------------------------------------------------


def three_steps(model, optimizer):
    for group in optimizer.param_groups:
        group["eps"] = 1e-12  # the two add it in different places
    for seed in range(3):
        model.zero_grad()
        model(**training.batch(model, seed=seed)).loss.backward()
        optimizer.step()
    return {name: factors(layer)[1].detach() for name, layer in layers(model).items()}


def pefts(model):
    return create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=1e-2)


def plain_peft(**options):
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(tiny.llama(), peft.LoraConfig(**settings | options))


def test_with_adamw_it_is_pefts_optimiser_without_its_bfloat16(monkeypatch):
    ours = lora_fa(tiny.llama())
    adamw = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    found = three_steps(ours, adamw)
    theirs = plain_peft()
    rounded = three_steps(theirs, pefts(theirs))
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    theirs = plain_peft()
    expected = three_steps(theirs, pefts(theirs))
    for name, b in expected.items():
        assert torch.allclose(found[name], b, rtol=1e-3, atol=1e-5), name
    errors = [(rounded[name] - b).norm() / b.norm() for name, b in expected.items()]
    assert max(errors) > 1e-3


def test_two_adapters_on_a_layer_learn_and_pefts_optimiser_raises():
    theirs = plain_peft()
    theirs.add_adapter("second", theirs.peft_config["default"])
    with pytest.raises(TypeError):
        three_steps(theirs, pefts(theirs))
    ours = lora_fa(tiny.llama())
    ours.add_adapter("second", method("lora_fa")(r=4, lora_alpha=6))
    ours.base_model.set_adapter(["default", "second"])
    three_steps(ours, torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad]))
    for layer in layers(ours).values():
        assert factors(layer)[1].any()
        assert factors(layer, "second")[1].any()


def test_an_embedding_is_refused_and_pefts_does_not_learn():
    theirs = plain_peft(target_modules=["embed_tokens"])
    before = {n: p.detach().clone() for n, p in theirs.named_parameters() if "lora_" in n}
    optimizer = pefts(theirs)
    theirs(**training.batch(theirs)).loss.backward()
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in theirs.named_parameters() if n in before)
    with pytest.raises(MethodError, match=r"embed_tokens.*Embedding"):
        lora_fa(tiny.llama(), target_modules=["embed_tokens"])


# Memory ----------------------------------------------------------------------------------------------------


def kept_bytes(name, fused, blocks, tokens=32, **options):
    """What one forward of blocks as wide as SmolLM2-135M's keeps for the backward pass."""
    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=blocks,
            num_attention_heads=9,
            num_key_value_heads=3,
        )
    )
    model = attach(training.half(model), method(name)(r=16, **options))
    model.train()
    model.enable_input_require_grads()  # as if a block that learns were below
    model(input_ids=torch.zeros(1, 2, dtype=torch.long))  # P is no activation: it is known from here on
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    storages = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and tensor.shape != (16, 16):
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.long)
    with ExitStack() as stack:
        for part in (fused_lora, fused_mlp, fused_norm) if fused else ():
            stack.enter_context(part.fused(model))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(note, lambda t: t))
        hidden = model.base_model.model.model(input_ids=ids, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return sum(size for size, _ in storages.values()) / tokens


@pytest.mark.parametrize(("fused", "lora", "ours"), [(True, 14.1, 11.8), (False, 37.4, 17.4)])
def test_a_block_keeps_less_than_loras(fused, lora, ours):
    found = [(kept_bytes(name, fused, 2) - kept_bytes(name, fused, 1)) / 1000 for name in ("lora", "lora_fa")]
    assert found == pytest.approx([lora, ours], abs=0.05)
    if fused:
        # The normalised inputs of attention and MLP, which nothing else needs: 576 numbers of bfloat16 each.
        assert 1000 * (found[0] - found[1]) == pytest.approx(2 * 2 * 576)


# Use -------------------------------------------------------------------------------------------------------


def test_the_file_is_an_ordinary_lora(tmp_path):
    model = training.disturb(lora_fa(tiny.llama()))
    hooks.save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert type(loaded.peft_config["default"]) is peft.LoraConfig
    assert all(type(layer) is peft.tuners.lora.Linear for layer in layers(loaded).values())
    assert torch.equal(training.logits(loaded), training.logits(model))


def test_a_plain_peft_model_is_the_method_too(tmp_path):
    model = peft.get_peft_model(tiny.llama(), method("lora_fa")(r=4, lora_alpha=6, task_type="CAUSAL_LM"))
    training.Trainer(
        model=model, args=training.arguments(tmp_path), train_dataset=training.rows(model)
    ).train()
    assert not any(".lora_A." in n for n, p in model.named_parameters() if p.requires_grad)
    assert all(factors(layer)[1].any() for layer in layers(model).values())
    model.save_pretrained(tmp_path / "saved")


def loss_after(name, rank, folder):
    """On the rows that were trained on; 6.16 untuned."""
    torch.manual_seed(0)
    model = attach(tiny.llama(), method(name)(r=rank, lora_alpha=2 * rank))
    rows = training.rows(model)
    training.train(model, folder, rows, max_steps=60, learning_rate=2e-2, per_device_train_batch_size=8)
    batch = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
    with torch.no_grad():
        return model.eval()(**batch).loss.item()


def test_learns_less_than_lora_at_equal_rank_and_as_much_at_equal_parameters(tmp_path):
    lora, equal_rank, equal_size = (
        loss_after(name, rank, tmp_path) for name, rank in (("lora", 8), ("lora_fa", 8), ("lora_fa", 16))
    )
    assert lora + 0.1 < equal_rank < 0.6 * 6.16
    assert equal_size == pytest.approx(lora, abs=0.05)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init_lora_weights": "pissa"}, "random start"),
        ({"projection": "half"}, "projection"),
        ({"r": 0}, "r must be"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, words):
    with pytest.raises(MethodError, match=words):
        method("lora_fa")(**options)


@pytest.mark.parametrize("option", ["use_dora", "lora_bias"])
def test_another_formula_of_lora_is_refused(option):
    with pytest.raises(MethodError, match=option):
        lora_fa(tiny.llama(), **{option: True})
