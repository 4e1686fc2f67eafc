"""Tiny models beside those of `tiny.py`, and inputs, for the tests of learnt prompts."""

from collections.abc import Callable
from typing import Any

import small_training as training
import tiny
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

SIZES = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
    "num_labels": 3,
}


def gradients(make: Callable[[], Any], reentrant: bool) -> list[dict[str, Any]]:
    """Gradients of one batch without checkpointing and with it, by parameter."""
    found = []
    for checkpointing in (False, True):
        model = make()
        model.train()
        if checkpointing:
            options = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            model.enable_input_require_grads()
        model(**training.batch(model)).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    return found


STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bart(seed: int = 0) -> BartForConditionalGeneration:
    """An encoder of three layers, a decoder of two."""
    config = BartConfig(
        vocab_size=tiny.VOCAB,
        d_model=32,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        dropout=0.0,
        init_std=0.1,
        pad_token_id=tiny.PAD,
        bos_token_id=tiny.BOS,
        eos_token_id=tiny.IM_END,
        decoder_start_token_id=tiny.PAD,
        forced_eos_token_id=None,
    )
    return tiny._build(BartForConditionalGeneration, config, seed)


def deep_t5(seed: int = 0):
    """Heads wider than the model, an encoder of three layers and a decoder of two."""
    return tiny.t5(seed, d_kv=12, num_layers=3, num_decoder_layers=2)


def roberta(seed: int = 0) -> RobertaForSequenceClassification:
    """Its positions count from the padding's id."""
    config = RobertaConfig(**SIZES, **STILL, max_position_embeddings=66, pad_token_id=tiny.PAD)
    return tiny._build(RobertaForSequenceClassification, config, seed)


def distilbert(seed: int = 0) -> DistilBertForSequenceClassification:
    config = DistilBertConfig(
        vocab_size=tiny.VOCAB,
        dim=32,
        hidden_dim=64,
        n_layers=2,
        n_heads=4,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        initializer_range=0.1,
        num_labels=3,
        pad_token_id=tiny.PAD,
    )
    return tiny._build(DistilBertForSequenceClassification, config, seed)


def modernbert(seed: int = 0) -> ModernBertForSequenceClassification:
    """An encoder with rotated positions and windows in some layers."""
    ids = {
        "pad_token_id": tiny.PAD,
        "bos_token_id": 2,
        "cls_token_id": 2,
        "eos_token_id": 3,
        "sep_token_id": 3,
    }
    config = ModernBertConfig(**SIZES, **ids, max_position_embeddings=64, attn_implementation="sdpa")
    return tiny._build(ModernBertForSequenceClassification, config, seed)


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids (rows, length), none of them special."""
    return torch.randint(5, 300, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(texts: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    """Texts (length,) as one batch with padding on the 'left' or 'right'."""
    longest = max(len(text) for text in texts)
    batch = torch.full((len(texts), longest), tiny.PAD)
    mask = torch.zeros_like(batch)
    for row, text in enumerate(texts):
        place = slice(longest - len(text), None) if side == "left" else slice(len(text))
        batch[row, place], mask[row, place] = text, 1
    return {"input_ids": batch, "attention_mask": mask}


def forward(model: PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    """Logits without dropout and gradients."""
    model.eval()
    with torch.no_grad():
        return model(**inputs).logits
