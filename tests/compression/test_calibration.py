"""The pass over the blocks: equal to running the whole model before each step, resumable, of even memory."""

import gc
import json
from pathlib import Path

import pytest
import small_compression as small
import tiny
import torch
from torch import nn
from transformers import AlbertConfig, AlbertForMaskedLM

from luthier import method
from luthier.compression import masks
from luthier.compression.block import Block, real_tokens
from luthier.compression.calibration import calibrate, chain, choose_layers
from luthier.compression.compress import compress
from luthier.compression.linear import matrix, quantized_layers, set_matrix
from luthier.compression.records import Record
from luthier.errors import MethodError, ModelError
from luthier.models import structure


def whole_run(model, batches, names):
    """Inputs of layers, (tokens, features) of each batch, in plain runs of the whole model."""
    found = {name: [] for name in names}
    for batch in batches:
        mask = batch["attention_mask"].bool()
        handles = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, inputs, name=name, mask=mask: found[name].append(real_tokens(inputs[0], mask))
            )
            for name in names
        ]
        with torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()
    return found


def layers_as_they_work(model, batches, block):
    """Names of a block's linear layers in the order in which they are called."""
    order = []
    layers = {n: m for n, m in structure.linears(model).items() if n.startswith(f"{block}.")}
    handles = [m.register_forward_pre_hook(lambda *_, n=n: order.append(n)) for n, m in layers.items()]
    with torch.no_grad():
        model(**batches[0])
    for handle in handles:
        handle.remove()
    return order


def naive_gptq(model, batches, config):
    """Layer by layer: run the whole model as it now is, take the layer's inputs, settle it."""
    name, stack = structure.stacks(model)[0]
    for index in range(len(stack)):
        block = Block(model, f"{name}.{index}", index, [], [], [])
        for layer in layers_as_they_work(model, batches, f"{name}.{index}"):
            parts = whole_run(model, batches, [layer])[layer]
            x = torch.cat(parts)
            if config.token_cap is not None:
                square = x.square().sum(1, keepdim=True)
                x = x * (config.token_cap * square.median() / square).clamp(max=1).sqrt()
            hessian = x.T @ x * (2 / len(x))
            config.change_layer(block, layer, model.get_submodule(layer), hessian)


def naive_wanda(model, batches, sparsity):
    """Block by block: run the whole model as it now is, score all layers of the block, prune them."""
    name, stack = structure.stacks(model)[0]
    for index in range(len(stack)):
        layers = [n for n in structure.linears(model) if n.startswith(f"{name}.{index}.")]
        for layer, parts in whole_run(model, batches, layers).items():
            weight = matrix(model.get_submodule(layer))
            score = weight.abs() * torch.cat(parts).norm(dim=0)
            for row, scores in zip(weight, score, strict=True):
                row[scores.argsort(stable=True)[: int(sparsity * len(row))]] = 0
            set_matrix(model.get_submodule(layer), weight)


def weights(model):
    return {name: matrix(layer) for name, layer in structure.linears(model).items()}


def logits(model):
    with torch.no_grad():
        return model(small.batches(1, seed=9)[0]["input_ids"]).logits


@pytest.mark.parametrize("cap", [None, 1.2])
@pytest.mark.parametrize("family", small.MODELS)
def test_gptq_is_that_of_whole_runs_before_each_layer(family, cap):
    config = method("gptq")(bits=3, group_size=16, token_cap=cap)
    fast, slow = small.MODELS[family](), small.MODELS[family]()
    records = compress(fast, config, calibration=small.batches())
    naive_gptq(slow, small.batches(), config)
    assert {r.name for r in records} == set(quantized_layers(slow)) == set(quantized_layers(fast))
    for name, weight in weights(slow).items():
        off = (weights(fast)[name] - weight).abs() > 1e-5
        # Sums in another order may put a weight that lies between two points on the other.
        assert off.float().mean() < 0.01, name
        if off.any():  # all layers after it have other inputs
            break
    else:
        assert torch.allclose(logits(fast), logits(slow), atol=0.1 * float(logits(slow).std()))


@pytest.mark.parametrize("family", small.MODELS)
def test_wanda_is_that_of_whole_runs_before_each_block(family):
    fast, slow = small.MODELS[family](), small.MODELS[family]()
    before = weights(fast)
    records = compress(fast, method("wanda")(sparsity=0.5), calibration=small.batches())
    naive_wanda(slow, small.batches(), 0.5)
    assert {r.name for r in records if r.sparsity == 0.5} == {n for n in before if ".pooler" not in n} & {
        n for block in chain(fast) for n in block.all_layers()
    }
    for name, weight in weights(slow).items():
        assert ((weights(fast)[name] != 0) == (weight != 0)).float().mean() > 0.999, name
    assert torch.allclose(logits(fast), logits(slow), atol=0.1 * float(logits(slow).std()))


def test_later_blocks_see_what_became_of_earlier_ones():
    """Otherwise the errors of a block would be those of a model that is no more."""
    model = tiny.llama(num_hidden_layers=3)
    seen = []

    def change(block):
        seen.append(block.hidden[0].clone())
        block.module.mlp.down_proj.weight.data.zero_()
        return [Record(block.name, 0, 0)]

    calibrate(model, small.batches(), change)
    with torch.no_grad():
        states = model.model(**small.batches()[0], output_hidden_states=True).hidden_states
    for found, expected in zip(seen, states, strict=False):
        assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_dropout_gradients_and_hooks_are_as_before(kind):
    model = small.MODELS[kind]().train()
    compress(model, method("wanda")(), calibration=small.batches())
    assert all(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def live(shape):
    """How many tensors of a shape there are that own their numbers."""
    return len({t.data_ptr() for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == shape})


def test_the_hidden_states_that_are_held_do_not_grow_with_the_depth():
    peaks = {}
    for depth in (2, 9):
        model, counts = tiny.llama(num_hidden_layers=depth), []
        for block in model.model.layers:  # in the first run of the model as in those of single blocks
            block.register_forward_pre_hook(lambda *_, counts=counts: counts.append(live((2, 10, 32))))
        gc.collect()
        gc.freeze()  # what there is already need not be looked through
        try:
            compress(model, method("gptq")(group_size=16), calibration=small.batches(5))
        finally:
            gc.unfreeze()
        peaks[depth] = max(counts)
    assert peaks[9] == peaks[2]
    assert (
        5 <= peaks[2] <= 2 * 5 + 3
    )  # inputs of the block, and outputs of its attention once that is settled


class Killed(BaseException):
    pass


def run(monkeypatch, folder, name="gptq", *, kill_at=None, seed=0, model_seed=0, data=None, **options):
    """(model, records, indices of the blocks that were changed) of a pass, killed in a block or whole."""
    model = tiny.llama(num_hidden_layers=4, seed=model_seed)
    config = method(name)(**options)
    plain, done = type(config).change, []

    def change(self, block):
        done.append(block.index)
        for number, record in enumerate(plain(self, block)):
            if block.index == kill_at and number:
                raise Killed  # in the midst of a block
            yield record

    records = None
    with monkeypatch.context() as patch:
        patch.setattr(type(config), "change", change)
        data = small.batches(seed=seed) if data is None else data
        try:
            records = compress(model, config, calibration=data, folder=folder)
        except Killed:
            assert kill_at is not None
    return model, records, done


GPTQ = {"group_size": 16, "bits": 3}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gptq", GPTQ),
        ("gptq", GPTQ | {"symmetric": False, "activation_bits": 8, "activation_per": "static"}),
        ("sparsegpt", {"pattern": "2:4"}),
        ("wanda", {}),
        ("smoothquant", {"bits": 4, "activation_per": "static"}),
    ],
)
def test_a_pass_that_was_killed_goes_on_to_the_same_end(monkeypatch, tmp_path, name, options):
    whole, expected, _ = run(monkeypatch, None, name, **options)
    _, _, done = run(monkeypatch, tmp_path, name, kill_at=2, **options)
    assert done == [0, 1, 2]
    model, records, done = run(monkeypatch, tmp_path, name, **options)
    assert done == [2, 3]
    state = whole.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    for found, wanted in zip(records, expected, strict=True):
        assert found.as_dict() | {"seconds": 0} == wanted.as_dict() | {"seconds": 0}
    assert run(monkeypatch, tmp_path, name, **options)[2] == [], "what is finished stays until it is saved"


def test_nothing_of_another_pass_is_used(monkeypatch, tmp_path):
    run(monkeypatch, tmp_path, kill_at=2, **GPTQ)
    ids = small.batches()
    ids[0]["input_ids"] = ids[0]["input_ids"].flip(1)  # the same tokens in another order
    masked = small.batches()
    masked[2]["attention_mask"][:, -2:] = 0
    others = {
        "method": {"name": "sparsegpt"},
        "option": {"damping": 0.02, **GPTQ},
        "model": {"model_seed": 1, **GPTQ},
        "data": {"seed": 1, **GPTQ},
        "order of the data": {"data": ids, **GPTQ},
        "mask": {"data": masked, **GPTQ},
    }
    for what, options in others.items():
        assert run(monkeypatch, tmp_path, **options)[2] == [0, 1, 2, 3], what
    assert run(monkeypatch, tmp_path, **GPTQ)[2] == [2, 3]


def test_methods_with_the_same_options_are_told_apart(monkeypatch, tmp_path):
    """Each method's class is named Config."""
    twin = type(method("wanda")())

    class Config(twin):
        pass

    Config.__qualname__, Config.__module__ = "Config", "elsewhere"
    assert repr(Config()) == repr(twin())
    run(monkeypatch, tmp_path, "wanda", kill_at=1)
    model = tiny.llama(num_hidden_layers=4)
    seen = []
    monkeypatch.setattr(Config, "prepare", lambda self, block: seen.append(block.index))
    compress(model, Config(), calibration=small.batches(), folder=tmp_path)
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize("damage", ["no record", "half a state", "record in the making"])
def test_a_block_that_is_half_written_is_done_again(monkeypatch, tmp_path, damage):
    whole, _, _ = run(monkeypatch, None, **GPTQ)
    run(monkeypatch, tmp_path, kill_at=2, **GPTQ)
    (folder,) = tmp_path.iterdir()
    said, state = folder / "00001.json", folder / "00001.safetensors"
    assert json.loads(said.read_text())["records"]
    if damage == "record in the making":
        said.rename(said.with_suffix(".partial"))
    else:
        said.unlink()
    if damage == "half a state":
        state.write_bytes(state.read_bytes()[:100])
    model, _, done = run(monkeypatch, tmp_path, **GPTQ)
    assert done == [1, 2, 3]
    assert all(torch.equal(t, whole.state_dict()[key]) for key, t in model.state_dict().items())


def test_a_kill_while_the_record_is_written_leaves_no_half_of_it(monkeypatch, tmp_path):
    plain = Path.write_text

    def cut_off(path, text, *args, **options):
        plain(path, text[: len(text) // 2])
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", cut_off)
        with pytest.raises(Killed):
            compress(tiny.llama(), method("gptq")(**GPTQ), calibration=small.batches(), folder=tmp_path)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    compress(tiny.llama(), method("gptq")(**GPTQ), calibration=small.batches(), folder=tmp_path)


def test_what_is_no_chain_of_blocks_is_refused():
    nothing = lambda block: []  # noqa: E731
    with pytest.raises(ModelError, match=r"T5ForCond.*encoder-decoder.*decoder-only or an encoder-only"):
        calibrate(tiny.t5(), small.batches(), nothing)
    shared = AlbertConfig(
        vocab_size=tiny.VOCAB, hidden_size=32, embedding_size=16, intermediate_size=64, num_attention_heads=4
    )
    with pytest.raises(ModelError, match=r"Albert.*not run once each.*Llama, Qwen"):
        calibrate(AlbertForMaskedLM(shared).eval(), small.batches(), nothing)
    between = tiny.llama()
    between.model.layers[0].register_forward_hook(lambda _, __, output: output)
    between.model.layers[1].register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
    with pytest.raises(ModelError, match="block 1 does not read what block 0 gives"):
        calibrate(between, small.batches(), nothing)
    without = tiny.llama()
    without.model.layers = nn.Identity()
    with pytest.raises(ModelError, match="no list of blocks"):
        calibrate(without, small.batches(), nothing)


def test_the_blocks_alone_need_no_inputs():
    blocks = list(chain(tiny.gpt2()))
    assert [b.name for b in blocks] == ["transformer.h.0", "transformer.h.1"]
    assert all(not b.hidden and b.tokens == 0 for b in blocks)
    assert masks.share_of_zeros(matrix(next(iter(blocks[0].all_layers().values())))) == 0


def test_layers_are_chosen_by_name_or_end_of_name():
    model = tiny.llama()
    everything = choose_layers(model, [], [])
    assert len(everything) == 14
    assert choose_layers(model, ["q_proj", "layers.1.mlp.up_proj"], []) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    }
    assert choose_layers(model, [], ["down_proj"]) == {n for n in everything if "down_proj" not in n}
    assert choose_layers(model, "q_proj", []) == {n for n in everything if "q_proj" in n}
    assert not any("pooler" in n for n in choose_layers(tiny.bert(), [], []))


@pytest.mark.parametrize(
    ("targets", "exclude", "words"),
    [
        (["qproj"], [], r"'qproj' matches no layer.*'q_proj'"),
        ([], ["qproj"], r"'qproj' matches no layer.*'q_proj'"),
        (["lm_head"], [], r"'lm_head' is no linear layer of a block.*down_proj, gate_proj"),
        (["input_layernorm"], [], r"'input_layernorm' is no linear layer of a block"),
        (["embed_tokens"], [], r"embeddings and head stay as they are"),
        (["mlp"], [], r"holds layers but is none"),
        (["q_proj"], ["self_attn.q_proj"], r"No layer is left to compress: exclude \(self_attn.q_proj\)"),
    ],
)
def test_names_that_choose_nothing_are_refused(targets, exclude, words):
    with pytest.raises(MethodError, match=words):
        choose_layers(tiny.llama(), targets, exclude)
