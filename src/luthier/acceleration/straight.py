"""The forward pass of a Llama-shaped decoder, written straight: for decoding, where overheads count.

At one token a layer of SmolLM2-135M in 4 bits is seven products of 10 to 50 microseconds each; transformers'
modules spend as long again around them. Here the same operations stand in one function:

- keys and values go into tensors of full length, not into ever new ones;
- the heads that share a key are rows of one query: torch's attention kernel copies keys for each head else;
- layers that read the same input and were joined by `luthier.accelerate` are one product;
- the logits of the last token only;
- one token's bfloat16 products on our kernel, or where it does not run without oneDNN, which packs the weight
  anew for each.

Which models are of this shape is found by their parts and then proven: the logits of a few tokens must be
those of the model itself (`straight`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from luthier.acceleration import native
from luthier.acceleration.fast_linear import FastLinear, IntegerLinear
from luthier.acceleration.float32 import attention
from luthier.models import structure

PARTS = {
    "block": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}
PROBE = 6  # tokens
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
TOLERANCE_HALF = 0.05  # of logits relative to their norm
_proven: WeakKeyDictionary[nn.Module, tuple[Any, str | None]] = WeakKeyDictionary()  # parts, fault


def straight(model: nn.Module) -> "Straight | str":
    """The straight form of a model, or why there is none."""
    fault = _shape_fault(model)
    if fault is not None:
        return fault
    made = Straight(model)
    parts = tuple((type(m), id(m)) for m in model.modules())
    known = _proven.get(model)
    if known is None or known[0] != parts:
        known = _proven[model] = (parts, _number_fault(made, model))
    return made if known[1] is None else known[1]


class Straight:
    """A Llama-shaped model and the room for its keys and values.

    Args:
        model: as `straight` has found it fit.
    """

    def __init__(self, model: nn.Module):
        self.model: Any = structure.base(model)
        self.trunk = self.model.model
        self.layers = [_Layer(block) for block in self.trunk.layers]
        integers = any(isinstance(m, IntegerLinear) for m in self.model.modules())
        weight = self.trunk.embed_tokens.weight
        on_cpu = weight.device.type == "cpu"
        self.half = on_cpu and weight.dtype == torch.bfloat16 and not torch.cpu._is_amx_tile_supported()
        self.whole_without = self.half and not integers  # whole numbers are oneDNN's
        self.head = _call(self.model.lm_head)
        self.past = 0

    def reserve(self, batch: int, room: int) -> None:
        """Forget what was seen, and make room for so many tokens in each row."""
        self.past = 0
        weight = self.trunk.embed_tokens.weight
        for layer in self.layers:
            shape = (2, batch, layer.kv_heads, room, layer.dim)
            layer.keys, layer.values = torch.empty(shape, dtype=weight.dtype, device=weight.device)

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits (batch, vocabulary) of what follows `ids` (batch, seq), which follow those seen before."""
        assert ids.shape[1] == 1 or not self.past, "only the first call takes several tokens"
        single = self.half and ids.numel() == 1
        with without_onednn() if single and self.whole_without else nullcontext():
            x = self._trunk(ids)
        with without_onednn() if single else nullcontext():
            return self.head(x)

    def _trunk(self, ids: Tensor) -> Tensor:
        batch, seq = ids.shape
        x = self.trunk.embed_tokens(ids)
        positions = torch.arange(self.past, self.past + seq, device=ids.device)[None]
        cos, sin = self.trunk.rotary_emb(x, positions)  # (1, seq, dim)
        cos, sin = cos[0, :, None], sin[0, :, None].clone()  # (seq, 1, dim)
        sin[..., : sin.shape[-1] // 2].neg_()  # see `_turn`
        x = x.view(batch * seq, -1)
        for layer in self.layers:
            x = layer(x, cos, sin, batch, self.past)
        self.past += seq
        return _norm(self.trunk.norm, x.view(batch, seq, -1)[:, -1])


class _Layer:
    def __init__(self, block: Any):
        attention, mlp = block.self_attn, block.mlp
        self.norms = block.input_layernorm, block.post_attention_layernorm
        self.dim, self.scale = attention.head_dim, attention.scaling
        self.qkv = _together(attention.q_proj, attention.k_proj, attention.v_proj)
        self.heads = attention.q_proj.out_features // self.dim
        self.kv_heads = attention.k_proj.out_features // self.dim
        self.out = _call(attention.o_proj)
        self.gate_up = _together(mlp.gate_proj, mlp.up_proj)
        self.act, self.down = mlp.act_fn, _call(mlp.down_proj)
        self.keys = self.values = torch.empty(0)  # (batch, kv heads, room, dim)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, batch: int, past: int) -> Tensor:
        """x (batch * seq, hidden)."""
        x = x + self.out(self._attend(_norm(self.norms[0], x), cos, sin, batch, past))
        gate, up = self.gate_up(_norm(self.norms[1], x)).chunk(2, 1)
        return x + self.down(self.act(gate) * up)

    def _attend(self, x: Tensor, cos: Tensor, sin: Tensor, batch: int, past: int) -> Tensor:
        every = self.qkv(x).view(batch, -1, self.heads + 2 * self.kv_heads, self.dim)
        seq, turning = every.shape[1], self.heads + self.kv_heads
        turned, values = _turn(every[:, :, :turning], cos, sin).transpose(1, 2), every[:, :, turning:]
        queries = turned[:, : self.heads]
        self.keys[:, :, past : past + seq] = turned[:, self.heads :]
        self.values[:, :, past : past + seq] = values.transpose(1, 2)
        keys, values = self.keys[:, :, : past + seq], self.values[:, :, : past + seq]
        if seq == 1:  # (batch, kv heads, heads of each, dim)
            shared = queries.reshape(batch, self.kv_heads, -1, self.dim)
            return F.scaled_dot_product_attention(shared, keys, values, scale=self.scale).reshape(batch, -1)
        grouped = self.heads != self.kv_heads
        y = attention(queries, keys, values, is_causal=True, scale=self.scale, enable_gqa=grouped)
        return y.transpose(1, 2).reshape(batch * seq, -1)


def _call(layer: Any) -> Callable[[Tensor], Tensor]:
    """What to call for a linear layer on (rows, in)."""
    if _watched(layer) or layer.bias is not None:
        return layer
    if isinstance(layer, FastLinear):
        return layer.product if layer.scale.device.type == "cpu" else layer
    if type(layer) is nn.Linear and _half_on_cpu(layer.weight) and native.here():
        return lambda x: native.one_row(layer.weight, x) if len(x) == 1 and _half_on_cpu(x) else layer(x)
    return layer


def _half_on_cpu(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.is_contiguous()


def _together(*layers: Any) -> Callable[[Tensor], Tensor]:
    """The outputs of several layers for one input, side by side."""
    joint = getattr(layers[0], "joint", None)
    if joint is not None and all(getattr(m, "joint", None) is joint and not _watched(m) for m in layers):
        return _call(joint)
    calls = [_call(layer) for layer in layers]
    return lambda x: torch.cat([call(x) for call in calls], 1)


def _norm(norm: Any, x: Tensor) -> Tensor:
    """The RMS norm of Llama, bit by bit, without its module."""
    wide = x.float()
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    return norm.weight * (wide * inverse).to(x.dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions. x (batch, seq, heads, dim); the first half of `sin` has its sign changed.

    (x1 cos - x2 sin, x2 cos + x1 sin): the halves change places and meet a sine that knows its sign.
    """
    changed = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return (x * cos).add_(changed.mul_(sin))


def _shape_fault(model: nn.Module) -> str | None:
    """Why a model is not of Llama's shape as far as its parts tell, or None."""
    whole: Any = structure.base(model)
    trunk: Any = getattr(whole, "model", None)
    if _parts(trunk) != {"embed_tokens", "layers", "norm", "rotary_emb"} or not hasattr(whole, "lm_head"):
        return "its trunk has other parts than Llama's"
    if model.training:
        return "it is in training mode"
    if _slides(whole.config):
        return "its attention has a window"
    stepped_over: list[nn.Module] = [model, whole, trunk, trunk.norm]
    for block in trunk.layers:
        for name, module in (("block", block), ("self_attn", block.self_attn), ("mlp", block.mlp)):
            if _parts(module) != PARTS[name]:
                return f"its {type(module).__name__} has other parts than Llama's"
            stepped_over.append(module)
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            if not isinstance(getattr(norm, "variance_epsilon", None), float):
                return f"its {type(norm).__name__} is no RMS norm"
            stepped_over.append(norm)
        if not {"head_dim", "scaling"} <= vars(block.self_attn).keys():
            return "its attention does not say the size of a head"
    watched = next((m for m in stepped_over if _watched(m)), None)
    return None if watched is None else f"a hook is on its {type(watched).__name__}"


def _number_fault(made: Straight, model: Any) -> str | None:
    """Run a few tokens, the last two one by one, here and through the model itself."""
    vocabulary = made.trunk.embed_tokens.weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, PROBE), generator=generator).to(made.trunk.embed_tokens.weight.device)
    steps = [ids[:, :-2], ids[:, -2:-1], ids[:, -1:]]
    made.reserve(1, PROBE)
    with torch.no_grad():
        found = torch.stack([made(step) for step in steps]).double()
        cache: Any = None
        expected = []
        for step in steps:
            output = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            expected.append(output.logits[:, -1])
    wanted = torch.stack(expected).double()
    error = float((found - wanted).norm() / wanted.norm().clamp_min(1e-12))
    rounds = any(
        isinstance(m, FastLinear) for m in model.modules()
    )  # in bfloat16, whatever the model's dtype
    tolerance = TOLERANCE_HALF if rounds else TOLERANCE.get(expected[0].dtype, TOLERANCE_HALF)
    return None if error <= tolerance else f"its logits differ from the straight form's by {error:.1e}"


def _parts(module: Any) -> set[str]:
    return {name for name, _ in module.named_children()} if isinstance(module, nn.Module) else set()


def _watched(module: nn.Module) -> bool:
    """Whether somebody has changed what calling a module does."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _slides(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is not None


@contextmanager
def without_onednn() -> Iterator[None]:
    """Inside, torch multiplies without oneDNN (in the whole process, so for short)."""
    before, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before
