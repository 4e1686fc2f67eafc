"""A block: who reads what, statistics without padding, and the outputs that the next block gets."""

import pytest
import small_compression as small
import tiny
import torch
from torch import nn

from luthier.compression.block import Block, Call, real_tokens
from luthier.compression.calibration import catch
from luthier.compression.linear import dimensions
from luthier.compression.statistics import Hessian, Moments
from luthier.errors import MethodError
from luthier.models import structure


def first_block(model, batches):
    name, stack = structure.stacks(model)[0]
    with torch.no_grad():
        hidden, calls, masks, starts = catch(model, stack, batches)
    block = Block(model, f"{name}.0", 0, hidden, calls[0], masks, start=starts[0])
    block.choose(set(block.all_layers()))
    return block


GROUPS = {
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "mistral": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    "bert": [["query", "key", "value"], ["dense"], ["dense"], ["dense"]],
    "opt": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
}


@pytest.mark.parametrize("family", GROUPS)
def test_layers_of_one_input_are_a_group_and_groups_come_as_they_work(family):
    block = first_block(small.MODELS[family](), small.batches())
    found = [sorted(name.rpartition(".")[2] for name in names) for names in block.groups()]
    assert found == [sorted(names) for names in GROUPS[family]]
    block.choose({n for n in block.all_layers() if n.endswith(("v_proj", "fc1", "c_fc", "value"))})
    assert [n for names in block.groups() for n in names] == [
        n for n in block.all_layers() if n in block.layers()
    ]


@pytest.mark.parametrize("family", small.MODELS)
def test_padded_batches_give_the_statistics_of_unpadded_ones(family):
    """A row of seven tokens beside one of ten, and the two alone."""
    model, (whole,) = small.MODELS[family](), small.batches(1)
    short = {key: value[1:, :7] for key, value in whole.items()}
    alone = [{key: value[:1] for key, value in whole.items()}, short]
    padded = {key: value.clone() for key, value in whole.items()}
    padded["input_ids"][1, 7:], padded["attention_mask"][1, 7:] = tiny.PAD, 0
    found = []
    for batches in ([padded], alone):
        block = first_block(model, batches)
        hessians = {name: Hessian(dimensions(layer)[1]) for name, layer in block.all_layers().items()}
        block.observe(hessians)
        assert block.tokens == 17
        found.append(hessians)
    for name, hessian in found[0].items():
        assert hessian.tokens == found[1][name].tokens == 17
        assert torch.allclose(hessian.value, found[1][name].value, rtol=1e-4, atol=1e-5), name


def test_a_shared_statistic_is_fed_once_and_inputs_are_those_that_were_seen():
    block = first_block(tiny.llama(), small.batches())
    shared = Moments(32)
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    block.observe(dict.fromkeys(names, shared))
    assert shared.tokens == block.tokens == 3 * 20 - 4
    x = torch.cat([block.inputs(names[2], index) for index in range(3)])
    assert x.shape == (56, 32)
    assert torch.allclose(x.norm(dim=0), shared.norm)


def test_the_run_ends_where_all_was_seen():
    """Statistics of the first layers do not pay for the rest of the block."""
    block = first_block(tiny.llama(), small.batches())
    runs = []
    block.module.mlp.register_forward_hook(lambda *_: runs.append(1))
    block.observe({"model.layers.0.self_attn.q_proj": Moments(32)})
    assert not runs
    block.observe({})
    assert not runs
    block.observe({"model.layers.0.mlp.down_proj": Moments(64)})
    assert not runs


@pytest.mark.parametrize("family", small.MODELS)
def test_what_a_block_is_left_with_is_the_model_s_own(family):
    model, batches = small.MODELS[family](), small.batches()
    block = first_block(model, batches)
    block.leave()
    stack = structure.stacks(model)[0][1]
    seen = []
    stack[1].register_forward_pre_hook(
        lambda _, inputs, options: seen.append(inputs[0] if inputs else options["hidden_states"]),
        with_kwargs=True,
    )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for found, expected, batch in zip(block.hidden, seen, batches, strict=True):
        kept = batch["attention_mask"].bool()
        assert torch.allclose(found[kept], expected[kept], atol=1e-5)


def test_no_gradients_are_kept():
    block = first_block(tiny.llama(), small.batches(1))
    assert not block.run(0).requires_grad
    block.leave()
    assert not block.hidden[0].requires_grad


class Routed(nn.Module):
    """A feed-forward part with an expert beside it, for inputs whose sum is above a threshold."""

    def __init__(self, shared, above):
        super().__init__()
        self.shared, self.spare, self.above = shared, nn.Linear(32, 32), above

    def forward(self, x):
        out = self.shared(x)
        return out + self.spare(x) if x.sum() > self.above else out


def test_a_layer_that_no_token_reaches_is_named():
    model, batches = tiny.llama(), small.batches()
    layer = model.model.layers[0]
    sums = []
    layer.mlp.register_forward_pre_hook(lambda _, inputs: sums.append(float(inputs[0].sum())))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    # An expert of the last batch alone is found although the first does not use it.
    batches = [batches[i] for i in torch.tensor(sums).argsort().tolist()]
    sums.sort()
    layer.mlp = Routed(layer.mlp, (sums[1] + sums[2]) / 2)
    assert any("model.layers.0.mlp.spare" in group for group in first_block(model, batches).groups())
    layer.mlp.above = torch.inf
    with pytest.raises(
        MethodError, match=r"layers\.0\.mlp\.spare is not used on the calibration data.*exclude"
    ):
        first_block(model, batches).groups()


def test_inputs_that_are_not_finite_are_refused_unless_they_are_padding():
    block = first_block(tiny.llama(), small.batches())
    name = "model.layers.0.self_attn.q_proj"
    block.hidden[1][0, -1] = torch.nan
    block.observe({name: Moments(32)})
    block.hidden[1][1, -1, 3] = torch.inf
    with pytest.raises(MethodError, match=rf"inputs of {name} are not finite on calibration batch 1"):
        block.observe({name: Moments(32)})


def test_tokens_are_told_from_padding_in_either_shape():
    x = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    expected = torch.tensor([[0.0, 1], [2, 3], [6, 7]])
    assert torch.equal(real_tokens(x, mask), expected)
    assert torch.equal(real_tokens(x.flatten(0, 1), mask), expected)
    routed = x.flatten(0, 1)[:4]  # tokens that went to an expert: which of them are padding is not known
    assert torch.equal(real_tokens(routed, mask), routed)


def runs_of(module):
    """A list that grows with each run of a module's own forward."""
    found, plain = [], module.forward

    def forward(*arguments, **options):
        found.append(1)
        return plain(*arguments, **options)

    module.forward = forward
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "opt"])
def test_what_is_settled_is_run_once_more_and_gives_what_it_gave(family):
    model, batches = small.MODELS[family](), small.batches()
    block = first_block(model, batches)
    name = next(n for n in ("self_attn", "attn", "attention") if hasattr(block.module, n))
    inside = {n for n in block.all_layers() if n.startswith(f"{block.name}.{name}.")}
    exact = [block.run(index) for index in range(len(batches))]
    runs = runs_of(getattr(block.module, name))
    for layers in ([], sorted(inside)[:1]):  # nothing, and a part of it
        block.settle(layers)
        block.run(0)
    assert len(runs) == 2
    block.settle(inside)
    for _ in range(3):
        assert all(torch.equal(block.run(index), exact[index]) for index in range(len(batches)))
    assert len(runs) == 2 + len(batches)
    assert block.run(0).data_ptr() != block.run(0).data_ptr()
    block.choose(set(block.all_layers()))
    block.run(0)
    assert len(runs) == 3 + len(batches)  # another method may change what was settled
    block.settle(inside)
    block.run(1)
    block.leave()
    assert all(torch.equal(found, wanted) for found, wanted in zip(block.hidden, exact, strict=True))
    assert len(runs) == 3 + 2 * len(batches)


def test_a_settled_part_that_works_twice_or_gives_more_than_the_hidden_state_is_run_each_time():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.wide = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 24))

        def forward(self, hidden):
            return (
                self.first(hidden) + self.first(hidden + 1) + self.wide(hidden).unflatten(-1, (3, 8)).sum(-2)
            )

    root = nn.Module()
    root.block = Twice()
    hidden = torch.randn(2, 5, 8)
    block = Block(root, "block", 0, [hidden], [Call((), {})], [torch.ones(2, 5, dtype=torch.bool)])
    block.choose(set(block.all_layers()))
    block.settle(block.all_layers())
    runs = runs_of(root.block.first), runs_of(root.block.wide)
    exact = root.block(hidden)
    assert all(torch.allclose(block.run(0), exact, atol=1e-6) for _ in range(2))
    assert [len(found) for found in runs] == [6, 3]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_of_a_part_that_ends_with_a_layer_the_inputs_that_were_observed_do(family):
    model, batches = small.MODELS[family](), small.batches()
    block = first_block(model, batches)
    groups = block.groups()
    name = next(n for n in ("self_attn", "attn") if hasattr(block.module, n))
    inside = [names for names in groups if names[0].startswith(f"{block.name}.{name}.")]
    for names in inside:
        block.observe({names[0]: Hessian(dimensions(block.layers()[names[0]])[1])})
        with torch.no_grad():
            block.layers()[names[-1]].weight.mul_(1.1)  # a layer changes after its inputs were seen
        if names is not inside[-1]:
            block.settle(names)
    exact = [block.run(index) for index in range(len(batches))]
    block.settle(inside[-1])
    runs = runs_of(getattr(block.module, name))
    for _ in range(2):
        assert all(torch.equal(block.run(index), exact[index]) for index in range(len(batches)))
    assert not runs
    for names in groups[len(inside) :]:
        block.observe({names[0]: Hessian(dimensions(block.layers()[names[0]])[1])})
        block.settle(names)
    block.leave()
    assert all(torch.equal(found, wanted) for found, wanted in zip(block.hidden, exact, strict=True))
    assert not runs


class Ending(nn.Module):
    """Gives what its last layer gives, or something else, as `how` says."""

    def __init__(self, how):
        super().__init__()
        self.first, self.last, self.how = nn.Linear(8, 8), nn.Linear(8, 8), how

    def forward(self, x):
        y = self.last(self.first(x).relu())
        if self.how == "twice":
            return self.last(y)
        return {"plain": y, "more": (y, x), "none": (y, None), "scaled": 2 * y}[self.how]


@pytest.mark.parametrize("how", ["plain", "none", "more", "scaled", "twice"])
def test_where_a_part_gives_something_else_it_is_run(how):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Ending(how)

        def forward(self, hidden):
            made = self.part(hidden)
            return hidden + (made if isinstance(made, torch.Tensor) else made[0])

    root = nn.Module()
    root.block = Outer()
    hidden = torch.randn(2, 5, 8)
    block = Block(root, "block", 0, [hidden], [Call((), {})], [torch.ones(2, 5, dtype=torch.bool)])
    block.choose(set(block.all_layers()))
    for names in block.groups():
        block.observe({names[0]: Hessian(8)})
        block.settle(names)
    runs = runs_of(root.block.part)
    exact = root.block(hidden)
    assert len(runs) == 1
    assert torch.allclose(block.run(0), exact, atol=1e-6)
    assert len(runs) == (1 if how in ("plain", "none") else 2)
