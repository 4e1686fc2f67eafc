"""A digest sees every change of a tensor: a bit, the order, all elements alike, dtype and shape."""

import pytest
import torch

from luthier.models.bits import digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_same_bits_have_the_same_digest(dtype):
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    assert digest(tensor) == digest(tensor.clone())
    assert digest(tensor.T) == digest(tensor.T.contiguous())


@pytest.mark.parametrize(
    "changed",
    [
        torch.tensor([0.0, 1.0, 2.0, 4.0]),
        torch.tensor([0.0, 2.0, 1.0, 3.0]),
        torch.tensor([-0.0, 1.0, 2.0, 3.0]),
        torch.tensor([[0.0, 1.0], [2.0, 3.0]]),
        torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64),
    ],
)
def test_what_differs_has_another(changed):
    assert digest(changed) != digest(torch.tensor([0.0, 1.0, 2.0, 3.0]))


def test_an_even_number_of_equal_changes_is_seen():
    """The XOR of the elements is zero both before and after."""
    assert digest(torch.zeros(64)) != digest(torch.full((64,), 0.5))
    assert digest(torch.empty(0)) == digest(torch.empty(0))
