"""SFT: supervised fine-tuning on conversations, prompts with answers, or text.

Paper: Wei et al., 2022, "Finetuned Language Models Are Zero-Shot Learners", arXiv 2109.01652; the loss on
answers alone as in Ouyang et al., 2022, "Training language models to follow instructions with human
feedback", arXiv 2203.02155.
Pick it when you have examples of what the model should say: the second stage of training, and the usual one.
Cost: one forward and backward pass over the tokens; with an adapter, no gradient of the frozen weights.

For token ids x_1 ... x_T of an example and the set S of trained positions (the assistant's turns, with the
token that ends each):

    L = - sum over examples, t in S of log p(x_t | x_<t)  /  number of such t in the accumulated batch

One mean over the whole accumulated batch: k micro-batches are one batch, whatever their lengths. What is
trained is decided by the tuning method; the masks come from `luthier.data.tokenize.encode`.

Examples of a batch share a row (`packing`), kept apart by positions and attention: the gradient is that of
the padded batch. Differs from TRL in what is not computed (`luthier.alignment.causal`), not in the loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from luthier.alignment import causal, row_inputs
from luthier.alignment.defaults import arguments
from luthier.data.load import Loaded
from luthier.data.tokenize import Encoded, encode
from luthier.options import option


@dataclass
class Config:
    """Options of SFT."""

    max_length: int = option(1024, "longest example in tokens; longer ones are cut and counted", ge=2)
    train_on: Literal["assistant_all", "assistant_last", "completion", "all"] = option(
        "assistant_all",
        "tokens that are trained: all turns of the assistant, the last one, the completion, or all",
        choices=("assistant_all", "assistant_last", "completion", "all"),
    )
    chat: Literal["auto", "on", "off"] = option(
        "auto", "render prompt and completion with the chat template", choices=("auto", "on", "off")
    )
    packing: bool | Literal["auto", "rows"] = option(
        "auto",
        "examples that share a row: true those of a batch, rows as many as fit into max_length (a batch is "
        "then that many full rows), false none (padding); auto is true where the model keeps them apart",
        choices=(True, False, "auto", "rows"),
    )
    allow_empty: bool = option(False, "leave out examples that keep no trained token, instead of refusing")
    template_options: dict | None = option(None, "variables of the chat template")


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
        DataError: rows that cannot be trained on. RecipeError: wrong training arguments.
        CheckError: packing was asked for and the model mixes packed documents.
    """
    encoded, held_out = (
        part
        if part is None or isinstance(part, Encoded)
        else row_inputs.add(
            model,
            part,
            encode(
                part,
                tokenizer,
                max_length=config.max_length,
                train_on=config.train_on,
                chat=config.chat,
                allow_empty=config.allow_empty,
                options=config.template_options,
            ),
        )
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
