"""Learnt rows in the input, as if they were embedded tokens: the engine of prompt tuning and P-tuning.

    [E(x_1) ... E(x_s-1); P_1 ... P_p; E(x_s) ... E(x_T)],    P (p, width), E the frozen embedding layer

The rows are tokens with ids of their own, which begin where the vocabulary ends: id V + k stands for row k.
The embedding layer of the model writes the rows (a hook); so positions, masks, caches, and whatever else a
model makes of ids, are the model's own. A text without such ids gets them in front of its first real token,
and an encoder's behind it, so that what reads the first token ([CLS]) goes on reading that. In packed rows
every document gets its own.

The trunk's output has the length of the text again: the rows that were put in are taken out. Heads, labels,
pooling and generation see nothing of them. Of an encoder-decoder the encoder is the trunk, and its decoder
attends to the rows too.
"""

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import peft
import torch
from peft import PeftConfig
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from luthier.errors import MethodError, ModelError
from luthier.models import structure
from luthier.tuning.soft_prompts import (
    PromptConfig,
    PromptLayer,
    PromptTuner,
    learnt_positions,
    require_room,
    text_of,
    text_positions,
    token_id,
)

# Where the rows go ------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """A longer batch, made of prompts and text.

    source (batch, longer): column k of the prompt as k, of the text as P + its column.
    place (batch, seq): the column of each token of the text in the longer batch.
    """

    source: Tensor
    place: Tensor

    def merge(self, prompt: Tensor, text: Tensor) -> Tensor:
        """prompt (P, ...) and text (batch, seq, ...) to (batch, longer, ...)."""
        both = torch.cat([prompt.expand(len(text), *prompt.shape), text], dim=1)
        return _gather(both, self.source)

    def text(self, longer: Tensor) -> Tensor:
        """The text's part of (batch, longer, ...)."""
        return _gather(longer, self.place)


def layout(text: Tensor, mask: Tensor | None, positions: Tensor | None, length: int, behind: int) -> Layout:
    """A prompt of `length` at each row's first real token, or `behind` so many of them.

    Without a mask, positions that begin anew in a row tell of its documents: each gets a prompt, and rows
    with fewer documents than others are filled up with prompts at their end.
    """
    rows, size = text.shape[:2]
    columns, most = torch.arange(size, device=text.device), 1
    if mask is not None:
        starts = columns == mask.long().argmax(1, keepdim=True) + behind
    elif positions is not None and positions.ndim == 2 and not behind:
        starts = (positions == positions[:, :1]).expand(rows, -1)
        most = int(starts.sum(1).max())
    else:
        starts = (columns == behind).expand(rows, -1)
    place = columns + length * starts.long().cumsum(1)
    is_text = torch.zeros(rows, size + length * most, dtype=torch.bool, device=text.device)
    is_text.scatter_(1, place, True)
    token = is_text.long().cumsum(1) - 1
    row = ((~is_text).long().cumsum(1) - 1) % length
    return Layout(torch.where(is_text, length + token, row), place)


def _gather(values: Tensor, index: Tensor) -> Tensor:
    index = index.view(*index.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:])
    return values.gather(1, index)


# The prompts -------------------------------------------------------------------------------------------


class InputPrompt(PromptLayer):
    """The rows (P, width) of several adapters by name: a table, or what an encoder without inputs gives."""

    adapter_layer_names: tuple[str, ...] = ("table", "encoder")
    other_param_names: tuple[str, ...] = ("lengths", "_folded")

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.lengths: dict[str, int] = {}
        self.table = nn.ParameterDict()
        self.encoder = nn.ModuleDict()

    def add(self, adapter: str, length: int, start: Tensor | nn.Module) -> None:
        """`start` are the first rows (length, width), or the encoder that makes them."""
        self.lengths[adapter] = length
        if isinstance(start, nn.Module):
            self.encoder[adapter] = start
        else:
            self.table[adapter] = nn.Parameter(start.detach().clone())

    def active(self) -> list[str]:
        return [] if self.disable_adapters else [n for n in self.active_adapters if n in self.lengths]

    def length(self) -> int:
        """P of what is active now, and 0 where nothing is."""
        return sum(self.lengths[name] for name in self.active())

    def rows(self, adapter: str) -> Tensor:
        """Rows (P, width) in fp32, whatever precision the model computes in."""
        if adapter in self.table:
            return self.table[adapter]
        encoder = self.encoder[adapter]
        return self.computed(adapter, list(encoder.parameters()), encoder)

    def forward(self) -> Tensor:
        """The rows of what is active, one adapter's behind another's."""
        return torch.cat([self.rows(name) for name in self.active()])

    def fold(self, adapter: str, rows: Tensor | None = None) -> None:
        """Drop the encoder for its value, or for `rows` (P, width)."""
        value = self.rows(adapter) if rows is None else rows
        held = self.table[adapter] if adapter in self.table else next(self.encoder[adapter].parameters())
        for store in (self.encoder, self._folded):
            if adapter in store:
                del store[adapter]
        value = value.detach().to(held.dtype, copy=True)
        self.table[adapter] = nn.Parameter(value, requires_grad=held.requires_grad)


# What they start from --------------------------------------------------------------------------------

FREQUENT = 5000  # ids, whose order stands for their frequency


def frequent_ids(model: PreTrainedModel, count: int) -> Tensor:
    """`count` different ids (as far as there are) of the first 5,000, none of them special."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    config = model.config
    special = {getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "decoder_start")}
    ids = torch.tensor([i for i in range(min(FREQUENT, vocabulary)) if i not in special])
    drawn = torch.randperm(len(ids)) if count <= len(ids) else torch.randint(len(ids), (count,))
    return ids[drawn[:count]]


@torch.no_grad()
def embedded(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Rows (ids, width) as the embedding layer gives them, its scale included, in fp32."""
    trunk = model.get_encoder() if model.config.is_encoder_decoder else model
    layer = trunk.get_input_embeddings()
    rows: Tensor = layer(ids.to(layer.weight.device))
    return rows.float().cpu()


# The tuner ---------------------------------------------------------------------------------------------


@dataclass
class InputPromptConfig(PromptConfig):
    """What the engine reads; a method declares as options what its users may choose.

    Attributes:
        marker: a token of the tokenizer; each text has it P times, where the rows go. None: in front.
        marker_id: its id, looked up when the prompt is made.
        encoder: what makes the rows in training; "none" where they learn directly.
    """

    marker: str | None = None
    marker_id: int | None = None
    encoder: str = "none"

    @classmethod
    def plain(cls, **options: Any) -> "InputPromptConfig":
        """A config of rows that learn directly, as files of PEFT's have them."""
        return cls(encoder="none", **options)

    def check_model(self, model: nn.Module) -> None:
        require_embeddings(model)

    def initial(self, model: PreTrainedModel, width: int) -> Tensor | nn.Module:
        """The rows (P, width) to start from, or the encoder that makes them."""
        raise NotImplementedError


class InputPromptTuner(PromptTuner):
    """Puts an `InputPrompt` beside the embedding layer, and its hooks on that and on the trunk."""

    kind_of_peft: ClassVar[type[PeftConfig]] = peft.PromptTuningConfig  # whose files ours are

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        require_embeddings(model)
        both = model.config.is_encoder_decoder
        self.trunk = [model.get_encoder() if both else model.base_model]  # a list: it is no part of the tuner
        trunk = self.trunk[0]
        embedding = trunk.get_input_embeddings()
        self.prompt = [self.make_prompt(embedding.weight.shape[1])]
        names = inspect.signature(trunk.forward).parameters
        self._positions, self._types = "position_ids" in names, "token_type_ids" in names
        self._limit, self._first = learnt_positions(trunk)
        self._behind = 0 if both or _is_causal(model) else 1
        self._longer: list[Layout | None] = []
        self._rows: Tensor | None = None
        self._hooks = [
            trunk.register_forward_pre_hook(self._put_in, with_kwargs=True),
            trunk.register_forward_hook(self._take_out),
            embedding.register_forward_pre_hook(self._look_up),
            embedding.register_forward_hook(self._write),
        ]
        if both:
            hook = model.get_decoder().register_forward_pre_hook(self._lengthen, with_kwargs=True)
            self._hooks.append(hook)

    def make_prompt(self, width: int) -> InputPrompt:
        """What holds the rows."""
        return InputPrompt(width)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        embedding = self.trunk[0].get_input_embeddings()
        peft_config.target_modules = {name for name, module in model.named_modules() if module is embedding}

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        layer, length = self.prompt[0], peft_config.num_virtual_tokens
        if peft_config.marker is not None and peft_config.marker_id is None and not target.weight.is_meta:
            peft_config.marker_id = token_id(self.model, peft_config.marker)
        setattr(target, f"{self.prefix}prompt", layer)
        layer.add(adapter_name, length, peft_config.initial(self.model, layer.width))
        layer.settle(target)

    # Hooks ----------------------------------------------------------------------------------------------

    def _put_in(self, trunk: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Lengthen ids, mask and positions by the prompt; behind a cache that has it, mask and positions."""
        self._longer.append(None)
        length = self.prompt[0].length()
        text, mask = text_of(args, kwargs), kwargs.get("attention_mask")
        if not length:
            return None
        if (marker := self._marker()) is not None:
            self._require_places(text, marker, length)
            return None
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise ModelError(
                "A learnt prompt in the input needs the mask of the text, (batch, seq), not one made of it.",
                fix="Generate without a static cache, or use method: prefix.",
            )
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        if past:
            return args, kwargs | self._behind_a_cache(text, mask, kwargs, length)
        require_room(trunk, self._limit, text.shape[1], length)
        positions = kwargs.get("position_ids")
        where = self._longer[-1] = layout(text, mask, positions, length, self._behind)
        found = self._text(where, text, length)
        if mask is not None:
            found["attention_mask"] = where.merge(mask.new_ones(length), mask)
        if self._positions and (mask is not None or positions is not None):
            if positions is None:
                positions = self._first + text_positions(mask, text, 0)
            found["position_ids"] = self._moved(where, positions.expand(len(text), -1), length)
        if self._types and kwargs.get("token_type_ids") is not None:
            types = kwargs["token_type_ids"]
            found["token_type_ids"] = where.merge(types.new_zeros(length), types)
        return (), kwargs | {"input_ids": None} | found

    def _marker(self) -> int | None:
        """The id that marks the places of what is active, or None where it goes in front."""
        names = self.prompt[0].active()
        found = {self.peft_config[name].marker_id for name in names}
        if len(names) > 1 and found != {None}:
            raise MethodError("Of prompts with marked places one can be active.", fix="Use set_adapter.")
        return found.pop() if found else None

    def _require_places(self, text: Tensor, marker: int, length: int) -> None:
        """Raise ModelError for a text with some places, but not all of them."""
        if text.is_floating_point():
            raise ModelError(
                "Marked places are found in token ids; vectors have none.", fix="Give input_ids."
            )
        counts = (text == marker).sum(1)
        if int((counts % length).sum()):
            row = int((counts % length).nonzero()[0])
            raise ModelError(
                f"Text {row + 1} of the batch has {int(counts[row])} places for a prompt of {length} rows.",
                fix="Write the marker exactly num_virtual_tokens times, where it is not cut off.",
            )

    def _text(self, where: Layout, text: Tensor, length: int) -> dict[str, Tensor]:
        if text.is_floating_point():
            return {"inputs_embeds": where.merge(self.prompt[0]().to(text.dtype), text)}
        vocabulary = self.trunk[0].get_input_embeddings().weight.shape[0]
        ids = torch.arange(vocabulary, vocabulary + length, device=text.device)
        return {"input_ids": where.merge(ids, text)}

    def _moved(self, where: Layout, positions: Tensor, length: int) -> Tensor:
        """Positions of the longer batch: the prompt's behind what it stands behind, then the text's."""
        before = torch.arange(positions.shape[1], device=positions.device) < where.place
        own = self._first + self._behind + torch.arange(length, device=positions.device)
        return where.merge(own, positions + length * before)

    def _behind_a_cache(
        self, text: Tensor, mask: Tensor | None, kwargs: dict[str, Any], length: int
    ) -> dict[str, Tensor]:
        found = {}
        if mask is not None:
            where = layout(mask, mask, None, length, self._behind)
            found["attention_mask"] = where.merge(mask.new_ones(length), mask)
        positions = kwargs.get("position_ids")
        if positions is None and mask is not None and self._positions:
            positions = self._first + text_positions(mask, text, mask.shape[1] - text.shape[1])
        if positions is not None:
            found["position_ids"] = positions + length
        return found

    def _take_out(self, trunk: nn.Module, args: tuple, output: Any) -> Any:
        where = self._longer.pop()
        if where is None or self.model.config.is_encoder_decoder:
            return None
        if isinstance(output, tuple):
            return (where.text(output[0]), *output[1:])
        output.last_hidden_state = where.text(output.last_hidden_state)
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(where.text(states) for states in output.hidden_states)
        return output

    def _look_up(self, embedding: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Ids of the prompt, which the table has no row for, look up any other for now."""
        ids, length = args[0], self.prompt[0].length()
        if not length:
            return args
        if (marker := self._marker()) is None:
            self._rows = ids - embedding.weight.shape[0]
        else:
            here = ids == marker
            self._rows = torch.where(here, (here.long().cumsum(-1) - 1) % length, -1)
        return (ids.masked_fill((self._rows >= 0) & (self._rows < length), 0), *args[1:])

    def _write(self, embedding: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        row, self._rows = self._rows, None
        if row is None:
            return output
        written = F.embedding(row.clamp(min=0), self.prompt[0]().to(output.dtype))
        return torch.where((row >= 0).unsqueeze(-1), written, output)

    def _lengthen(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """The decoder sees the encoder's rows of the prompt too."""
        length, mask = self.prompt[0].length(), kwargs.get("encoder_attention_mask")
        states = kwargs.get("encoder_hidden_states")
        if not length or mask is None or states is None or states.shape[1] == mask.shape[1]:
            return None
        where = layout(mask, mask, None, length, 0)
        return args, kwargs | {"encoder_attention_mask": where.merge(mask.new_ones(length), mask)}

    # Files ----------------------------------------------------------------------------------------------

    def folded(self, adapter: str) -> dict[str, Tensor]:
        layer = self.prompt[0]
        path = next(path for path, module in self.model.named_modules() if module is layer)
        return {f"base_model.model.{path}.table": layer.rows(adapter).detach()}

    def folded_config(self, adapter: str) -> PeftConfig:
        config = super().folded_config(adapter)
        config.encoder = "none"
        return config

    def to_peft(self, adapter: str) -> tuple[PeftConfig, Tensor] | None:
        config, layer = self.peft_config[adapter], self.prompt[0]
        # PEFT's class pools a classifier's answer from the prompt, or from padding.
        if structure.task(self.model) not in ("causal", "seq2seq") or config.marker is not None:
            return None
        found = self.config_of_peft(self.kind_of_peft, adapter)
        if found is None or found.token_dim != layer.width:
            return None
        return found, layer.rows(adapter)

    def from_peft(self, adapter: str, table: Tensor) -> None:
        layer = self.prompt[0]
        wanted = (self.peft_config[adapter].num_virtual_tokens, layer.width)
        # PEFT makes twice as many rows for an encoder-decoder, and uses the first half.
        if table.ndim != 2 or len(table) not in (wanted[0], 2 * wanted[0]) or table.shape[1] != wanted[1]:
            raise ModelError(
                f"The prompt has shape {tuple(table.shape)}, the model takes {wanted}.",
                fix="Load it on the model that it was trained on.",
            )
        layer.fold(adapter, table[: wanted[0]])

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self.trunk[0].get_input_embeddings()._modules.pop(f"{self.prefix}prompt", None)


def require_embeddings(model: nn.Module) -> None:
    """Raise MethodError for what is not a transformer over token ids."""
    if not isinstance(model, PreTrainedModel) or not isinstance(model.get_input_embeddings(), nn.Embedding):
        raise MethodError(
            f"{type(model).__name__} has no layer that embeds token ids: no rows can be put before them.",
            fix="method: lora changes weights instead.",
        )


def _is_causal(model: PreTrainedModel) -> bool:
    """Whether a token sees only what stands before it."""
    flags = [
        module.is_causal for module in model.modules() if isinstance(getattr(module, "is_causal", None), bool)
    ]
    if flags:
        return any(flags)
    kind = model.config.model_type  # attention of an architecture's own says nothing of itself
    causal, masked = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )
    return kind in causal and kind not in masked
