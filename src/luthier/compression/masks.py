"""Which weights become zero: patterns, scopes, and keeping the zeros through training.

A pattern "2:4" counts *zeros*: of every four neighbours along the input two are zero, as SparseGPT and Wanda
write it. (Hardware texts count what is kept; the two agree for 2:4 and 4:8.)
"""

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from luthier.errors import MethodError


def parse(pattern: str | None) -> tuple[int, int] | None:
    """(zeros, group) of a pattern such as "2:4"; None where there is none.

    Raises:
        MethodError: it is no such pattern.
    """
    if pattern is None:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", str(pattern))
    zeros, group = (int(found[1]), int(found[2])) if found else (0, 0)
    if not found or not 0 < zeros < group:
        raise MethodError(
            f"pattern: '{pattern}' is not zeros:group.", fix="Write 2:4 or 4:8: so many zeros in each group."
        )
    return zeros, group


def lowest(scores: Tensor, sparsity: float, scope: str = "layer") -> Tensor:
    """Mask of the lowest scores, exactly floor(sparsity n) of them; of equal ones the first.

    Args:
        scores: (rows, columns).
        scope: among what is compared: the whole "layer", or each "row".
    """
    whole = scope == "layer"
    among = scores.numel() if whole else scores.shape[1]
    count = int(sparsity * among + 1e-9)
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    # For the limit alone the numbers may come in any order: as they lie.
    compared = (scores if scores.is_contiguous() else scores.T).reshape(1, -1) if whole else scores
    limit = _smallest(compared, count)
    mask = scores <= limit
    if int(mask.count_nonzero()) > count * len(compared):  # several are equal to the limit
        flat = scores.reshape(1, -1) if whole else scores
        mask, equal = flat < limit, flat == limit
        mask |= equal & (equal.cumsum(1) <= count - mask.sum(1, keepdim=True))
    return mask.reshape(scores.shape)


def _smallest(values: Tensor, count: int) -> Tensor:
    """The `count`-th smallest of each row, (rows, 1), by selection: several times faster than sorting."""
    if values.device.type != "cpu" or values.dtype not in (torch.float32, torch.float64):
        return values.kthvalue(count, dim=1, keepdim=True).values
    # numpy's selection is ten times as fast as torch's.
    found = np.partition(values.detach().numpy(), count - 1, axis=1)[:, count - 1 : count]
    return torch.from_numpy(found.copy())


def in_groups(scores: Tensor, zeros: int, group: int) -> Tensor:
    """Mask of the `zeros` lowest scores of each `group` neighbours of a row; of equal ones the first."""
    columns = scores.reshape(-1, group).T.contiguous()  # (group, all groups)
    lower = torch.zeros(columns.shape, dtype=torch.int16, device=scores.device)
    for i in range(group):
        for j in range(i + 1, group):
            later = columns[j] < columns[i]
            lower[i] += later
            lower[j] += ~later
    return (lower < zeros).T.reshape(scores.shape)


def require_divides(columns: int, group: int, name: str) -> None:
    """Raise MethodError where the groups of a pattern do not fill a row."""
    if columns % group:
        raise MethodError(
            f"Groups of {group} do not fill a row of the {columns} inputs of {name}.",
            fix="Choose a pattern whose group divides it, or leave the layer out (exclude).",
        )


def zeroed(weight: Tensor, mask: Tensor) -> Tensor:
    """The weight, finite, with zeros where the mask is: as `masked_fill`, without its branches."""
    return (weight * ~mask).add_(0)  # -0 + 0 = 0


def share_of_zeros(weight: Tensor) -> float:
    return (weight == 0).count_nonzero().item() / weight.numel()


SPARSE = 0.25  # from this share of zeros on a weight counts as pruned


class KeepZeros(TrainerCallback):
    """Sets weights that were zero when training began back to zero after each step of the optimiser.

    Give it to any `Trainer` in whose model pruned weights learn themselves; under an adapter they do not.
    """

    def __init__(self, least: float = SPARSE):
        self.least = least
        self._masks: dict[nn.Parameter, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._masks = {
            p: p.detach() != 0
            for p in model.parameters()
            if p.requires_grad and p.dim() == 2 and share_of_zeros(p) >= self.least
        }

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter, kept in self._masks.items():
            parameter.mul_(kept)
