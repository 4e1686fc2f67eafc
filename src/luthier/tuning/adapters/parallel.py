"""Parallel adapters: bottleneck networks beside the FFN, and with a prefix in attention the MAM adapter.

Paper: He et al., 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv 2110.04366.
Pick it when a frozen model must learn to write (summaries, translations, answers) and some percent of its
size may be spent; MAM (`prefix_length: 30`) is what the paper ends with. It cannot be merged: for that, LoRA.
Cost: 2 r d + r + d parameters a block and 4 r d operations a token, beside the FFN; a prefix as in `prefix`.

With the stream a (batch, seq, d) that the FFN starts from, its norm N and a bottleneck of width r:

    D(x) = W_up relu(W_down x + b_down) + b_up,    W_down (r, d), W_up (d, r)

    pre-norm blocks (Llama, GPT-2, T5):    h = a + FFN(N(a)) + s D(a)
    post-norm blocks (BERT, BART):         h = N( a + FFN(a) + s D(a) )

The change is added after the FFN's own dropout; dropout of the adapter acts on the r activations. The scale s
multiplies the bias too. `parallel_input: normed` reads N(a) instead in pre-norm blocks, which is easier on
deep models whose stream grows.

`attention_dim` puts adapters beside attention too, of that width and with s = 1. They read what the queries
are made of, and stand before the output projection:

    W_o ( [head_1 ... head_H] + D(x) ) + b_o

`prefix_length` l makes it MAM: l learnt keys and values in front of those of every attention (encoder,
decoder and cross), made by an MLP in training, as in the method `prefix`. Both parts are one adapter and one
file. The prefix changes the model from the start on.

Start: W_down uniform, W_up and biases 0: without a prefix the model starts as its base. `init: normal` draws
both matrices from N(0, 0.02^2), cut off at two standard deviations, as the paper's unscaled adapters do.
Trained: the adapters, the prefix, the new head of a classifier. Frozen: all else, every LayerNorm too.

Differs from the authors' code: no LayerNorm of its own on the input of adapters beside attention, and the
start chosen is that of all adapters. Differs from the paper: no multi-head variant, and s is no parameter.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig, PeftModel
from torch import Tensor, nn

from luthier.options import option
from luthier.tuning import soft_prompts
from luthier.tuning.attention_prompt_tuner import AttentionPromptTuner
from luthier.tuning.attention_prompts import Site, find_sites
from luthier.tuning.bottleneck import Anatomy, Bottleneck, HeadsLayer, Place, PlacedConfig, PlacedTuner
from luthier.tuning.registration import register
from luthier.tuning.soft_prompts import PromptLayer, PromptTuner
from luthier.tuning.tuner import DeltaLayer, FeedForwardLayer


@dataclass
class Config(PlacedConfig):
    """Options of parallel adapters."""

    bottleneck_dim: int = option(512, "width r of the adapters beside the FFN", ge=1)
    scale: float = option(4.0, "s, by which they are multiplied; 2 for classification", gt=0)
    parallel_input: str = option(
        "residual",
        "what they read in a pre-norm block: the stream or its norm",
        choices=("residual", "normed"),
    )
    attention_dim: int = option(0, "width of adapters beside attention; 0 for none", ge=0)
    prefix_length: int = option(0, "length l of a prefix in every attention (MAM); 0 for none", ge=0)
    prefix_projection: bool = option(True, "learn the prefix through an MLP, which is dropped afterwards")
    prefix_hidden_size: int = option(800, "hidden width of that MLP", ge=1)
    non_linearity: str = option(
        "relu",
        "of the bottleneck",
        choices=("relu", "gelu", "gelu_tanh", "leaky_relu", "silu", "tanh"),
    )
    layers_to_transform: list[int] | int | None = option(
        None, "indices of the blocks with adapters, within encoder and decoder each; default: all"
    )
    dropout: float = option(0.1, "dropout on the bottleneck", ge=0, lt=1)
    init: str = option("zero", "start as the base, or small and random", choices=("zero", "normal"))

    init_std: ClassVar[float] = 1.0  # of a prefix without projection
    init_text: ClassVar[None] = None
    prompt_dropout: ClassVar[float] = 0.0
    shift_positions: ClassVar[bool] = True

    @property
    def num_virtual_tokens(self) -> int:
        return self.prefix_length

    @property
    def encoder_hidden_size(self) -> int:
        return self.prefix_hidden_size

    @property
    def starts_as_base(self) -> bool:
        return self.init == "zero" and not self.prefix_length

    def check_model(self, model: nn.Module) -> None:
        if self.prefix_length:
            find_sites(model)

    def layers(self, count: int) -> Sequence[int]:
        """Of the `count` attentions of a kind those with a prefix."""
        wanted = range(count) if self.layers_to_transform is None else self.layers_to_transform
        return [wanted] if isinstance(wanted, int) else wanted

    def why_not_alone(self) -> str:
        return "it has a prefix in attention" if self.prefix_length else ""

    def places(self, anatomy: Anatomy) -> dict[str, Place]:
        found = {}
        for sub in self.chosen(anatomy):
            out, joined = anatomy.features[sub.last]
            if sub.kind == "ffn":
                heard = sub.stream if self.parallel_input == "residual" else sub.first
                found[sub.end] = Place(sub.kind, FeedForwardLayer, out, out, heard=heard)
            elif self.attention_dim:
                reads = anatomy.features[sub.first][1]
                found[sub.last] = Place(sub.kind, HeadsLayer, joined, reads, heard=sub.first)
        return found

    def change(self, place: Place) -> Bottleneck:
        ffn = place.role == "ffn"
        return Bottleneck(
            place.reads,
            place.width,
            self.bottleneck_dim if ffn else self.attention_dim,
            activation=self.non_linearity,
            scale=self.scale if ffn else 1.0,
            dropout=self.dropout,
            std=0.0 if self.init == "zero" else 0.02,
        )

    def save_adapter(self, model: PeftModel, folder: Path | str) -> None:
        if self.prefix_length:
            soft_prompts.save(model, folder)
        else:
            model.save_pretrained(str(folder))


class Tuner(PlacedTuner, AttentionPromptTuner):
    """Puts parallel adapters on a model, and where the config asks for one a prefix."""

    prefix = "parallel_"
    tuner_layer_cls = (DeltaLayer, PromptLayer)  # type: ignore[assignment]  # PEFT asks with isinstance

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self._sites: list[Site] = []  # until an adapter with a prefix comes
        self.attentions = []

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        self._chosen_paths: set[str] = set()
        if not peft_config.prefix_length:
            return
        if not self._sites:
            AttentionPromptTuner._pre_injection_hook(self, model, peft_config, "")
        places = peft_config.target_modules
        super()._prepare_model(peft_config, model)
        self._chosen_paths = set(peft_config.target_modules)
        peft_config.target_modules |= places

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:
        return key in self._chosen_paths or super()._check_target_module_exists(peft_config, key)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        prefix = kwargs["current_key"] in self._chosen_paths
        engine: Any = AttentionPromptTuner if prefix else PlacedTuner
        engine._create_and_replace(self, *args, **kwargs)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        engine: Any = PromptTuner if f".{cls.prefix}prompt." in key else PlacedTuner
        name: str = engine._remove_adapter_name_from_key.__func__(cls, key, adapter_name)
        return name

    # What stays of a prefix after training -----------------------------------------------------------------

    def folded_config(self, adapter: str) -> PeftConfig:
        config = copy.deepcopy(self.peft_config[adapter])
        config.prefix_projection = False
        return config

    def to_peft(self, adapter: str) -> tuple[PeftConfig, Tensor] | None:
        return None

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            self.require_mergeable()
        if self._sites:
            self.remove()
        return super(PromptTuner, self)._unload_and_optionally_merge(False, *args, **kwargs)


register("parallel", Config, Tuner)
