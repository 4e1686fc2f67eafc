"""LPAQA: many wordings of one cloze prompt, collected, measured and weighted against each other.

Paper: Jiang et al., 2020, "How Can We Know What Language Models Know?", TACL 8, arXiv 1911.12543.
Pick it when the answer should depend less on how the question is worded: to measure what a model knows of a
relation, or to classify by an ensemble of texts. Where one text must do, AutoPrompt finds a better one.
Cost: T texts a row are measured once, then the weights are fitted in seconds. Stored are the texts and T
numbers. A query takes one forward pass for each template that kept a weight.

A relation is known by pairs (x, y), subject and object; a template t has one place for x and the gap for y.
Candidates are the user's templates, wordings mined from a corpus (the words between x and y in sentences
that hold both), and paraphrases that the model itself writes. With the log-probabilities of all objects V',

    l_i(y) = log P(y | x, t_i)           normalised over the whole vocabulary
    s(y)   = sum_i w_i l_i(y),           answer: argmax over V' of s(y)

    top1        w is 1 for the template that is right most often on the training pairs
    rank        w is 1/K for the K that are
    optimised   w = softmax(theta), theta maximises sum log softmax_{V'}(s)(y) over the training pairs

theta starts at 0, the equal ensemble. Adding up logarithms is a product of experts: every template can veto.
The softmax over V' belongs to it: without it the loss is linear in w and falls on one template.

Trained: theta, T numbers a relation; no weight of the model. Objects of several tokens are left out, and
counted. One relation a run.

Differs from the authors' code: the loss that stops the fit is that of held-out pairs, and the best weights
are kept, not the last; middle-word mining only (no dependency parser); paraphrases come from the model that
is measured, not from translation there and back; no backward probabilities, no weights of samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from luthier import checks
from luthier.data.load import Loaded
from luthier.data.rows import Row
from luthier.data.spec import DataSpec
from luthier.data.tokenize import prompt_ids
from luthier.errors import MethodError
from luthier.evaluation.cloze import Scorer, Template
from luthier.evaluation.generation import generate
from luthier.evaluation.text_prompt import TextPrompt, class_name
from luthier.options import option
from luthier.terminal import track
from luthier.tuning.search import State, split_rows
from luthier.tuning.wordings import distinct, mine, paraphrase, sentences

LEAST = 0.01  # weight below which a template is dropped: it would cost a pass for nothing
ASK = "Say in other words, keeping [X] and [Y]: {}"


@dataclass
class Config:
    """Options of LPAQA."""

    templates: list = option([], "templates of your own, such as '{text} is a city in {mask}'")
    corpus: str | None = option(None, "text file from whose sentences templates are mined")
    paraphrases: int = option(
        0, "paraphrases of each of your templates that the model is asked for (causal models)", ge=0
    )
    max_templates: int = option(40, "templates of each source at most, the most frequent", ge=1)
    objects: list | None = option(None, "the candidates V'; default: the objects of the data")
    ensemble: Literal["optimised", "rank", "top1"] = option(
        "optimised", "how templates are joined: optimised, rank, top1", choices=("optimised", "rank", "top1")
    )
    top_k: int = option(5, "templates of the rank ensemble", ge=1)
    learning_rate: float = option(0.1, "step size of the fit", gt=0)
    epochs: int = option(500, "passes of the fit over the pairs at most", ge=0)
    patience: int = option(30, "passes without a better held-out loss that end the fit", ge=1)
    batch_size: int = option(32, "texts that go through the model at once", ge=1)

    def search(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        data: Loaded | DataSpec | str | Path,
        *,
        eval_data: Loaded | DataSpec | str | Path | None = None,
        seed: int = 0,
        folder: Path | None = None,
    ) -> TextPrompt:
        """The prompt, see `luthier.tuning.search.Search`.

        Raises:
            MethodError: no template is left, or no object that the model has one token for.
        """
        scorer = Scorer(model, tokenizer, batch_size=self.batch_size)
        train, held_out = split_rows(data, eval_data, seed)
        texts = self._candidates(scorer, [*train, *held_out], seed)
        objects = self._objects(scorer, texts, [*train, *held_out])
        train, held_out = _answerable(train, objects, "train"), _answerable(held_out, objects, "held-out")
        rows = [*train, *held_out]
        logp = _measured(scorer, texts, rows, objects, State(folder).folder)  # (rows, T, V')
        gold = torch.tensor([objects.index(class_name(row)) for row in rows])
        return self._ensemble(texts, objects, logp, gold, len(train)).made_for(model)

    def rows_scored(self, train: int, held_out: int) -> int:
        sources = len(self.templates) * (1 + self.paraphrases)
        return (train + held_out) * (sources + (self.max_templates if self.corpus else 0))

    def _candidates(self, scorer: Scorer, rows: Sequence[Row], seed: int) -> list[str]:
        """Templates of all sources, each wording once."""
        found = [str(Template.of(str(text))) for text in self.templates]
        for text in found:
            scorer.require(Template.of(text))
        gathered: list[str] = []
        if self.corpus is not None:
            pairs = [(row["text"], class_name(row)) for row in rows]
            gathered += mine(sentences(self.corpus), pairs)[: self.max_templates]
        if self.paraphrases:
            if scorer.kind != "causal":
                raise MethodError("Only a causal model writes paraphrases.", fix="Leave paraphrases out.")
            gathered += paraphrase(found, _writer(scorer, self.paraphrases, seed))[: self.max_templates]
        if scorer.kind == "causal":
            gathered = [text for text in gathered if Template.of(text).ends_in_gap]
        found = distinct([*found, *gathered])
        checks.record(
            "data", "templates", bool(found), len(found), detail=f"{len(gathered)} of them collected",
            fix="Write templates of your own, or name a larger corpus.",
        )  # fmt: skip
        return found

    def _objects(self, scorer: Scorer, texts: Sequence[str], rows: Sequence[Row]) -> list[str]:
        """The candidates that are one token in every template."""
        wanted = sorted({class_name(row) for row in rows}) if self.objects is None else self.objects
        ways = {Template.of(text).spaced for text in texts}
        found = [
            str(name)
            for name in dict.fromkeys(wanted)
            if all(len(scorer.word_ids(str(name), spaced=spaced)) == 1 for spaced in ways)
        ]
        left_out = sorted({str(name) for name in wanted} - set(found))
        checks.record(
            "data", "objects of one token", len(found) > 1, len(found),
            detail=f"left out: {', '.join(left_out[:10])}" if left_out else "",
            fix="Choose a relation whose objects are words that the model knows whole.",
        )  # fmt: skip
        return found

    def _ensemble(
        self, texts: list[str], objects: list[str], logp: Tensor, gold: Tensor, train: int
    ) -> TextPrompt:
        accuracy = template_accuracy(logp[:train], gold[:train])
        order = accuracy.argsort(descending=True, stable=True)
        weights = torch.zeros(len(texts))
        history: list[dict[str, float]] = []
        if self.ensemble == "optimised":
            weights, history = fit_weights(
                (logp[:train], gold[:train]),
                (logp[train:], gold[train:]),
                rate=self.learning_rate,
                epochs=self.epochs,
                patience=self.patience,
            )
            weights = weights.masked_fill(weights < min(LEAST, float(weights.max())), 0)
        else:
            weights[order[: 1 if self.ensemble == "top1" else self.top_k]] = 1.0
        weights = weights / weights.sum()
        held_out = logp[train:], gold[train:]
        best = int(order[0])
        scores = {
            "accuracy": share_right(ensemble(held_out[0], weights), held_out[1]),
            "macro_accuracy": macro_accuracy(ensemble(held_out[0], weights), held_out[1]),
            "best_template": share_right(held_out[0][:, best], held_out[1]),
            "first_template": share_right(held_out[0][:, 0], held_out[1]),
            "templates": float((weights > 0).sum()),
        }
        kept = {
            texts[i]: float(weights[i]) for i in weights.argsort(descending=True, stable=True) if weights[i]
        }
        labels = {name: [name] for name in objects}
        return TextPrompt(kept, labels, method="lpaqa", scores=scores, history=history)


# Mathematics --------------------------------------------------------------------------------------------


def ensemble(logp: Tensor, weights: Tensor) -> Tensor:
    """s(y): weighted sum over templates of log-probabilities (rows, T, V') -> (rows, V')."""
    return torch.einsum("ntv,t->nv", logp, weights)


def share_right(scores: Tensor, gold: Tensor) -> float:
    """Share of rows (n, V') whose best object is the right one."""
    return float((scores.argmax(-1) == gold).float().mean())


def macro_accuracy(scores: Tensor, gold: Tensor) -> float:
    """The same, averaged over the objects that occur: each counts once, however many subjects it has."""
    right = scores.argmax(-1) == gold
    return float(torch.stack([right[gold == y].float().mean() for y in gold.unique()]).mean())


def template_accuracy(logp: Tensor, gold: Tensor) -> Tensor:
    """A(t): share of rows that each template alone gets right, (rows, T, V') -> (T)."""
    return (logp.argmax(-1) == gold[:, None]).float().mean(0)


def ensemble_loss(logp: Tensor, gold: Tensor, theta: Tensor) -> Tensor:
    """Mean of -log softmax_{V'}(s)(gold) with weights softmax(theta)."""
    return nn.functional.cross_entropy(ensemble(logp, theta.softmax(0)), gold)


def fit_weights(
    train: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    *,
    rate: float = 0.1,
    epochs: int = 500,
    patience: int = 30,
    batch: int = 128,
    tolerance: float = 1e-3,
) -> tuple[Tensor, list[dict[str, float]]]:
    """Weights (T) of the least held-out loss on the way from equal ones, and the losses of each pass.

    Args:
        train, held_out: log-probabilities (rows, T, V') and the number of the right object (rows).
    """
    theta = torch.zeros(train[0].shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=rate)
    kept, since = theta.detach().clone(), 0
    best = float(ensemble_loss(*held_out, kept))
    history = []
    for epoch in range(epochs):
        total = 0.0
        for start in range(0, len(train[1]), batch):
            part = slice(start, start + batch)
            with torch.enable_grad():
                loss = ensemble_loss(train[0][part], train[1][part], theta)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(train[1][part])
        with torch.no_grad():
            value = float(ensemble_loss(*held_out, theta))
        history.append({"step": epoch + 1, "loss": total / len(train[1]), "eval_loss": value})
        since = 0 if value < best - tolerance else since + 1
        if value < best:
            best, kept = value, theta.detach().clone()
        if since >= patience:
            break
    return kept.softmax(0), history


# Measuring ----------------------------------------------------------------------------------------------


def _writer(scorer: Scorer, count: int, seed: int) -> Callable[[str], list[str]]:
    """Asks the model for `count` rewordings of a text."""

    def write(text: str) -> list[str]:
        ids = prompt_ids({"prompt": ASK.format(text)}, scorer.tokenizer)
        options = {"do_sample": True, "max_new_tokens": 32}
        answers = generate(
            scorer.model, scorer.tokenizer, [ids] * count, batch_size=count, options=options, seed=seed
        )
        return [answer.text for answer in answers]

    return write


def _answerable(rows: list[Row], objects: Sequence[str], which: str) -> list[Row]:
    """The rows whose object is a candidate."""
    known = set(objects)
    found = [row for row in rows if class_name(row) in known]
    checks.record(
        "data", f"{which} pairs", bool(found), len(found), detail=f"of {len(rows)} an object is a candidate",
        fix="Give pairs whose objects are one token of the model.",
    )  # fmt: skip
    return found


def _measured(
    scorer: Scorer, texts: Sequence[str], rows: list[Row], objects: Sequence[str], folder: Path | None
) -> Tensor:
    """log P of every object in every template for every row: (rows, T, V'). What is in `folder` is read."""
    found = []
    for text in track(texts, "templates"):
        file = (
            None
            if folder is None
            else folder / f"{blake2b(text.encode(), digest_size=8).hexdigest()}.safetensors"
        )
        if file is not None and file.is_file():
            found.append(load_file(file)["logp"])
            continue
        template = Template.of(text)
        words = [scorer.word_id(name, spaced=template.spaced) for name in objects]
        found.append(scorer.log_probs(scorer.encode(template, rows), words))
        if file is not None:
            draft = file.with_suffix(".draft")
            save_file({"logp": found[-1]}, draft)
            draft.rename(file)
    return torch.stack(found, 1)
