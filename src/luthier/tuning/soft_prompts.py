"""What all learnt prompts share: config, tuner, and files.

A prompt of ours is a tuner of PEFT (a `BaseTuner`), not one of PEFT's prompt classes: those work outside of
the model, on its inputs and its cache, and fail with gradient checkpointing, without a cache, with padding
on the left, and on encoders (huggingface/peft#869, #1093, #1188). Ours work inside, in one of two ways:
`attention_prompts.py` adds keys and values, `input_prompts.py` adds rows to the input.

Two forms of one adapter on disk:

- `model.save_pretrained`, and so a trainer's checkpoint: everything that training goes on with, under our
  own type of PEFT (`registration.py`).
- `luthier.save`: the prompt alone, any reparametrisation evaluated. Where a class of PEFT computes the same,
  it is that class's file (`prompt_embeddings`), which PEFT loads without us; `load` reads those too.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, delete_adapter
from peft.utils.other import _prepare_prompt_learning_config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier import taxonomy
from luthier.errors import MethodError, ModelError, did_you_mean
from luthier.models import tokens
from luthier.options import option
from luthier.terminal import no_peft_warnings
from luthier.tuning.probe import evaluating
from luthier.tuning.registration import registered_type

WEIGHTS = "adapter_model.safetensors"
TABLE = "prompt_embeddings"  # PEFT's name of the prompt in its files
# PEFT's types whose files we read, and the method that computes the same.
READS = {"PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt", "P_TUNING": "prompt"}


@dataclass
class PromptConfig(PeftConfig):
    """Config of a learnt prompt; `num_virtual_tokens` is its length P."""

    num_virtual_tokens: int = 20
    modules_to_save: list[str] | None = option(
        None, "modules that learn whole beside the prompt, such as a new classification head"
    )

    is_soft_prompt: ClassVar[bool] = True  # no change of weights: no identity at the start, nothing to merge

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = registered_type(type(self))

    def save_adapter(self, model: PeftModel, folder: Path | str) -> None:
        save(model, folder)


class PromptLayer(nn.Module, BaseTunerLayer):
    """Holds prompts of several adapters by name; it wraps nothing, and so has no weight or bias to show."""

    weight = None
    bias = None

    def __init__(self) -> None:
        super().__init__()
        self._folded: dict[str, tuple[Any, Tensor]] = {}

    def computed(self, adapter: str, weights: list[nn.Parameter], make: Callable[[], Tensor]) -> Tensor:
        """What a reparametrisation of `weights` gives, in fp32; in generation not anew for every token."""
        fixed = not torch.is_grad_enabled() and not self.training
        key = [(p.data_ptr(), p._version) for p in weights] if fixed else None
        if fixed and adapter in self._folded and self._folded[adapter][0] == key:
            return self._folded[adapter][1]
        kind = "cpu" if weights[0].is_meta else weights[0].device.type
        with torch.autocast(kind, enabled=False):
            found = make()
        if fixed:
            self._folded[adapter] = (key, found)
        return found

    def settle(self, beside: nn.Module) -> None:
        """Go where `beside` is, in fp32 (or its float64), in its mode."""
        base = next(beside.parameters())
        self.to(base.device, torch.float64 if base.dtype == torch.float64 else torch.float32)
        self.train(beside.training)

    def train(self, mode: bool = True) -> Self:
        self._folded.clear()
        return super().train(mode)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Nothing: PEFT would look for a base layer, and round the prompt to its precision."""


class PromptTuner(BaseTuner):
    """A `BaseTuner` that changes no layer: it adds `PromptLayer`s beside them, named `<prefix>prompt`."""

    prefix: str
    tuner_layer_cls = PromptLayer
    target_module_mapping: ClassVar[dict] = {}

    def folded(self, adapter: str) -> dict[str, Tensor]:
        """The prompt without what only training needs: tensors by their names in `save_pretrained`."""
        raise NotImplementedError

    def folded_config(self, adapter: str) -> PeftConfig:
        """The config that goes with `folded`."""
        return copy.deepcopy(self.peft_config[adapter])

    def to_peft(self, adapter: str) -> tuple[PeftConfig, Tensor] | None:
        """PEFT's own config and `prompt_embeddings` where its class computes the same, or None."""
        raise NotImplementedError

    def config_of_peft(self, kind: type[PeftConfig], adapter: str) -> PeftConfig | None:
        """PEFT's own config of the prompt, or None where PEFT does not know the model."""
        own = self.peft_config[adapter]
        taken = ("num_virtual_tokens", "task_type", "modules_to_save", "base_model_name_or_path")
        found = kind(num_transformer_submodules=1, **{name: getattr(own, name) for name in taken})
        try:
            _prepare_prompt_learning_config(found, self.model.config)
        except ValueError:
            return None
        return found

    def from_peft(self, adapter: str, table: Tensor) -> None:
        """Take up the `prompt_embeddings` of a file of PEFT's.

        Raises:
            ModelError: they do not fit the model.
        """
        raise NotImplementedError

    def remove(self) -> None:
        """Take everything off the model that the tuner put on it."""
        raise NotImplementedError

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT's own expects the name last or next to last; a reparametrisation is a module of several layers.
        holder, dot, rest = key.partition(f".{cls.prefix}prompt.")
        return holder + dot + rest.replace(f".{adapter_name}", "", 1) if dot else key

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return peft_config

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT's own looks for a weight to take the device from, which a head of several layers lacks.
        setattr(parent, child_name, new_module)

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        del self.peft_config[adapter_name]
        # PEFT skips what has the prefix in its name, as our layers do.
        rest = delete_adapter(self.model, adapter_name, prefix="<none>", layer_cls=self.tuner_layer_cls)
        self.active_adapter = rest or []

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            raise MethodError(
                "A prompt is no change of weights; it cannot be merged.", fix="Export the adapter."
            )
        self.remove()
        return super()._unload_and_optionally_merge(False, *args, **kwargs)


def save(model: PeftModel, folder: Path | str) -> None:
    """Write the active adapter without what only training needs, in PEFT's own layout where there is one."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    adapter, tuner = model.active_adapter, model.base_model
    state = get_peft_model_state_dict(model, adapter_name=adapter)
    own = get_own_names(tuner, adapter)
    beside = {name: tensor for name, tensor in state.items() if name not in own}  # a new head
    with evaluating(model):  # a reparametrisation may have dropout
        peft = tuner.to_peft(adapter)
        if peft is None:
            config, tensors = tuner.folded_config(adapter), tuner.folded(adapter) | beside
        else:
            config, table = peft
            # PEFT's prompt classes wrap no tuner round the model: one part of the names less.
            tensors = {TABLE: table} | {_less_a_part(name): tensor for name, tensor in beside.items()}
    config.inference_mode = True
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / WEIGHTS, {"format": "pt"})
    config.save_pretrained(str(folder))


def load(model: nn.Module, folder: Path | str, *, train: bool = False) -> PeftModel | None:
    """An adapter of one of PEFT's prompt classes, on our mechanism; None where ours would not be the same.

    Raises:
        ModelError: the file does not fit the model.
    """
    folder = Path(folder)
    fields = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    name = READS.get(fields.get("peft_type", ""))
    if name is None:
        return None
    options = {
        key: fields.get(key)
        for key in ("num_virtual_tokens", "task_type", "modules_to_save", "base_model_name_or_path")
    }
    config = taxonomy.find(f"tuning/prompts/{name}").load().Config.plain(**options, inference_mode=not train)
    tensors = load_file(str(folder / WEIGHTS), device=str(next(model.parameters()).device))
    try:
        with no_peft_warnings():
            adapted = get_peft_model(model, config)
    except MethodError:
        return None
    tuner, adapter = adapted.base_model, adapted.active_adapter
    if tuner.to_peft(adapter) is None:
        tuner.unload()
        return None
    table = tensors.pop(TABLE, None)
    if table is None:
        raise ModelError(f"{folder / WEIGHTS} has no '{TABLE}'.", fix="Save the adapter again with PEFT.")
    tuner.from_peft(adapter, table)
    _load_beside(adapted, adapter, tensors, folder / WEIGHTS)
    return adapted


def get_own_names(tuner: PromptTuner, adapter: str) -> set[str]:
    """Names, as `save_pretrained` writes them, of the tensors of the prompt itself."""
    return {
        tuner._remove_adapter_name_from_key(f"base_model.model.{path}.{name}", adapter)
        for path, module in tuner.model.named_modules()
        if isinstance(module, PromptLayer)
        for name in module.state_dict()
    }


def _load_beside(model: PeftModel, adapter: str, tensors: dict[str, Tensor], file: Path) -> None:
    """Put the whole modules that an adapter brings (a head, an embedding with new rows) into their places.

    Their names have one part less where PEFT wrote them.
    """
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    heads = set(state) - get_own_names(model.base_model, adapter)
    places = model.state_dict()
    found = {}
    for key, tensor in tensors.items():
        name = next((n for n in (_more_a_part(key), key) if n in heads or n in places), None)
        known = state.get(name, places.get(name))
        if name is None or known.shape != tensor.shape:
            wanted = "no place for it" if name is None else f"{tuple(known.shape)}"
            raise ModelError(f"{file}: {key} is {tuple(tensor.shape)}, and the model has {wanted}.")
        found[name] = tensor
    if missing := sorted(heads - set(found)):
        raise ModelError(f"{file} lacks {missing[0]}.", fix="Save it again from the model that was trained.")
    set_peft_model_state_dict(model, state | found, adapter_name=adapter)


def _less_a_part(name: str) -> str:
    return "base_model." + name.removeprefix("base_model.model.")


def _more_a_part(name: str) -> str:
    return "base_model.model." + name.removeprefix("base_model.")


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


# Inputs of a transformer -------------------------------------------------------------------------------


def text_of(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """What a transformer's forward is given: token ids (batch, seq), or their vectors (batch, seq, width)."""
    ids = args[0] if args else kwargs.get("input_ids")
    return kwargs["inputs_embeds"] if ids is None else ids


def require_room(trunk: nn.Module, limit: int | None, text: int, prompt: int) -> None:
    """Raise ModelError where learnt positions end before a text of `text` tokens behind a prompt does."""
    if limit is not None and text + prompt > limit:
        raise ModelError(
            f"A text of {text} tokens behind a prompt of {prompt} does not fit into the {limit} positions of "
            f"{type(trunk).__name__}.",
            fix=f"Cut texts to {limit - prompt} tokens, or shorten num_virtual_tokens.",
        )


def text_positions(mask: Any, text: Tensor, past: int) -> Tensor:
    """Positions (1 or batch, seq) of the text alone; they count real tokens where a mask tells which are."""
    length = text.shape[1]
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == past + length:
        return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
    return torch.arange(past, past + length, device=text.device)[None]


def learnt_positions(trunk: nn.Module) -> tuple[int | None, int]:
    """How many positions a table of learnt ones has room for, None without one, and which is the first."""
    for path, module in trunk.named_modules():
        name = path.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("position" in name or name == "wpe"):
            # RoBERTa's padding has a position of its own, before all others.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - first - getattr(module, "offset", 0), first
    return None, 0


def text_ids(model: PreTrainedModel, text: str, length: int | None = None) -> list[int]:
    """Token ids of a text without special ones, by the model's own tokenizer; repeated or cut to `length`.

    Raises:
        ModelError: there is no tokenizer beside the model. MethodError: the text has no tokens.
    """
    tokenizer = tokens.load(model.name_or_path, model.name_or_path, False, None)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise MethodError(f"'{text}' has no tokens to start from.", fix="Write a few words of the task.")
    return ids if length is None else (ids * (length // len(ids) + 1))[:length]


def token_id(model: PreTrainedModel, token: str) -> int:
    """The id of one token of the model's own tokenizer.

    Raises:
        ModelError: there is no tokenizer beside the model. MethodError: it has no such token.
    """
    tokenizer = tokens.load(model.name_or_path, model.name_or_path, False, None)
    vocabulary = tokenizer.get_vocab()
    if token not in vocabulary:
        marked = [t for t in vocabulary if len(t) > 2 and t[0] in "<[" and t[-1] in ">]"]
        raise MethodError(
            f"'{token}' is no token of {model.name_or_path}.", fix=did_you_mean(token, sorted(marked)[:50])
        )
    return int(vocabulary[token])
