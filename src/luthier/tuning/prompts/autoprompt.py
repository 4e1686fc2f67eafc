"""AutoPrompt: a few trigger words, the same for all inputs, found by following the gradient.

Paper: Shin et al., 2020, "AutoPrompt: Eliciting Knowledge from Language Models with Automatically Generated
Prompts", arXiv 2010.15980.
Pick it when the model can be given nothing but text (it is served by others), to probe what a model knows, or
as a discrete baseline for learnt vectors. It does not reach them, and fails on hard tasks.
Cost: nothing stored but a line of text, n tokens in every query. A step takes accumulation x (1 backward
pass + (1 + num_candidates) forward passes) of a batch.

A template joins the text x, the triggers t_1 ... t_n and a gap; words V_y stand for each class y:

    p(y | x, t) = sum_{w in V_y} p(gap = w | x, t),      loss = -log p(y | x, t)

A step picks one slot j and ranks every token w of the vocabulary by the loss's first-order change when t_j
becomes w, which up to a constant is

    score(w) = -e_w . g_j,      g_j = mean over a batch of d loss / d e_{t_j}        E (V, e), g_j (e)

With `normalise` p(y | x, t) is divided by its sum over the classes: the search then parts the classes, and is
not content to make their words likely. (Not in the paper; for models to which none of the words is likely.)

The best `num_candidates` are then measured exactly, on a fresh batch, and the best of them is kept where it
beats what stands there. The triggers returned are those that did best on held-out rows on the way.

The words of the classes are given, or found first, with the triggers as they start: a logistic regression
(w_y, b_y) is fitted on what the output embedding gets at the gap, and of each class y the words w with the
highest softmax_y(w_y . o_w + b_y) are taken, o_w being the output embedding's row of w.

Trained: nothing. Never triggers: special tokens, capitalised words, single characters, and the words of the
classes, which would give the answer away. Triggers that read back as other tokens are passed over: what is
found is a text, and all its scores are those of that text.

Differs from the authors' code: the start counts as a candidate of the best; the filters always hold;
`slots: all` draws the candidates from all slots (as in GCG, Zou et al., 2023); words of the classes are those
of the fitted model without a look by hand, with the bias of the paper (the code leaves it out), and the
regression is solved, not stepped with Adam. Decoders and encoder-decoders can be searched too.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from luthier import checks
from luthier.data.load import Loaded
from luthier.data.rows import Row
from luthier.data.spec import DataSpec
from luthier.errors import MethodError
from luthier.evaluation.cloze import Cloze, Scorer, Template, label_scores
from luthier.evaluation.text_prompt import TextPrompt, class_name, label_words
from luthier.options import option
from luthier.terminal import progress
from luthier.tuning.label_words import find_label_words
from luthier.tuning.probe import evaluating
from luthier.tuning.search import State, split_rows

DEPTH = 50  # candidates looked at for each that is wanted: most tokens read back as themselves


@dataclass
class Config:
    """Options of AutoPrompt."""

    template: str = option(
        "{text} {triggers} {mask}",
        "where the row's text (text_pair), the triggers and the gap stand; a causal model's ends in {mask}",
    )
    labels: dict | Literal["search", "names"] = option(
        "search",
        "words of each class, such as {'0': [bad], '1': [good]}; or names: each class's own name; or search",
    )
    num_label_words: int = option(3, "words that a search of labels takes for each class", ge=1)
    num_triggers: int = option(3, "number n of trigger tokens; 0 measures the template as it stands", ge=0)
    iterations: int = option(100, "steps of the search", ge=0)
    num_candidates: int = option(10, "tokens that a step measures exactly", ge=1)
    batch_size: int = option(32, "rows of a batch", ge=1)
    accumulation: int = option(10, "batches for the gradient, and as many fresh ones to measure on", ge=1)
    metric: Literal["accuracy", "likelihood"] = option(
        "accuracy", "what a trigger must improve: accuracy or likelihood", choices=("accuracy", "likelihood")
    )
    normalise: bool = option(
        False, "hold the classes against each other only: p(y) over the sum of all classes' p, in the loss"
    )
    slots: Literal["one", "all"] = option(
        "one", "candidates of a step for one random slot, or drawn from all", choices=("one", "all")
    )
    initial: str | None = option(None, "text of n tokens to start from; default: masks, or 'the the ...'")
    max_length: int | None = option(None, "tokens of a text at most; default: as the model allows", ge=1)

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
            MethodError: the template, the start or the words of the classes do not fit the model.
        """
        scorer = Scorer(model, tokenizer, batch_size=self.batch_size, max_length=self.max_length)
        train, held_out = split_rows(data, eval_data, seed)
        return _Search(self, scorer, train, held_out, seed, State(folder)).run()

    def rows_scored(self, train: int, held_out: int) -> int:
        each = min(self.batch_size * self.accumulation, train)
        steps = self.iterations if self.num_triggers else 0
        return steps * each * (3 + 1 + self.num_candidates) + held_out * (1 + steps // 4)


# Mathematics --------------------------------------------------------------------------------------------


def candidate_scores(embedding: Tensor, gradient: Tensor, allowed: Tensor) -> Tensor:
    """First-order fall of the loss when a slot gets each token: (V, e), (e), (V) bool -> (V) in fp32."""
    scores = -(embedding.float() @ gradient.float())
    return scores.masked_fill(~allowed, float("-inf"))


def class_loss(scores: Tensor, classes: Tensor, normalise: bool = False) -> Tensor:
    """-log p(y | x) of each row, from log p (rows, classes) of all classes; or of their share in the sum."""
    if normalise:
        scores = scores.log_softmax(-1)
    return -scores.gather(1, classes[:, None])[:, 0]


# The search ---------------------------------------------------------------------------------------------


class _Search:
    def __init__(
        self, config: Config, scorer: Scorer, train: list[Row], held_out: list[Row], seed: int, state: State
    ):
        self.config, self.scorer, self.tokenizer = config, scorer, scorer.tokenizer
        self.train, self.held_out, self.seed, self.state = train, held_out, seed, state
        self.template = Template.of(config.template)
        if config.num_triggers and "triggers" not in self.template.places:
            raise MethodError(
                f"Template {config.template!r} has no place for triggers.",
                fix="Write {triggers} where they go.",
            )
        self.scorer.require(self.template)
        self.names = sorted({class_name(row) for row in [*train, *held_out]})
        self.labels: dict[str, list[str]] = {}
        self.words: list[int] = []
        self.groups: list[list[int]] = []

    def run(self) -> TextPrompt:
        found = self.state.read() or self._start()
        self._set_labels(found["labels"])
        allowed = self._allowed()
        embedding = self._embedding()
        steps = self.config.iterations if self.config.num_triggers else 0
        with progress("autoprompt") as bar:
            task = bar.add_task("", total=steps, completed=found["step"], note="")
            while found["step"] < steps:
                self._step(found, embedding, allowed)
                self.state.write(found)
                bar.update(task, completed=found["step"], note=f"{self.config.metric} {found['best']:.3g}")
        return self._prompt(found)

    def _start(self) -> dict[str, Any]:
        triggers = self._initial()
        labels = self._labels(self._with(triggers))
        self._set_labels(labels)
        value = self._measure([self._with(triggers)], self.held_out)[0]
        return {
            "step": 0, "labels": labels, "triggers": triggers, "start": value,
            "best": value, "best_triggers": triggers, "history": [],
        }  # fmt: skip

    def _step(self, found: dict[str, Any], embedding: Tensor, allowed: Tensor) -> None:
        """One step of the search; what it draws depends on the seed and its number only."""
        draw = random.Random(f"{self.seed}/{found['step']}")
        count = min(len(self.train), self.config.batch_size * self.config.accumulation)
        triggers = found["triggers"]
        gradient = self._gradient(self._with(triggers), draw.sample(self.train, count))
        proposals = self._proposals(triggers, gradient, embedding, allowed, draw)
        fresh = draw.sample(self.train, count)
        now, *values = self._measure([self._with(each) for each in [triggers, *proposals]], fresh)
        entry = {"step": found["step"] + 1, self.config.metric: now}
        if values and max(values) > now:
            entry[self.config.metric] = max(values)
            found["triggers"] = triggers = proposals[values.index(max(values))]
            value = self._measure([self._with(triggers)], self.held_out)[0]
            if value > found["best"]:
                found["best"], found["best_triggers"] = value, triggers
        entry[f"eval_{self.config.metric}"] = found["best"]
        found["history"].append(entry)
        found["step"] += 1

    def _prompt(self, found: dict[str, Any]) -> TextPrompt:
        template = self._with(found["best_triggers"])
        clozes = self.scorer.encode(template, self.held_out)
        kept = sum(self._tokens(cloze) == found["best_triggers"] for cloze in clozes)
        scores = {self.config.metric: found["best"], "start": found["start"], "steps": found["step"]}
        checks.record(
            "end", "triggers read back as found", kept == len(clozes), kept, len(clozes), str(template),
            refuse=False,
        )  # fmt: skip
        log = found["history"]
        prompt = TextPrompt(
            {str(template): 1.0}, self.labels, method="autoprompt", scores=scores, history=log
        )
        return prompt.made_for(self.scorer.model)

    # Triggers -------------------------------------------------------------------------------------------

    def _with(self, triggers: Sequence[int]) -> Template:
        text = self.tokenizer.decode(list(triggers), clean_up_tokenization_spaces=False)
        return replace(self.template, triggers=text.strip())

    def _tokens(self, cloze: Cloze) -> list[int]:
        return [cloze.ids[i] for i in cloze.triggers]

    def _reads_back(self, triggers: list[int]) -> bool:
        return self._tokens(self.scorer.encode(self._with(triggers), self.train[:1])[0]) == triggers

    def _initial(self) -> list[int]:
        n = self.config.num_triggers
        if not n:
            return []
        word = self.tokenizer.mask_token if self.scorer.kind == "masked" else "the"
        text = " ".join([word] * n) if self.config.initial is None else self.config.initial
        cloze = self.scorer.encode(replace(self.template, triggers=text.strip()), self.train[:1])[0]
        found = self._tokens(cloze)
        if len(found) != n or not self._reads_back(found):
            raise MethodError(
                f"The start {text!r} is {len(found)} tokens in the template, not {n}.",
                fix="Write another initial, or another num_triggers.",
            )
        return found

    def _allowed(self) -> Tensor:
        """Which tokens may be triggers: (vocabulary of the model)."""
        taken = {word.strip().lower() for words in self.labels.values() for word in words}
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        allowed = torch.zeros(self.scorer.vocabulary, dtype=torch.bool)
        for token, text in enumerate(self.scorer.token_texts):
            bare = text.strip()
            plain = text.isprintable() and "\ufffd" not in text and len(bare) > 1
            allowed[token] = plain and not bare[0].isupper() and bare.lower() not in taken
        allowed[[i for i in special if i < len(allowed)] + self.words] = False
        return allowed

    def _embedding(self) -> Tensor:
        """What the embedding layer gives for every token, its scale included: (V, e) in fp32."""
        layer = self.scorer.base.get_input_embeddings()
        with torch.no_grad():
            found: Tensor = layer(torch.arange(self.scorer.vocabulary, device=layer.weight.device))
        return found.float().cpu()

    def _gradient(self, template: Template, rows: Sequence[Row]) -> Tensor:
        """Mean gradient of the loss with respect to each trigger's vector: (n, e) in fp32."""
        scorer, total, count = self.scorer, torch.zeros(()), 0
        for start in range(0, len(rows), self.config.batch_size):
            part = rows[start : start + self.config.batch_size]
            clozes = scorer.encode(template, part)
            longest = max(len(cloze.ids) for cloze in clozes)
            with evaluating(scorer.model), torch.enable_grad(), scorer.input_vectors() as vectors:
                log_probs = scorer.logits(clozes).log_softmax(-1)[:, self.words]
                scores = label_scores(log_probs, self.groups)
                classes = self._classes(part).to(scores.device)
                loss = class_loss(scores, classes, self.config.normalise).sum()
                (slope,) = torch.autograd.grad(loss, vectors[0])  # (batch, seq, e)
            for cloze, row in zip(clozes, slope.float().cpu(), strict=True):
                if len(cloze.triggers) == self.config.num_triggers:
                    total = total + row[[column - longest for column in cloze.triggers]]
                    count += 1
        return total / max(count, 1)

    def _proposals(
        self,
        triggers: list[int],
        gradient: Tensor,
        embedding: Tensor,
        allowed: Tensor,
        draw: random.Random,
    ) -> list[list[int]]:
        """Triggers with one token replaced, those of the best scores first; each reads back as itself."""
        one = self.config.slots == "one"
        found: list[list[int]] = []
        for slot in [draw.randrange(len(triggers))] if one else range(len(triggers)):
            ranked = candidate_scores(embedding, gradient[slot], allowed).topk(
                min(len(allowed), DEPTH * self.config.num_candidates)
            )
            good = []
            for token in ranked.indices[ranked.values.isfinite()].tolist():
                changed = [*triggers[:slot], token, *triggers[slot + 1 :]]
                if token != triggers[slot] and self._reads_back(changed):
                    good.append(changed)
                if len(good) == self.config.num_candidates:
                    break
            found += good
        if one or len(found) <= self.config.num_candidates:
            return found
        return draw.sample(found, self.config.num_candidates)

    def _measure(self, templates: Sequence[Template], rows: Sequence[Row]) -> list[float]:
        """The metric of each template on the same rows; higher is better."""
        variants = list(zip(*(self.scorer.encode(each, rows) for each in templates), strict=True))
        log_probs = self.scorer.variant_log_probs(variants, self.words)  # (rows, templates, words)
        scores = label_scores(log_probs.transpose(0, 1).flatten(0, 1), self.groups)
        scores = scores.view(len(templates), len(rows), -1)
        classes = self._classes(rows)
        if self.config.metric == "accuracy":
            return (scores.argmax(-1) == classes).float().mean(1).tolist()
        return [-float(class_loss(each, classes, self.config.normalise).mean()) for each in scores]

    def _classes(self, rows: Sequence[Row]) -> Tensor:
        return torch.tensor([self.names.index(class_name(row)) for row in rows])

    # Words of the classes -------------------------------------------------------------------------------

    def _set_labels(self, labels: dict[str, list[str]]) -> None:
        self.labels = labels
        self.words, self.groups = label_words(self.scorer, labels, self.template)

    def _labels(self, template: Template) -> dict[str, list[str]]:
        given = self.config.labels
        if given == "names":
            return {name: [name] for name in self.names}
        if given == "search":
            classes, count = self._classes(self.train), self.config.num_label_words
            return find_label_words(self.scorer, template, self.train, classes, self.names, count)
        labels = {
            str(name): [words] if isinstance(words, str) else list(map(str, words))
            for name, words in dict(given).items()
        }
        if sorted(labels) != self.names or not all(labels.values()):
            raise MethodError(
                f"labels has words for {', '.join(labels)}; the data's classes are {', '.join(self.names)}.",
                fix="Write words for each class of the data, or labels: search.",
            )
        return {name: labels[name] for name in self.names}
