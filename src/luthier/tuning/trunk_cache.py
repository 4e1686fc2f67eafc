"""Activations of a frozen trunk, computed once and read from disk in every later epoch.

The lowest blocks of a partly frozen model compute the same for the same tokens, epoch after epoch. While
the cache is installed, a training forward looks its documents up; if all are known, their activations
take the place of the frozen blocks' output and the blocks are skipped. Otherwise the blocks run and what
they give is kept. Embeddings, masks, positions, the upper blocks and the loss are the model's own code in
both cases.

A document is known by its *content* (token ids, positions, token types), not by a row number: shuffling,
packing and padding change nothing, and activations can never meet the wrong tokens. The folder is known
by the trunk's weights, its config, the attention implementation and this format's version.

    documents in a batch:  a packed row (no mask, positions restart) holds one for each restart, since
                           attention does not cross documents; any other row is one, without its padding
    activations.bin        the activations, (tokens, hidden) of one document after another, memory-mapped
    index.bin              48 bytes a document: 32 of its hash, 8 of its first byte, 8 of its length in bytes
"""

import hashlib
import itertools
import logging
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn
from transformers import TrainerCallback

from luthier.errors import MethodError
from luthier.models import structure
from luthier.resources import require_space, require_writable
from luthier.tuning.groups import trunk_depth, trunk_modules
from luthier.tuning.probe import evaluating, probe_inputs

log = logging.getLogger("luthier.tuning")

VERSION = 1
RECORD = struct.Struct("<32sQQ")


class Store:
    """Activations on disk by the hash of their document; append-only, a kill loses at most the last one."""

    def __init__(self, folder: Path, hidden: int, dtype: torch.dtype):
        folder.mkdir(parents=True, exist_ok=True)
        self.hidden, self.dtype = hidden, dtype
        # numpy has no bfloat16: the bytes are kept as integers of the same width.
        self.width = torch.empty(0, dtype=dtype).element_size()
        self.folder = folder
        self.index: dict[bytes, tuple[int, int]] = {}
        self._data = (folder / "activations.bin").open("ab", buffering=0)
        self._records = (folder / "index.bin").open("ab", buffering=0)
        self._map: np.memmap | None = None
        self._lock = FileLock(folder / "lock")
        self._read_index()

    def _read_index(self) -> None:
        with self._lock:
            self._read_records()

    def _read_records(self) -> None:
        raw = (self.folder / "index.bin").read_bytes()
        size = (self.folder / "activations.bin").stat().st_size
        whole = len(raw) - len(raw) % RECORD.size
        for key, start, length in RECORD.iter_unpack(raw[:whole]):
            if start + length <= size:
                self.index[key] = (start, length)
        if whole != len(raw):
            self._records.truncate(whole)  # the last record was cut off by a kill

    def __contains__(self, key: bytes) -> bool:
        return key in self.index

    def add(self, key: bytes, activations: Tensor) -> None:
        """Keep the activations (tokens, hidden) of a document."""
        raw = activations.detach().to("cpu", self.dtype).contiguous().view(torch.uint8).numpy().tobytes()
        with self._lock:  # another run may fill the same cache
            start = self._data.seek(0, os.SEEK_END)
            if self._data.write(raw) != len(raw):
                raise OSError(f"{self.folder / 'activations.bin'}: short write")
            self._records.write(RECORD.pack(key, start, len(raw)))
        self.index[key] = (start, len(raw))

    def get(self, key: bytes) -> Tensor:
        """The activations (tokens, hidden) of a document, on the CPU."""
        start, length = self.index[key]
        if self._map is None or start + length > self._map.size:
            self._map = np.memmap(self.folder / "activations.bin", dtype=np.uint8, mode="r")
        # A copy: torch does not take read-only memory, and the pages may then be dropped.
        return (
            torch.from_numpy(self._map[start : start + length].copy()).view(self.dtype).view(-1, self.hidden)
        )

    def close(self) -> None:
        self._data.close()
        self._records.close()
        self._map = None


class TrunkCache:
    """The cache on a model: `install()`, train, `remove()`.

    Args:
        model: with a frozen trunk whose dropout is off (see `luthier.tuning.groups.still_trunk`).
        folder: where caches live; each trunk gets a folder of its own in it.

    Raises:
        MethodError: there is no frozen block, or the model is an encoder-decoder.
    """

    def __init__(self, model: nn.Module, folder: Path | str | None = None):
        if model.config.is_encoder_decoder:
            raise MethodError(
                "The trunk's cache does not serve encoder-decoders.", fix="Write cache_trunk: false."
            )
        self.model = model
        self.depth = trunk_depth(model)
        if self.depth == 0:
            raise MethodError(
                "No block at the bottom is frozen: there is nothing to cache.",
                fix="Freeze the embeddings and at least one block, or write cache_trunk: false.",
            )
        self.blocks = list(structure.blocks(model))[: self.depth]
        self.folder = Path(folder or cache_root()) / trunk_key(model, self.depth)[:24]
        require_writable(self.folder)
        weight = model.get_input_embeddings().weight
        self.store = Store(self.folder, model.config.hidden_size, weight.dtype)
        self.hits = self.misses = 0
        self._read: Tensor | None = None
        self._keys: list[tuple[bytes, int, Tensor]] = []
        self._undo: list[Any] = []

    def install(self) -> None:
        """Skip the frozen blocks of training forwards whose documents are all known, from now on."""
        tuples = self._returns_tuples()
        for block, is_tuple in zip(self.blocks, tuples, strict=True):
            self._wrap(block, is_tuple, last=block is self.blocks[-1])
        self._undo.append(self.model.register_forward_pre_hook(self._before, with_kwargs=True).remove)
        self._undo.append(self.model.register_forward_hook(self._after).remove)

    def remove(self) -> None:
        for undo in self._undo:
            undo()
        self._undo.clear()
        self.store.close()
        log.info("trunk cache: %d batches read, %d computed, %s", self.hits, self.misses, self.folder)

    def _returns_tuples(self) -> list[bool]:
        found: dict[nn.Module, bool] = {}
        hooks = [
            block.register_forward_hook(lambda b, _, out: found.update({b: isinstance(out, tuple)}))
            for block in self.blocks
        ]
        try:
            with evaluating(self.model):
                self.model(**probe_inputs(self.model))
        finally:
            for hook in hooks:
                hook.remove()
        return [found[block] for block in self.blocks]

    def _wrap(self, block: nn.Module, is_tuple: bool, last: bool) -> None:
        original = block.forward

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._read is None:
                out = original(hidden_states, *args, **kwargs)
                if last and self._keys:
                    self._keep(out[0] if is_tuple else out)
                return out
            out = self._read if last else hidden_states
            return (out,) if is_tuple else out

        block.forward = forward
        self._undo.append(lambda: block.__dict__.pop("forward"))

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._read, self._keys = None, []
        if not module.training:
            return
        if args or kwargs.get("input_ids") is None:
            raise MethodError(
                "The trunk's cache needs batches with input_ids.", fix="Write cache_trunk: false."
            )
        # Only without a key-value cache does transformers read restarting positions as separate documents.
        use_cache = kwargs.get("use_cache")
        isolated = not (self.model.config.use_cache if use_cache is None else use_cache)
        given = {name: kwargs.get(name) for name in INPUTS}
        self._keys = list(documents(**given, labels=kwargs.get("labels"), isolated=isolated))
        if not all(key in self.store for key, _, _ in self._keys):
            self.misses += 1
            return
        self.hits += 1
        ids = kwargs["input_ids"]
        read = torch.zeros(*ids.shape, self.store.hidden, dtype=self.store.dtype)  # (batch, seq, hidden)
        for key, row, columns in self._keys:
            read[row, columns] = self.store.get(key)
        self._read = read.to(ids.device)

    def _keep(self, hidden_states: Tensor) -> None:
        for key, row, columns in self._keys:
            if key not in self.store:
                self.store.add(key, hidden_states[row, columns.to(hidden_states.device)])

    def _after(self, *_: Any) -> None:
        self._read, self._keys = None, []


INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


def documents(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    isolated: bool = True,
) -> Iterator[tuple[bytes, int, Tensor]]:
    """The documents of a batch (batch, seq): hash, row and columns of each; padding belongs to none.

    Args:
        labels: where given, a packed document without any is left out: it is filling, which nothing looks at
            and whose length changes from batch to batch.
        isolated: whether attention stays within a document where positions restart.

    Raises:
        MethodError: the attention mask is not of shape (batch, seq), so that documents cannot be told apart.
    """
    ids = input_ids.cpu()
    if attention_mask is not None and attention_mask.shape != ids.shape:
        raise MethodError(
            f"The trunk's cache cannot read an attention mask of shape {tuple(attention_mask.shape)}; "
            f"expected {tuple(ids.shape)}.",
            fix="Write cache_trunk: false.",
        )
    columns = torch.arange(ids.shape[1])
    positions = columns.expand_as(ids) if position_ids is None else position_ids.cpu().expand_as(ids)
    types = torch.zeros_like(ids) if token_type_ids is None else token_type_ids.cpu()
    mask = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.cpu().bool()
    packed = isolated and attention_mask is None and position_ids is not None
    described = torch.stack([ids, positions, types], dim=-1).to(torch.int64)  # (batch, seq, 3)
    for row in range(ids.shape[0]):
        here = columns[mask[row]]
        jumps = (positions[row, here].diff() != 1).nonzero().flatten() + 1  # where a document starts
        bounds = [0, *(jumps.tolist() if packed else []), len(here)]
        for start, end in itertools.pairwise(bounds):
            part = here[start:end]
            if packed and labels is not None and bool((labels[row, part.to(labels.device)] == -100).all()):
                continue
            yield hashlib.sha256(described[row, part].numpy().tobytes()).digest(), row, part


def trunk_key(model: nn.Module, depth: int) -> str:
    """Hash of all that the trunk's output depends on: weights, config, attention, precision, this format."""
    digest = hashlib.sha256()
    settings = {
        k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")
    }
    attention = model.config._attn_implementation
    digest.update(repr((VERSION, depth, sorted(settings.items(), key=str), attention)).encode())
    for part in trunk_modules(model):
        for name, tensor in part.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def cache_root() -> Path:
    """Where caches live: $LUTHIER_TRUNK_CACHE, or a folder of Luthier's own cache."""
    own = os.environ.get("LUTHIER_TRUNK_CACHE")
    return Path(own or Path(os.environ.get("LUTHIER_CACHE", Path.home() / ".cache" / "luthier"), "trunk"))


class CacheTrunk(TrainerCallback):
    """Installs the cache for the time of a training."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.cache: TrunkCache | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if args.world_size > 1:
            raise MethodError("The trunk's cache serves one process.", fix="Write cache_trunk: false.")
        self.cache = TrunkCache(self.model)
        self._require_space(train_dataloader.dataset)
        self.cache.install()

    def _require_space(self, dataset: Any) -> None:
        if "input_ids" not in (getattr(dataset, "column_names", None) or ()):
            return
        assert self.cache is not None
        store = self.cache.store
        tokens = sum(len(ids) for ids in dataset["input_ids"])
        needed = tokens * store.hidden * store.width - sum(length for _, length in store.index.values())
        require_space(self.cache.folder, max(0, needed))
        log.info("trunk cache: up to %.1f MB in %s", max(0, needed) / 1e6, self.cache.folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.cache is not None:
            self.cache.remove()
            self.cache = None


def clear(folder: Path | str | None = None) -> None:
    """Delete all cached activations."""
    shutil.rmtree(Path(folder or cache_root()), ignore_errors=True)
