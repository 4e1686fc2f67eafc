"""ZeroQuant-V2: what the rounding took comes back, as much of it as any matrix of that rank can bring."""

import copy
from itertools import pairwise

import peft
import pytest
import small_compression as small
import tiny
import torch
from torch import nn

import luthier
from luthier import method
from luthier.compression import compensated
from luthier.compression.compensated import CompensatedLinear, low_rank, separate
from luthier.compression.compress import compress
from luthier.compression.grid import fit
from luthier.compression.linear import dequantize, matrix, quantized_layers
from luthier.compression.storage import as_saved
from luthier.errors import DataError, MethodError
from luthier.models import gguf_blocks
from luthier.models.saving import save
from luthier.tuning.attach import attach

KINDS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert}
W, X = small.weight_of(24, 64), small.correlated()


def lorc(**options):
    return method("zeroquant_v2")(**{"bits": 3, "group_size": 16, "rank": 4} | options)


def rounded(**options):
    return fit(W, lorc(**options).scheme).round(W)


def lost(new):
    return float((new - W).double().square().sum())


def logits(model):
    with torch.no_grad():
        return model(small.batches()[0]["input_ids"]).logits


# The matrix ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
@pytest.mark.parametrize("rank", [1, 5, 24])
def test_no_matrix_of_that_rank_is_nearer(shape, rank):
    error = small.weight_of(*shape, seed=3)
    down, up = low_rank(error, rank)
    assert (down.shape, up.shape) == ((rank, shape[1]), (shape[0], rank))
    values = torch.linalg.svdvals(error.double())
    best = float(values[rank:].square().sum())
    assert float((error - up @ down).double().square().sum()) == pytest.approx(best, rel=1e-5, abs=1e-8)


def test_singular_values_are_shared_equally_between_the_factors():
    error = small.weight_of(24, 64, seed=3)
    down, up = low_rank(error, 6)
    root = torch.linalg.svdvals(error)[:6].sqrt()
    assert torch.allclose(down.norm(dim=1), root, rtol=1e-4)
    assert torch.allclose(up.norm(dim=0), root, rtol=1e-4)


def test_a_matrix_of_zeros_has_factors_of_zeros():
    down, up = low_rank(torch.zeros(8, 12), 3)
    assert not (up @ down).any()
    assert torch.isfinite(down).all()
    assert torch.isfinite(up).all()


# The layer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_left_of_the_error_are_the_squares_of_the_other_singular_values(bits, transposed):
    values = torch.linalg.svdvals((W - rounded(bits=bits)).double())
    errors = []
    for rank in (0, 1, 4, 8, 24):
        config = lorc(bits=bits, rank=rank, factor_bits=None)
        errors.append(lost(small.changed(config, W, transposed=transposed)))
        assert errors[-1] == pytest.approx(float(values[rank:].square().sum()), rel=1e-4, abs=1e-6)
    assert errors == sorted(errors, reverse=True)


def test_full_rank_gives_the_weight_back_and_rank_nought_the_rounding():
    assert torch.allclose(small.changed(lorc(rank=24, factor_bits=None), W), W, atol=1e-5)
    assert torch.equal(small.changed(lorc(rank=0), W), rounded())


@pytest.mark.parametrize("base", ["nearest", "gptq"])
def test_it_never_loses_more_than_what_it_stands_on(base):
    plain = small.changed(lorc(rank=0, base=base), W, X)
    for rank in (1, 4, 16):
        for factor_bits in (None, 8):
            made = small.changed(lorc(rank=rank, base=base, factor_bits=factor_bits), W, X)
            assert lost(made) < lost(plain)


def test_on_gptq_the_codes_are_those_of_gptq():
    model, other = tiny.llama(), tiny.llama()
    compress(model, lorc(base="gptq"), calibration=small.batches())
    compress(other, method("gptq")(bits=3, group_size=16), calibration=small.batches())
    name = "model.layers.0.self_attn.q_proj"  # the first: later ones see what the low rank gave back
    assert torch.equal(quantized_layers(model)[name].codes, quantized_layers(other)[name].codes)


def test_factors_in_8_bits_change_the_product_by_less_than_a_hundredth():
    whole = small.changed(lorc(rank=8, factor_bits=None), W) - rounded()
    coarse = small.changed(lorc(rank=8), W) - rounded()
    assert 0 < (coarse - whole).norm() < 0.01 * whole.norm()


def test_a_weight_that_is_on_its_grid_needs_nothing():
    codes = torch.randint(-4, 4, (24, 64), generator=torch.Generator().manual_seed(0)).float()
    # Zero points: the whole range of codes is used in each group, so that the steps found are exactly 1.
    codes[:, ::16], codes[:, 1::16] = -4.0, 3.0
    made = small.changed(lorc(symmetric=False), codes)
    assert torch.equal(made, codes)


def test_the_layer_computes_with_two_skinny_products_what_its_weight_says():
    block = small.alone(W, X)
    list(lorc(activation_bits=8).change(block))
    layer = block.layers()["0.layer"]
    assert isinstance(layer, CompensatedLinear)
    x = X[0]
    seen = layer.quantize_input(x)
    assert not torch.equal(seen, x)
    assert torch.allclose(layer(x), seen @ layer.weight.T, atol=1e-4)


def test_smaller_groups_never_raise_the_bound_of_a_rows_error():
    steps = [fit(W, lorc(group_size=g).scheme).scale.amax(1) for g in (16, 32, 64, None)]
    assert all((a <= b).all() for a, b in pairwise(steps))
    assert torch.equal(steps[-1], steps[-2])  # the whole row


# In models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_layers_come_nearer_with_the_rank_and_models_are_as_before_with_all_of_it(kind):
    wanted, distances, errors = logits(KINDS[kind]()), [], []
    for rank in (0, 8, 32):
        model = KINDS[kind]()
        records = compress(model, lorc(rank=rank, factor_bits=None))
        distances.append(float((logits(model) - wanted).norm()))
        errors.append([record.after for record in records])
        assert [record.before for record in records] == errors[0]
    assert all(first > second > third for first, second, third in zip(*errors, strict=True))
    assert distances[-1] < 1e-3 * distances[0]


def test_records_count_the_bits_of_the_factors():
    record = next(iter(lorc(rank=4).change(small.alone(W))))
    expected = 8 * 4 * (24 + 64) + 32 * (4 + 24)  # codes, and a scale a row of each
    assert record.bits == pytest.approx(3 + expected / (24 * 64))


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_taken_off_it_is_a_lora_adapter_of_scaling_1(kind):
    model = KINDS[kind]()
    compress(model, lorc())
    wanted = logits(model)
    factors = separate(model)
    assert not any(isinstance(m, CompensatedLinear) for m in model.modules())
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=list(factors), init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    for name, (down, up) in factors.items():
        layer = adapted.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(down)
        layer.lora_B["default"].weight.data.copy_(up)
    assert torch.allclose(logits(adapted), wanted, atol=1e-5)


def test_dequantised_and_saved_it_is_the_plain_weight_that_it_stood_for(tmp_path):
    model = tiny.llama()
    compress(model, lorc())
    wanted = logits(model)
    folder = save(model, tmp_path / "model", tiny.tokenizer())
    again, _ = luthier.load(folder, dtype="float32", device="cpu")
    assert type(again.model.layers[0].mlp.up_proj) is nn.Linear
    assert torch.allclose(logits(again), wanted, atol=1e-5)
    assert torch.allclose(logits(dequantize(copy.deepcopy(model))), wanted, atol=1e-5)


def test_in_half_precision_the_folder_is_held_against_what_it_holds(tmp_path):
    plain = save(tiny.llama(), tmp_path / "plain", tiny.tokenizer())
    model, _ = luthier.load(plain, dtype="bfloat16", device="cpu")
    compress(model, lorc(rank=16))
    folder = save(model, tmp_path / "model", tiny.tokenizer())
    again, _ = luthier.load(folder, device="cpu")
    with as_saved(model):
        assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(model))  # two skinny products round otherwise
    assert all(isinstance(layer, CompensatedLinear) for layer in quantized_layers(model).values())
    assert len(quantized_layers(model)) == 14


def test_files_of_codes_alone_are_not_written_without_the_low_rank():
    block = small.alone(W)
    list(lorc(bits=8, group_size=32).change(block))
    layer = block.layers()["0.layer"]
    written = gguf_blocks.decode(gguf_blocks.encode("layer", layer, "weight", "F32"), "F32")
    assert torch.allclose(torch.from_numpy(written).reshape(24, 64), layer.weight, atol=1e-6)
    coded = gguf_blocks.decode(gguf_blocks.encode("layer", layer, "weight", "Q8_0"), "Q8_0")
    step = layer.weight.abs().amax() / 127
    assert (torch.from_numpy(coded).reshape(24, 64) - layer.weight).abs().max() < step


def test_scales_do_not_learn_under_a_low_rank_that_they_do_not_know():
    model = tiny.llama()
    compress(model, lorc())
    with pytest.raises(MethodError, match="more than a product"):
        attach(model, method("peqa")())


def test_data_are_needed_by_gptq_alone():
    compress(tiny.bert(), lorc(rank=2))
    with pytest.raises(DataError):
        compress(tiny.bert(), lorc(rank=2, base="gptq"))


@pytest.mark.parametrize("factor_bits", [8, None])
def test_a_pass_that_was_killed_goes_on_to_the_same_model(tmp_path, monkeypatch, factor_bits):
    config = lorc(base="gptq", factor_bits=factor_bits)
    whole, broken, again = (tiny.llama(num_hidden_layers=3) for _ in range(3))
    compress(whole, config, calibration=small.batches())
    change = type(config).change

    def die(self, block):
        if block.index == 2:
            raise KeyboardInterrupt
        return change(self, block)

    monkeypatch.setattr(type(config), "change", die)
    with pytest.raises(KeyboardInterrupt):
        compress(broken, config, calibration=small.batches(), folder=tmp_path)
    monkeypatch.undo()
    compress(again, config, calibration=small.batches(), folder=tmp_path)
    kinds = {type(layer) for layer in quantized_layers(again).values()}
    assert kinds == {compensated.CompensatedLinear}
    for key, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor)


def test_weights_are_those_of_a_model_in_half_precision():
    model = tiny.llama().to(torch.bfloat16)
    compress(model, lorc(rank=32, factor_bits=None))
    for name, layer in quantized_layers(model).items():
        plain = matrix(tiny.llama().to(torch.bfloat16).get_submodule(name))
        assert layer.weight.dtype == torch.bfloat16
        assert (layer.weight.float() - plain).norm() < 0.01 * plain.norm()
