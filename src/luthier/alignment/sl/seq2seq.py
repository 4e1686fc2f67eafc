"""Sequence to sequence: an encoder reads the prompt, a decoder learns to write the completion.

Paper: Sutskever et al., 2014, "Sequence to Sequence Learning with Neural Networks", arXiv 1409.3215; with
transformers as in Raffel et al., 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer" (T5), arXiv 1910.10683.
Pick it when the model is an encoder-decoder (T5, BART): translation, summaries, extraction.
Cost: one forward and backward pass over prompts and completions.

    L = - sum over examples, t of log p(y_t | y_<t, x)  /  number of target tokens in the accumulated batch

The decoder reads y shifted to the right, as the model's own `prepare_decoder_input_ids_from_labels` does it.
The mean is over all target tokens of the accumulated batch, with the end token of each.

Differs from `transformers.Seq2SeqTrainer`, where T5 and BART take a mean in each micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import (
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainingArguments,
)

from luthier.alignment import row_inputs
from luthier.alignment.defaults import arguments
from luthier.alignment.reliable import Reliable
from luthier.data.load import Loaded
from luthier.data.tokenize import IGNORED, Encoded, encode_seq2seq
from luthier.options import option


@dataclass
class Config:
    """Options of sequence-to-sequence training."""

    max_length: int = option(512, "longest prompt in tokens; longer ones are cut and counted", ge=2)
    max_target_length: int = option(256, "longest completion in tokens", ge=2)


class SequenceTrainer(Reliable, Seq2SeqTrainer):
    """Cross-entropy over target tokens, every one of an accumulated batch weighing the same."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels = inputs["labels"]  # (batch, target)
        outputs = model(
            **{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False
        )
        loss = nn.functional.cross_entropy(
            outputs["logits"].flatten(0, 1).float(),
            labels.flatten(),
            ignore_index=IGNORED,
            label_smoothing=self.args.label_smoothing_factor,
            reduction="sum",
        )
        loss = loss / ((labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss


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
) -> Seq2SeqTrainer:
    """The trainer; all of `Seq2SeqTrainingArguments` can be given.

    Raises:
        DataError: rows other than prompt and completion. RecipeError: wrong training arguments.
    """
    encoded, held_out = (
        part
        if part is None or isinstance(part, Encoded)
        else row_inputs.add(
            model,
            part,
            encode_seq2seq(
                part, tokenizer, max_length=config.max_length, max_target_length=config.max_target_length
            ),
        )
        for part in (data, eval_data)
    )
    assert encoded is not None
    chosen = arguments(args, model, evaluates=held_out is not None, kind=Seq2SeqTrainingArguments)
    chosen.remove_unused_columns = False
    return SequenceTrainer(
        model=model,
        args=chosen,
        # Given the model, it makes the decoder's inputs from the labels.
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        train_dataset=encoded.dataset,
        eval_dataset=None if held_out is None else held_out.dataset,
        processing_class=tokenizer,
        callbacks=list(callbacks),
        expected_memory=expected_memory,
        encodings=[part.report for part in (encoded, held_out) if part is not None],
    )
