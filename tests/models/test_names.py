"""Names of devices and attention are known without torch, and are those that torch and transformers know."""

import pytest
import torch

from luthier.models import names


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:1", "mps", "mps:0", "xpu:2"])
def test_devices_are_taken(name):
    assert names.device_fault(name) is None
    assert name == "auto" or torch.device(name)


@pytest.mark.parametrize(
    ("name", "best"),
    [("cudda", "cuda"), ("cudda:2", "cuda:2"), ("CPU", "cpu"), ("cpu:0", "cpu"), ("gpu", "cuda"),
     ("gpu:1", "cuda:1"), ("cuda:one", "cuda"), ("auto:1", "auto")],
)  # fmt: skip
def test_another_device_is_answered_with_the_nearest(name, best):
    message, fix = names.device_fault(name)
    assert repr(name) in message
    assert fix == f"Did you mean '{best}'?"


def test_a_device_like_none_is_answered_with_all():
    assert all(device in names.device_fault("quantum")[1] for device in names.DEVICES)


def test_attention_is_what_the_installed_transformers_has():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    found = set(names.attentions())
    assert {"eager", "sdpa", "flash_attention_2", "flex_attention"} <= found
    assert found - {"eager"} <= set(ALL_ATTENTION_FUNCTIONS)  # which has what we register, besides
    assert all(names.attention_fault(name) is None for name in ("auto", *names.attentions()))


def test_a_kernel_of_the_hub_is_what_transformers_takes_for_one():
    from transformers.integrations.hub_kernels import is_kernel

    for name in ("owner/kernel", "owner/kernel@main", "owner/kernel@v1:run", "sdpa", "a/b/c", "a:b"):
        assert (names.attention_fault(name) is None) == (is_kernel(name) or name == "sdpa"), name


@pytest.mark.parametrize(
    ("name", "best"), [("spda", "sdpa"), ("flash", "flash_attention_2"), ("egaer", "eager")]
)
def test_another_attention_is_answered_with_the_nearest(name, best):
    assert f"'{best}'" in names.attention_fault(name)[1]


def test_dtypes_are_those_of_torch():
    for name in (*names.DTYPES, *names.SHORT.values()):
        assert isinstance(getattr(torch, name), torch.dtype)
    assert "'bfloat16'" in names.dtype_fault("bfloat")[1]
