"""Each layer on torch's kernels gives what the plain quantised layer gives, or says why it cannot.

Those on our own kernels, which go before them, are in test_native_linear.py.
"""

import pytest
import torch
from torch import nn

from luthier.acceleration import fast_linear, native
from luthier.acceleration.convert import convert, join
from luthier.acceleration.fast_linear import FastLinear, Int4Linear, Int8Linear, IntegerLinear
from luthier.compression.grid import Scheme, fit
from luthier.compression.linear import QuantizedLinear, quantize_layer

ROWS = (1, 3, 15, 16, 63, 64, 300)


@pytest.fixture(autouse=True)
def _without_our_kernels(monkeypatch):
    monkeypatch.setattr(native, "_library", lambda: "it is not here")


def plain(
    rows, columns, scheme, *, bias=False, dtype=torch.float32, seed=0, input_scale=None
) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(columns, rows, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    grid = fit(layer.weight.detach(), scheme, dtype)
    return quantize_layer(layer.to(dtype), grid.quantize(layer.weight.detach()), grid, input_scale)


def inputs(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def fast(layer: QuantizedLinear, kind: type[FastLinear]) -> FastLinear:
    made = convert(layer)
    assert type(made) is kind, made
    return made


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@torch.no_grad()
def compare(layer: QuantizedLinear, kind: type[FastLinear], tolerance: float) -> None:
    made = fast(layer, kind)
    for count in ROWS:
        x = inputs(count, layer.in_features, dtype=layer.dtype)
        assert error(made(x), layer(x)) < tolerance, f"{count} rows"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "scheme"),
    [
        (16, 32, Scheme(4, 32)),
        (48, 96, Scheme(4, 32, symmetric=False)),
        (80, 192, Scheme(4, 64)),  # a block of rows and a rest
        (128, 256, Scheme(3, 128, symmetric=False)),
        (64, 256, Scheme(2, 256)),
        (64, 384, Scheme(4, 192, symmetric=False)),  # two groups of the kernel in one of the layer's
        (64, 160, Scheme(4, None)),
        (64, 64, Scheme(4, 0)),
    ],
    ids=str,
)
def test_int4(rows, columns, scheme, bias, dtype):
    compare(plain(rows, columns, scheme, bias=bias, dtype=dtype), Int4Linear, 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "scheme"),
    [
        (1, 16, Scheme(8, None)),
        (33, 48, Scheme(8, None)),
        (48, 80, Scheme(6, None)),
        (40, 64, Scheme(8, 0)),
        (33, 48, Scheme(4, None)),  # rows and groups that the int4 kernel does not take
    ],
    ids=str,
)
def test_int8(rows, columns, scheme, dtype):
    compare(plain(rows, columns, scheme, bias=rows > 40, dtype=dtype), Int8Linear, 1e-2)


@pytest.mark.parametrize(
    ("rows", "columns", "scheme"),
    [
        (1, 1, Scheme(8, None, activation_bits=8)),
        (17, 33, Scheme(8, None, activation_bits=8)),
        (17, 33, Scheme(8, None, symmetric=False, activation_bits=8)),
        (48, 64, Scheme(4, None, activation_bits=4)),
        (48, 50, Scheme(8, 0, activation_bits=8)),
        (48, 50, Scheme(8, None, activation_bits=8, activation_per="tensor")),
    ],
    ids=str,
)
def test_whole_numbers_are_exact(rows, columns, scheme):
    """In float32 the product of whole numbers is the product of the rounded ones to float's rounding."""
    compare(plain(rows, columns, scheme, bias=True), IntegerLinear, 1e-5)


def test_static_steps():
    scheme = Scheme(8, None, activation_bits=8, activation_per="static")
    compare(plain(32, 48, scheme, input_scale=torch.tensor(0.02)), IntegerLinear, 1e-5)


def test_rounded_inputs_reach_the_int4_kernel():
    """Groups of weights leave no whole-number product: the inputs are rounded, and the weight kernel used."""
    compare(plain(64, 128, Scheme(4, 32, activation_bits=8)), Int4Linear, 1e-2)


@pytest.mark.parametrize("kind", ["int4", "int8", "integer"])
def test_any_number_of_leading_dimensions(kind):
    layer = plain(48, 64, SCHEMES[kind], bias=True)
    made = convert(layer)
    with torch.no_grad():
        for shape in ((64,), (2, 5, 64), (2, 1, 3, 64), (0, 64), (2, 0, 64)):
            x = inputs(*shape)
            assert made(x).shape == layer(x).shape
            assert not x.numel() or error(made(x), layer(x)) < 1e-2
        gaps = inputs(4, 3, 64)[:, -1]
        assert error(made(gaps), layer(gaps)) < 1e-2


SCHEMES = {"int4": Scheme(4, 32), "int8": Scheme(8, None), "integer": Scheme(8, None, activation_bits=8)}


@pytest.mark.parametrize("kind", SCHEMES)
def test_zero_weights_and_zero_inputs(kind):
    layer = plain(32, 64, SCHEMES[kind])
    layer.codes[3:20] = 0
    made = convert(layer)
    with torch.no_grad():
        for count in (1, 100):
            assert (made(inputs(count, 64))[:, 3:20] == 0).all()
            assert (made(torch.zeros(count, 64)) == 0).all()


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (plain(64, 40, Scheme(8, None)), "not a multiple of 16"),  # torch's kernel would crash
        (plain(64, 64, Scheme(8, 32)), "8 bits in groups"),
        (plain(64, 64, Scheme(8, None, symmetric=False)), "a zero point"),
        (plain(24, 64, Scheme(4, 32)), "24 outputs, not a multiple of 16"),
        (plain(16, 48, Scheme(4, 16)), "groups of 16, not a multiple of 32"),
    ],
)
def test_what_no_kernel_takes_says_why(layer, reason):
    found = convert(layer)
    assert isinstance(found, str)
    assert reason in found


def test_other_kinds_of_layer_stay():
    class Other(QuantizedLinear):
        pass

    layer = plain(64, 64, Scheme(4, 32))
    assert convert(Other(layer.codes, layer.grid, dtype=torch.float32)) == "a Other"


def test_a_kernel_that_gives_something_else_is_not_taken(monkeypatch):
    wrong = fast_linear._int4_product
    monkeypatch.setattr(fast_linear, "_int4_product", lambda *args: wrong(*args) * 1.1)
    assert "is off by" in convert(plain(64, 64, Scheme(4, 32)))

    def missing(*args):
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr(fast_linear, "_int4_pack", missing)
    assert "no such kernel" in convert(plain(64, 64, Scheme(4, 32)))


@pytest.mark.parametrize("kind", SCHEMES)
def test_gradients_take_the_plain_path(kind):
    layer = plain(32, 64, SCHEMES[kind])
    made = convert(layer)
    grads = []
    for module in (layer, made):
        x = inputs(5, 64).requires_grad_()
        module(x).square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("rows", [16, 32, 48, 64, 112, 128])
def test_packed_codes_come_back(rows):
    layer = plain(rows, 64, Scheme(4, 32, symmetric=False))
    made = fast(layer, Int4Linear)
    assert torch.equal(made.codes, layer.codes)
    assert torch.equal(made.weight, layer.weight)
    held = sum(b.numel() * b.element_size() for b in made.buffers())
    assert held < layer.codes.numel(), "packed codes beside their scales take less than a byte each"


@pytest.mark.parametrize("kind", SCHEMES)
def test_state_dict_is_that_of_the_plain_layer(kind):
    layer = plain(32, 64, SCHEMES[kind], bias=True)
    found, expected = convert(layer).state_dict(), layer.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("kind", SCHEMES)
def test_plain_gives_the_layer_back(kind):
    layer = plain(32, 64, SCHEMES[kind], bias=True)
    back = convert(layer).plain()
    assert type(back) is QuantizedLinear
    x = inputs(4, 64)
    assert torch.equal(back(x), layer(x))


@pytest.mark.parametrize("kind", SCHEMES)
def test_a_model_may_be_cast(kind):
    layer = plain(32, 64, SCHEMES[kind])
    made = convert(layer).to(torch.bfloat16).float()
    with torch.no_grad():
        assert error(made(inputs(2, 64)), layer(inputs(2, 64))) < 1e-2


@pytest.mark.parametrize("kind", SCHEMES)
def test_joint_layers(kind):
    """The joint layer gives the parts' outputs side by side; the parts hold no numbers of their own."""
    layers = [plain(rows, 64, SCHEMES[kind], bias=True, seed=rows) for rows in (128, 64, 64)]
    parts = [convert(layer) for layer in layers]
    joint = join(parts)
    assert joint is not None
    with torch.no_grad():
        for count in (1, 100):
            x = inputs(count, 64)
            assert error(joint(x), torch.cat([layer(x) for layer in layers], 1)) < 1e-2
            assert all(error(p(x), m(x)) < 1e-2 for p, m in zip(parts, layers, strict=True))
    name = "packed" if kind == "int4" else "codes"
    whole = getattr(joint, name).untyped_storage().data_ptr()
    assert all(getattr(part, name).untyped_storage().data_ptr() == whole for part in parts)
    assert all(torch.equal(part.codes, layer.codes) for part, layer in zip(parts, layers, strict=True))
    assert not any("joint" in name for name, _ in parts[0].named_modules())


def test_what_does_not_fit_is_not_joined():
    def parts(*layers):
        return [convert(layer) for layer in layers]

    four, eight = Scheme(4, 32), Scheme(8, None)
    assert join(parts(plain(64, 64, four), plain(64, 64, eight))) is None
    assert join(parts(plain(64, 64, four), plain(64, 128, four))) is None
    assert join(parts(plain(64, 64, four), plain(64, 64, four, bias=True))) is None
    assert join(parts(plain(48, 64, four), plain(64, 64, four))) is None, "rows that do not fill a block"
    static = Scheme(8, None, activation_bits=8, activation_per="static")
    steps = [plain(64, 64, static, input_scale=torch.tensor(step)) for step in (0.1, 0.2)]
    assert join(parts(*steps)) is None
