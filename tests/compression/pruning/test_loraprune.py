"""LoRAPrune: importance from the factors' gradients alone, masks that only grow, a smaller model."""

import copy

import pruned_models
import pytest
import small_training
import tiny
import torch
from transformers import TrainerCallback

import luthier
from luthier.compression import short_tuning, slicing
from luthier.compression.pruning import loraprune
from luthier.errors import DataError, MethodError
from luthier.tuning.attach import attach
from luthier.tuning.merge import merge

IDS = pruned_models.chains(3, 20, 7)
PROJECTIONS = {"mlp": ("gate", "up", "down"), "attention": ("q", "k", "v", "o")}


def config(**options):
    return luthier.method("loraprune")(
        **({"ratio": 0.5, "steps": 10, "batch_size": 8, "every": 2, "lora_dropout": 0.0} | options)
    )


def prepared(model, disturbed=True, **options):
    """The model with its LoRA, gradients of a batch in place, and the callback that prunes it."""
    own = config(**options)
    found = own.find(model)
    targets = slicing.targets(model, found, own.ratio, own.widths)
    torch.manual_seed(0)
    tuned = attach(model, own.lora(found))
    if disturbed:
        small_training.disturb(tuned)
    pruner = loraprune.PruneUnits(own, tuned, targets)
    tuned(input_ids=IDS, labels=IDS).loss.backward()
    return tuned, pruner


def factors(tuned, place, name):
    kind = "mlp" if place.kind == "mlp" else "self_attn"
    layer = tuned.get_base_model().get_submodule(f"model.layers.{place.block}.{kind}.{name}_proj")
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer, a.detach(), b.detach(), a.grad, b.grad


def test_at_the_start_the_estimate_is_the_gradient_through_a():
    """B = 0: G = s dL/dW A^T A; with orthonormal rows that fill the space, s dL/dW itself."""
    torch.manual_seed(0)
    weight, x, target = torch.randn(6, 5), torch.randn(9, 5), torch.randn(9, 6)
    scaling = 2.0
    for a in (torch.randn(3, 5), torch.linalg.qr(torch.randn(5, 5)).Q):
        a = a.clone().requires_grad_(True)
        b = torch.zeros(6, len(a), requires_grad=True)
        whole = (weight + scaling * b @ a).detach().requires_grad_(True)
        (x @ (weight + scaling * b @ a).T - target).square().mean().backward()
        (x @ whole.T - target).square().mean().backward()
        found = loraprune.movement(a.detach(), b.detach(), a.grad, b.grad)
        expected = scaling * whole.grad @ a.detach().T @ a.detach()
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found, scaling * whole.grad)


def test_the_estimate_is_what_a_step_on_both_factors_moves():
    torch.manual_seed(1)
    a, b, grad_a, grad_b = torch.randn(2, 5), torch.randn(6, 2), torch.randn(2, 5), torch.randn(6, 2)
    moved = b @ a - (b - grad_b) @ (a - grad_a)
    torch.testing.assert_close(loraprune.movement(a, b, grad_a, grad_b), moved)
    without = loraprune.movement(a, b, grad_a, grad_b, cross_term=False)
    torch.testing.assert_close(without - moved, grad_b @ grad_a)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_scores_are_the_formula(tiny_llama, kind, p):
    tuned, pruner = prepared(tiny_llama, p=p)
    for place in (u for u in pruner.targets if u.kind == kind):
        expected = []
        for name in PROJECTIONS[kind]:
            layer, a, b, grad_a, grad_b = factors(tuned, place, name)
            estimate = grad_b @ a + b @ grad_a - grad_b @ grad_a
            importance = (estimate * (layer.base_layer.weight.detach() + 2.0 * b @ a)).abs() ** p
            sums = importance.sum(0 if name in ("down", "o") else 1).reshape(place.count, -1).sum(1)
            expected.append(sums / (sums.norm() + 1e-8))
        found = pruner.module_scores(place)
        torch.testing.assert_close(torch.stack(found), torch.stack(expected), atol=1e-6, rtol=1e-4)


def test_scale_of_a_layer_does_not_count():
    sums = torch.rand(20)
    torch.testing.assert_close(loraprune.normalised(1e3 * sums), loraprune.normalised(sums))


def test_magnitude_looks_at_no_gradient(tiny_llama):
    tuned, pruner = prepared(tiny_llama, metric="magnitude")
    before = {u: pruner.module_scores(u) for u in pruner.targets}
    for parameter in tuned.parameters():
        parameter.grad = None
    for u, scores in before.items():
        for old, new in zip(scores, pruner.module_scores(u), strict=True):
            assert torch.equal(old, new)
    tuned, pruner = prepared(tiny.llama())
    tuned.zero_grad()
    with pytest.raises(MethodError, match="no gradient"):
        pruner.observe()


def test_a_head_is_judged_by_its_own_slices(tiny_llama):
    """Before the norm over heads, what happens to rows of one head leaves the other's sum alone."""
    tuned, pruner = prepared(tiny_llama)
    place = next(u for u in pruner.targets if u.kind == "attention")
    before = pruner.module_scores(place)[0]
    _, _, _, _, grad_b = factors(tuned, place, "q")
    grad_b[16:] *= 5  # the queries of the second key-value head
    after = pruner.module_scores(place)[0]
    ratio = after / before
    assert ratio[1] > 1 > ratio[0]
    grad_b[16:] = 0
    b = factors(tuned, place, "q")[0].lora_B["default"].weight
    b.data[16:] = 0
    only = pruner.module_scores(place)[0]
    torch.testing.assert_close(only[0], torch.tensor(1.0))  # all of the norm is now the first head's


def test_scores_are_a_moving_average(tiny_llama):
    tuned, pruner = prepared(tiny_llama)
    place = next(iter(pruner.targets))
    now = sum(pruner.module_scores(place))
    for k in (1, 2, 3):
        pruner.observe()
        torch.testing.assert_close(pruner.scores[place], now * (1 - 0.9**k))
    next(p for n, p in tuned.named_parameters() if "lora_B" in n).grad[0, 0] = float("nan")
    held = pruner.scores[place].clone()
    pruner.observe()
    assert torch.equal(pruner.scores[place], held)


class Watch(TrainerCallback):
    def __init__(self, pruner):
        self.pruner = pruner
        self.counts, self.masks = [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.masks.append({u: m.clone() for u, m in self.pruner.masks.items()})
        self.counts.append({u: int(u.count - m.sum()) for u, m in self.pruner.masks.items()})


def tuned_with_masks(model, batches, **options):
    own = config(**options)
    targets = slicing.targets(model, own.find(model), own.ratio, own.widths)
    torch.manual_seed(0)
    tuned = attach(model, own.lora(own.find(model)))
    pruner = loraprune.PruneUnits(own, tuned, targets)
    watch = Watch(pruner)
    short_tuning.tune(
        tuned,
        batches,
        steps=own.steps,
        batch_size=8,
        learning_rate=own.learning_rate,
        seed=0,
        callbacks=[pruner, watch],
    )
    return tuned, pruner, watch


def test_masks_grow_on_schedule_and_never_shrink():
    _, pruner, watch = tuned_with_masks(tiny.llama(), pruned_models.batches(), steps=20, every=3)
    place = next(u for u in pruner.targets if u.kind == "mlp")
    expected, reached = [], 0
    for step in range(1, 21):
        done = min(max((step - 2) / 16, 0), 1)
        if done == 1 or (done > 0 and step % 3 == 0):
            share = 0.5 * (1 - (1 - done) ** 3)
            reached = 64 - int(64 * (1 - share) + 1e-9)
        expected.append(reached)
    assert [counts[place] for counts in watch.counts] == expected
    assert expected[-1] == 32
    for earlier, later in zip(watch.masks, watch.masks[1:], strict=False):
        for u in earlier:
            assert (later[u] <= earlier[u]).all()


def test_without_a_mask_it_is_lora_to_the_bit():
    batches = pruned_models.batches()
    tuned, _, watch = tuned_with_masks(tiny.llama(), batches, steps=6, hold=0.9, settle=0.05, every=100)
    torch.manual_seed(0)
    own = config()
    plain = attach(tiny.llama(), own.lora(own.find(tiny.llama())))
    short_tuning.tune(
        plain, batches, steps=6, batch_size=8, learning_rate=own.learning_rate, seed=0, callbacks=[]
    )
    assert len(watch.counts) == 6
    assert not any(watch.counts[4].values())  # masks came with the last step, after its gradients
    last = dict(plain.named_parameters())
    assert all(torch.equal(p, last[n]) for n, p in tuned.named_parameters())


def test_masked_is_cut():
    tuned, pruner, _ = tuned_with_masks(tiny.llama(), pruned_models.batches())
    with torch.no_grad():
        expected = tuned(input_ids=IDS).logits
    pruner.remove()
    merged = merge(tuned)
    slicing.cut(merged, pruner.kept())
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=IDS).logits, expected, atol=2e-5, rtol=1e-4)


def test_a_smaller_model_of_its_own_class_is_left(tiny_llama):
    learns = [p.requires_grad for p in tiny_llama.parameters()]
    records = config().compress(tiny_llama, pruned_models.batches())
    assert type(tiny_llama).__name__ == "LlamaForCausalLM"
    assert (tiny_llama.config.intermediate_size, tiny_llama.config.num_key_value_heads) == (32, 1)
    assert tiny_llama.config.use_cache
    assert [p.requires_grad for p in tiny_llama.parameters()] == learns
    assert not any("lora" in name for name, _ in tiny_llama.named_modules())
    assert {r.note for r in records} == {"1 of 2 heads kept", "32 of 64 neurons kept"}
    tiny_llama.generate(IDS[:1], max_new_tokens=2)


def test_per_layer_leaves_the_first_tenth_and_the_last_whole():
    model = tiny.llama(num_hidden_layers=10)
    config(widths="per_layer", steps=4, every=1).compress(model, pruned_models.batches(count=1))
    widths = [block.mlp.down_proj.in_features for block in model.model.layers]
    assert widths == [64, *[32] * 8, 64]


def test_transposed_layers_are_pruned_too(tiny_gpt2):
    config(units=["mlp"]).compress(tiny_gpt2, pruned_models.batches(count=1))
    assert tiny_gpt2.config.n_inner == 64


def test_what_lora_learns_is_worth_more_than_magnitude():
    """The paper's order in one setting, on a model that was trained."""
    batches = pruned_models.batches(count=20)
    found = {}
    for metric in ("lora", "magnitude"):
        model = pruned_models.trained()
        config(metric=metric, steps=60, every=5, learning_rate=2e-3).compress(model, batches)
        found[metric] = pruned_models.loss(model)
    assert found["lora"] < found["magnitude"]


def test_tuning_while_pruning_beats_pruning_alone():
    batches = pruned_models.batches(count=20)
    model, other = pruned_models.trained(), pruned_models.trained()
    config(steps=60, every=5, learning_rate=2e-3).compress(model, batches)
    luthier.method("llm_pruner")(ratio=0.5).compress(other, batches)
    assert pruned_models.loss(model) < pruned_models.loss(other) - 0.3


def test_what_it_cannot_do_is_refused(tiny_llama, tiny_bert):
    with pytest.raises(MethodError, match="no steps to prune in"):
        config(hold=0.6, settle=0.5)
    with pytest.raises(MethodError, match="units"):
        config(units=["channel"])
    with pytest.raises(MethodError, match="causal"):
        config(units=["mlp"]).compress(tiny_bert, pruned_models.batches(count=1))
    before = copy.deepcopy(tiny_llama.state_dict())
    with pytest.raises(DataError):
        config().compress(tiny_llama, [])
    after = tiny_llama.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(t, before[n]) for n, t in after.items())
