"""dtype, device and attention are chosen in one place, with the reason."""

import pytest
import torch

from luthier.errors import ModelError
from luthier.models.placement import place


@pytest.fixture
def cpu(monkeypatch):
    """A machine without accelerator, whose CPU has AMX, AVX512-BF16 or neither."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)

    def choose(amx: bool, avx512: bool = False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)

    return choose


def test_frozen_weights_are_bfloat16_only_where_that_is_fast(cpu):
    cpu(amx=True)
    found = place(train=False)
    assert (found.dtype, found.device, found.attn, found.autocast) == (torch.bfloat16, "cpu", "sdpa", None)
    assert "AMX" in found.reason
    cpu(amx=False, avx512=True)
    assert place(train=False).dtype == torch.bfloat16
    cpu(amx=False)
    assert place(train=False).dtype == torch.float32


def test_the_reason_is_said_where_something_was_chosen_only(cpu, caplog):
    cpu(amx=False)
    caplog.set_level("INFO", logger="luthier.models")
    place("float32", "cpu", "sdpa", train=False)
    assert caplog.messages == []
    assert place(train=False).reason in caplog.messages


def test_weights_that_learn_stay_float32(cpu):
    """The smallest step of bfloat16 is 2^-8 of a weight: what AdamW adds at a rate of 1e-5 is lost in it."""
    cpu(amx=True)
    found = place(train=True)
    assert (found.dtype, found.autocast) == (torch.float32, torch.bfloat16)
    weight = torch.ones(1, dtype=torch.bfloat16)
    assert weight - 1e-5 == weight
    cpu(amx=False)
    assert place(train=True).autocast is None


def test_what_is_given_is_taken(cpu):
    cpu(amx=True)
    found = place("fp32", "cpu", "eager", train=False)
    assert (found.dtype, found.attn) == (torch.float32, "eager")
    assert "as asked" in found.reason
    assert place(torch.float16, train=True).dtype == torch.float16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat"}, "dtype must be a dtype, not 'bfloat'.*'bfloat16'"),
        ({"device": "gpu"}, "device must be a device, not 'gpu'.*'cuda'"),
        ({"device": "cuda"}, "not available.*cpu only"),
        ({"attn": "flash"}, "must be an implementation of attention, not 'flash'.*flash_attention_2"),
    ],
)
def test_unknown_names_are_refused(cpu, options, message):
    with pytest.raises(ModelError, match=message):
        place(**options, train=False)
