"""The names that dtype, device and attention can have, told without torch: a recipe is refused at once.

What is there on the machine at hand is `luthier.models.placement`'s to say.
"""

import re
from functools import cache

from luthier.errors import did_you_mean, nearest
from luthier.installed import class_in, keys_of, source

DTYPES = ("float32", "bfloat16", "float16")
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DEVICES = ("auto", "cpu", "cuda", "mps", "xpu", "hpu", "npu", "mtia")
# What people write for them.
_CALLED = {"gpu": "cuda", "nvidia": "cuda", "rocm": "cuda", "hip": "cuda", "amd": "cuda", "metal": "mps"}
# An attention kernel on the Hub, as transformers writes it: owner/name, with @revision and :function at will.
_KERNEL = re.compile(r"[^/:@|\s]+/[^/:@\s]+(@[^/:\s]+)?(:[^/:\s]+)?")

Fault = tuple[str, str]  # what is wrong, what to write instead


def dtype_fault(name: str) -> Fault | None:
    """Why `name` is no dtype of weights, or None."""
    if name in ("auto", *DTYPES, *SHORT):
        return None
    return f"must be a dtype, not {name!r}", did_you_mean(name, ["auto", *DTYPES, *SHORT])


def device_fault(name: str) -> Fault | None:
    """Why `name` is no device, or None. Of several of a kind one is named by its number: 'cuda:1'."""
    kind, colon, number = name.partition(":")
    if not colon and kind in DEVICES:
        return None
    counted = kind not in ("auto", "cpu")
    if kind in DEVICES and counted and number.isdecimal():
        return None
    near = nearest(kind.lower(), DEVICES, count=1)
    best = _CALLED.get(kind.lower()) or (near[0] if near else None)
    if best not in (None, "auto", "cpu") and number.isdecimal():
        best = f"{best}:{number}"
    fix = f"Did you mean '{best}'?" if best else f"Choose from: {', '.join(DEVICES)}, or cuda:1, say."
    return f"must be a device, not {name!r}", fix


@cache
def attentions() -> tuple[str, ...]:
    """The implementations of attention that the installed transformers has."""
    tree = source("transformers", "modeling_utils.py")
    known = keys_of(class_in(tree, "AttentionInterface").body, "_global_mapping")
    return ("sdpa", "eager", *sorted(name for name in known if name != "sdpa" and "|" not in name))


def attention_fault(name: str) -> Fault | None:
    """Why `name` is no implementation of attention, or None."""
    if name in ("auto", *attentions()) or _KERNEL.fullmatch(name):
        return None
    choices = ["auto", *attentions()]
    near = nearest(name, choices)
    fix = did_you_mean(name, near) if near else f"Choose from: {', '.join(choices)}, or a kernel of the Hub."
    return f"must be an implementation of attention, not {name!r}", fix
