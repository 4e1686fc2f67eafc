"""dtype, device and attention of a model: decided here and nowhere else, each with its reason.

On a CPU bfloat16 pays only where the CPU has instructions that multiply it. SmolLM2-135M, forward and
backward of 4 x 256 tokens, two threads (`benchmarks/dtype_cpu.py`):

    instructions                 float32   bfloat16   float32 weights, bfloat16 products
    AMX (Sapphire Rapids)         3.90 s     1.50 s      2.22 s
    AVX512-BF16 (EPYC, Zen 4)     7.83 s     3.57 s      3.83 s
    AVX512 only                   3.71 s    12.19 s     12.58 s

The last row is the first CPU with its newer instructions hidden. With AMX alone hidden, bfloat16 took 5.17 s
there, longer than float32; whether an Intel CPU that has AVX512-BF16 and no AMX (Cooper Lake) is as slow was
not measured.
"""

import logging
from dataclasses import dataclass

import torch

from luthier.errors import ModelError
from luthier.models import names

log = logging.getLogger("luthier.models")


@dataclass(frozen=True)
class Placement:
    """Where and how a model is held.

    Attributes:
        dtype: of the weights.
        device: "cpu", "cuda", "cuda:1", "mps".
        attn: transformers' `attn_implementation`.
        autocast: dtype of the matrix products where it differs from the weights', for `torch.autocast`.
        reason: why, in words for the log and the report.
    """

    dtype: torch.dtype
    device: str
    attn: str
    reason: str
    autocast: torch.dtype | None = None


def place(
    dtype: str | torch.dtype = "auto", device: str = "auto", attn: str = "auto", *, train: bool
) -> Placement:
    """Choose what is "auto", and check what is given.

    Args:
        dtype: "auto", a name of torch's ("bfloat16") or its short form ("bf16"), or a `torch.dtype`.
        train: the model's own weights will learn. They are then held in float32 (an update of 1e-5 of a
            weight is lost in bfloat16, whose steps are 2^-8 of it) and multiplied in bfloat16 by autocast
            where that is fast. A frozen model, under an adapter too, is held in the fast dtype itself.

    Raises:
        ModelError: an unknown name, or a device that is not there.
    """
    news = "auto" in (dtype, device, attn)
    where, why_device = _device(device)
    fast, why_fast = _fast_dtype(where)
    autocast = None
    if isinstance(dtype, torch.dtype):
        dtype = _name(dtype)
    if dtype != "auto":
        _refuse("dtype", names.dtype_fault(dtype))
        chosen, why = getattr(torch, names.SHORT.get(dtype, dtype)), "as asked"
    elif train and fast != torch.float32:
        chosen, autocast = torch.float32, fast
        why = f"the weights learn; products in {_name(fast)} ({why_fast})"
    else:
        chosen, why = fast, why_fast
    _refuse("attn", names.attention_fault(attn))
    attn = "sdpa" if attn == "auto" else attn
    reason = f"{_name(chosen)} ({why}) on {where} ({why_device}), {attn} attention"
    log.log(logging.INFO if news else logging.DEBUG, "%s", reason)
    return Placement(chosen, where, attn, reason, autocast)


def _refuse(name: str, fault: names.Fault | None) -> None:
    if fault is not None:
        raise ModelError(f"{name} {fault[0]}.", fix=fault[1])


def _device(device: str) -> tuple[str, str]:
    _refuse("device", names.device_fault(device))
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device == "auto":
        if accelerator is None:
            return "cpu", "no accelerator found"
        return accelerator.type, "the accelerator found"
    kind = device.partition(":")[0]
    if kind != "cpu" and (accelerator is None or accelerator.type != kind):
        raise ModelError(
            f"Device '{device}' is not available (found: {accelerator.type if accelerator else 'cpu only'}).",
            fix="Write device: auto.",
        )
    return device, "as asked"


def _fast_dtype(device: str) -> tuple[torch.dtype, str]:
    if device.startswith("cuda"):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU has bfloat16"
        return torch.float32, "the GPU has no bfloat16"
    if device == "cpu":
        if torch.cpu._is_amx_tile_supported():
            return torch.bfloat16, "the CPU multiplies bfloat16 in AMX tiles"
        if torch.cpu._is_avx512_bf16_supported():
            return torch.bfloat16, "the CPU multiplies bfloat16 in AVX512 registers"
        return torch.float32, "bfloat16 is no faster on this CPU"
    return torch.float32, f"bfloat16 is not proven on {device}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
