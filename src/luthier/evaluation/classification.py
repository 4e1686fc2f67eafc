"""Classes predicted by a sequence classifier, and F1 from counts."""

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from luthier.data.load import Loaded
from luthier.data.tokenize import encode_classification
from luthier.errors import DataError
from luthier.models import structure
from luthier.terminal import track
from luthier.tuning.hooks import of_batch, row_inputs
from luthier.tuning.probe import evaluating


def classify(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, loaded: Loaded, *, batch_size: int = 16
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Predicted and right class (n,) of every row, and the names of the classes.

    Raises:
        DataError: rows of another type, or classes that are not the model's.
    """
    config = structure.base(model).config
    names = class_names(config, loaded)
    limit = getattr(config, "max_position_embeddings", None)
    encoded = encode_classification(loaded, tokenizer, max_length=limit, labels=names)
    if len(encoded.label_names or []) > config.num_labels:
        raise DataError(
            f"{loaded.spec.path} has {len(encoded.label_names or [])} classes, the model {config.num_labels}."
        )
    order = np.argsort([-len(ids) for ids in encoded.dataset["input_ids"]], kind="stable")
    rows = encoded.dataset.remove_columns("labels")
    extra = row_inputs(model, loaded.records)
    collate = DataCollatorWithPadding(tokenizer)
    predicted = np.zeros(len(order), dtype=int)
    with evaluating(model):
        for start in track(range(0, len(order), batch_size), "classes"):
            batch = order[start : start + batch_size]
            inputs = collate([rows[int(i)] for i in batch]).to(structure.base(model).device)
            # The mask is made from lengths: a pad id may stand inside a text too.
            lengths = torch.tensor([len(rows[int(i)]["input_ids"]) for i in batch])
            at = torch.arange(inputs["input_ids"].shape[1])
            real = (
                at < lengths[:, None] if tokenizer.padding_side == "right" else at.flip(0) < lengths[:, None]
            )
            inputs["attention_mask"] = real.long().to(inputs["input_ids"].device)
            inputs.update(of_batch(extra, batch, inputs["input_ids"].device))
            predicted[batch] = model(**inputs).logits.argmax(-1).cpu().numpy()
    return predicted, np.array(encoded.dataset["labels"]), encoded.label_names or []


def class_names(config: Any, loaded: Loaded) -> list[str] | None:
    """The model's names of its classes, in order; None where it has none of its own (LABEL_0, ...)."""
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    if names == [f"LABEL_{i}" for i in range(config.num_labels)]:
        return None
    found = {str(row["label"]) for row in loaded.records}
    # Data may number the classes that the model names.
    return None if found <= {str(i) for i in range(len(names))} and not found & set(names) else names


def class_counts(predicted: np.ndarray, wanted: np.ndarray, count: int) -> np.ndarray:
    """(right, predicted, wanted) of each of `count` classes for each row: (n, count * 3)."""
    classes = np.arange(count)
    is_predicted = predicted[:, None] == classes  # (n, classes)
    is_wanted = wanted[:, None] == classes
    counts = np.stack([is_predicted & is_wanted, is_predicted, is_wanted], axis=-1)  # (n, classes, 3)
    return counts.reshape(len(predicted), -1).astype(float)


def macro_f1(sums: np.ndarray) -> np.ndarray:
    """Mean F1 over the classes that occur, as predicted or as wanted: (..., classes * 3) -> (...)."""
    counts = sums.reshape(*sums.shape[:-1], -1, 3)
    below = counts[..., 1] + counts[..., 2]
    each = np.divide(2 * counts[..., 0], below, out=np.zeros(below.shape), where=below != 0)
    occurring = np.maximum((below != 0).sum(-1), 1)
    return each.sum(-1) / occurring


def binary_f1(sums: np.ndarray) -> np.ndarray:
    """F1 of class 1: (..., 6) -> (...); 0 where it is neither predicted nor wanted."""
    right, predicted, wanted = sums[..., 3], sums[..., 4], sums[..., 5]
    below = predicted + wanted
    return np.divide(2 * right, below, out=np.zeros(below.shape), where=below != 0)
