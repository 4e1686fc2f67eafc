"""Logits on a small fixed batch: how attach proves identity at step 0, and merge proves merged = unmerged."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LENGTH = 16


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off and no gradients inside; every module's mode is put back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def probe_inputs(model: nn.Module) -> dict[str, Tensor]:
    """One row of token ids drawn with a generator of its own, so that no seed of the user's is disturbed.

    One row, because a classifier without a pad token refuses more.
    """
    config = model.config
    vocabulary = model.get_input_embeddings().weight.shape[0]
    longest = getattr(config, "max_position_embeddings", None) or LENGTH
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, min(LENGTH, longest)), generator=generator)  # (1, seq)
    device = next(model.parameters()).device
    inputs = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1).to(device)
    return inputs


def empty_inputs(model: nn.Module) -> dict[str, Any]:
    """Three empty inputs, and two for a decoder: a run whose calls are looked at, also on the meta device."""
    table = model.get_input_embeddings().weight
    empty = table.new_zeros(1, 3, table.shape[1])  # (batch, seq, width)
    # With a cache: without one, transformers looks for packed rows, in numbers that meta tensors lack.
    inputs = {"use_cache": True, "inputs_embeds": empty}
    return inputs | ({"decoder_inputs_embeds": empty[:, :2]} if model.config.is_encoder_decoder else {})


def probe_logits(model: nn.Module) -> Tensor:
    """Logits of the probe batch in fp32: (1, seq, vocab), or (1, labels) for a classifier."""
    with evaluating(model):
        return model(**probe_inputs(model)).logits.float()


def distance(found: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """Norm of `found - expected` relative to the norm of `scale` (default: `expected`)."""
    reference = torch.linalg.vector_norm(expected if scale is None else scale)
    return float(torch.linalg.vector_norm(found - expected) / reference.clamp_min(1e-30))
