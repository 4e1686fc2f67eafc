"""Classes predicted by a sequence classifier, and their accuracy and F1."""

from typing import Any

import numpy as np
import torch

from luthier.data.packing import PaddedCollator


@torch.inference_mode()
def predict(model: Any, dataset: Any, pad_token_id: int, *, batch_size: int = 16) -> np.ndarray:
    """Logits (n, classes) of a data set of encoded texts, in order."""
    collate = PaddedCollator(pad_token_id)
    order = sorted(range(len(dataset)), key=lambda i: len(dataset[i]["input_ids"]))
    logits = np.zeros((len(dataset), model.config.num_labels), dtype=np.float32)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = collate([dataset[i] for i in rows])
        batch.pop("labels", None)
        output = model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
        logits[rows] = output.logits.float().cpu().numpy()
    return logits


def confusion(predicted: np.ndarray, gold: np.ndarray, classes: int) -> np.ndarray:
    """What each example adds to (true positives, predicted, gold) of each class, (n, 3 * classes)."""
    ours, theirs = np.eye(classes)[predicted], np.eye(classes)[gold]
    return np.concatenate([ours * theirs, ours, theirs], axis=1)


def macro_f1(sums: np.ndarray) -> np.ndarray:
    """Unweighted mean of the classes' F1, of summed `confusion` (b, 3 * classes), to (b,).

    A class that is neither predicted nor there is left out of the mean.
    """
    right, ours, theirs = np.split(sums, 3, axis=1)
    there = (ours + theirs) > 0
    f1 = np.where(there, 2 * right / np.maximum(ours + theirs, 1), 0)
    return f1.sum(1) / np.maximum(there.sum(1), 1)
