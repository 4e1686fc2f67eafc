"""The tuner of the methods that learn keys and values (`attention_prompts.py`), and their configs."""

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.errors import ModelError
from luthier.tuning.attention_prompts import (
    AttentionPrompt,
    Reparametrisation,
    Site,
    find_sites,
    over,
    recording,
    run_recorded,
    underlying,
)
from luthier.tuning.soft_prompts import (
    PromptConfig,
    PromptTuner,
    device_of,
    learnt_positions,
    require_room,
    text_ids,
    text_of,
    text_positions,
)


@dataclass
class AttentionPromptConfig(PromptConfig):
    """What the engine reads; a method declares as options what its users may choose.

    Attributes:
        prefix_projection: the prompt is made by an MLP of hidden width `encoder_hidden_size`.
        init_std: of a prompt that learns directly.
        init_text: its keys and values start the prompt.
        prompt_dropout: on keys and values of the prompt, in training.
        shift_positions: the text begins at position P.
    """

    prefix_projection: bool = False
    encoder_hidden_size: int = 512
    init_std: float = 1.0
    init_text: str | None = None
    prompt_dropout: float = 0.0
    shift_positions: bool = True

    @classmethod
    def plain(cls, **options: Any) -> "AttentionPromptConfig":
        """A config of prompts that learn directly, as files of PEFT's have them."""
        return cls(prefix_projection=False, init_text=None, **options)

    def layers(self, count: int) -> range:
        """Which of the `count` layers of each kind get prompts."""
        return range(count)

    def check_model(self, model: nn.Module) -> None:
        find_sites(model)


class AttentionPromptTuner(PromptTuner):
    """Puts an `AttentionPrompt` into every attention module that the config asks for."""

    attentions: list[AttentionPrompt]

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self._sites = find_sites(model)
        self.attentions = []
        trunk = model.base_model
        self._positions = inspect.signature(trunk.forward).parameters.get("position_ids") is not None
        self._limit, self._first = learnt_positions(trunk)
        self._hook = trunk.register_forward_pre_hook(self._shift, with_kwargs=True)
        model.set_attn_implementation(over(underlying(model.config._attn_implementation)))

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        peft_config.target_modules = {site.path for site in self._chosen(peft_config)}
        # A loaded prompt is there already, and the planner's model has no numbers.
        wanted = peft_config.init_text is not None and not peft_config.inference_mode
        self._start = {}
        if wanted and device_of(model).type != "meta":
            self._start = text_pairs(model, peft_config.init_text, peft_config.num_virtual_tokens)

    def _chosen(self, config: PeftConfig) -> list[Site]:
        counts = {site.kind: site.layer + 1 for site in self._sites}
        return [site for site in self._sites if site.layer in config.layers(counts[site.kind])]

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        site = next(site for site in self._sites if site.path == current_key)
        name = f"{self.prefix}prompt"
        layer = getattr(target, name, None)
        if layer is None:
            layer = self.make_pairs(site)
            setattr(target, name, layer)
            self.attentions.append(layer)
        self._add(layer, adapter_name, peft_config)
        layer.settle(target)
        if self._start:
            layer.start_from(adapter_name, self._start[site.path])

    def make_pairs(self, site: Site) -> AttentionPrompt:
        """What holds the prompts of one attention module."""
        return AttentionPrompt(site)

    def _add(self, layer: AttentionPrompt, adapter: str, config: AttentionPromptConfig) -> None:
        if not config.prefix_projection:
            layer.add_table(adapter, config.num_virtual_tokens, config.init_std, config.prompt_dropout)
            return
        same = [other for other in self.attentions if other.site.kind == layer.site.kind]
        shared = next((other.reparametrisation(adapter) for other in same if other.has(adapter)), None)
        owns = shared is None
        if shared is None:
            width = self.model.get_input_embeddings().weight.shape[1]
            shared = Reparametrisation(config.num_virtual_tokens, width, config.encoder_hidden_size)
        layer.add_head(adapter, shared, owns=owns, dropout=config.prompt_dropout)

    # Positions ------------------------------------------------------------------------------------------

    def _shift(self, trunk: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """The text's positions begin at P, as behind a cache of that length, or at 0; padding has none.

        How far a text stands from the prompt must not depend on the padding between them.
        """
        length = max((layer.length() for layer in self.attentions), default=0)
        if not self._positions or not length or recording():
            return None
        offset = length if self._shifts() else 0
        positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
        if not offset and (positions is not None or mask is None):
            return None
        text, cache = text_of(args, kwargs), kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        require_room(trunk, self._limit, past + text.shape[1], offset)
        if positions is None:
            positions = self._first + text_positions(mask, text, past)
        return args, kwargs | {"position_ids": positions + offset}

    def _shifts(self) -> bool:
        return all(self.peft_config[name].shift_positions for name in self.active_adapters)

    # Files ----------------------------------------------------------------------------------------------

    def folded(self, adapter: str) -> dict[str, Tensor]:
        paths = {module: path for path, module in self.model.named_modules()}
        return {
            f"base_model.model.{paths[layer]}.table": layer.pairs(adapter).detach()
            for layer in self._holding(adapter)
        }

    def folded_config(self, adapter: str) -> PeftConfig:
        config = copy.deepcopy(self.peft_config[adapter])
        config.prefix_projection = False
        return config

    def to_peft(self, adapter: str) -> tuple[PeftConfig, Tensor] | None:
        config, layers = self.peft_config[adapter], self._holding(adapter)
        site = layers[0].site
        settings = self.model.config.get_text_config()
        same = (
            [layer.site.path for layer in layers] == [site.path for site in self._sites]
            and all((s.kind, s.heads, s.key_dim, s.value_dim) == _uniform(site) for s in self._sites)
            and config.shift_positions
            and self._positions
            and "past_key_values" in inspect.signature(self.model.base_model.forward).parameters
            # A window hides PEFT's prompt, which lies in the cache, from what comes later.
            and not getattr(settings, "sliding_window", None)
            and "sliding_attention" not in (getattr(settings, "layer_types", None) or ())
        )
        if not same:
            return None
        shape = {"num_layers": len(layers), "num_attention_heads": site.heads, "token_dim": site.size // 2}
        found = self.config_of_peft(peft.PrefixTuningConfig, adapter)
        if found is None or any(getattr(found, name) != value for name, value in shape.items()):
            return None
        return found, torch.cat([layer.pairs(adapter) for layer in layers], dim=1)

    def from_peft(self, adapter: str, table: Tensor) -> None:
        layers = self._holding(adapter)
        sizes = [layer.site.size for layer in layers]
        length = self.peft_config[adapter].num_virtual_tokens
        if table.shape != (length, sum(sizes)):
            raise ModelError(
                f"The prompt has shape {tuple(table.shape)}, the model takes {(length, sum(sizes))}.",
                fix="Load it on the model that it was trained on.",
            )
        for layer, part in zip(layers, table.split(sizes, dim=1), strict=True):
            layer.fold(adapter, part)

    def remove(self) -> None:
        self._hook.remove()
        for site in self._sites:
            module = self.model.get_submodule(site.path)
            module._modules.pop(f"{self.prefix}prompt", None)
        self.model.set_attn_implementation(underlying(self.model.config._attn_implementation))

    def _holding(self, adapter: str) -> list[AttentionPrompt]:
        """The layers of an adapter in the order in which they run."""
        held = {layer.site.path: layer for layer in self.attentions if layer.has(adapter)}
        return [held[site.path] for site in self._sites if site.path in held]


def _uniform(site: Site) -> tuple[str, int, int, int]:
    return "self", site.heads, site.key_dim, site.key_dim


def text_pairs(model: PreTrainedModel, text: str, length: int) -> dict[str, Tensor]:
    """Keys and values (length, size) that each attention computes for a text, by the path of its module."""
    ids = text_ids(model, text, length)
    calls = run_recorded(model, torch.tensor([ids], device=device_of(model)))
    paths = {module: path for path, module in model.named_modules()}
    return {
        # (1, heads, length, dim) to (length, heads * dim), keys before values
        paths[call.module]: torch.cat([t[0].transpose(0, 1).flatten(1) for t in (call.key, call.value)], 1)
        for call in calls
    }
