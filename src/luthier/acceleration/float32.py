"""Products of float32 matrices through oneDNN, which on AMD's CPUs is twice as fast as torch's way to MKL.

torch hands such products to MKL, which does not use all of what the CPUs of another maker have: on a Zen 5 it
makes 100 billion operations a second and core, oneDNN 230, both exact to float32. The operator called here is
the one to which torch's own compiler lowers linear layers; it has no gradient.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_available = torch.backends.mkldnn.is_available()
_product: Any = torch.ops.mkldnn._linear_pointwise.default if _available else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, as `torch.nn.functional.linear`.

    Args:
        x: (..., in). Other dtypes than float32, other devices, and what needs a gradient go torch's way.
        weight: (out, in).
    """
    if _taken(x, weight):
        # For parts of larger matrices the operator has a loop a hundred times slower.
        return _product(x.contiguous(), weight.contiguous(), bias, "none", [], "")
    return functional.linear(x, weight, bias)


def _taken(x: Tensor, weight: Tensor) -> bool:
    return (
        _product is not None
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() > 0
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    )


class LinearLayers(TorchFunctionMode):
    """Inside `with LinearLayers():` linear layers that need no gradient compute so."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = linear if function is functional.linear else function
        return made(*args, **(kwargs or {}))
