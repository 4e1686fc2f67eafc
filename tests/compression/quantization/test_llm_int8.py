"""LLM.int8(): int8 by row and token where inputs are small, floating point elsewhere, as in bitsandbytes."""

import copy
import json
import math

import peft
import pytest
import small_compression as small
import tiny
import torch
from transformers.pytorch_utils import Conv1D

import luthier
from luthier import method
from luthier.compression import outliers
from luthier.compression.compress import compress
from luthier.compression.linear import dequantize, matrix, quantized_layers
from luthier.compression.outliers import OutlierLinear, found, round_inliers, row_grid
from luthier.compression.storage import as_saved
from luthier.errors import ModelError
from luthier.models.saving import save, verify_export

KINDS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert}
TASKS = {"llama": "causal", "gpt2": "causal", "bert": "classification"}
W = small.weight_of(24, 64)


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes", reason="the extra bnb is not installed")


def int8(**options):
    return method("llm_int8")(**options)


def layer(weight=W, threshold=6.0, **options):
    block = small.alone(weight, **options)
    list(int8(threshold=threshold).change(block))
    return block.layers()["0.layer"]


def inputs(tokens=7, outlier=None, seed=2):
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(seed)).clamp(-4, 4)
    if outlier is not None:
        x[3, 5] = outlier
    return x


def paper(x, weight, threshold):
    """The equations, in float64: integers where no token is an outlier, the codes' weights where one is."""
    x, weight = x.double(), weight.double()
    largest = weight.abs().amax(1)
    codes = (127 * weight / largest[:, None]).round()
    apart = (x.abs() >= threshold).any(0)
    ofs_token = x.masked_fill(x.abs() >= threshold, 0).abs().amax(1)
    rounded = (127 * x / ofs_token[:, None]).round().masked_fill(apart, 0)
    inside = ofs_token[:, None] * largest * (rounded @ codes.T) / 127**2
    return inside + x[:, apart] @ (codes * largest[:, None] / 127)[:, apart].T


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def logits(model):
    with torch.no_grad():
        return model(small.batches()[0]["input_ids"]).logits


# The rule --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("outlier", [None, 40.0, -6.0])
def test_the_layer_computes_the_equations(outlier, transposed):
    x = inputs(outlier=outlier)
    found = layer(transposed=transposed)(x)
    assert torch.allclose(found.double(), paper(x, W, 6.0), rtol=1e-4, atol=1e-4)


def test_without_outliers_it_is_vector_wise_int8_whatever_the_threshold():
    x = inputs()
    plain = layer(threshold=0.0)(x)
    assert torch.equal(layer(threshold=6.0)(x), plain)
    assert torch.equal(layer(threshold=1e9)(x), plain)
    assert torch.equal(layer(threshold=math.inf)(x), plain)
    assert torch.allclose(plain.double(), paper(x, W, math.inf), rtol=1e-4, atol=1e-4)


def test_with_threshold_0_even_large_inputs_are_rounded():
    x = inputs(outlier=40.0)
    assert torch.allclose(layer(threshold=0.0)(x).double(), paper(x, W, math.inf), rtol=1e-4, atol=1e-3)
    assert not outliers.outliers(x, 0.0).any()


def test_with_the_least_threshold_nothing_is_rounded_but_the_weight():
    x, made = inputs(outlier=40.0), layer(threshold=1e-9)
    assert torch.equal(round_inliers(x, 1e-9), x)
    assert torch.allclose(made(x), x @ made.weight.T, atol=1e-5)


def test_the_threshold_itself_is_an_outlier():
    x = inputs(outlier=6.0)
    assert outliers.outliers(x, 6.0).nonzero().flatten().tolist() == [5]
    assert not outliers.outliers(x, 6.001).any()
    assert torch.equal(round_inliers(x, 6.0)[:, 5], x[:, 5])  # of all tokens


def test_an_outlier_costs_little_with_the_decomposition_and_much_without():
    x = inputs(outlier=40.0)
    exact = x @ W.T
    assert relative(layer()(x), exact) < 0.5 * relative(layer(threshold=0.0)(x), exact)


def test_the_largest_weight_of_a_row_has_the_code_127_and_none_is_beyond():
    made = layer()
    assert torch.equal(made.codes.abs().amax(1), torch.full((24,), 127, dtype=torch.int8))
    assert made.codes.min() >= -127
    other = W.clone()
    other[4] *= 3
    assert torch.equal(layer(other).codes, made.codes)
    x = inputs()
    rows = [n for n in range(24) if n != 4]
    assert torch.equal(layer(other)(x)[:, rows], made(x)[:, rows])  # a row knows nothing of the others


def test_rows_and_tokens_of_zeros_give_zeros():
    weight, x = W.clone(), inputs()
    weight[3], x[2] = 0, 0
    found = layer(weight)(x)
    assert torch.isfinite(found).all()
    assert not found[:, 3].any()
    assert not found[2].any()
    assert row_grid(weight).scale[3] == 1


def test_a_token_with_an_outlier_changes_its_neighbours_a_little():
    alone, together = inputs(), inputs(outlier=40.0)
    made = layer()
    neighbours = [t for t in range(7) if t != 3]
    change = relative(made(together)[neighbours], made(alone)[neighbours])
    assert 0 < change < 0.01


def test_gradients_are_those_of_the_weight_that_the_codes_stand_for():
    made, x = layer(), inputs(outlier=40.0).requires_grad_()
    upstream = torch.randn(7, 24, generator=torch.Generator().manual_seed(0))
    made(x).backward(upstream)
    assert torch.allclose(x.grad, upstream @ made.weight, atol=1e-5)
    assert not any(p.requires_grad for p in made.parameters())


# In models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_of_the_blocks_is_replaced_without_data(kind):
    model, plain = KINDS[kind](), KINDS[kind]()
    records = compress(model, int8(threshold=2.0))
    names = {n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    assert set(found(model)) == {record.name for record in records} < names  # the head stays
    assert all(record.bits == 8 and record.after < 1e-4 for record in records)
    assert relative(logits(model), logits(plain)) < 0.05


def test_the_decomposition_helps_a_model_with_outliers():
    distance = {}
    for threshold in (0.0, 6.0):
        model = tiny.llama()
        for block in model.model.layers:  # a feature of the norm's output that is large for many tokens
            block.input_layernorm.weight.data[3] = 40.0
            block.post_attention_layernorm.weight.data[7] = 40.0
        compress(model, int8(threshold=threshold))
        weights_alone = logits(dequantize(copy.deepcopy(model)))
        distance[threshold] = relative(logits(model), weights_alone)
    assert distance[6.0] < 0.5 * distance[0.0]


def test_an_adapter_learns_on_it():
    model = tiny.llama()
    compress(model, int8())
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    ids = small.batches()[0]["input_ids"]
    adapted(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for n, p in adapted.named_parameters() if "layers.0.self_attn" in n and "lora_B" in n]
    assert gradients
    assert all(g.abs().max() > 0 for g in gradients)


# bitsandbytes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outlier", [None, 40.0])
def test_bitsandbytes_computes_the_same(bitsandbytes, outlier):
    weight, x = W.half().float(), inputs(outlier=outlier)
    if outlier is not None:
        x[:3, 5] = 5.5  # small entries of the feature, and the largest of their tokens
    x = x.half().float()  # which it rounds to first
    theirs = bitsandbytes.nn.Linear8bitLt(64, 24, bias=False, has_fp16_weights=False, threshold=6.0)
    theirs.weight = bitsandbytes.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    theirs = theirs.to("cpu").eval()
    ours = layer(weight)
    with torch.no_grad():
        answer = theirs(x)
    assert torch.equal(theirs.state.CB, ours.codes)
    assert relative(answer, ours(x)) < 1e-3
    if outlier is not None:  # had the whole feature been left out of a token's largest, it would differ
        without = x.masked_fill((x.abs() >= 6).any(0), 0)
        other = round_inliers(without, 0) + (x - without)
        assert relative(answer, other @ ours.weight.T) > 2 * relative(answer, ours(x))


@pytest.mark.parametrize("kind", KINDS)
def test_its_kernels_run_our_layers_and_give_them_back(bitsandbytes, kind):
    model = KINDS[kind]()
    compress(model, int8(threshold=2.0))
    ours, layers = logits(model), found(model)
    with as_saved(model):
        assert not found(model)
        theirs = logits(model)
    assert found(model) == layers
    assert torch.equal(logits(model), ours)
    assert 0 < relative(theirs, ours) < 0.03  # float16 moves some inputs to the next code


@pytest.mark.parametrize("kind", KINDS)
def test_saved_as_bitsandbytes_has_it_and_loaded_to_the_bit(bitsandbytes, kind, tmp_path):
    model, tokenizer = KINDS[kind](), tiny.tokenizer()
    left_out = ["0.mlp.c_proj"] if kind == "gpt2" else []
    compress(model, int8(threshold=2.0, exclude=left_out))
    folder = save(model, tmp_path / "model", tokenizer)
    written = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (written["quant_method"], written["llm_int8_threshold"]) == ("bitsandbytes", 2.0)
    if kind == "gpt2":
        verify_export(folder, model, tokenizer)  # by transformers in a process without us, which takes long
    again, _ = luthier.load(folder, task=TASKS[kind], dtype="float32", device="cpu")
    assert set(found(again)) == set(found(model))
    assert torch.equal(logits(again), logits(model))
    twice = luthier.load(save(again, tmp_path / "twice", tokenizer), task=TASKS[kind], dtype="float32")[0]
    assert torch.equal(logits(twice), logits(model))


def test_handed_over_for_good_it_is_saved_by_transformers(bitsandbytes, tmp_path):
    model = tiny.llama()
    compress(model, int8(threshold=2.0))
    outliers.to_bitsandbytes(model).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert type(again.model.layers[0].mlp.up_proj) is bitsandbytes.nn.Linear8bitLt
    assert torch.equal(logits(again), logits(model))


def test_two_thresholds_do_not_fit_one_checkpoint(tmp_path):
    model = tiny.llama()
    compress(model, [int8(threshold=2.0), int8(threshold=6.0, targets=["down_proj"])])
    assert {m.threshold for m in found(model).values()} == {2.0, 6.0}
    with pytest.raises(ModelError, match="one threshold"):
        save(model, tmp_path / "model")


def test_nor_do_layers_of_two_kinds(tmp_path):
    model = tiny.llama()
    compress(
        model, [int8(targets=["down_proj"]), method("rtn")(bits=4, group_size=16, exclude=["down_proj"])]
    )
    with pytest.raises(ModelError, match="no single format"):
        save(model, tmp_path / "model")


def test_a_pass_that_was_killed_goes_on_with_layers_of_this_kind(tmp_path, monkeypatch):
    configs = [int8(threshold=2.5, exclude=["v_proj"]), method("gptq")(group_size=16, targets=["v_proj"])]
    whole, broken, again = (tiny.llama(num_hidden_layers=3) for _ in range(3))
    compress(whole, configs, calibration=small.batches())
    change = type(configs[0]).change

    def die(self, block):
        if block.index == 2:
            raise KeyboardInterrupt
        return change(self, block)

    monkeypatch.setattr(type(configs[0]), "change", die)
    with pytest.raises(KeyboardInterrupt):
        compress(broken, configs, calibration=small.batches(), folder=tmp_path)
    monkeypatch.undo()
    compress(again, configs, calibration=small.batches(), folder=tmp_path)
    assert {m.threshold for m in found(again).values()} == {2.5}
    assert len(found(again)) == 18
    assert torch.equal(logits(again), logits(whole))


def test_half_precision_keeps_scales_and_statistics_in_full(tmp_path):
    model = tiny.llama().to(torch.bfloat16)
    compress(model, int8())
    for name, made in quantized_layers(model).items():
        assert isinstance(made, OutlierLinear)
        plain = matrix(tiny.llama().to(torch.bfloat16).get_submodule(name))
        assert torch.equal(made.scale[:, 0], plain.abs().amax(1) / 127)
    assert logits(model).dtype == torch.bfloat16
