"""EVA: a LoRA that starts in the directions in which the inputs of its layers vary most, on the data at hand.

Paper: Paischer et al., 2024, "Parameter Efficient Fine-tuning via Explained Variance Adaptation", arXiv
2410.07170.

For the inputs X (tokens, in) of a layer, those of tokens that are trained, X = U S V^T, and

    A = V_r^T (r, in),    B = 0

so the model starts as its base. X is not kept: of each batch the leading directions so far, each with its
weight in S, take in the new rows by one more decomposition (an incremental SVD). Layers that read the same
tensor share it.

PEFT's own does this in a loop that the user runs (`initialize_lora_eva_weights`): it centres X, goes on until
the directions stand still, and hands ranks from layer to layer (rho); here the number of batches is given and
every layer keeps its rank (PEFT's rho = 1).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from luthier import checks
from luthier.errors import MethodError
from luthier.tuning.batch_loss import Loss, LossCallback
from luthier.tuning.probe import evaluating

MORE = 4  # directions that are kept on the way, for each that will be used


def take_in(found: Tensor | None, rows: Tensor, count: int) -> Tensor:
    """The leading `count` right singular vectors, each times its singular value, of all rows so far.

    Args:
        found: what the call before returned, (k, in); None at the first.
        rows: (tokens, in).
    """
    rows = rows.float() if found is None else torch.cat([found, rows.float()])
    _, values, directions = torch.linalg.svd(rows, full_matrices=False)
    return values[:count, None] * directions[:count]


class StartFromData(LossCallback):
    """Draws A from the first batches of the training data, before the first step."""

    def __init__(self, model: nn.Module, batches: int):
        super().__init__(model)
        self.batches = batches

    def on_train_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step > 0 or train_dataloader is None:
            return  # goes on from a checkpoint, which has A
        if args.world_size > 1 or args.deepspeed or args.fsdp:
            raise MethodError(
                "init_lora_weights: eva reads the data in one process.",
                fix="Train on one device, or write init_lora_weights: pissa.",
            )
        data = train_dataloader.dataset
        if not hasattr(data, "__len__"):
            raise MethodError(
                "init_lora_weights: eva draws batches of the training rows, and these are a stream.",
                fix="Give a data set of known length, or write init_lora_weights: pissa.",
            )
        rows = DataLoader(
            data,
            batch_size=min(args.per_device_train_batch_size, len(data)),
            shuffle=True,
            collate_fn=train_dataloader.collate_fn,
            generator=torch.Generator().manual_seed(args.seed),  # the trainer's own order stays as it is
        )
        with torch.random.fork_rng():
            start(self.model, islice(rows, self.batches), self.loss_of)


def start(model: Any, batches: Iterable[dict[str, Any]], loss_of: Loss) -> None:
    """Set A of the active adapter's linear layers to what they read in the batches."""
    name = model.active_adapter
    layers: dict[str, Any] = {
        path: m for path, m in model.named_modules() if isinstance(m, LoraLayer) and name in m.lora_A
    }
    found: dict[str, Tensor] = {}
    with evaluating(model):
        for batch in batches:
            with _listening(layers, name, _trained(batch), found):
                loss_of(dict(batch))  # a trainer takes out of it what is not the model's
    drawn = 0
    for path, directions in found.items():
        a = layers[path].lora_A[name].weight  # (r, in)
        rows = nn.functional.normalize(directions[: len(a)], dim=1)
        with torch.no_grad():
            a[: len(rows)] = rows.to(a)
        drawn += len(rows)
    total = sum(len(layer.lora_A[name].weight) for layer in layers.values())
    detail = "rows of A are directions of the data" + ("; the others stay random" if drawn < total else "")
    checks.record("before", "start from the data", drawn > 0, drawn, total, detail)


def _trained(batch: dict[str, Any]) -> Tensor:
    """(batch, seq): the tokens with a label; where labels are of rows, those that are no padding."""
    ids, labels = batch["input_ids"], batch.get("labels")
    if labels is not None and labels.shape == ids.shape:
        return labels != -100
    mask = batch.get("attention_mask")
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


@contextmanager
def _listening(layers: dict[str, Any], name: str, wanted: Tensor, found: dict[str, Tensor]) -> Iterator[None]:
    """Inside, what the layers read goes into `found`, for one batch."""
    # By the tensor that is read, which is kept alive: another could get its id.
    shared: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def listen(path: str, count: int) -> Callable[..., None]:
        def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if x.shape[:-1] != wanted.shape or not wanted.any():
                return
            if (id(x), count) not in shared:
                shared[id(x), count] = x, take_in(found.get(path), x[wanted.to(x.device)], count)
            found[path] = shared[id(x), count][1]

        return note

    handles = [
        layer.register_forward_pre_hook(listen(path, MORE * len(layer.lora_A[name].weight)))
        for path, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
