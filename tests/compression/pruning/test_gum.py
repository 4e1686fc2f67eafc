"""GUM: movement scores with a straight-through mask, one threshold for all blocks, a price on redundancy."""

import copy

import pruned_models
import pytest
import small_training
import tiny
import torch
from transformers import TrainerCallback

import luthier
from luthier.compression import short_tuning, slicing, units
from luthier.compression.pruning import gum
from luthier.errors import MethodError

IDS = pruned_models.chains(3, 20, 7)


def config(**options):
    return luthier.method("gum")(**({"ratio": 0.5, "steps": 12, "batch_size": 8} | options))


def neurons(model, **options):
    own = config(**options)
    found = units.find(model, ["mlp"])
    return gum.Neurons(own, model, slicing.targets(model, found, own.ratio, own.widths))


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2], ids=["llama", "gpt2"])
def test_all_neurons_kept_is_the_dense_model(make):
    model = make()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        held = neurons(model)
        held.prune(0.0)
        assert torch.equal(model(input_ids=IDS).logits, expected)
    held.remove()
    assert dict(model.named_parameters()).keys() == dict(make().named_parameters()).keys()


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2], ids=["llama", "gpt2"])
def test_masked_is_cut(make):
    model = make()
    if make is tiny.gpt2:  # a neuron whose row is masked still gives act(b)
        torch.nn.init.normal_(model.transformer.h[0].mlp.c_fc.bias)
    held = neurons(model)
    for scores in held.scores:
        torch.nn.init.normal_(scores)
    held.prune(1.0)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        held.remove()
        slicing.cut(model, held.kept(), widths="per_layer")
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("done", [0.0, 0.2, 0.7, 1.0])
def test_exactly_the_share_of_all_neurons_is_kept(tiny_llama, done):
    held = neurons(tiny_llama, ratio=0.7)
    for index, scores in enumerate(held.scores):
        torch.nn.init.normal_(scores, mean=float(index))
    held.prune(done)
    total, final = 128, 2 * (64 - (64 - int(64 * 0.3 + 1e-9))) / 128
    share = final + (1 - final) * (1 - done) ** 3
    assert sum(int(m.sum()) for m in held.masks) == int(share * total + 1e-9)
    every = torch.cat([s.detach() for s in held.scores])
    kept = torch.cat(held.masks).bool()
    if done:
        assert every[kept].min() >= every[~kept].max()


def test_equal_scores_do_not_change_the_number(tiny_llama):
    held = neurons(tiny_llama)
    held.prune(1.0)
    assert sum(int(m.sum()) for m in held.masks) == 64
    assert all(m.sum() >= 1 for m in held.masks)  # a block is never emptied


def test_scores_get_the_gradient_of_the_mask(tiny_gpt2):
    """dL/dS = sum of dL/dW W over the neuron's row of the first matrix and its column of the second."""
    plain = copy.deepcopy(tiny_gpt2)
    plain(input_ids=IDS, labels=IDS).loss.backward()
    held = neurons(tiny_gpt2, uniqueness=0.0)
    tiny_gpt2(input_ids=IDS, labels=IDS).loss.backward()
    for block, scores in zip(plain.transformer.h, held.scores, strict=True):
        first, last = block.mlp.c_fc.weight, block.mlp.c_proj.weight  # (in, out)
        expected = (first.grad * first).sum(0) + (last.grad * last).sum(1)
        torch.testing.assert_close(scores.grad, expected.detach(), atol=1e-6, rtol=1e-3)


def test_redundancy_is_the_mean_similarity_and_ignores_scale():
    torch.manual_seed(0)
    hidden = torch.randn(50, 6)
    hidden[:, 1] = 3 * hidden[:, 0]
    cosine = torch.nn.functional.cosine_similarity(hidden.T[:, None], hidden.T[None], dim=-1).abs()
    expected = (cosine.sum(1) - 1) / (6 * 0.5)
    found = gum.redundancy(hidden.T @ hidden, 0.5)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    scaled = hidden * torch.tensor([1, 5, 0.1, 2, 9, 1.0])
    torch.testing.assert_close(gum.redundancy(scaled.T @ scaled, 0.5), found, atol=1e-4, rtol=1e-4)
    assert set(found.argsort(descending=True)[:2].tolist()) == {0, 1}


def test_the_penalty_lowers_every_score_and_redundant_ones_faster():
    scores = [torch.randn(4, requires_grad=True), torch.randn(6, requires_grad=True)]
    redundant = [torch.rand(4), torch.rand(6)]
    gum.penalty(scores, redundant, 3.0).backward()
    for s, u in zip(scores, redundant, strict=True):
        slope = s.sigmoid() * (1 - s.sigmoid())
        torch.testing.assert_close(s.grad, (slope * (1 + 3.0 * u) / len(s) / 2).detach())


def test_similarities_leave_out_padding_and_masked_neurons(tiny_llama):
    held = neurons(tiny_llama)
    hidden = {}
    down = tiny_llama.model.layers[0].mlp.down_proj
    down.register_forward_pre_hook(lambda m, x: hidden.update(h=x[0].detach()), prepend=True)
    mask = torch.ones_like(IDS)
    mask[1, -7:] = 0
    held.prune(1.0)
    tiny_llama(input_ids=IDS, attention_mask=mask)
    rows = hidden["h"][mask.bool()] * held.masks[0]
    torch.testing.assert_close(held.similar[0], 0.999 * rows.T @ rows)
    tiny_llama(input_ids=IDS, attention_mask=mask)
    torch.testing.assert_close(held.similar[0], (1 - 0.001**2) * rows.T @ rows, rtol=1e-4, atol=1e-5)


def test_divergence_of_a_model_from_itself_is_0():
    logits, other = torch.randn(2, 5, 9), torch.randn(2, 5, 9)
    real = torch.ones(2, 5, dtype=torch.bool)
    real[1, 3:] = False
    assert float(gum.divergence(logits, logits, real, 2.0)) == pytest.approx(0, abs=1e-6)
    p, q = (t[real] / 2.0 for t in (other, logits))
    expected = 4 * (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(gum.divergence(logits, other, real, 2.0), expected)


class Watch(TrainerCallback):
    def __init__(self):
        self.kept, self.rates = [], []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def test_one_of_two_equal_neurons_goes_before_any_that_is_unique():
    """Where the penalty decides alone, a neuron and its double have the lowest scores of their block."""
    model = pruned_models.trained("gpt2")
    mlp = model.transformer.h[0].mlp
    with torch.no_grad():
        mlp.c_fc.weight[:, 9], mlp.c_fc.bias[9] = mlp.c_fc.weight[:, 4], mlp.c_fc.bias[4]
    held = neurons(model, uniqueness=100.0)
    model(input_ids=IDS)
    redundant = gum.redundancy(held.similar[0], 1.0)
    norms = held.similar[0].diagonal().sqrt()
    cosine = held.similar[0].abs() / (norms[:, None] * norms + 1e-6)
    assert cosine[4, 9] == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(redundant[4], redundant[9])
    gum.penalty(list(held.scores), [redundant, held.redundant[1]], 100.0).backward()
    slope = held.scores[0].grad
    assert torch.equal(slope.argsort(), redundant.argsort())


def test_weights_and_scores_have_rates_of_their_own(tiny_llama):
    own = config(learning_rate=1e-5, score_rate=0.02, weight_decay=0.3)
    held = neurons(tiny_llama)
    watch = Watch()
    short_tuning.tune(
        tiny_llama,
        pruned_models.batches(count=1),
        steps=4,
        batch_size=8,
        learning_rate=1e-5,
        seed=0,
        callbacks=[held, watch],
        parameter_groups=own.parameter_groups(tiny_llama),
        loss_with=lambda loss, outputs, inputs: held.whole_loss(loss, outputs, inputs, None),
    )
    assert all(rates[2] == pytest.approx(2000 * rates[0]) for rates in watch.rates)
    groups = own.parameter_groups(tiny_llama)
    assert [g["weight_decay"] for g in groups] == [0.3, 0.0, 0.0]
    assert len(groups[2]["params"]) == 2
    assert any(s.abs().sum() > 0 for s in held.scores)


def test_after_the_tuning_the_model_computes_in_its_own_precision_again(tiny_llama):
    with torch.no_grad():
        before = tiny_llama(IDS).logits
    short_tuning.tune(
        tiny_llama,
        pruned_models.batches(count=1),
        steps=1,
        batch_size=8,
        learning_rate=0.0,
        seed=0,
        callbacks=[],
        bf16=True,
    )
    with torch.no_grad():
        assert torch.equal(tiny_llama(IDS).logits, before)


def test_blocks_get_different_widths_and_the_sum_is_exact():
    model = pruned_models.trained()
    records = config(steps=40, learning_rate=5e-4).compress(model, pruned_models.batches(count=6))
    left = [block.mlp.down_proj.in_features for block in model.model.layers]
    assert sum(left) == 96
    assert len(set(left)) > 1
    assert [r.note for r in records] == [f"{n} of 64 neurons kept" for n in left]
    assert model.config.use_cache
    model.generate(IDS[:1], max_new_tokens=2)


def test_uniform_widths_keep_the_models_own_class(tiny_llama):
    config(widths="uniform").compress(tiny_llama, pruned_models.batches(count=1))
    assert type(tiny_llama).__name__ == "LlamaForCausalLM"
    assert tiny_llama.config.intermediate_size == 32


def test_half_precision_is_trained_in_float32_and_given_back(tiny_llama):
    small_training.half(tiny_llama)
    tiny_llama.model.norm.weight.requires_grad_(False)
    config(widths="uniform", steps=4).compress(tiny_llama, pruned_models.batches(count=1))
    assert {b.dtype for b in tiny_llama.buffers()} == {torch.float32}
    assert [n for n, p in tiny_llama.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    assert {p.dtype for p in tiny_llama.parameters()} == {torch.bfloat16}


def test_it_beats_magnitude_that_is_tuned_as_long():
    batches = pruned_models.batches(count=20)
    model, other = pruned_models.trained(), pruned_models.trained()
    config(steps=60, learning_rate=5e-4).compress(model, batches)
    luthier.method("llm_pruner")(ratio=0.5, importance="l2", units=["mlp"]).compress(other, batches)
    short_tuning.tune(other, batches, steps=60, batch_size=8, learning_rate=5e-4, seed=0, callbacks=[])
    assert pruned_models.loss(model) < pruned_models.loss(other)


def test_a_teacher_helps_and_is_not_changed():
    batches = pruned_models.batches(count=20)
    found = {}
    for share in (0.0, 0.5):
        model = pruned_models.trained()
        config(steps=60, learning_rate=5e-4, distill=share).compress(model, batches)
        found[share] = pruned_models.loss(model)
    assert found[0.5] < found[0.0]


def test_what_it_cannot_do_is_refused(tiny_bert):
    with pytest.raises(MethodError, match="no steps to prune in"):
        config(hold=0.6, settle=0.5)
    with pytest.raises(MethodError, match="causal"):
        config().compress(tiny_bert, pruned_models.batches(count=1))
    with pytest.raises(MethodError, match="ratio must be"):
        config(ratio=1.5)
