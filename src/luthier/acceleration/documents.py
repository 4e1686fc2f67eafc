"""Attention of packed rows, document by document: no mask, and no work between documents.

A packed row of N tokens in documents of lengths l_1 ... l_m needs sum l_i^2 products of queries and keys.
Under a block-diagonal mask torch's kernels compute all N^2 of them and throw the rest away; on a CPU that was
half of a training step (SmolLM2-135M, 2048 tokens in documents of 128: 2.6 s of 4.5 s). Here each document
is a call of its own, causal without a mask.

Registered in transformers as the attention "documents". Where documents begin is read from `position_ids`,
which restart at 0; what is not a packed row (padding, a cache, a sliding window) goes to "sdpa" as it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from luthier.acceleration import half_attention
from luthier.models import structure
from luthier.tuning.probe import evaluating

NAME = "documents"
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
TOLERANCE_HALF = 0.08  # of SmolLM2 in bfloat16: rounding alone 0.03, attention across documents 0.2


def document_lengths(positions: Tensor) -> list[int]:
    """Lengths of the documents in one packed row; `positions` (seq,) is 0 where one begins."""
    starts = [0, *((positions[1:] == 0).nonzero().squeeze(-1) + 1).tolist()]
    return [end - start for start, end in zip(starts, [*starts[1:], len(positions)], strict=True)]


def documents_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (batch, heads, seq, dim), key, value (batch, kv heads, seq, dim) to (batch, seq, heads, dim)."""
    rows: list[list[int]] = []
    if attention_mask is None and position_ids is not None and query.shape[2] == position_ids.shape[-1]:
        rows = [document_lengths(row) for row in position_ids.expand(len(query), -1)]
    if all(len(lengths) == 1 for lengths in rows):
        kwargs |= {"dropout": dropout, "scaling": scaling}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    outputs = []
    for row, lengths in enumerate(rows):
        # split, not slices: its gradient is one concatenation, that of a slice a row of zeros a document.
        parts = (t[row : row + 1].split(lengths, dim=2) for t in (query, key, value))
        documents = [
            _attend(q, k, v, dropout, scaling).transpose(1, 2) for q, k, v in zip(*parts, strict=True)
        ]
        outputs.append(torch.cat(documents, dim=1))  # (1, seq, heads, dim)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)), None


def _attend(query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None) -> Tensor:
    """One document: causal attention, (1, heads, seq, dim)."""
    if not dropout and half_attention.pays(query, value):
        return half_attention.half_attention(query, key, value, scaling)
    grouped = key.shape[1] != query.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
    )


def documents_mask(
    *, attention_mask: Tensor | None = None, local_size: int | None = None, **kwargs: Any
) -> Tensor | None:
    """No mask for a whole row without padding; sdpa's for anything else."""
    whole = kwargs["q_length"] == kwargs["kv_length"] and not kwargs.get("q_offset", 0)
    if attention_mask is None and local_size is None and whole and not kwargs.get("use_vmap", False):
        return None
    return sdpa_mask(attention_mask=attention_mask, local_size=local_size, **kwargs)


AttentionInterface.register(NAME, documents_attention)
AttentionMaskInterface.register(NAME, documents_mask)


def why_not(model: nn.Module) -> str | None:
    """Why packed rows cannot be attended document by document, or None.

    Tried on a row of two documents: the logits must be those under the block-diagonal mask.
    """
    base = structure.base(model)
    if _under_prompts(base.config._attn_implementation)[0] != "sdpa":
        return f"{base.config._attn_implementation} attention was chosen"
    table = base.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(table.shape[0], (1, 12), generator=generator).to(table.device)
    positions = torch.tensor([[*range(5), *range(7)]], device=table.device)
    with evaluating(base):
        expected = base(input_ids=ids, position_ids=positions, use_cache=False).logits
        with by_documents(base):
            found = base(input_ids=ids, position_ids=positions, use_cache=False).logits
    error = ((found - expected).norm() / expected.norm()).item()
    if error > TOLERANCE.get(base.dtype, TOLERANCE_HALF):
        return f"{type(base).__name__} does not hand positions to its attention (logits off by {error:.1e})"
    return None


@contextmanager
def by_documents(model: nn.Module) -> Iterator[None]:
    """Inside, packed rows are attended document by document."""
    base = structure.base(model)
    before = base.config._attn_implementation
    base.set_attn_implementation(_under_prompts(before)[1])
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def _under_prompts(name: str) -> tuple[str, str]:
    """The attention under learnt prompts, where there are some, and its counterpart by documents."""
    from luthier.tuning import attention_prompts  # stands on this file

    inner = attention_prompts.underlying(name)
    return inner, NAME if inner == name else attention_prompts.over(NAME)
