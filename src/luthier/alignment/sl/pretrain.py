"""Pre-training: the next token of raw text, every token trained.

Paper: Radford et al., 2018, "Improving Language Understanding by Generative Pre-Training"; continued on
text of a domain as in Gururangan et al., 2020, "Don't Stop Pretraining", arXiv 2004.10964.
Pick it when you have text of a field and no answers: it teaches language and facts, not behaviour.
Cost: one forward and backward pass over the tokens.

    L = - sum over t >= 2 of log p(x_t | x_<t)  /  number of such t in the accumulated batch

A document is cut into blocks of `max_length` tokens; blocks of several documents share a row, kept apart by
positions and attention (`packing: rows`), so that no token is lost and none is predicted from another
document. The common practice of cutting one long stream of tokens into rows lets documents see each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from luthier.alignment import causal, row_inputs
from luthier.alignment.defaults import arguments
from luthier.data.load import Loaded
from luthier.data.tokenize import Encoded, encode_pretrain
from luthier.options import option


@dataclass
class Config:
    """Options of pre-training."""

    max_length: int = option(1024, "tokens of a block and of a row", ge=2)
    packing: bool | Literal["rows"] = option(
        "rows",
        "blocks that share a row: rows as many as fit into max_length, true those of a batch, false none",
        choices=(True, False, "rows"),
    )

    cuts_documents: ClassVar[bool] = True  # into blocks; other objectives leave the rest of a long one out


def trainer(
    config: Config,
    model: nn.Module,
    tokenizer: Any,
    data: Loaded | Encoded,
    *,
    args: TrainingArguments | dict[str, Any] | None = None,
    eval_data: Loaded | Encoded | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    expected_memory: int | None = None,
) -> Trainer:
    """The trainer; `data` are encoded here where they are not yet.

    Raises:
        DataError: rows that are not text. RecipeError: wrong training arguments.
        CheckError: the model mixes packed documents.
    """
    encoded, held_out = (
        part
        if part is None or isinstance(part, Encoded)
        else row_inputs.add(model, part, encode_pretrain(part, tokenizer, max_length=config.max_length))
        for part in (data, eval_data)
    )
    assert encoded is not None
    return causal.build(
        model,
        tokenizer,
        encoded.dataset,
        args=arguments(args, model, evaluates=held_out is not None),
        max_length=config.max_length,
        packing=config.packing,
        eval_dataset=None if held_out is None else held_out.dataset,
        callbacks=callbacks,
        expected_memory=expected_memory,
        encodings=[part.report for part in (encoded, held_out) if part is not None],
    )
