"""Packed loss is the unpacked loss, documents do not see each other, and padding hides no end token."""

import json

import numpy as np
import pytest
import rendering
import tiny
import torch
from datasets import Dataset

from luthier.data.load import load
from luthier.data.packing import PackedCollator, PaddedCollator, pack, prove_isolated
from luthier.data.tokenize import encode
from luthier.errors import CheckError, DataError


def documents(count=40, longest=60, seed=0):
    draw = np.random.default_rng(seed)
    ids = [draw.integers(5, tiny.VOCAB, draw.integers(2, longest)).tolist() for _ in range(count)]
    labels = [[-100] * (len(row) // 3) + row[len(row) // 3 :] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def runs(row):
    """(ids, labels) of the documents of a packed row."""
    starts = [i for i, p in enumerate(row["position_ids"]) if p == 0]
    for start, stop in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
        assert row["position_ids"][start:stop] == list(range(stop - start))
        yield row["input_ids"][start:stop], row["labels"][start:stop]


def summed_loss(model, batch):
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).double(), batch["labels"][:, 1:].flatten(), reduction="sum"
    )


def test_packing_keeps_every_document_whole():
    data = documents()
    packed = pack(data, 64)
    assert packed.column_names == ["input_ids", "labels", "position_ids"]
    assert all(len(row["input_ids"]) <= 64 for row in packed)
    found = sorted((ids, labels) for row in packed for ids, labels in runs(row))
    expected = sorted(
        (ids, [-100, *labels[1:]]) for ids, labels in zip(data["input_ids"], data["labels"], strict=True)
    )
    assert found == expected


def test_packing_is_best_fit_decreasing():
    lengths = [6, 5, 5, 4, 3, 3, 2, 2]
    data = Dataset.from_dict({"input_ids": [[9] * n for n in lengths], "labels": [[9] * n for n in lengths]})
    packed = [sorted((len(ids) for ids, _ in runs(row)), reverse=True) for row in pack(data, 10)]
    assert sorted(packed) == [[3, 3, 2, 2], [5, 5], [6, 4]]


def test_document_longer_than_the_row_is_refused():
    with pytest.raises(DataError, match="document of 57 tokens does not fit into packed rows of 32"):
        pack(documents(), 32)


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_packed_loss_is_the_unpacked_loss(build, attn):
    model = build(attn_implementation=attn)
    data = documents()
    rows = list(pack(data, 64))
    with torch.no_grad():
        packed = sum(summed_loss(model, PackedCollator()(rows[i : i + 4])) for i in range(0, len(rows), 4))
        alone = sum(summed_loss(model, PaddedCollator(tiny.PAD)([row])) for row in data)
    count = sum(label >= 0 for row in data["labels"] for label in row[1:])
    assert abs(packed - alone) / count < 1e-5


def test_packed_gradient_is_the_unpacked_gradient():
    model, data = tiny.llama(), documents(12)
    summed_loss(model, PackedCollator()(list(pack(data, 64)))).backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    summed_loss(model, PaddedCollator(tiny.PAD)(list(data))).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2], ids=["llama", "gpt2"])
def test_changing_a_document_moves_no_logit_of_the_next(build):
    model = build()
    prove_isolated(model)
    first, other, second = torch.randint(5, tiny.VOCAB, (3, 10))
    positions = torch.arange(10).repeat(2)[None]

    def logits(one, **options):
        return model(input_ids=torch.cat([one, second])[None], use_cache=False, **options).logits[0, 10:]

    with torch.no_grad():
        assert torch.equal(logits(first, position_ids=positions), logits(other, position_ids=positions))
        assert not torch.allclose(logits(first), logits(other)), "without restarts they see each other"


def test_model_that_mixes_documents_is_refused():
    class Mixing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny.llama()

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

        def forward(self, input_ids, position_ids, use_cache):
            return self.inner(input_ids=input_ids, use_cache=use_cache)  # does not read positions

    with pytest.raises(CheckError, match="packed documents isolated"):
        prove_isolated(Mixing())


def test_padding_comes_from_lengths_so_the_end_token_is_learnt(tmp_path):
    """With pad = eos, a mask made from the pad id would hide the end of every answer."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": "Hi", "completion": "y" * n}) + "\n" for n in (1, 30)))
    tokenizer = rendering.tokenizer(rendering.CHATML, pad="eos")
    data = encode(load(path), tokenizer, max_length=None, use_cache=False).dataset
    batch = PaddedCollator(tokenizer.pad_token_id)([data[0], data[1]])
    lengths = [len(ids) for ids in data["input_ids"]]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    for labels, mask in zip(batch["labels"], batch["attention_mask"], strict=True):
        assert labels[labels >= 0][-1] == tokenizer.eos_token_id
        assert (labels[mask == 0] == -100).all()


def test_padding_does_not_change_the_loss():
    model, data = tiny.llama(), documents(6)
    with torch.no_grad():
        together = summed_loss(model, PaddedCollator(tiny.PAD, multiple_of=16)(list(data)))
        alone = sum(summed_loss(model, PaddedCollator(tiny.PAD)([row])) for row in data)
    assert torch.isclose(together, alone, rtol=1e-6)


def test_classes_are_collated_as_numbers():
    rows = [
        {"input_ids": [1, 2], "token_type_ids": [0, 1], "labels": 1},
        {"input_ids": [3], "token_type_ids": [1], "labels": 0},
    ]
    batch = PaddedCollator(9)(rows)
    assert batch["input_ids"].tolist() == [[1, 2], [3, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 1], [1, 0]]
    assert batch["labels"].tolist() == [1, 0]
