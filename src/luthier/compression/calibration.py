"""The one pass that all methods without training share: block by block, each on the outputs of those before.

For every block the method gathers what it wants of the stored inputs and changes the block; then the outputs
of the changed block become the inputs of the next, so that what is lost in one block is seen by those above.
In memory are one set of hidden states (tokens x hidden), whatever the depth, and what a method holds of it;
where parts of a block are settled, one more and the inputs of a part's last layer (`Block.settle`). Of
methods that want the inputs of the model as it came (`propagates`) the blocks pass those on.

A pass that is given a folder leaves there the state of each block as it was changed. After a kill the blocks
that are done are read from there, and the pass goes on with the first that is not.
"""

import hashlib
import inspect
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from luthier.acceleration.float32 import norms
from luthier.compression.block import START, Block, Call
from luthier.compression.grid import Grid, Scheme
from luthier.compression.linear import QuantizedLinear, quantize_layer, quantized_layers
from luthier.compression.records import Record
from luthier.errors import MethodError, ModelError
from luthier.models import structure
from luthier.resources import kept_heap, not_needed_now, replaces_weights
from luthier.terminal import progress
from luthier.tuning.probe import evaluating

log = logging.getLogger("luthier.compression")

Batch = dict[str, Tensor]
Change = Callable[[Block], Iterable[Record]]


class _Caught(Exception):
    """Ends a run of the model where enough of it was seen."""


def calibrate(
    model: nn.Module,
    batches: Sequence[Batch],
    change: Change,
    *,
    folder: Path | None = None,
    identity: str = "",
    propagates: bool = True,
) -> list[Record]:
    """Change the blocks of a model one after the other.

    Args:
        batches: `{"input_ids": (batch, seq), "attention_mask": (batch, seq)}`; labels are not looked at.
        change: changes a block in place and says what became of each layer.
        folder: where the state of finished blocks is kept, until the caller has saved the model and removes
            it; None keeps none.
        propagates: see `Block`.
        identity: of methods, model and data. What a folder holds of another pass is not used.

    Raises:
        ModelError: the model is not a chain of blocks from hidden states to hidden states.
    """
    name, stack = _stack(model)
    store = None if folder is None else _Store(folder, identity)
    records: list[Record] = []
    with evaluating(model), kept_heap(), progress("compress") as bar:
        hidden, calls, masks, starts = catch(model, stack, batches)
        inside = {p for block in stack for p in block.parameters()}
        not_needed_now(p for p in model.parameters() if p not in inside)  # embeddings, head
        task = bar.add_task("", total=len(stack), note="")
        for index in range(len(stack)):
            block = Block(
                *(model, f"{name}.{index}", index, hidden, calls[index], masks),
                propagates=propagates,
                start=starts[index],
            )
            start = time.perf_counter()
            with replaces_weights(block.module), norms(block.module):
                found = store.restore(block) if store is not None else None
                if found is None:
                    found = list(change(block))
                    if store is not None:
                        store.keep(block, found)
                records += found
                block.leave()
            note = _note(found, time.perf_counter() - start)
            log.info("block %d of %d: %s", index + 1, len(stack), note)
            bar.update(task, advance=1, note=note)
    return records


def chain(model: nn.Module) -> Iterator[Block]:
    """The blocks without any inputs, for methods that look at weights alone."""
    name, stack = _stack(model)
    for index in range(len(stack)):
        yield Block(model, f"{name}.{index}", index, [], [], [])


def _stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} is an encoder-decoder: its decoder's blocks read two streams.",
            fix="Compress a decoder-only or an encoder-only model.",
        )
    return structure.stacks(model)[0]


def catch(
    model: nn.Module, stack: Sequence[nn.Module], batches: Sequence[Batch]
) -> tuple[list[Tensor], list[list[Call]], list[Tensor], list[Call]]:
    """Hidden states before the first block, the calls of each block ([block][batch]), the token masks, and
    the call of each block for the first `START` tokens.

    That start of a row runs through the whole model, to see whether all blocks are called alike. Where they
    are, the batches stop at the first block. Raises ModelError where a block is handed something else than
    the output of the one before.
    """
    hidden: list[Tensor] = []
    calls: list[list[Call]] = [[] for _ in stack]
    masks: list[Tensor] = []
    start = {name: part[:1, :START] for name, part in batches[0].items()}
    _, starts = _run(model, stack, start, only_first=False)
    alike = all(_same(starts[0], call) for call in starts)
    for batch in batches:
        first, seen = _run(model, stack, batch, only_first=alike)
        hidden.append(first)
        for index, per_batch in enumerate(calls):
            per_batch.append(seen[0 if alike else index])
        masks.append(_token_mask(batch))
    return hidden, calls, masks, starts


def _run(
    model: nn.Module, stack: Sequence[nn.Module], batch: Batch, *, only_first: bool
) -> tuple[Tensor, list[Call]]:
    """Hidden states before the first block and the call of each, in one run of the model, or a part of it."""
    first: list[Tensor] = []
    latest: list[Any] = []  # what the block before gave; no more is held, whatever the depth
    calls: list[Call] = []

    def before(block: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        options = dict(options)
        hidden, *rest = inputs or (options.pop("hidden_states", None),)
        index = len(calls)
        if index == len(stack) or block is not stack[index]:
            raise _no_chain(model, "its blocks are not run once each, in their order")
        if index and hidden is not latest[0]:
            raise _no_chain(model, f"block {index} does not read what block {index - 1} gives")
        if not index:
            first.append(hidden)
        calls.append(Call(tuple(rest), options))
        if only_first:
            raise _Caught

    def after(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        latest[:] = [output[0] if isinstance(output, tuple) else output]

    handles = [b.register_forward_pre_hook(before, with_kwargs=True) for b in stack]
    handles += [b.register_forward_hook(after) for b in stack]
    try:
        device = model.get_input_embeddings().weight.device
        with torch.no_grad(), suppress(_Caught):
            base = structure.base(model).base_model
            inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
            base(**inputs, **_no_cache(base))
    finally:
        for handle in handles:
            handle.remove()
    if len(calls) < (1 if only_first else len(stack)):
        raise _no_chain(model, f"of its {len(stack)} blocks {len(calls)} are run")
    return first[0], calls


def _no_cache(base: nn.Module) -> dict[str, Any]:
    """A cache would grow each time a block is run again."""
    return {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}


def _no_chain(model: nn.Module, found: str) -> ModelError:
    return ModelError(
        f"{type(model).__name__} is no chain of blocks, hidden states in, hidden states out: {found}.",
        fix="Use a model of the Llama, Qwen, Mistral, GPT-2, OPT or BERT kind.",
    )


def _same(first: Call, second: Call) -> bool:
    """Whether two blocks were called with the very same objects."""
    pairs = zip(first.arguments, second.arguments, strict=False)
    return (
        first.options.keys() == second.options.keys()
        and all(_is(first.options[key], second.options[key]) for key in first.options)
        and all(_is(a, b) for a, b in pairs)
    )


def _is(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_is(x, y) for x, y in zip(a, b, strict=True))
    return a is b or (isinstance(a, bool | int | float | str) and a == b)


def _token_mask(batch: Batch) -> Tensor:
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def _note(records: list[Record], seconds: float) -> str:
    worst = max(records, key=lambda r: r.after, default=None)
    errors = "" if worst is None else f", error up to {worst.after:.2g} ({worst.name.rpartition('.')[2]})"
    return f"{len(records)} layers{errors}, {seconds:.1f} s"


class _Store:
    """Finished blocks in a folder: `00007.safetensors` with the state, and the records in `00007.json`."""

    def __init__(self, folder: Path, identity: str):
        self.folder = folder / hashlib.sha256(identity.encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)

    def keep(self, block: Block, records: list[Record]) -> None:
        state = {name: tensor.contiguous() for name, tensor in block.module.state_dict().items()}
        layers = {n: _description(m) for n, m in quantized_layers(block.module).items()}
        weights, said = self._files(block)
        save_file(state, weights)
        draft = said.with_suffix(".partial")
        draft.write_text(json.dumps({"layers": layers, "records": [r.as_dict() for r in records]}))
        draft.replace(said)  # the last to appear: a block counts as done when it is there

    def restore(self, block: Block) -> list[Record] | None:
        """Put a block into the state that it was left in; None where it was not."""
        weights, said = self._files(block)
        if not said.is_file():
            return None
        if not block.propagates:
            block.leave()
        known = json.loads(said.read_text())
        state = load_file(weights, device=str(block.device))
        for name, layer in known["layers"].items():
            plain = block.module.get_submodule(name)
            block.replace(f"{block.name}.{name}", _shell(plain, name, layer, state))
        block.module.load_state_dict(state)
        log.info("block %d was done before", block.index + 1)
        return [Record(**record) for record in known["records"]]

    def _files(self, block: Block) -> tuple[Path, Path]:
        stem = self.folder / f"{block.index:05}"
        return stem.with_suffix(".safetensors"), stem.with_suffix(".json")


def _description(layer: QuantizedLinear) -> dict[str, Any]:
    """Of a quantised layer what is no tensor: its class, scheme, and values of its own."""
    own = {name: getattr(layer, name) for name in layer.OWN}
    values = {name: value for name, value in own.items() if not isinstance(value, Tensor)}
    return {"class": type(layer).__name__, "scheme": layer.scheme.as_dict(), "values": values}


def _shell(layer: nn.Module, name: str, known: dict[str, Any], state: dict[str, Tensor]) -> QuantizedLinear:
    """A quantised layer of the right class and shapes, to be filled from the state."""
    kinds = {kind.__name__: kind for kind in (QuantizedLinear, *QuantizedLinear.__subclasses__())}
    kind, values = kinds[known["class"]], known["values"]
    codes, scale = state[f"{name}.codes"], state[f"{name}.scale"]
    zero = state.get(f"{name}.zero", torch.zeros_like(scale, dtype=torch.int8))
    grid = Grid(Scheme(**known["scheme"]), scale, zero)
    own = {o: values[o] if o in values else state[f"{name}.{o}"] for o in kind.OWN}
    return quantize_layer(layer, codes, grid, state.get(f"{name}.input_scale"), kind=kind, **own)


def choose_layers(model: nn.Module, targets: Sequence[str], exclude: Sequence[str]) -> set[str]:
    """Full names of the linear layers of the blocks that a method works on.

    Args:
        targets: names or ends of names, as in PEFT; empty: all.
        exclude: the same, of layers that stay as they are.

    Raises:
        MethodError: a pattern matches nothing, or the head; or no layer is left.
    """
    name, _ = _stack(model)
    targets, exclude = ([p] if isinstance(p, str) else p for p in (targets, exclude))
    inside = {n for n in structure.linears(model) if n.startswith(f"{name}.")}
    if not inside:
        raise MethodError(f"The blocks of {type(model).__name__} have no linear layers to compress.")
    for patterns in (targets, exclude):
        for pattern, matched in structure.match_targets(model, patterns).items():
            if not set(matched) & inside:
                raise MethodError(
                    f"'{pattern}' is no linear layer of a block: embeddings and head stay as they are.",
                    fix="Name layers of the blocks, such as "
                    + ", ".join(sorted({n.rpartition(".")[2] for n in inside})[:4])
                    + ".",
                )

    def matches(layer: str, patterns: Sequence[str]) -> bool:
        return any(layer == p or layer.endswith(f".{p}") for p in patterns)

    chosen = {n for n in inside if (not targets or matches(n, targets)) and not matches(n, exclude)}
    if not chosen:
        raise MethodError(
            f"No layer is left to compress: exclude ({', '.join(exclude)}) takes out all that targets name.",
            fix="Exclude fewer layers.",
        )
    return chosen
