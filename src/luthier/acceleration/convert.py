"""Which fast layer stands for a quantised one: the first that takes it and proves right on this machine."""

import torch

from luthier.acceleration.fast_linear import FastLinear, Int4Linear, Int8Linear, IntegerLinear
from luthier.acceleration.native_linear import NativeIntegerLinear, NativeLinear
from luthier.compression.grid import Grid
from luthier.compression.linear import QuantizedLinear

KINDS: tuple[type[FastLinear], ...] = (
    NativeIntegerLinear, IntegerLinear, NativeLinear, Int4Linear, Int8Linear,
)  # fmt: skip


def convert(layer: QuantizedLinear) -> FastLinear | str:
    """The fast layer that stands for a plain one, or why there is none. It shares what it can with it."""
    if type(layer) is not QuantizedLinear:
        return f"a {type(layer).__name__}"
    if layer.scale.device.type != "cpu":
        return f"on {layer.scale.device.type}"
    reasons: list[str] = []
    faults: list[str] = []  # those that lie with the machine
    for kind in KINDS:
        reason = kind.why_not(layer)
        if reason is None:
            made = _tried(kind, layer)
            if isinstance(made, FastLinear):
                made.passed_over = "; ".join(faults)
                return made
            reason = made
            faults.append(f"{kind.title}: {reason}")
        reasons.append(f"{kind.title}: {reason}")
    return "; ".join(reasons)


def _tried(kind: type[FastLinear], layer: QuantizedLinear) -> FastLinear | str:
    try:
        made = kind(layer)
        fault = _fault(made, layer)
    except (RuntimeError, AttributeError, NotImplementedError) as error:  # this torch or CPU has it not
        return str(error).splitlines()[0]
    return made if fault is None else fault


def join(parts: list[FastLinear]) -> FastLinear | None:
    """One layer with the rows of several that read the same input; they become views of it.

    None where they do not fit: other kernels or schemes, a bias in some only, rows that do not fill blocks.
    """
    first = parts[0]
    same = all(
        type(p) is type(first)
        and p.scheme == first.scheme
        and (p.in_features, p.dtype, p.bias is None) == (first.in_features, first.dtype, first.bias is None)
        and p.out_features % p.multiple == 0
        and p.joint is None
        and (p.input_scale is None or torch.equal(p.input_scale, first.input_scale))
        for p in parts
    )
    if not same:
        return None
    grids = [p.grid for p in parts]
    rows = [p.out_features for p in parts]
    scale = torch.cat([g.scale.expand(n, -1) for g, n in zip(grids, rows, strict=True)])
    zero = torch.cat([g.zero.expand(n, -1) for g, n in zip(grids, rows, strict=True)])
    bias = None if first.bias is None else torch.cat([p.bias for p in parts])
    whole = QuantizedLinear(
        torch.cat([p.codes for p in parts]), Grid(first.scheme, scale, zero), bias, dtype=first.dtype,
        input_scale=first.input_scale,
    )  # fmt: skip
    joint = type(first)(whole)
    for part, end in zip(parts, torch.tensor(rows).cumsum(0).tolist(), strict=True):
        part.adopt(joint, end - part.out_features)
    return joint


def _fault(fast: FastLinear, plain: QuantizedLinear) -> str | None:
    """What is wrong with a fast layer on this machine, by one product; None if nothing is."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, plain.in_features, generator=generator).to(plain.dtype)
    with torch.no_grad():
        expected, found = plain(x).float(), fast(x).float()
    error = (found - expected).norm() / expected.norm().clamp_min(1e-12)
    return None if error < 0.02 else f"its product is off by {error:.1%} on this machine"
