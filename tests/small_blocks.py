"""What tests of methods that change whole blocks share: a block of a small model, a planted channel."""

from collections.abc import Sequence
from typing import Any

import small_compression as small
import tiny
import torch
from torch import Tensor, nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from luthier.compression.block import Block
from luthier.compression.calibration import catch, choose_layers
from luthier.models import structure

IDS = {"bos_token_id": 1, "eos_token_id": 2}

KINDS: dict[str, Any] = {
    "llama": tiny.llama,
    "gpt2": tiny.gpt2,
    "bert": tiny.bert,
    "opt": small.opt,
    "opt, norms after": small.MODELS["opt, norms after"],
    "gemma": lambda: small.build(GemmaForCausalLM, GemmaConfig(**small.GROUPED, **IDS)),
    "gemma2": small.MODELS["gemma2"],
    "phi3": lambda: small.build(
        Phi3ForCausalLM, Phi3Config(**{k: v for k, v in small.GROUPED.items() if k != "head_dim"}, **IDS)
    ),
    "experts": lambda: small.build(
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig(
            **small.GROUPED,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=48,
            num_experts=4,
            num_experts_per_tok=2,
        ),
    ),
}


def block_of(model: nn.Module, index: int = 0, *, exclude: Sequence[str] = (), batches: Any = None) -> Block:
    """A block as the calibration pass hands it to a method; all layers are chosen but those of `exclude`."""
    name, stack = structure.stacks(model)[0]
    hidden, calls, masks, starts = catch(model, stack, batches or small.batches(length=20))
    for earlier in range(index):
        Block(model, f"{name}.{earlier}", earlier, hidden, calls[earlier], masks).leave()
    block = Block(model, f"{name}.{index}", index, hidden, calls[index], masks, start=starts[index])
    block.choose(choose_layers(model, [], list(exclude)))
    return block


def outputs(block: Block) -> list[Tensor]:
    """What a block makes of each batch, without padding."""
    return [block.run(i)[mask] for i, mask in enumerate(block.masks)]


def change(new: Sequence[Tensor], old: Sequence[Tensor]) -> float:
    """Largest difference, relative to the largest value."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(new, old, strict=True))


@torch.no_grad()
def logits(model: PreTrainedModel) -> list[Tensor]:
    return [model(**batch).logits for batch in small.batches(length=20)]


def error(new: Sequence[Tensor], old: Sequence[Tensor]) -> float:
    """Squared error relative to the square."""
    lost = sum(float((a - b).square().sum()) for a, b in zip(new, old, strict=True))
    return lost / sum(float(b.square().sum()) for b in old)


@torch.no_grad()
def with_outlier(size: float, **changes: Any) -> PreTrainedModel:
    """A Llama with a channel of `size` in all that its norms give; it computes what it did without."""
    model = tiny.llama(**changes)
    for layer in model.model.layers:
        for norm, readers in (
            (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
            (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
        ):
            norm.weight[5] *= size
            for reader in readers:
                reader.weight[:, 5] /= size
    return model


def inputs_of(block: Block, name: str) -> Tensor:
    """All inputs of a layer, (tokens, features) without padding, by a hook of its own."""
    seen: list[Tensor] = []
    layer = block.module.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _m, arguments: seen.append(arguments[0]))
    for index in range(len(block.hidden)):
        block.run(index)
    handle.remove()
    rows = [x.reshape(*mask.shape, -1)[mask] for x, mask in zip(seen, block.masks, strict=True)]
    return torch.cat(rows)
