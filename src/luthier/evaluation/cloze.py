"""Cloze: a text with one gap, and how likely each word is in it.

A template has places in braces, "{text} It was {mask}.": the columns of a row of classification data (text,
text_pair), the gap, and at most one place for triggers (`luthier.tuning.prompts.autoprompt`).

    log p(w | t, x) = log_softmax(logits at the gap)_w          over the whole vocabulary, in fp32
    score(c)        = log sum_{w in V_c} p(w | t, x)            words V_c of class c
                   or mean_{w in V_c} of the logits             (equal where classes have one word each)

Where the gap is, by the kind of model: the mask token of a masked language model; the end of the text of a
causal one, which sees nothing behind it, so that a template must end there; the first sentinel in an
encoder-decoder's text, answered by what its decoder writes behind that sentinel.

A text is tokenised whole, as a server would get it; where its parts lie is read from the tokens' offsets.
Texts that are too long lose the end of the row's columns, never of the template.
Sources: Schick and Schütze, 2021 (verbalisers); Shin et al., 2020 (sums of words); Liu et al., 2021 (means).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from string import Formatter
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from luthier.data.masking import Prefix
from luthier.errors import MethodError, ModelError, did_you_mean
from luthier.models import structure
from luthier.terminal import track
from luthier.tuning.probe import evaluating
from luthier.tuning.soft_prompts import learnt_positions

COLUMNS = ("text", "text_pair")
PLACES = (*COLUMNS, "mask", "triggers")
SENTINEL = "<extra_id_0>"
UNLIMITED = 1 << 20  # tokens
ENDS = 4  # times as many ends of texts go through the model at once as whole texts
Kind = Literal["masked", "causal", "seq2seq"]
How = Literal["sum", "mean"]


# Templates ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Template:
    """Parts of a text with one gap: (literal text, name of the place behind it or None).

    Attributes:
        triggers: the text that stands where `{triggers}` does; empty, it takes one space with it.
    """

    parts: tuple[tuple[str, str | None], ...]
    triggers: str = ""

    @classmethod
    def of(cls, text: str) -> "Template":
        """Read a template.

        Raises:
            MethodError: it has not exactly one gap, no column of the row, or a place that does not exist.
        """
        try:
            parts = tuple((literal, name) for literal, name, _, _ in Formatter().parse(text))
        except ValueError as error:
            raise MethodError(f"Template {text!r} cannot be read: {error}.", fix="Write {{ for {.") from error
        names = [name for _, name in parts if name is not None]
        for name in names:
            if name not in PLACES:
                raise MethodError(f"Template {text!r} has a place '{name}'.", fix=did_you_mean(name, PLACES))
        if names.count("mask") != 1 or names.count("triggers") > 1 or not set(names) & set(COLUMNS):
            raise MethodError(
                f"Template {text!r} needs one gap, the row's text and at most one place for triggers.",
                fix="Write '{text} It was {mask}.', say.",
            )
        return cls(parts)

    def __str__(self) -> str:
        """The template as text, the triggers put in."""
        return self._filled(lambda name: "{" + name + "}", lambda text: _escaped(text))[0]

    @property
    def places(self) -> set[str]:
        return {name for _, name in self.parts if name is not None}

    @property
    def ends_in_gap(self) -> bool:
        behind = [name for _, name in self.parts].index("mask") + 1
        return not any(name or literal.strip() for literal, name in self.parts[behind:])

    @property
    def spaced(self) -> bool:
        """Whether white space stands before the gap: the word in it then begins a word."""
        return next(literal for literal, name in self.parts if name == "mask")[-1:].isspace()

    def render(self, row: dict[str, Any], gap: str | None) -> tuple[str, dict[str, tuple[int, int]]]:
        """The text of a row, and where each place begins and ends in it.

        Args:
            gap: what stands for the gap; None ends the text before it.
        """

        def value(name: str) -> str:
            if name == "mask":
                return gap or ""
            return str(row.get(name) or "")

        text, spans = self._filled(value, lambda text: text)
        if gap is None:
            text = text[: spans["mask"][0]].rstrip()
        return text, spans

    def _filled(
        self, value: Callable[[str], str], plain: Callable[[str], str]
    ) -> tuple[str, dict[str, tuple[int, int]]]:
        text, spans, absent = "", {}, False
        for literal, name in self.parts:
            if absent and literal[:1].isspace():
                literal = literal[1:]
            text += plain(literal)
            absent = False
            if name == "triggers":
                absent = not self.triggers
                spans[name] = (len(text), len(text) + len(plain(self.triggers)))
                text += plain(self.triggers)
            elif name is not None:
                filled = value(name)
                spans[name] = (len(text), len(text) + len(filled))
                text += filled
        return text, spans


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


@dataclass(frozen=True)
class Cloze:
    """A filled template in tokens.

    Attributes:
        gap: column of `ids` whose output predicts the word; of an encoder-decoder the sentinel's.
        triggers: columns of the trigger tokens.
    """

    ids: list[int]
    gap: int
    triggers: list[int]


# The scorer ---------------------------------------------------------------------------------------------


class Scorer:
    """Reads the gap of a masked, causal or encoder-decoder model, with an adapter or a learnt prompt too."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 32,
        max_length: int | None = None,
    ):
        """`max_length`: tokens of a text at most; default: the positions that the model has.

        Raises:
            ModelError: the model has no gap, or the tokenizer does not tell where its tokens lie.
        """
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.base = structure.base(model)
        self.kind = _kind(model)
        if not tokenizer.is_fast:
            raise ModelError(
                "A cloze prompt needs a fast tokenizer, which tells where in the text its tokens lie.",
                fix="Use the model's tokenizer.json.",
            )
        if self.kind == "masked":
            self.gap = tokenizer.mask_token
        else:
            self.gap = SENTINEL if self.kind == "seq2seq" else None
        if self.kind != "causal" and (self.gap is None or self.gap not in tokenizer.get_vocab()):
            raise ModelError(
                f"The tokenizer has no token for a gap ({self.gap or 'mask_token is not set'}).",
                fix="Use the tokenizer that the model was pre-trained with.",
            )
        limit = learnt_positions(self.base)[0] or getattr(self.base.config, "max_position_embeddings", None)
        self.max_length = min(max_length or limit or UNLIMITED, limit or UNLIMITED)
        self._prefix = Prefix(tokenizer, plain=True)

    @cached_property
    def vocabulary(self) -> int:
        """Rows of the embedding; those beyond the tokenizer's belong to no token."""
        return int(self.base.get_input_embeddings().weight.shape[0])

    @cached_property
    def token_texts(self) -> list[str]:
        """The text of each token that has an embedding."""
        count = min(len(self.tokenizer), self.vocabulary)
        return list(self.tokenizer.batch_decode([[token] for token in range(count)]))

    # Words and texts ------------------------------------------------------------------------------------

    def word_ids(self, word: str, *, spaced: bool) -> list[int]:
        """Ids of a word as it stands in a gap, behind white space or not."""
        if spaced:
            anchor = "a"  # alone, SentencePiece would put a mark of its own before the space
            found = self.tokenizer(
                f"{anchor} {word.strip()}",
                add_special_tokens=False,
                return_offsets_mapping=True,
                verbose=False,
            )
            return [
                token
                for token, (_, end) in zip(found["input_ids"], found["offset_mapping"], strict=True)
                if end > len(anchor)
            ]
        return list(self.tokenizer(word, add_special_tokens=False, verbose=False)["input_ids"])

    def word_id(self, word: str, *, spaced: bool = True) -> int:
        """The one token of a word.

        Raises:
            MethodError: it is several tokens, or none that the tokenizer knows.
        """
        ids = self.word_ids(word, spaced=spaced)
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            parts = self.tokenizer.convert_ids_to_tokens(ids)
            raise MethodError(
                f"'{word}' is not one token of the model, which a gap holds, but {len(ids)}: {parts}.",
                fix="Choose another word for the class.",
            )
        return ids[0]

    def require(self, template: Template) -> None:
        """Raise MethodError for a template that the kind of model cannot answer."""
        if self.kind == "causal" and not template.ends_in_gap:
            raise MethodError(
                f"Template '{template}' goes on behind its gap, where a causal model does not look.",
                fix="End it with {mask}, or use a masked language model (task: masked).",
            )

    def encode(self, template: Template, rows: Sequence[dict[str, Any]]) -> list[Cloze]:
        """The rows in the template, as tokens.

        Raises:
            MethodError: the template alone is longer than the model's texts can be.
        """
        self.require(template)
        texts = [template.render(row, self.gap) for row in rows]
        found = [
            self._cloze(*one, encoding)
            for one, encoding in zip(texts, self._tokenised([text for text, _ in texts]), strict=True)
        ]
        for i, cloze in enumerate(found):
            if len(cloze.ids) > self.max_length:
                found[i] = self._shortened(template, rows[i], len(cloze.ids))
        return found

    def _tokenised(self, texts: list[str]) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        if not texts:
            return
        found = self.tokenizer(
            texts,
            add_special_tokens=self.kind != "causal",
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        for text, ids, offsets in zip(texts, found["input_ids"], found["offset_mapping"], strict=True):
            before = self._prefix(text) if self.kind == "causal" else []
            yield before + ids, [(0, 0)] * len(before) + offsets

    def _cloze(
        self,
        text: str,
        spans: dict[str, tuple[int, int]],
        encoding: tuple[list[int], list[tuple[int, int]]],
    ) -> Cloze:
        ids, offsets = encoding

        def columns(name: str) -> list[int]:
            start, end = spans.get(name, (0, 0))
            return [i for i, (a, b) in enumerate(offsets) if max(a, start) < min(b, end)]

        if self.kind == "causal":
            if not ids:
                raise MethodError(
                    "A template gives no text before its gap.", fix="Write words before {mask}."
                )
            return Cloze(ids, len(ids) - 1, columns("triggers"))
        return Cloze(ids, columns("mask")[0], columns("triggers"))

    def _shortened(self, template: Template, row: dict[str, Any], length: int) -> Cloze:
        """The row's longer column loses words at its end until the text fits."""
        row = {key: str(row.get(key) or "") for key in COLUMNS}
        while length > self.max_length:
            longer = max(COLUMNS, key=lambda key: len(row[key]))
            words = row[longer].split(" ")
            if not row[longer]:
                raise MethodError(
                    f"Template '{template}' alone has {length} tokens; texts may have {self.max_length}.",
                    fix="Shorten it, or raise max_length.",
                )
            row[longer] = " ".join(words[: -max(1, (length - self.max_length) // 4)])
            text, spans = template.render(row, self.gap)
            cloze = self._cloze(text, spans, next(self._tokenised([text])))
            length = len(cloze.ids)
        return cloze

    # Numbers --------------------------------------------------------------------------------------------

    def log_probs(self, clozes: Sequence[Cloze], words: Sequence[int], title: str = "") -> Tensor:
        """log p of each word at each gap, normalised over the whole vocabulary: (clozes, words) on the CPU.

        Args:
            title: of the progress bar; none without.
        """
        index = torch.tensor(list(words), dtype=torch.long)
        found = torch.empty(len(clozes), len(index))
        order = sorted(range(len(clozes)), key=lambda i: -len(clozes[i].ids))
        starts = range(0, len(order), self.batch_size)
        with evaluating(self.model):
            for start in track(starts, title) if title else starts:
                batch = order[start : start + self.batch_size]
                logits = self.logits([clozes[i] for i in batch])
                found[batch] = logits.log_softmax(-1)[:, index.to(logits.device)].cpu()
        return found

    def variant_log_probs(self, variants: Sequence[Sequence[Cloze]], words: Sequence[int]) -> Tensor:
        """The same for many texts that begin alike, such as one row in several templates.

        A causal model reads the beginning that a row's variants share once, and keeps its keys and values.

        Args:
            variants: for each row equally many.

        Returns:
            (rows, variants, words).
        """
        count = len(variants[0])
        begin = [_shared([cloze.ids for cloze in row]) for row in variants]
        if not self._caches or count == 1 or not all(begin):
            flat = [cloze for row in variants for cloze in row]
            return self.log_probs(flat, words).view(len(variants), count, -1)
        index = torch.tensor(list(words), dtype=torch.long, device=self.base.device)
        found = torch.empty(len(variants), count, len(index))
        order = sorted(range(len(variants)), key=lambda i: -begin[i])
        step = max(1, ENDS * self.batch_size // count)  # ends are short
        with evaluating(self.model):
            for start in range(0, len(order), step):
                batch = order[start : start + step]
                logits = self._end_logits([variants[i] for i in batch], [begin[i] for i in batch])
                found[batch] = logits.log_softmax(-1)[:, index].view(len(batch), count, -1).cpu()
        return found

    @cached_property
    def _caches(self) -> bool:
        """Whether keys and values of a beginning serve several ends: plain attention, nothing learnt."""
        if self.kind != "causal" or isinstance(self.model, PeftModel):
            return False
        one = torch.zeros(1, 1, dtype=torch.long, device=self.base.device)
        with evaluating(self.model):
            cache = self.base.base_model(input_ids=one, use_cache=True).get("past_key_values")
        return isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)

    def _end_logits(self, variants: Sequence[Sequence[Cloze]], begin: Sequence[int]) -> Tensor:
        """Logits (rows x variants, vocab) at the gaps; each row's variants share its first `begin` tokens."""
        device, count = self.base.device, len(variants[0])
        starts, seen = _padded([row[0].ids[:n] for row, n in zip(variants, begin, strict=True)], device)
        cache = self.base.base_model(input_ids=starts, attention_mask=seen, use_cache=True).past_key_values
        cache.batch_repeat_interleave(count)
        ends = [cloze.ids[n:] for row, n in zip(variants, begin, strict=True) for cloze in row]
        ids, mask = _padded(ends, device)
        lengths = mask.sum(1, keepdim=True)
        first = torch.tensor(begin, device=device).repeat_interleave(count)[:, None]
        at = torch.arange(ids.shape[1], device=device)
        options = {
            "input_ids": ids,
            "attention_mask": torch.cat([seen.repeat_interleave(count, 0), mask], 1),
            "position_ids": first + torch.minimum(at, lengths - 1),  # padding must not leave a table
            "past_key_values": cache,
        }
        with self._only_gaps(lengths[:, 0] - 1):
            logits: Tensor = self.model(**options).logits[:, -1].float()
        return logits

    def logits(self, clozes: Sequence[Cloze]) -> Tensor:
        """Logits (clozes, vocab) in fp32 at the gaps of one batch; the head computes no other.

        Differentiable: dropout and gradients are the caller's business.
        """
        device = self.base.device
        ids, mask = _padded([cloze.ids for cloze in clozes], device, self.tokenizer.pad_token_id or 0)
        options: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        # Counted from the end: a learnt prompt may stand before the text.
        columns = torch.tensor([cloze.gap - ids.shape[1] for cloze in clozes], device=device)
        if self.kind == "seq2seq":
            start = [self.base.config.decoder_start_token_id, self.tokenizer.convert_tokens_to_ids(SENTINEL)]
            options["decoder_input_ids"] = torch.tensor([start] * len(clozes), device=device)
            columns = torch.full_like(columns, -1)
        if self.kind == "causal":
            options["use_cache"] = False
        with self._only_gaps(columns):
            logits: Tensor = self.model(**options).logits[:, -1].float()
        return logits

    @contextmanager
    def _only_gaps(self, columns: Tensor) -> Iterator[None]:
        """Inside, the trunk hands the states of one column a row to whatever makes logits of them."""

        def narrow(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            hidden = output[0]
            one = hidden[torch.arange(len(hidden), device=hidden.device), columns][:, None]
            if isinstance(output, tuple):
                return (one, *output[1:])
            output.last_hidden_state = one
            return output

        trunk = self.base.get_decoder() if self.kind == "seq2seq" else self.base.base_model
        handle = trunk.register_forward_hook(narrow)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def input_vectors(self) -> Iterator[list[Tensor]]:
        """Inside, what the embedding layer gives are leaves (batch, seq, width) that take a gradient."""
        kept: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            kept.append(output.detach().requires_grad_())
            return kept[-1]

        trunk = self.base.get_encoder() if self.kind == "seq2seq" else self.base
        handle = trunk.get_input_embeddings().register_forward_hook(keep)
        try:
            yield kept
        finally:
            handle.remove()

    def states(self, clozes: Sequence[Cloze]) -> Tensor:
        """What the output embedding turns into logits, at each gap: (clozes, width) in fp32 on the CPU."""
        kept: list[Tensor] = []
        head = self.base.get_output_embeddings()
        handle = head.register_forward_pre_hook(
            lambda _m, inputs: kept.append(inputs[0][:, -1].float().cpu())
        )
        try:
            with evaluating(self.model):
                for start in range(0, len(clozes), self.batch_size):
                    self.logits(clozes[start : start + self.batch_size])
        finally:
            handle.remove()
        return torch.cat(kept)


def label_scores(log_probs: Tensor, groups: Sequence[Sequence[int]], how: How = "sum") -> Tensor:
    """Scores (n, classes) from log p (n, words), `groups` giving each class's columns."""
    columns = [log_probs[:, list(group)] for group in groups]
    if how == "mean":  # log p differs from the logit by the same for all words of a gap
        return torch.stack([part.mean(1) for part in columns], 1)
    return torch.stack([part.logsumexp(1) for part in columns], 1)


def _padded(rows: Sequence[Sequence[int]], device: torch.device, pad: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and mask (rows, longest), padded on the right, where a causal model's tokens do not see it."""
    ids = torch.full((len(rows), max(map(len, rows))), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)


def _shared(texts: Sequence[Sequence[int]]) -> int:
    """How many tokens at the beginning all texts share, the last of the shortest left out."""
    longest = min(map(len, texts)) - 1
    return next((i for i in range(longest) if len({text[i] for text in texts}) > 1), longest)


def _kind(model: nn.Module) -> Kind:
    task = structure.task(model)
    if task in ("masked", "causal", "seq2seq"):
        return task  # type: ignore[return-value]
    raise ModelError(
        f"{type(structure.base(model)).__name__} predicts no words: it has no gap to fill.",
        fix="Load a language model: task: masked (BERT and its kin), causal or seq2seq.",
    )
