"""Adapters that were trained before, taken from their folders as parts of something new.

What is taken is the change of hidden states that an adapter makes at each of its places: of a bottleneck, of
any method of `tuner.py`, and of a LoRA. Heads and other whole modules stay behind.
"""

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from luthier.errors import MethodError, ModelError
from luthier.models import sources
from luthier.tuning.bottleneck import Anatomy, Place, PlacedConfig
from luthier.tuning.tuner import Delta, DeltaConfig, DeltaLinear, DeltaTuner, FeedForwardLayer

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ROOT = "base_model.model."


class LowRank(Delta):
    """s B A x, the change of a LoRA."""

    def __init__(self, config: LoraConfig, out_features: int, in_features: int, name: str):
        super().__init__(config, out_features, in_features, name)
        self.A = nn.Parameter(torch.zeros(config.r, in_features))
        self.B = nn.Parameter(torch.zeros(out_features, config.r))
        self.scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.A), self.B) * self.scale


@dataclass(frozen=True)
class Trained:
    """An adapter that was trained.

    Attributes:
        modules: names of the modules that it stands at.
        sha256: of its weights.
        tensors: its weights, as (module, name within the change); none where only the record is at hand.
    """

    config: PeftConfig
    modules: list[str]
    sha256: str
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, folder: str) -> "Trained":
        """From the folder of an adapter, of a stage, or of a run.

        Raises:
            ModelError: there is no adapter. MethodError: it makes no change of hidden states.
        """
        own = (Path(folder) / CONFIG).is_file()
        path = Path(folder) if own else sources.locate(folder).path
        if path is None or not (path / CONFIG).is_file():
            raise ModelError(
                f"'{folder}' holds no adapter.", fix="Name a folder with an adapter_config.json."
            )
        config = PeftConfig.from_pretrained(str(path))
        if reason := why_not(config):
            raise MethodError(f"The adapter in {folder} cannot be taken: {reason}.")
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, tensor in load_file(path / WEIGHTS).items():
            module, inside = _split(name, config)
            if module:
                tensors.setdefault(module, {})[inside] = tensor
        sha256 = hashlib.sha256((path / WEIGHTS).read_bytes()).hexdigest()
        return cls(config, sorted(tensors), sha256, tensors)

    @classmethod
    def of_model(cls, model: PeftModel) -> "Trained":
        """An adapter on a model, without its weights.

        Raises:
            MethodError: it makes no change of hidden states.
        """
        config = model.peft_config[model.active_adapter]
        if reason := why_not(config):
            raise MethodError(f"The adapter of {type(config).__module__} cannot be taken: {reason}.")
        layers = [name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
        return cls(config, sorted(name.removeprefix(ROOT) for name in layers), "")

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> "Trained":
        """The same without its weights."""
        return cls(PeftConfig.from_peft_type(**record["config"]), record["modules"], record["sha256"])

    def record(self) -> dict[str, Any]:
        """What JSON can hold of it."""
        config = self.config.to_dict()
        plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
        return {"config": json.loads(json.dumps(plain)), "modules": self.modules, "sha256": self.sha256}

    def places(self, anatomy: Anatomy) -> dict[str, Place]:
        """Where it stands.

        Raises:
            ModelError: the model has no such places.
        """
        if isinstance(self.config, PlacedConfig):
            found = self.config.places(anatomy)
        elif getattr(self.config, "beside_ffn", False):
            found = {}
            for sub in anatomy.sub_layers:
                width = anatomy.features[sub.last][0]
                if sub.last in self.modules:
                    found[sub.last] = Place("ffn", FeedForwardLayer, width, width, heard=sub.first)
        else:
            known = [name for name in self.modules if name in anatomy.features]
            found = {name: Place("linear", DeltaLinear, *anatomy.features[name]) for name in known}
        if sorted(found) != self.modules:
            other = sorted(set(found) ^ set(self.modules))[0]
            raise ModelError(
                f"The adapter does not fit the model: at '{other}' only one of the two has a place."
            )
        return found

    def change(self, name: str, place: Place) -> Delta:
        """Its change at a place, with its weights where they are at hand."""
        config: Any = self.config
        if isinstance(config, PlacedConfig):
            made = config.change(place)
        elif isinstance(config, LoraConfig):
            made = LowRank(config, place.width, place.reads, name)
        else:
            made = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].delta(config, place.width, place.reads, name)
        if self.tensors:
            made.load_state_dict(self.tensors[name])
        return made


def why_not(config: PeftConfig) -> str:
    """Why an adapter is no change of hidden states that could be taken alone, or ''."""
    if isinstance(config, PlacedConfig):
        return config.why_not_alone()
    if isinstance(config, LoraConfig):
        odd = config.use_dora or config.rank_pattern or config.alpha_pattern or config.bias != "none"
        return (
            "a LoRA with DoRA, biases, or ranks and scales of single layers is not known here" if odd else ""
        )
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    if isinstance(config, DeltaConfig) and isinstance(tuner, type) and issubclass(tuner, DeltaTuner):
        return "" if tuner.make_delta is DeltaTuner.make_delta else "its changes share parts with each other"
    return f"{config.peft_type} makes no change of hidden states at places of its own"


def frozen(change: nn.Module) -> nn.Module:
    """The change with buffers for parameters: saved as before, and never trained."""
    for module in change.modules():
        for name, value in list(module._parameters.items()):
            del module._parameters[name]
            module.register_buffer(name, None if value is None else value.detach())
    return change


def _split(key: str, config: PeftConfig) -> tuple[str, str]:
    """(module, name within the change) of a tensor in an adapter's file; ('', '') for all else."""
    key = key.removeprefix(ROOT)
    if isinstance(config, LoraConfig):
        module, found, factor = key.partition(".lora_")
        return (module, factor.removesuffix(".weight")) if found else ("", "")
    module, found, inside = key.partition(f".{PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].prefix}delta.")
    return (module, inside.removeprefix("adapter.")) if found else ("", "")
