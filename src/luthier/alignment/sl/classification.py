"""Classification: one class for a text or a pair of texts.

Paper: Devlin et al., 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding", arXiv 1810.04805; decoders as in Radford et al., 2018 (the state of the last token).
Pick it when the answer is one of a few labels: cheaper and surer than generating the label as text.
Cost: one forward and backward pass over the texts; the head has hidden x classes parameters.

    z = head(h)  (batch, classes),      L = - sum over examples of log softmax(z)[y]  /  number of examples

h is the encoder's pooled state, or a decoder's state at the last real token. The mean is over the whole
accumulated batch. Texts are padded on the right with the mask from their lengths. A decoder without a pad
token finds the last token by the pad id in its config: `luthier.load(task="classification")` gives it one
that no text contains, for with pad = eos the final eos would be taken for padding.

Differs from `transformers.Trainer` on such models: there k micro-batches weigh as they come, here each
example weighs the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments

from luthier.alignment import row_inputs
from luthier.alignment.defaults import arguments
from luthier.alignment.reliable import Reliable
from luthier.data.load import Loaded
from luthier.data.packing import PaddedCollator
from luthier.data.tokenize import Encoded, encode_classification
from luthier.errors import ModelError
from luthier.models import structure
from luthier.options import option


@dataclass
class Config:
    """Options of classification."""

    max_length: int = option(512, "longest text in tokens; longer ones are cut and counted", ge=2)
    class_weights: list | None = option(None, "weight of each class in the loss, in the order of the classes")


class ClassificationTrainer(Reliable, Trainer):
    """Cross-entropy over classes, every example of an accumulated batch weighing the same."""

    def __init__(self, *args: Any, class_weights: list[float] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.class_weights = None if class_weights is None else torch.tensor(class_weights)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels = inputs["labels"]
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        logits = outputs["logits"].float()  # (batch, classes)
        weights = None if self.class_weights is None else self.class_weights.to(logits)
        loss = nn.functional.cross_entropy(
            logits, labels, weight=weights, label_smoothing=self.args.label_smoothing_factor, reduction="sum"
        )
        loss = loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)
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
) -> Trainer:
    """The trainer; the model learns the names of the classes, so that a saved one can tell them.

    Raises:
        DataError: rows that are not classified texts. RecipeError: wrong training arguments.
        ModelError: the model has another number of classes.
    """
    encoded = (
        data
        if isinstance(data, Encoded)
        else row_inputs.add(model, data, encode_classification(data, tokenizer, max_length=config.max_length))
    )
    names = encoded.label_names or []
    held_out = (
        eval_data
        if eval_data is None or isinstance(eval_data, Encoded)
        else row_inputs.add(
            model,
            eval_data,
            encode_classification(eval_data, tokenizer, max_length=config.max_length, labels=names),
        )
    )
    _name_classes(model, names, config)
    chosen = arguments(args, model, evaluates=held_out is not None)
    chosen.remove_unused_columns = False
    return ClassificationTrainer(
        model=model,
        args=chosen,
        data_collator=PaddedCollator(structure.base(model).config.pad_token_id),
        train_dataset=encoded.dataset,
        eval_dataset=None if held_out is None else held_out.dataset,
        processing_class=tokenizer,
        compute_metrics=accuracy,
        callbacks=list(callbacks),
        expected_memory=expected_memory,
        encodings=[part.report for part in (encoded, held_out) if part is not None],
        class_weights=config.class_weights,
    )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of texts whose most probable class is theirs."""
    logits = prediction.predictions
    if isinstance(logits, tuple):
        logits = logits[0]
    return {"accuracy": float((np.argmax(logits, axis=-1) == prediction.label_ids).mean())}


def _name_classes(model: nn.Module, names: list[str], config: Config) -> None:
    settings = structure.base(model).config
    if len(names) != settings.num_labels:
        raise ModelError(
            f"The data have {len(names)} classes ({', '.join(names[:8])}), the model has "
            f"{settings.num_labels}.",
            fix=f"Load the model with num_labels: {len(names)}.",
        )
    if config.class_weights is not None and len(config.class_weights) != len(names):
        raise ModelError(
            f"class_weights has {len(config.class_weights)} entries for {len(names)} classes.",
            fix="Give one weight a class.",
        )
    settings.id2label = dict(enumerate(names))
    settings.label2id = {name: number for number, name in enumerate(names)}
    settings.problem_type = "single_label_classification"
