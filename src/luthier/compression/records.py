"""What a compression method says of each layer or unit that it changed."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Record:
    """One layer, before and after.

    Attributes:
        before: relative squared error of the layer's output with plain rounding or masking, or 0.
        after: relative squared error of its output as the method left it.
        bits: of a weight, where it was quantised.
        sparsity: share of zeros, where it was pruned.
    """

    name: str
    before: float
    after: float
    bits: float | None = None
    sparsity: float | None = None
    seconds: float = 0.0
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Course:
    """What a method's own training is going to cost, for the planner.

    Attributes:
        steps: of the whole model, or of every block once.
        rows, length: shape of a step's batch, in tokens.
        learns: share of the parameters that learn.
        at_once: blocks that are trained together; None: all.
        written: steps of generation before it.
    """

    steps: int
    rows: int
    length: int
    learns: float = 1.0
    at_once: int | None = None
    written: int = 0
