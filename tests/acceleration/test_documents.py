"""Attention by documents equals the block-diagonal mask, and plain attention where a row is not packed."""

import itertools

import pytest
import tiny
import torch
from torch.nn import functional as F

from luthier.acceleration.documents import by_documents, document_lengths, documents_attention, why_not


def packed(lengths, rows=1):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, tiny.VOCAB, (rows, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].repeat(rows, 1)
    return {"input_ids": ids, "position_ids": positions, "use_cache": False}


def test_lengths_are_read_from_positions():
    assert document_lengths(torch.tensor([0, 1, 2, 0, 0, 1])) == [3, 1, 2]
    assert document_lengths(torch.tensor([4, 5, 0, 1])) == [2, 2]
    assert document_lengths(torch.tensor([0, 1])) == [2]


def test_operation_equals_masked_attention_and_its_gradients():
    torch.manual_seed(0)
    lengths = [3, 1, 5]
    q = torch.randn(1, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 2, 9, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    block = torch.block_diag(*[torch.ones(n, n).tril() for n in lengths]).bool()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ours, _ = documents_attention(
        torch.nn.Module(), q, k, v, None, scaling=0.3, position_ids=positions, is_causal=True
    )
    wide = (t.repeat_interleave(2, dim=1) for t in (k, v))
    theirs = F.scaled_dot_product_attention(q, *wide, attn_mask=block, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(ours, theirs)
    g = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (q, k, v), g), torch.autograd.grad(theirs, (q, k, v), g)
    )


@pytest.mark.parametrize("rows", [1, 2])
def test_a_packed_row_is_the_documents_one_by_one(rows):
    model = tiny.llama().eval()
    assert why_not(model) is None
    inputs = packed([6, 3, 8], rows)
    if rows == 2:  # rows of different documents
        inputs["position_ids"][1] = torch.cat([torch.arange(10), torch.arange(7)])
    with by_documents(model), torch.no_grad():
        logits = model(**inputs).logits
    for row, (ids, positions) in enumerate(zip(inputs["input_ids"], inputs["position_ids"], strict=True)):
        starts = [i for i, p in enumerate(positions.tolist()) if p == 0] + [len(ids)]
        for start, end in itertools.pairwise(starts):
            alone = model(ids[None, start:end], use_cache=False).logits[0]
            torch.testing.assert_close(logits[row, start:end], alone, rtol=1e-5, atol=1e-5)


def test_padding_and_generation_are_as_with_sdpa():
    model = tiny.llama().eval()
    ids = torch.randint(5, tiny.VOCAB, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    with by_documents(model):
        assert torch.equal(model(ids, attention_mask=mask).logits[mask.bool()], expected)
        assert torch.equal(
            model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False), tokens
        )
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_keeps_positions_from_its_attention_is_found_out(monkeypatch):
    model = tiny.llama()
    for module in model.modules():
        if type(module).__name__ == "LlamaAttention":
            original = module.forward
            module.forward = lambda *a, position_ids=None, original=original, **k: original(*a, **k)
    assert "does not hand positions" in why_not(model)


def test_another_attention_is_not_replaced():
    model = tiny.llama()
    model.set_attn_implementation("eager")
    assert "eager" in why_not(model)
