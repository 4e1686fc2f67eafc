"""A conversation with a model, streamed, and where asked with its base beside it.

The base of an adapter is the same weights with the adapter switched off. Each side has a conversation of its
own: what the base hears later is what the base said before.
"""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from luthier.data.tokenize import prompt_ids, uses_chat
from luthier.errors import DataError, LuthierError, ModelError, did_you_mean
from luthier.models import sources
from luthier.models.loading import load

Write = Callable[[str, str], None]  # (side, piece of its answer)
HELP = {
    "/system [TEXT]": "show the system prompt, or set it and start anew",
    "/reset": "start anew",
    "/help": "these commands",
    "/quit": "leave (Ctrl-D too)",
}


@dataclass(frozen=True)
class Answer:
    """What one side said.

    Attributes:
        ended: by the end token, at the length limit, or stopped by the user.
        dropped: earlier turns that no longer fitted into the model's context.
    """

    side: str
    text: str
    tokens: int
    ended: Literal["end", "length", "stopped"]
    dropped: int = 0


@dataclass
class Side:
    """One of the models that answer, with its own conversation."""

    name: str
    model: Any
    switched_off: bool = False
    messages: list[dict[str, str]] = field(default_factory=list)

    def voice(self) -> AbstractContextManager[Any]:
        """The state in which the model speaks for this side."""
        return self.model.disable_adapter() if self.switched_off else nullcontext()


class Chat:
    """A conversation.

    Args:
        base: what answers beside the model: True for an adapter's own base, or another model that takes the
            same tokenizer.
        system: system prompt; '' for the template's own.
        max_new_tokens: longest answer.
        generation: fields of transformers.GenerationConfig over the model's own.

    Raises:
        ModelError: the model does not generate text, or base is True and the model is no adapter.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        base: PreTrainedModel | bool = False,
        system: str = "",
        max_new_tokens: int = 512,
        generation: dict[str, Any] | None = None,
    ):
        _require_causal(model)
        self.tokenizer = tokenizer
        self.system = system
        self.max_new_tokens = max_new_tokens
        self.generation = generation or {}
        self.sides = [Side("tuned" if base else "model", model.eval())]
        if base is True:
            if not isinstance(model, PeftModel):
                raise ModelError(
                    "The model is no adapter, so its base is not inside it.", fix="Load the base too."
                )
            self.sides.append(Side("base", model, switched_off=True))
        elif isinstance(base, PreTrainedModel):
            _require_causal(base)
            self.sides.append(Side("base", base.eval()))

    @property
    def has_template(self) -> bool:
        """Whether messages are rendered as a chat; else the model goes on with the text as it stands."""
        return uses_chat(self.tokenizer, "auto")

    def reset(self) -> None:
        """Forget what was said; the system prompt stays."""
        for side in self.sides:
            side.messages.clear()

    def command(self, line: str) -> str | None:
        """Carry out a line that starts with '/'. What to tell the user; None to leave.

        Raises:
            LuthierError: there is no such command.
        """
        name, _, rest = line.strip().partition(" ")
        if name == "/quit":
            return None
        if name == "/help":
            return "\n".join(f"{command:<16} {text}" for command, text in HELP.items())
        if name == "/reset":
            self.reset()
            return "A new conversation."
        if name == "/system":
            if not rest.strip():
                return f"System prompt: {self.system}" if self.system else "No system prompt is set."
            self.system = rest.strip()
            self.reset()
            return "The system prompt is set. A new conversation."
        names = [command.split()[0] for command in HELP]
        raise LuthierError(
            f"There is no command '{name}'.",
            fix=f"{did_you_mean(name, names)} A message that starts with '/' is written after a space.",
        )

    def say(self, text: str, write: Write) -> list[Answer]:
        """Send a message to every side. `write` gets each piece of an answer as it comes.

        A KeyboardInterrupt while an answer is written stops it: what was said stays in the conversation, and
        the sides that have not begun are not asked.

        Raises:
            DataError: the message alone is longer than the model's context.
        """
        answers = []
        for side in self.sides:
            answer = self._answer(side, text, write)
            answers.append(answer)
            if answer.ended == "stopped":
                break
        return answers

    def _answer(self, side: Side, text: str, write: Write) -> Answer:
        messages = [*side.messages, {"role": "user", "content": text}]
        ids, dropped = self._fit(side, messages)
        config = self._config(side)
        stream = _Stream(self.tokenizer, lambda piece: write(side.name, piece))
        inputs = torch.tensor([ids], device=side.model.device)  # (1, seq)
        try:
            with torch.inference_mode(), side.voice():
                side.model.generate(
                    input_ids=inputs,
                    attention_mask=torch.ones_like(inputs),
                    generation_config=config,
                    streamer=stream,
                )
        except KeyboardInterrupt:
            stream.end()
            ended: Literal["end", "length", "stopped"] = "stopped"
        else:
            ended = "end" if stream.ids and stream.ids[-1] in _end_tokens(config) else "length"
        said = stream.text.strip() if self.has_template else stream.text
        if said:  # a turn without an answer would break the alternation that templates ask for
            side.messages = [*messages[2 * dropped :], {"role": "assistant", "content": said}]
        return Answer(side.name, said, len(stream.ids), ended, dropped)

    def _fit(self, side: Side, messages: list[dict[str, str]]) -> tuple[list[int], int]:
        """The prompt's ids, without as many of the oldest turns as leave room for an answer."""
        room = _context(side.model) - self.max_new_tokens
        for dropped in range(len(messages) // 2 + 1):
            ids = self._ids(messages[2 * dropped :])
            if len(ids) <= room:
                return ids, dropped
        raise DataError(
            f"The message takes {len(ids)} tokens (with its system prompt), and the model's context leaves "
            f"{max(room, 0)} beside an answer of up to {self.max_new_tokens}.",
            fix="Write less, or lower --max-new-tokens.",
        )

    def _ids(self, messages: list[dict[str, str]]) -> list[int]:
        if self.has_template:
            system = [{"role": "system", "content": self.system}] if self.system else []
            return prompt_ids({"prompt": [*system, *messages]}, self.tokenizer)
        text = "".join(m["content"] + ("\n" if m["role"] == "assistant" else "") for m in messages)
        return prompt_ids({"prompt": f"{self.system}\n{text}" if self.system else text}, self.tokenizer)

    def _config(self, side: Side) -> GenerationConfig:
        fields = side.model.generation_config.to_dict() | self.generation
        config = GenerationConfig(**fields | {"max_length": None, "max_new_tokens": self.max_new_tokens})
        if config.pad_token_id is None:
            config.pad_token_id = self.tokenizer.pad_token_id
            if config.pad_token_id is None:  # nothing is padded in a batch of one; generate asks all the same
                config.pad_token_id = self.tokenizer.eos_token_id
        return config


class _Stream(TextStreamer):
    """Hands over text as soon as it is whole, and keeps it with its ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.ids: list[int] = []
        self.text = ""

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.ids.extend(value.reshape(-1).tolist())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        if text:
            self.write(text)


def open_chat(name: str, *, base: bool = False, **options: Any) -> Chat:
    """A chat with a model by name, for `luthier chat`.

    Args:
        name: alias, folder, adapter, run or Hub id.
        base: put the base beside it: an adapter's own, else the model that its run started from.
        options: of `Chat`.

    Raises:
        ModelError: there is no such model, or its base is not known.
    """
    model, tokenizer = load(name)
    if not base or isinstance(model, PeftModel):
        return Chat(model, tokenizer, base=base, **options)
    start = base_of(name)
    if start is None:
        raise ModelError(
            f"'{name}' does not say which model it was made from, so there is no base to compare with.",
            fix="Name an adapter or a run's folder, or leave --base out.",
        )
    other, _ = load(start)
    if other.get_input_embeddings().num_embeddings < len(tokenizer):
        raise ModelError(
            f"The base '{start}' has fewer tokens than the tokenizer of '{name}'.",
            fix="Chat with each by itself.",
        )
    return Chat(model, tokenizer, base=other, **options)


def base_of(name: str) -> str | None:
    """The model that an adapter belongs to, or that a run started from; None where nothing says it."""
    source = sources.locate(name)
    if source.base is not None:
        return source.base
    for folder in source.path.resolve().parents[:2] if source.path else ():
        try:
            recipe = json.loads(Path(folder, "run.json").read_text(encoding="utf-8"))["recipe"]
        except (OSError, ValueError, KeyError):
            continue
        model = recipe.get("model")
        return model.get("name") if isinstance(model, dict) else model
    return None


def _require_causal(model: Any) -> None:
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ModelError(
            f"A chat needs a causal language model; this is {type(model).__name__}.",
            fix="Measure it with an evaluate stage instead.",
        )


def _context(model: Any) -> int:
    """Longest sequence of prompt and answer that the model's positions allow."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 1 << 30)


def _end_tokens(config: GenerationConfig) -> list[int]:
    end = config.eos_token_id
    return end if isinstance(end, list) else [] if end is None else [end]
