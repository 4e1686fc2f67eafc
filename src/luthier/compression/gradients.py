"""Gradients of a model's loss on calibration data: of the joint loss, and their squares sequence by sequence.

A sequence j of a batch, without its padding, has the loss L_j, the mean over its targets n_j:

    g = sum_j n_j dL_j/dW / sum_j n_j          gradient of the joint loss, the mean over all targets
    F = (1/N) sum_j (dL_j/dW)^2                diagonal of the empirical Fisher matrix

Sequences run one at a time: activations of one are in memory, whatever the batches are.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from luthier.errors import DataError, MethodError
from luthier.models import structure
from luthier.terminal import progress

Batch = Mapping[str, Tensor]


def sequences(model: nn.Module, batches: Iterable[Batch]) -> list[dict[str, Tensor]]:
    """The rows of the batches without padding, each {input_ids, labels} as (1, seq); (1,) labels of a
    classifier.

    Of a causal model the labels are the tokens, unless the batches have some.

    Raises:
        DataError: there are none.
        MethodError: a model of another kind, and no labels.
    """
    rows = []
    for batch in batches:
        ids, labels = batch["input_ids"], batch.get("labels")
        mask = batch.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        if labels is None and structure.task(model) != "causal":
            raise MethodError(
                f"The batches do not say what a {type(model).__name__} is to answer: there is no loss.",
                fix="Give the batches labels, or write importance: l2.",
            )
        labels = ids if labels is None else labels
        for row in range(len(ids)):
            own = labels[row][real[row]] if labels.shape == ids.shape else labels[row]
            rows.append({"input_ids": ids[row][real[row]][None], "labels": own[None]})
    rows = [row for row in rows if row["input_ids"].shape[1] > 1]
    if not rows:
        raise DataError(
            "There are no calibration data.", fix="Give batches of token ids with two tokens or more."
        )
    return rows


def gradients(
    model: nn.Module, batches: Iterable[Batch], names: Collection[str], *, squares: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """g and F of the parameters `names`, float32; F is {} unless `squares`."""
    rows = sequences(model, batches)
    total = sum(_targets(row) for row in rows)
    with _only(model, names) as parameters, progress("gradients") as bar:
        joint = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in parameters.items()}
        fisher = {n: torch.zeros_like(j) for n, j in joint.items()} if squares else {}
        task = bar.add_task("", total=len(rows), note="")
        for row in rows:
            inputs = {key: value.to(model.device) for key, value in row.items()}
            loss = model(**inputs, use_cache=False).loss if _causal(model) else model(**inputs).loss
            made = torch.autograd.grad(loss, list(parameters.values()))
            for name, gradient in zip(parameters, made, strict=True):
                joint[name].add_(gradient.float(), alpha=_targets(row) / total)
                if squares:
                    fisher[name].addcmul_(gradient.float(), gradient.float(), value=1 / len(rows))
            bar.update(task, advance=1)
    return joint, fisher


def _causal(model: nn.Module) -> bool:
    return structure.task(model) == "causal"


def _targets(row: Mapping[str, Tensor]) -> int:
    """Labels that count: of a sequence all but the first, which nothing predicts."""
    labels = row["labels"]
    return int((labels[:, 1:] != -100).sum()) if labels.dim() == 2 else 1


@contextmanager
def _only(model: nn.Module, names: Collection[str]) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, gradients flow to these parameters alone, dropout is off, and nothing else changes."""
    before = {p: p.requires_grad for p in model.parameters()}
    training = [module for module in model.modules() if module.training]
    model.eval()
    for parameter in before:
        parameter.requires_grad_(False)
    chosen = {name: p for name, p in model.named_parameters() if name in names}
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield chosen
    finally:
        for parameter, learns in before.items():
            parameter.requires_grad_(learns)
        for module in training:
            module.training = True
