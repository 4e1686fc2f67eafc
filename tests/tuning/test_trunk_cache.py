"""The trunk's cache: the same losses as without it, for padded and packed batches, and keys that hold."""

import os

import pytest
import small_training as training
import tiny
import torch

from luthier import method
from luthier.data.packing import PackedCollator
from luthier.errors import MethodError
from luthier.tuning import trunk_cache
from luthier.tuning.attach import attach
from luthier.tuning.trunk_cache import Store, TrunkCache, documents, trunk_key

EPOCHS = {"max_steps": -1, "num_train_epochs": 3, "logging_strategy": "steps", "logging_steps": 1}
METHODS = {
    "linear_probe": {"untie_head": True},
    "top_layers": {"k": 1},
    "frozen_bottom": {"n": 2},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))


def uneven(model, count=8):
    """Rows of different lengths; row 5 repeats row 0."""
    rows = training.rows(model, count, length=20)
    for number, row in enumerate(rows):
        cut = 20 if number in (0, 5) else 6 + number
        row["input_ids"] = rows[0]["input_ids"] if number == 5 else row["input_ids"][:cut]
        if isinstance(row["labels"], list):
            row["labels"] = row["input_ids"]
        del row["attention_mask"]
    return rows


def pad(rows):
    """Right padding with a mask from the lengths."""
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        ids, gap = row["input_ids"], longest - len(row["input_ids"])
        batch["input_ids"].append(ids + [tiny.PAD] * gap)
        batch["attention_mask"].append([1] * len(ids) + [0] * gap)
        batch["labels"].append(
            row["labels"] + [-100] * gap if isinstance(row["labels"], list) else row["labels"]
        )
    return {name: torch.tensor(column) for name, column in batch.items()}


def pack(rows):
    """One row of all documents; positions restart, no mask."""
    ids = [i for row in rows for i in row["input_ids"]]
    labels = [label for row in rows for label in [-100, *row["labels"][1:]]]
    positions = [p for row in rows for p in range(len(row["input_ids"]))]
    columns = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {name: torch.tensor([column]) for name, column in columns.items()}


def losses(model, folder, collate, **changes):
    trainer = training.trainer(model, folder, uneven(model), **(EPOCHS | changes))
    trainer.data_collator = collate
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def counting(model):
    """How often each block computes attention."""
    calls = [0] * 4
    for number, name in enumerate(
        n for n, m in model.named_modules() if type(m).__name__.endswith("Attention")
    ):

        def count(*_, number=number):
            calls[number] += 1

        model.get_submodule(name).register_forward_hook(count)
    return calls


@pytest.mark.parametrize("collate", [pad, pack])
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.bert])
@pytest.mark.parametrize("name", METHODS)
def test_losses_are_those_without_the_cache(name, make, collate, tmp_path):
    if make is tiny.bert and collate is pack:
        collate = pad  # a classifier's rows are not packed
    dropout = {"hidden_dropout_prob": 0.3} if make is tiny.bert else {}
    found = []
    for cache_trunk in (False, True):
        options = METHODS[name] | {"cache_trunk": cache_trunk}
        model = attach(
            make(num_hidden_layers=3, **dropout) if make is not tiny.gpt2 else make(n_layer=3),
            method(name)(**options),
        )
        found.append(losses(model, tmp_path / "run", collate))
    assert len(found[0]) == 12
    assert found[1] == pytest.approx(found[0], abs=1e-6)


def test_blocks_run_once_a_document_and_never_again(tmp_path):
    model = attach(tiny.llama(num_hidden_layers=4), method("top_layers")(k=1, cache_trunk=True))
    calls = counting(model)
    losses(model, tmp_path / "run", pad)
    trained = 12
    # Four batches fill the cache (one probe tells what the blocks return); two epochs read it.
    assert calls == [5, 5, 5, trained + 1]


def test_a_second_run_reads_what_the_first_wrote(tmp_path):
    for first in (True, False):
        model = attach(tiny.llama(num_hidden_layers=3), method("top_layers")(k=1, cache_trunk=True))
        calls = counting(model)
        losses(model, tmp_path / "run", pack if first else pad)
        assert calls[0] == (5 if first else 1)


def test_the_model_is_left_as_it_was(tmp_path):
    model = attach(tiny.llama(), method("top_layers")(k=1, cache_trunk=True))
    losses(model, tmp_path / "run", pad)
    assert not any("forward" in block.__dict__ for block in model.model.layers)
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(training.logits(model), training.logits(plain))


def test_evaluation_in_between_does_not_touch_the_cache(tmp_path):
    model = attach(tiny.llama(), method("top_layers")(k=1))
    cache = TrunkCache(model, tmp_path)
    model.eval()
    expected = model(**training.batch(model)).logits
    cache.install()
    assert torch.equal(model(**training.batch(model)).logits, expected)
    assert cache.hits == cache.misses == 0
    cache.remove()


def test_other_weights_or_settings_have_another_key():
    def key(model):
        return trunk_key(attach(model, method("top_layers")(k=1)), 1)

    model = tiny.llama()
    first = key(model)
    assert first == key(tiny.llama())
    model.model.layers[1].mlp.up_proj.weight.data += 1  # above the trunk
    assert key(model) == first
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1e-6
    assert key(model) != first
    assert key(tiny.llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0})) != first
    assert key(tiny.llama().bfloat16()) != first


def test_padding_and_packing_leave_the_key_of_a_document():
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    padded = {n: t for n, t in pad(rows).items() if n != "labels"}
    packed = {n: t for n, t in pack(rows).items() if n != "labels"}
    assert [k for k, _, _ in documents(**padded)] == [k for k, _, _ in documents(**packed)]
    assert [(row, columns.tolist()) for _, row, columns in documents(**packed)] == [
        (0, [0, 1, 2]),
        (0, [3, 4]),
    ]
    # Where attention crosses documents, a packed row is one.
    assert len(list(documents(**packed, isolated=False))) == 1


def test_filling_of_packed_rows_is_no_document(tmp_path):
    """Its length depends on its neighbours in a batch: as a document it would be new in each epoch."""
    model = attach(tiny.llama(num_hidden_layers=3), method("top_layers")(k=1, cache_trunk=True))
    calls = counting(model)
    rows = [{n: t[0].tolist() for n, t in pack([row]).items()} for row in uneven(model)]
    trainer = training.trainer(model, tmp_path / "run", rows, **EPOCHS)
    trainer.data_collator = PackedCollator(tiny.PAD)
    trainer.train()
    assert calls[0] == 5


def test_positions_belong_to_the_key():
    ids = torch.tensor([[0, 5, 6]])
    left = documents(ids, torch.tensor([[0, 1, 1]]))
    right = documents(torch.tensor([[5, 6, 0]]), torch.tensor([[1, 1, 0]]))
    assert next(left)[0] != next(right)[0]


def test_a_cut_off_file_loses_only_its_last_document(tmp_path):
    store = Store(tmp_path, 4, torch.float32)
    store.add(b"a" * 32, torch.ones(3, 4))
    store.add(b"b" * 32, torch.full((2, 4), 2.0))
    store.close()
    os.truncate(tmp_path / "index.bin", 48 + 20)  # killed while the second record was written
    store = Store(tmp_path, 4, torch.float32)
    assert set(store.index) == {b"a" * 32}
    store.add(b"c" * 32, torch.full((1, 4), 3.0))
    store.close()
    store = Store(tmp_path, 4, torch.float32)
    assert torch.equal(store.get(b"a" * 32), torch.ones(3, 4))
    assert torch.equal(store.get(b"c" * 32), torch.full((1, 4), 3.0))


def test_bfloat16_is_kept_bit_for_bit(tmp_path):
    store = Store(tmp_path, 8, torch.bfloat16)
    written = torch.randn(5, 8).bfloat16()
    store.add(b"k" * 32, written)
    assert torch.equal(store.get(b"k" * 32), written)
    assert (tmp_path / "activations.bin").stat().st_size == 5 * 8 * 2


def test_without_a_frozen_trunk_it_is_refused(tmp_path):
    model = attach(tiny.llama(), method("top_layers")(k=2, cache_trunk=True))
    with pytest.raises(MethodError, match="nothing to cache"):
        training.train(model, tmp_path)


def test_dropout_in_the_trunk_excludes_the_cache():
    with pytest.raises(MethodError, match="trunk_dropout"):
        attach(tiny.llama(), method("top_layers")(cache_trunk=True, trunk_dropout=True))


def test_an_encoder_decoder_is_refused(tmp_path):
    model = attach(tiny.t5(), method("top_layers")(k=1, cache_trunk=True))
    with pytest.raises(MethodError, match="encoder-decoder"):
        training.train(model, tmp_path)


def test_masks_of_four_dimensions_are_refused():
    with pytest.raises(MethodError, match="attention mask of shape"):
        list(documents(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 1, 3, 3)))


def test_clear_deletes_all(tmp_path):
    training.train(attach(tiny.llama(), method("top_layers")(k=1, cache_trunk=True)), tmp_path / "run")
    assert list(trunk_cache.cache_root().iterdir())
    trunk_cache.clear()
    assert not trunk_cache.cache_root().exists()
