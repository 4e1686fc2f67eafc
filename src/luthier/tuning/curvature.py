"""Curvature of LoRA layers: their inputs and output gradients, and the Kronecker factors made of them.

Source of the factors: Martens & Grosse, 2015, "Optimizing Neural Networks with Kronecker-factored Approximate
Curvature", arXiv 1503.05671; over positions as "expand" in Eschenhagen et al., 2023, arXiv 2311.00636.

A layer y = W x + s B A x has two learnt matrices, each a linear layer of its own:

    A (r, in)     input x,        gradient of its output   s B^T g          g = dL/dy
    B (out, r)    input A x,      gradient of its output   s g

What is heard at the base layer, x and g, is enough for both. A hook on the base layer also makes the fused
layers (`acceleration/fused_lora.py`, `fused_mlp.py`) step aside.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from luthier.errors import MethodError
from luthier.models import structure
from luthier.models.bits import digest
from luthier.tuning.probe import evaluating

FULL = 512  # up to this size a sum of outer products is kept whole; above, as its leading eigenvectors
SPARE = 10  # directions more than are kept, so that the last one kept is right
EXACT = 16  # classes up to which the Fisher's expectation is summed and not sampled

IGNORED = -100  # the label of a position that is not trained

Calls = dict[str, list[tuple[Tensor, Tensor]]]
Batch = dict[str, Any]
Rows = Callable[[nn.Module, Batch], tuple[Tensor, Tensor | None]]
"""(model, batch) -> logits (n, classes) and labels (n), or None where the batch has none."""


def lora_layers(model: Any) -> dict[str, Any]:
    """The layers with the active adapter, by name."""
    name = model.active_adapter
    found = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer) and name in m.lora_A}
    return dict(sorted(found.items()))


@contextmanager
def listening(model: nn.Module, layers: dict[str, Any]) -> Iterator[Calls]:
    """Inside, in evaluation mode and with gradients, each layer's calls are kept: (x, its base's output)."""
    calls: Calls = defaultdict(list)

    def hear(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            # The layer adds to this output, so the gradients of both are one.
            heard = output if output.requires_grad else output.detach().requires_grad_()
            calls[name].append((args[0].detach(), heard))
            return heard

        return hook

    hooks = [layer.get_base_layer().register_forward_hook(hear(name)) for name, layer in layers.items()]
    try:
        with evaluating(model), torch.enable_grad():
            yield calls
    finally:
        for handle in hooks:
            handle.remove()


def output_gradients(logits: Tensor, calls: Calls, seeds: Tensor) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """(x, g) of each call that the logits depend on, g (seeds, ..., out).

    Args:
        logits: (n, classes); seeds: (seeds, n, classes), the gradients that are pulled back.
    """
    places = [(name, x, y) for name, heard in calls.items() for x, y in heard]
    outputs = [y for _, _, y in places]
    pulled = [
        torch.autograd.grad(logits, outputs, seed, retain_graph=True, allow_unused=True) for seed in seeds
    ]
    found = defaultdict(list)
    for (name, x, _), each in zip(places, zip(*pulled, strict=True), strict=True):
        used = [g for g in each if g is not None]
        if used:
            found[name].append((x, torch.stack(used)))
    return found


def fisher_seeds(logits: Tensor, generator: torch.Generator, separate: bool) -> Tensor:
    """Seeds whose pulled-back gradients g have sum_s g g^T = E_{y ~ p}[g_y g_y^T] of -log p(y).

    Args:
        logits: (n, classes).
        separate: no position of a layer takes part in two rows. Otherwise their y must be independent.

    Returns:
        (classes, n, classes), exact; for many classes or rows that meet (1, n, classes), one y drawn a row.
    """
    precise = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    p = precise.softmax(-1).to(logits.dtype)  # (n, classes)
    classes = p.shape[-1]
    if separate and classes <= EXACT:
        one = torch.eye(classes, dtype=p.dtype, device=p.device)
        return p.T.sqrt()[:, :, None] * (p - one[:, None])
    drawn = torch.multinomial(p.float().cpu(), 1, generator=generator).to(p.device)
    return (p - torch.zeros_like(p).scatter_(1, drawn, 1.0))[None]


def parts(layer: Any, name: str, x: Tensor, g: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output gradient of A and of B, as in the table above, in fp32 at least.

    Args:
        x: (..., in); g: (seeds, ..., out).
    """
    a, b = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
    dtype = torch.promote_types(a.dtype, torch.float32)
    a, b, x, g = a.to(dtype), b.to(dtype), x.to(dtype), g.to(dtype) * layer.scaling[name]
    return {"lora_A": (x, g @ b), "lora_B": (x @ a.T, g)}


@dataclass
class Block:
    """Curvature U diag(p) U^T ⊗ Q diag(q) Q^T of one matrix: U (d, k), p (k), Q (r, r), q (r)."""

    u: Tensor
    p: Tensor
    q_vectors: Tensor
    q: Tensor

    def eigenvalues(self) -> Tensor:
        """(k, r)."""
        return self.p[:, None] * self.q


class Gram:
    """A sum of outer products z z^T (size, size), of which the `rank` leading eigenvectors are asked for."""

    def __init__(self, size: int, rank: int):
        self.rank = min(rank, size)
        self.whole = size <= FULL
        self.value: Tensor | None = None  # the sum (size, size), or a root of it (size, rank + spare)

    def add(self, z: Tensor) -> None:
        """Add the outer products of the rows of z (n, size)."""
        if self.whole:
            product = z.T @ z
            self.value = product if self.value is None else self.value + product
            return
        joined = z.T if self.value is None else torch.cat([self.value, z.T], dim=1)
        self.value = leading_root(joined, self.rank + SPARE)

    def leading(self) -> tuple[Tensor, Tensor]:
        """Eigenvectors (size, rank) and eigenvalues (rank), the largest first."""
        assert self.value is not None
        if not self.whole:
            vectors, roots, _ = torch.linalg.svd(self.value.double(), full_matrices=False)
            return vectors[:, : self.rank], roots[: self.rank].square()
        values, vectors = torch.linalg.eigh(self.value.double())
        return vectors.flip(1)[:, : self.rank], values.flip(0)[: self.rank].clamp_min(0)


def leading_root(z: Tensor, rank: int) -> Tensor:
    """R (size, <= rank) with R R^T the best approximation of z z^T, for z (size, n); exact where it fits."""
    if min(z.shape) <= 2 * rank:
        vectors, roots, _ = torch.linalg.svd(z, full_matrices=False)
        return vectors[:, :rank] * roots[:rank]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vectors, roots, _ = torch.svd_lowrank(z, q=rank, niter=2)
    return vectors * roots


class Kronecker:
    """The curvature of one matrix of a LoRA as the product of two sums: big (d, d) and small (r, r).

    The Fisher of the weight, with d first, is about big ⊗ small / count; exactly, for one position in all.
    """

    def __init__(self, size: int, r: int, rank: int, big_is_input: bool):
        self.big = Gram(size, rank)
        self.small: Tensor | float = 0.0
        self.r = r
        self.big_is_input = big_is_input
        self.count = 0

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Positions without a gradient (padding, or what the output does not see) do not count.

        Args:
            inputs: (n, i); gradients: (seeds, n, o).
        """
        counted = (gradients != 0).any(-1).any(0)
        inputs, gradients = inputs[counted], gradients[:, counted].flatten(0, 1)
        big, small = (inputs, gradients) if self.big_is_input else (gradients, inputs)
        if len(inputs):
            self.big.add(big)
            self.small = self.small + small.T @ small
            self.count += len(inputs)

    def block(self) -> Block:
        """The product in its eigenvectors."""
        assert isinstance(self.small, Tensor)
        u, p = self.big.leading()
        q, vectors = torch.linalg.eigh(self.small.double())
        return Block(u, p / self.count, vectors, q.clamp_min(0))


def kronecker(
    model: Any, batches: Iterable[Batch], rank: int, rows: Rows | None = None, seed: int = 0
) -> tuple[dict[str, Kronecker], float]:
    """The curvature of each matrix of the active adapter, and the log-likelihood of the labels, in one pass.

    Args:
        rank: eigenvectors that are kept of a long factor.
        rows: see `Rows`, one row an example; by default a classifier's or a language model's labels.
        seed: of the labels that are drawn for the Fisher.
    """
    adapter, layers = model.active_adapter, lora_layers(model)
    separate = rows is not None or classifies(model)
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, Kronecker] = {}
    total = 0.0
    for batch in batches:
        with listening(model, layers) as calls:
            logits, labels = (rows or labelled)(model, _inputs(model, batch))
            if labels is None:
                raise MethodError("A batch has no labels: nothing can be fitted to it.")
            pulled = output_gradients(logits, calls, fisher_seeds(logits, generator, separate))
        total += float(logits.detach().double().log_softmax(-1).gather(1, labels[:, None]).sum())
        for name, heard in pulled.items():
            for side, inputs, gradients in (
                (side, *part) for x, g in heard for side, part in parts(layers[name], adapter, x, g).items()
            ):
                into, out = inputs.shape[-1], gradients.shape[-1]
                sizes = (into, out) if side == "lora_A" else (out, into)
                found = sums.setdefault(f"{name}.{side}", Kronecker(*sizes, rank, side == "lora_A"))
                found.add(inputs.reshape(-1, into), gradients.reshape(len(gradients), -1, out))
    return {name: found for name, found in sums.items() if found.count}, total


def jacobians(
    model: Any, batch: Batch, rows: Rows | None = None
) -> tuple[Tensor, Iterator[tuple[str, Tensor]]]:
    """Logits (n, classes), and of each matrix of the active adapter its Jacobian (n, classes, d, r).

    Raises:
        MethodError: rows that are not those of the batch, or a model that mixes its examples.
    """
    if rows is None and not classifies(model):
        raise MethodError(
            "The predictions of a language model are over its whole vocabulary.",
            fix="Say which tokens can be the answer: rows=luthier.tuning.curvature.answers(ids).",
        )
    adapter, layers = model.active_adapter, lora_layers(model)
    with listening(model, layers) as calls:
        logits, _ = (rows or labelled)(model, _inputs(model, batch))
        n, classes = logits.shape
        eye = torch.eye(classes, dtype=logits.dtype, device=logits.device)
        pulled = output_gradients(logits, calls, eye[:, None].expand(classes, n, classes))

    def each() -> Iterator[tuple[str, Tensor]]:
        for name, heard in pulled.items():
            sums: dict[str, Tensor] = {}
            for x, g in heard:
                if len(x) != n:
                    raise MethodError(f"'{name}' mixes the examples of a batch; they must stay apart.")
                for side, (inputs, gradients) in parts(layers[name], adapter, x, g).items():
                    z, w = (
                        inputs.reshape(n, -1, inputs.shape[-1]),
                        gradients.reshape(classes, n, -1, gradients.shape[-1]),
                    )
                    formula = "nti,cnto->ncio" if side == "lora_A" else "nti,cnto->ncoi"
                    made = torch.einsum(formula, z, w).double()
                    sums[side] = sums[side] + made if side in sums else made
            yield from ((f"{name}.{side}", jacobian) for side, jacobian in sums.items())

    return logits.detach(), each()


# What of a batch counts ----------------------------------------------------------------------------------


def classifies(model: nn.Module) -> bool:
    return structure.task(model) == "classification"


def has_labels(batch: Batch) -> bool:
    return "labels" in batch and "input_ids" in batch


def labelled(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Logits and labels: of the examples of a classifier, of the labelled positions of a language model."""
    labels = batch.get("labels")
    if structure.task(model) == "seq2seq":
        logits = model(**batch).logits  # the decoder's inputs are made of the labels
    else:
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        if not classifies(model) and labels is not None:
            logits, labels = logits[:, :-1], labels[:, 1:]
    if labels is None or classifies(model):
        return logits, labels
    kept = labels != IGNORED
    return logits[kept], labels[kept]


def answers(ids: Sequence[int]) -> Rows:
    """Rows of a causal language model that answers with one of the tokens `ids`, after the last token.

    Labels, where there are some, are indices into `ids`.
    """

    def read(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        places = torch.arange(mask.shape[1], device=mask.device)
        last = (mask * places).argmax(-1)  # padding may be on either side
        return logits[torch.arange(len(logits)), last][:, list(ids)], batch.get("labels")

    return read


def _inputs(model: nn.Module, batch: Batch) -> Batch:
    """The tensors of a batch on the model's device; collators add numbers too."""
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}


# The adapter's weights -----------------------------------------------------------------------------------


def weights(model: Any) -> dict[str, Tensor]:
    """A and B of the active adapter, by the layer's name and `.lora_A` or `.lora_B`."""
    return {
        f"{name}.{side}": getattr(layer, side)[model.active_adapter].weight.detach()
        for name, layer in lora_layers(model).items()
        for side in ("lora_A", "lora_B")
    }


def bits(model: Any) -> int:
    """A hash of them."""
    parts = (f"{name} {digest(w)}\n" for name, w in weights(model).items())
    return int(hashlib.sha256("".join(parts).encode()).hexdigest()[:15], 16)
