"""Rendering of conversations with the tokenizer's own chat template, and what of the text is trained.

The template is a black box. What the assistant wrote is found by rendering turn by turn: the served prompt
of turn i is `render(messages[:i], add_generation_prompt=True)`, and what `render(messages[:i + 1])` adds to
it is what the model has to write. No template needs `{% generation %}` marks for this.

Three kinds of templates:

- the rendering of every beginning is a beginning of the whole rendering (ChatML, Llama 3, Mistral, Zephyr
  ...): the conversation is one text with one trained span a turn;
- earlier turns are rewritten when later ones follow (Qwen 3 drops their thoughts): each trained turn
  becomes a text of its own, with the context exactly as it is served at that turn;
- the served prompt opens a thought that the rendering of history leaves out (DeepSeek R1): the thought is
  put back between prompt and answer. Anything else is refused by the template's name.
"""

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from luthier.data.rows import Message
from luthier.errors import DataError

_OPENER = re.compile(r"<think>\s*\Z")
_THOUGHT = re.compile(r"\A\s*<think>(.*?)</think>\s*", re.DOTALL)


@dataclass(frozen=True)
class Rendered:
    """A text with its trained character ranges; each range starts where a served prompt ends.

    Attributes:
        end: whether an end-of-text token must be added (and trained), the text having none.
        source: index of the record that it came from.
    """

    text: str
    spans: list[tuple[int, int]] = field(default_factory=list)
    end: bool = False
    source: int = 0


class Renderer:
    """Renders conversations with a tokenizer's template; `options` are variables of the template."""

    def __init__(self, tokenizer: Any, options: dict[str, Any] | None = None):
        if not tokenizer.chat_template:
            raise DataError(
                f"The tokenizer of {self._name(tokenizer)} has no chat template, but the rows are chats.",
                fix="Use an instruction-tuned model, or set tokenizer.chat_template.",
            )
        self.tokenizer = tokenizer
        self.options = options or {}

    @staticmethod
    def _name(tokenizer: Any) -> str:
        return tokenizer.name_or_path or type(tokenizer).__name__

    @cached_property
    def special(self) -> tuple[str, ...]:
        return special_tokens(self.tokenizer)

    def render(self, messages: list[Message], tools: list[Any] | None = None, *, prompt: bool = False) -> str:
        """The text of a conversation; `prompt` adds what the template puts before the assistant's answer."""
        try:
            return self.tokenizer.apply_chat_template(
                [self._message(m) for m in messages],
                tools=tools,
                tokenize=False,
                add_generation_prompt=prompt,
                **self.options,
            )
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(m["role"] for m in messages)
            raise DataError(
                f"The chat template of {self._name(self.tokenizer)} cannot render a conversation of roles "
                f"{roles}: {error}.",
                fix="Change these conversations (some templates know no system role), or the template.",
            ) from error

    @cached_property
    def _takes_reasoning(self) -> bool:
        return "reasoning_content" in str(self.tokenizer.chat_template)

    def _message(self, message: Message) -> Message:
        """A message as the template wants it: thoughts in their own field where it has one for them."""
        plain = {key: value for key, value in message.items() if key != "weight"}
        if self._takes_reasoning and message["role"] == "assistant":
            thought, content = _parts(message)
            if thought:
                plain |= {"reasoning_content": thought, "content": content}
        return plain

    def trained(self, messages: list[Message], tools: list[Any] | None, turns: list[int]) -> list[Rendered]:
        """The text in which the assistant's messages at `turns` are trained, or one text a turn.

        Raises:
            DataError: the template's served prompt is no beginning of its rendering.
        """
        whole = self.render(messages, tools)
        spans = []
        for turn in turns:
            prompt = self.render(messages[:turn], tools, prompt=True)
            after = whole if turn == len(messages) - 1 else self.render(messages[: turn + 1], tools)
            if not (whole.startswith(after) and after.startswith(prompt)):
                return [self._single(messages[: t + 1], tools) for t in turns]
            self._require_words(messages[turn], after[len(prompt) :])
            spans.append((len(prompt), len(after)))
        return [self._finished(whole, spans)]

    def _single(self, messages: list[Message], tools: list[Any] | None) -> Rendered:
        """The last turn of `messages` as a text of its own."""
        prompt = self.render(messages[:-1], tools, prompt=True)
        whole = self.render(messages, tools)
        if not whole.startswith(prompt):
            whole = self._with_thought(prompt, whole, messages[-1])
        self._require_words(messages[-1], whole[len(prompt) :])
        return self._finished(whole, [(len(prompt), len(whole))])

    def _with_thought(self, prompt: str, whole: str, answer: Message) -> str:
        """`prompt` (which opens a thought) + thought + answer + what the template puts after an answer."""
        shared = _common(prompt, whole)
        thought, content = _parts(answer)
        at = whole.find(content.strip(), shared)
        if not _OPENER.fullmatch(prompt[shared:]) or at < 0 or whole[shared:at].strip():
            raise DataError(
                f"The chat template of {self._name(self.tokenizer)} cannot be trained on: the prompt that it "
                f"serves goes on with {prompt[shared:][:40]!r} where with the answer it writes "
                f"{whole[shared:][:40]!r}, so that training and serving would differ.",
                fix="Set the template's options (such as enable_thinking: false) or another chat template.",
            )
        return f"{prompt}{thought.strip()}\n</think>\n\n{whole[at:]}"

    def _require_words(self, answer: Message, written: str) -> None:
        """What the assistant says and thinks must stand in what is trained: some templates leave it out."""
        for name, text in zip(("thoughts", "content"), _parts(answer), strict=True):
            if text.strip() not in written:
                raise DataError(
                    f"The chat template of {self._name(self.tokenizer)} leaves out the {name} of an answer "
                    f"({text.strip()[:40]!r}); it writes {written[:80]!r}.",
                    fix="Use a template that renders them, or take them out of the data.",
                )

    def _finished(self, text: str, spans: list[tuple[int, int]]) -> Rendered:
        """Spans cut after their end token, behind which nothing is generated; `end` where there is none."""
        cut = []
        for start, stop in spans:
            written = text[start:stop].rstrip()
            cut.append((start, start + len(written) if written.endswith(self.special) else stop))
        bare = (
            bool(cut) and cut[-1][1] >= len(text.rstrip()) and not text[: cut[-1][1]].endswith(self.special)
        )
        return Rendered(text, cut, end=bare)


def _parts(message: Message) -> tuple[str, str]:
    """Thoughts and content of a message, whose content may hold both."""
    thought = message.get("reasoning_content") or message.get("thinking") or ""
    if not thought and (found := _THOUGHT.match(message["content"])):
        return found.group(1).strip("\n"), message["content"][found.end() :]
    return thought, message["content"]


def _common(one: str, other: str) -> int:
    """How many characters two texts share at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """All special tokens as text: the named ones and those marked so in the vocabulary."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *added]))
