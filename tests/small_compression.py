"""What tests of compression share: a layer under a method, correlated inputs, small models of many kinds."""

from collections.abc import Callable
from typing import Any

import tiny
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from luthier.compression.block import Block, Call

SMALL: dict[str, Any] = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": tiny.PAD,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}


def build(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).eval()


def opt(**changes: Any) -> PreTrainedModel:
    options = {k: v for k, v in SMALL.items() if k != "intermediate_size"}
    config = OPTConfig(**options | {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.1} | changes)
    return build(OPTForCausalLM, config)


def modern_bert() -> PreTrainedModel:
    """An encoder whose blocks are called with masks of two kinds."""
    special = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    return build(ModernBertForMaskedLM, ModernBertConfig(**SMALL | special, local_attention=4))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: tiny.llama(num_hidden_layers=3),
    "llama classifier": lambda: build(LlamaForSequenceClassification, LlamaConfig(**GROUPED, num_labels=3)),
    "gpt2": lambda: tiny.gpt2(n_layer=3),
    "bert": tiny.bert,
    "bert masked": lambda: build(BertForMaskedLM, BertConfig(**SMALL)),
    "modernbert": modern_bert,
    "qwen2": lambda: build(
        Qwen2ForCausalLM,
        Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    ),
    "qwen3": lambda: build(Qwen3ForCausalLM, Qwen3Config(**GROUPED)),
    "mistral": lambda: build(MistralForCausalLM, MistralConfig(**GROUPED, sliding_window=4)),
    "gemma2": lambda: build(Gemma2ForCausalLM, Gemma2Config(**GROUPED, sliding_window=4)),
    "opt": opt,
    "opt, norms after": lambda: opt(do_layer_norm_before=False, word_embed_proj_dim=16),
}


def batches(count: int = 3, rows: int = 2, length: int = 10, seed: int = 0) -> list[dict[str, Tensor]]:
    """Random ids; in the second batch one row ends in padding."""
    lot = torch.Generator().manual_seed(seed)
    made = [
        {
            "input_ids": torch.randint(5, tiny.VOCAB, (rows, length), generator=lot),
            "attention_mask": torch.ones(rows, length, dtype=torch.long),
        }
        for _ in range(count)
    ]
    if count > 1:
        made[1]["input_ids"][0, -4:] = tiny.PAD
        made[1]["attention_mask"][0, -4:] = 0
    return made


def weight_of(rows: int = 24, columns: int = 64, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    lot = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=lot, dtype=torch.float64).to(dtype)


def correlated(tokens: int = 512, columns: int = 64, seed: int = 1) -> Tensor:
    """Inputs (1, tokens, columns) with few directions that count and columns of unlike size."""
    lot = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns // 4, columns, generator=lot)
    noise = torch.randn(tokens, columns, generator=lot)
    x = torch.randn(tokens, columns // 4, generator=lot) @ mixing + 0.3 * noise
    return (x * torch.logspace(-0.5, 0.5, columns)[torch.randperm(columns, generator=lot)])[None]


def hessian_of(x: Tensor) -> Tensor:
    """2/T X^T X of inputs (..., features)."""
    rows = x.flatten(0, -2)
    return 2 / len(rows) * rows.T @ rows


def alone(weight: Tensor, *inputs: Tensor, mask: Tensor | None = None, transposed: bool = False) -> Block:
    """A block of one linear layer "0.layer" with this weight and these inputs, each (batch, seq, in)."""
    layer: Any = (
        Conv1D(*weight.shape) if transposed else nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    )
    layer.weight = nn.Parameter((weight.T if transposed else weight).clone().contiguous())
    layer.to(weight.dtype)
    model = nn.Sequential(nn.Sequential())
    model[0].add_module("layer", layer)
    masks = [torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask for x in inputs]
    block = Block(model, "0", 0, list(inputs), [Call((), {}) for _ in inputs], masks)
    block.choose({"0.layer"})
    return block


def changed(config: Any, weight: Tensor, *inputs: Tensor, **options: Any) -> Tensor:
    """The weight (out, in) of a lone layer after a method."""
    block = alone(weight, *inputs, **options)
    list(config.change(block))
    return weight_in(block)


def weight_in(block: Block) -> Tensor:
    layer: Any = block.all_layers()["0.layer"]
    return (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).detach()


def error(new: Tensor, weight: Tensor, x: Tensor) -> float:
    """Squared change of the layer's outputs."""
    return float((x @ (new - weight).T).square().sum())
