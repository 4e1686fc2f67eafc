"""Each layer on our own kernels gives what the plain quantised layer gives; without a compiler torch's do."""

import copy
import logging
import os
import subprocess

import pytest
import tiny
import torch
from torch import nn

import luthier
from luthier.acceleration import native
from luthier.acceleration.convert import convert, join
from luthier.acceleration.fast_linear import Int4Linear, IntegerLinear
from luthier.acceleration.native_linear import NativeIntegerLinear, NativeLinear
from luthier.acceleration.straight import straight
from luthier.compression.grid import Scheme, fit
from luthier.compression.linear import QuantizedLinear, matrix, quantize_layer
from luthier.models import structure

ROWS = (1, 2, 3, 5, 6, 9, 15, 16, 17, 19, 64)  # all ways through the kernels
needs_kernels = pytest.mark.skipif(
    not native.here(), reason="our kernels need a CPU of their own and a C++ compiler"
)


def plain(rows, columns, scheme, *, bias=False, dtype=torch.float32, seed=0, step=None) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(columns, rows, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    grid = fit(layer.weight.detach(), scheme, dtype)
    return quantize_layer(layer.to(dtype), grid.quantize(layer.weight.detach()), grid, step)


def inputs(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def made(layer, kind):
    found = convert(layer)
    assert type(found) is kind, found
    return found


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


SHAPES = [
    (1, 8, Scheme(4, None)),
    (16, 32, Scheme(4, 32)),
    (7, 40, Scheme(4, 8, symmetric=False)),
    (33, 96, Scheme(4, 32, symmetric=False)),
    (80, 192, Scheme(3, 64)),
    (130, 256, Scheme(2, 128, symmetric=False)),
    (64, 64, Scheme(4, 0)),
    (31, 160, Scheme(4, None)),
    (1, 4, Scheme(8, None)),
    (33, 44, Scheme(8, 4)),
    (70, 128, Scheme(8, 32, symmetric=False)),
    (96, 68, Scheme(5, None, symmetric=False)),
    (64, 128, Scheme(4, 32, activation_bits=8)),  # groups of weights leave no product of whole numbers
]


@needs_kernels
@pytest.mark.parametrize(("rows", "columns", "scheme"), SHAPES, ids=str)
@torch.no_grad()
def test_weights_of_few_bits(rows, columns, scheme, threads):
    """The kernel rounds inputs and scales to bfloat16; where they are that already, little is lost."""
    layer = plain(rows, columns, scheme, bias=rows % 2 == 0)
    layer.scale.copy_(layer.scale.to(torch.bfloat16))  # which the kernel does
    fast = made(layer, NativeLinear)
    for count in ROWS:
        x = inputs(count, columns, dtype=torch.bfloat16).float()
        expected = x if scheme.activation_bits is None else layer.quantize_input(x).to(torch.bfloat16).float()
        expected = nn.functional.linear(expected, layer.weight, layer.bias)
        assert error(fast(x), expected) < 2e-6, f"{count} rows"
        half = fast.to(torch.bfloat16)(x.to(torch.bfloat16))
        assert half.dtype == torch.bfloat16
        assert error(half, expected) < 1e-2, f"{count} rows in bfloat16"
        fast.float()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "scheme", "step"),
    [
        (1, 1, Scheme(8, None, activation_bits=8), None),
        (17, 33, Scheme(8, None, activation_bits=8), None),
        (65, 130, Scheme(8, None, symmetric=False, activation_bits=8), None),
        (48, 64, Scheme(4, None, activation_bits=4), None),
        (48, 50, Scheme(8, 0, activation_bits=8), None),
        (48, 50, Scheme(8, None, activation_bits=8, activation_per="tensor"), None),
        (48, 50, Scheme(8, None, activation_bits=8, activation_per="static"), torch.tensor(0.02)),
    ],
    ids=str,
)
@torch.no_grad()
def test_whole_numbers_are_those_of_torch(rows, columns, scheme, step, dtype, threads):
    layer = plain(rows, columns, scheme, dtype=dtype, step=step)
    fast, other = made(layer, NativeIntegerLinear), IntegerLinear(layer)
    for count in ROWS:
        x = inputs(count, columns, dtype=dtype)
        assert torch.equal(fast(x), other(x)), f"{count} rows"


@needs_kernels
@torch.no_grad()
def test_the_greatest_sums_fit():
    layer = plain(4, IntegerLinear.LONGEST, Scheme(8, None, symmetric=False, activation_bits=8))
    layer.codes.fill_(-128)
    assert layer.zero is not None
    layer.zero.fill_(-1)
    x = -torch.ones(1, IntegerLinear.LONGEST)
    assert error(made(layer, NativeIntegerLinear)(x), IntegerLinear(layer)(x)) == 0


@needs_kernels
@torch.no_grad()
def test_what_is_not_finite_is_not_hidden():
    for scheme in (Scheme(4, 32), Scheme(8, None, activation_bits=8)):
        x = inputs(3, 64)
        x[1, 5] = torch.nan
        found = convert(plain(32, 64, scheme))(x)
        assert found[1].isnan().all()
        assert found[[0, 2]].isfinite().all()


@needs_kernels
@pytest.mark.parametrize(("rows", "columns", "scheme"), SHAPES, ids=str)
def test_the_layer_comes_back(rows, columns, scheme):
    layer = plain(rows, columns, scheme, bias=True)
    fast = made(layer, NativeLinear)
    assert torch.equal(fast.codes, layer.codes)
    found, expected = fast.state_dict(), layer.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    back = copy.deepcopy(fast).plain()
    assert type(back) is QuantizedLinear
    assert torch.equal(back(inputs(2, columns)), layer(inputs(2, columns)))


@needs_kernels
def test_codes_of_four_bits_take_half_a_byte():
    layer = plain(64, 256, Scheme(4, 64))
    held = sum(b.numel() * b.element_size() for b in made(layer, NativeLinear).buffers())
    assert held == 64 * 256 / 2 + 64 * 4 * (4 + 2), "codes, scales as they are saved, and the kernel's"


@needs_kernels
@pytest.mark.parametrize(
    "scheme", [Scheme(4, 32, symmetric=False), Scheme(8, None, activation_bits=8)], ids=str
)
@torch.no_grad()
def test_joint_layers(scheme):
    layers = [plain(rows, 64, scheme, bias=True, seed=rows) for rows in (128, 64, 32)]
    parts = [convert(layer) for layer in layers]
    joint = join(parts)
    assert joint is not None
    for count in (1, 7, 20):
        x = inputs(count, 64)
        assert torch.equal(joint(x), torch.cat([part(x) for part in parts], 1))
    whole = joint.packed.untyped_storage().data_ptr()
    assert all(part.packed.untyped_storage().data_ptr() == whole for part in parts)
    assert all(torch.equal(part.codes, layer.codes) for part, layer in zip(parts, layers, strict=True))
    odd = [convert(plain(rows, 64, scheme)) for rows in (48, 64)]
    assert join(odd) is None, "rows that do not fill a pair of tiles"


@needs_kernels
@torch.no_grad()
def test_inputs_that_do_not_lie_side_by_side():
    for scheme in (Scheme(4, 32), Scheme(8, None, activation_bits=8)):
        fast = convert(plain(32, 64, scheme))
        x = inputs(5, 128)[:, ::2]
        assert torch.equal(fast(x), fast(x.contiguous()))


@needs_kernels
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (33, 70), (64, 128), (100, 333)])
def test_one_row_of_a_plain_layer(rows, columns, threads):
    weight, x = inputs(rows, columns).to(torch.bfloat16), inputs(1, columns).to(torch.bfloat16)
    assert error(native.one_row(weight, x), x.double() @ weight.double().T) < 5e-3


@needs_kernels
def test_one_pool_of_threads():
    """Our library brings no OpenMP runtime: it finds the one that torch has loaded."""
    with open("/proc/self/maps") as maps:
        loaded = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line}
    assert len(loaded) == 1


def quantised():
    model = tiny.llama(
        hidden_size=128, intermediate_size=192, num_attention_heads=2, num_key_value_heads=1
    ).to(torch.bfloat16)
    for name, layer in structure.linears(model).items():
        grid = fit(matrix(layer), Scheme(4, 32), torch.bfloat16)
        model.set_submodule(name, quantize_layer(layer, grid.quantize(matrix(layer)), grid))
    return model.eval()


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a new process with an empty cache."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path))
    native._library.cache_clear()
    yield tmp_path
    native._library.cache_clear()


def without_compiler(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(native.shutil, "which", lambda name: None)


def broken_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "false")


def missing_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")


def older_cpu(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)


def cpu_with_amx(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_vnni_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_compiler, "no C++ compiler"),
        (broken_compiler, "false fails"),
        (missing_compiler, "no-such-compiler"),
        (older_cpu, "no AVX-512 BF16"),
        (cpu_with_amx, "has AMX"),
    ],
)
def test_without_our_kernels_torchs_serve(fresh, monkeypatch, caplog, change, reason):
    ours = torch.cpu._is_avx512_bf16_supported() and torch.cpu._is_vnni_supported()
    if change in (without_compiler, broken_compiler, missing_compiler) and (
        not ours or torch.cpu._is_amx_tile_supported()
    ):
        pytest.skip("the CPU is asked first, and is not one for our kernels")
    change(monkeypatch)
    model = quantised()
    ids = torch.tensor([[11, 42, 99, 7]])
    with torch.no_grad(), caplog.at_level(logging.INFO, "luthier.acceleration"):
        expected = model(ids).logits.float()
        luthier.accelerate(model)
        assert isinstance(model.model.layers[0].mlp.down_proj, Int4Linear)
        assert error(model(ids).logits.float(), expected) < 5e-2
        assert not isinstance(straight(model), str)
    assert reason in caplog.text
    assert "14 of them have no better kernel" in caplog.text
    assert not any((fresh / "kernels").glob("*")), "nothing is left of what failed"


@needs_kernels
def test_a_wrong_kernel_is_not_taken(monkeypatch):
    class Wrong:
        def luthier_weight_only(self, *args):
            pass  # leaves the output as it was

    monkeypatch.setattr(native, "_library", lambda: Wrong())
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    found = made(plain(32, 64, Scheme(4, 32)), Int4Linear)
    assert "is off by 100.0% on this machine" in found.passed_over


@needs_kernels
def test_the_library_is_made_once(fresh, monkeypatch):
    native.library()
    (file,) = (fresh / "kernels").iterdir()
    native._library.cache_clear()

    def refused(*args, **kwargs):
        raise AssertionError("compiled again")

    monkeypatch.setattr(subprocess, "run", refused)
    native.library()
    assert [p.name for p in (fresh / "kernels").iterdir()] == [file.name]
    assert os.access(file, os.R_OK)
