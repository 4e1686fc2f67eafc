"""Text prompts: what a search over prompts finds. They classify with a language model whose weights stay.

    s(c | x) = sum_i w_i score_i(c | x)         one score for each template t_i (`luthier.evaluation.cloze`)

The file is small and readable: templates with their weights, the words of each class, what the search
measured, and the fingerprint of the model that it was made for. Another model can use it too; that is said.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from luthier import checks
from luthier.data.load import Loaded
from luthier.errors import DataError, ModelError, did_you_mean
from luthier.evaluation.cloze import How, Scorer, Template, label_scores
from luthier.evaluation.names import PROMPT_FILE
from luthier.models import saving, structure

FORMAT = 1


@dataclass
class TextPrompt:
    """Templates that vote, and the words that stand for each class.

    Attributes:
        templates: {template: weight}, in order.
        labels: {class: its words}. Classes are named as in the data.
        how: how the words of a class are joined, see `label_scores`.
        method: what found it. scores: what the search measured. history: how it went, a line a step.
        base: name, revision and fingerprint of the model.
    """

    templates: dict[str, float]
    labels: dict[str, list[str]]
    how: How = "sum"
    method: str = "manual"
    scores: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    base: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path | str) -> "TextPrompt":
        """Read a file, or the file of that kind in a folder.

        Raises:
            ModelError: it is not there, or no text prompt.
        """
        path = Path(path)
        path = path / PROMPT_FILE if path.is_dir() else path
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record.pop("format") != FORMAT:
                raise ValueError("it was written by a later version")
            return cls(**record)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ModelError(f"{path} cannot be read as a text prompt: {error}.") from error

    def save(self, folder: Path | str) -> Path:
        """Write it into a folder, which is made where it is not there."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        record = {"format": FORMAT} | asdict(self) | {"history": []}
        lines = ",\n  ".join(json.dumps(entry, ensure_ascii=False) for entry in self.history)
        text = json.dumps(record, indent=1, ensure_ascii=False)
        # A line for each step.
        text = text.replace('\n "history": []', f'\n "history": [{lines}]')
        (folder / PROMPT_FILE).write_text(text + "\n", encoding="utf-8")
        return folder / PROMPT_FILE

    def made_for(self, model: nn.Module) -> "TextPrompt":
        """Note the model."""
        self.base = _base(model)
        return self

    def class_scores(self, scorer: Scorer, rows: Sequence[dict[str, Any]], title: str = "") -> Tensor:
        """s(c | x) for each row: (rows, classes), in the order of `labels`."""
        total = torch.zeros(len(rows), len(self.labels))
        for text, weight in self.templates.items():
            template = Template.of(text)
            words, groups = label_words(scorer, self.labels, template)
            found = scorer.log_probs(scorer.encode(template, rows), words, title)
            total += weight * label_scores(found, groups, self.how)
        return total

    def classify(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, loaded: Loaded, *, batch_size: int = 16
    ) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Predicted and right class (n,) of every row, and the names of the classes.

        Raises:
            DataError: rows of another type, or a class that has no word.
        """
        wanted = class_numbers(loaded, list(self.labels))
        found = _base(model)
        own = not self.base or self.base["fingerprint"] == found["fingerprint"]
        detail = "" if own else f"found on {self.base['name']}, used on {found['name']}"
        checks.record("before", "text prompt on its own model", True, "yes" if own else "no", detail=detail)
        scorer = Scorer(model, tokenizer, batch_size=batch_size)
        scores = self.class_scores(scorer, loaded.records, "classes")
        return scores.argmax(1).numpy(), np.array(wanted), list(self.labels)


def label_words(
    scorer: Scorer, labels: dict[str, list[str]], template: Template
) -> tuple[list[int], list[list[int]]]:
    """Ids of all words of the classes, and for each class the places of its own among them."""
    words: list[int] = []
    groups = []
    for group in labels.values():
        groups.append(list(range(len(words), len(words) + len(group))))
        words += [scorer.word_id(word, spaced=template.spaced) for word in group]
    return words, groups


def class_numbers(loaded: Loaded, names: Sequence[str]) -> list[int]:
    """The number of each row's class.

    Raises:
        DataError: rows of another type, or a class that is none of `names`.
    """
    if loaded.type != "classification":
        raise DataError(
            f"{loaded.spec.path} holds rows of type {loaded.type}, but a text prompt sorts into classes.",
            fix="Give rows of text and label; of facts the text is the subject, the label the object.",
        )
    numbers = {name: i for i, name in enumerate(names)}
    found = []
    for i, row in enumerate(loaded.records):
        name = class_name(row)
        if name not in numbers:
            raise DataError(
                f"{loaded.where(i)}: the prompt has no word for class '{name}'.",
                fix=did_you_mean(name, numbers),
            )
        found.append(numbers[name])
    return found


def class_name(row: dict[str, Any]) -> str:
    """The class of a row, as the labels of a prompt name it."""
    return str(row["label"]).strip()


def _base(model: nn.Module) -> dict[str, Any]:
    base = structure.base(model)
    origin = getattr(base, "luthier_origin", {})
    return {
        "name": origin.get("name") or type(base).__name__,
        "revision": origin.get("revision"),
        "fingerprint": saving.fingerprint(model),
    }
