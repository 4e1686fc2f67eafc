"""The head sees a column without gaps, so that a frozen weight is not repeated for every row."""

import pytest
import tiny
import torch
from torch.profiler import ProfilerActivity, profile

from luthier.acceleration.last_column import last_column
from luthier.models import structure

ROWS = 16


def largest(model: torch.nn.Module, ids: torch.Tensor) -> int:
    """Bytes of the largest single allocation of a forward pass that yields the last column's logits."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        model(input_ids=ids, logits_to_keep=1, use_cache=False)
    return max(event.cpu_memory_usage for event in found.events())


@pytest.fixture
def frozen():
    return tiny.llama().to(torch.bfloat16).eval().requires_grad_(False)


def test_no_copies_of_the_head(frozen):
    ids = torch.randint(10, 200, (ROWS, 4), generator=torch.Generator().manual_seed(0))
    weight = structure.head(frozen).weight
    copies = ROWS * weight.numel() * weight.element_size()
    assert largest(frozen, ids) >= copies, "torch no longer repeats the weight: this module can go"
    with last_column(frozen):
        assert largest(frozen, ids) < copies / 2


def test_logits_are_the_same_and_nothing_stays(frozen):
    ids = torch.randint(10, 200, (3, 4), generator=torch.Generator().manual_seed(0))
    expected = frozen(input_ids=ids, logits_to_keep=1).logits
    with last_column(frozen):
        torch.testing.assert_close(frozen(input_ids=ids, logits_to_keep=1).logits, expected)
    assert not structure.head(frozen)._forward_pre_hooks


def test_a_trunk_without_a_head_is_left_alone(frozen):
    with last_column(frozen.base_model):
        frozen.base_model(input_ids=torch.tensor([[11, 12]]))
