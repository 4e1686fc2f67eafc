"""What a tuning takes from a causal language model: its perplexity on a page of English, before and after.

The page (`general.txt`) was written for this project, so that no model has been trained on it. It is short:
the figure says whether the model still speaks, not how it fares on a benchmark.
"""

from importlib import resources
from typing import Any

import numpy as np
from torch import nn

from luthier import checks
from luthier.acceleration.fused_lora import fused
from luthier.data.masking import Prefix, plain_ids
from luthier.evaluation.perplexity import perplexity


def general_perplexity(model: nn.Module, tokenizer: Any) -> float:
    """Perplexity of the page, paragraph by paragraph."""
    page = resources.files("luthier.evaluation").joinpath("general.txt").read_text(encoding="utf-8")
    prefix = Prefix(tokenizer, plain=True)
    texts = []
    for paragraph in page.strip().split("\n\n"):
        ids = prefix(paragraph) + plain_ids(tokenizer, paragraph)
        texts.append((ids, np.arange(1, len(ids))))
    with fused(model):
        return perplexity(model, texts).value


def record(before: float, after: float) -> None:
    """Leave a line in the ledger. It refuses nothing: how much may be forgotten is the user's to say."""
    checks.record(
        "end",
        "forgetting on general text",
        np.isfinite(after),
        after / before,
        detail=f"perplexity of a page of plain English {before:.3g} before, {after:.3g} after",
        refuse=False,
    )
