"""CoDA, conditional adapters: a small adapter for every token, and the frozen block for the few that need it.

Paper: Lei et al., 2023, "Conditional Adapters: Parameter-efficient Transfer Learning with Fast Inference",
arXiv 2304.04947.
Pick it when a long text is read by an encoder (BERT, T5) and both the trained part and the time for reading
must be small. It chooses tokens among the whole text, so a model that writes token by token cannot have it.
Cost: 2 d h + 2 d + h parameters a block, and 2 d a LayerNorm; of the block's work a share 1 / r, and 4 n d h
operations for the adapter.

For the states X (n, d) of a text, a frozen block with its first norm N, and k = ceil(n / r):

    Y = X + A(N(X)) + m * ( block(P X) - P X ),    A(x) = W_up relu(W_down x + b_down) + b_up
    s = X w,    m = softtopk(s)_i for the k tokens with the highest s_i, else 0,    P picks those k

so that a token that is not chosen meets the adapter alone, and with r = 1 the layer is the dense block with a
parallel adapter. Chosen tokens attend to each other (k-to-k), at the positions that they have in the text,
and keep their order. Post-norm blocks (BERT) have no N before them: A reads X itself, and block(P X) - P X is
what the block changes; this form is our own, for the paper has pre-norm models only.

Soft top-k maximises s . m + eps H(m) under sum m = k and 0 <= m <= 1. `solver: exact` finds the one
threshold; `iterative` is the paper's, `solver_iters` dual steps, whose sum stays below k where eps is small.
The choice follows s, not m, where saturated weights tie. Of padding nothing is chosen, and k follows the real
length.

A classifier's head reads one token, the first (BERT) or the last (Llama). Where the last block does not
choose it, what the blocks below found out does not reach the head, and nothing learns; with `keep_read` that
token is always among the k, with m = 1. The paper's encoders feed a decoder, which reads all tokens.

Start: W_down uniform, W_up and biases 0, w ~ N(0, 1 / d). The model starts otherwise than its base, unless
r = 1.
Trained: adapters, w, a new head, and every LayerNorm of the encoder (as differences from the base's). Frozen:
all else. The decoder of an encoder-decoder has plain parallel adapters and no routing.

Differs from the paper: there the routers are first trained for many steps with the objective of pre-training;
here they learn with the task, unless the adapter is trained on general text before. Keys and values of all
tokens for the chosen queries (its k-to-all) are not offered.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from luthier.errors import MethodError
from luthier.models import structure
from luthier.options import option
from luthier.tuning.bottleneck import Anatomy, Bottleneck, NormLayer, Place, PlacedConfig, PlacedTuner
from luthier.tuning.registration import register
from luthier.tuning.routing import RoutedLayer, iterative_top_k, soft_top_k
from luthier.tuning.tuner import Delta, DeltaLayer, FeedForwardLayer


@dataclass
class Config(PlacedConfig):
    """Options of conditional adapters; `modules_to_save` can be given too."""

    bottleneck_dim: int = option(64, "hidden width h of the adapters", ge=1)
    reduction: float = option(3.0, "r: one of so many tokens goes through the block", ge=1)
    solver: str = option("exact", "of soft top-k", choices=("exact", "iterative"))
    eps: float = option(0.03, "softness of the choice", gt=0)
    solver_iters: int = option(20, "steps of the iterative solver", ge=1)
    eps_init: float = option(4.0, "softness at its first step", gt=0)
    eps_decay: float = option(0.7, "by which that falls at each step", gt=0, le=1)
    router_input: str = option(
        "hidden", "what w reads in a pre-norm block: the states or their norm", choices=("hidden", "normed")
    )
    keep_read: bool = option(True, "in a classifier, the token that the head reads is always chosen")
    train_layernorm: bool = option(True, "every LayerNorm of the encoder learns too")
    layers_to_transform: list[int] | int | None = option(
        None, "indices of the blocks with adapters, within encoder and decoder each; default: all"
    )
    dropout: float = option(0.0, "dropout on the bottleneck", ge=0, lt=1)

    @property
    def starts_as_base(self) -> bool:
        return self.reduction == 1

    def check_model(self, model: nn.Module) -> None:
        if structure.task(model) == "causal":
            raise MethodError(
                f"{type(model).__name__} writes token by token, but CoDA chooses tokens among the whole "
                "text: the choice would look at what is not written yet.",
                fix="Use an encoder (task: classification, or an encoder-decoder), or method: parallel.",
            )

    def why_not_alone(self) -> str:
        return "its adapters choose tokens"

    def places(self, anatomy: Anatomy) -> dict[str, Place]:
        subs = self.chosen(anatomy)
        decoding = {sub.block for sub in subs if sub.kind == "cross"}
        found = {}
        for sub in subs:
            width = anatomy.features[sub.last][0]
            if sub.kind == "ffn" and sub.block in decoding:
                found[sub.end] = Place("ffn", FeedForwardLayer, width, width, heard=sub.stream)
            elif sub.kind == "attention" and sub.block not in decoding:
                norm = sub.before and sub.before.removeprefix(f"{sub.block}.")
                found[sub.block] = Place("block", RoutedLayer, width, width, heard=norm)
        routed = [name for name, place in found.items() if place.role == "block"]
        for name in anatomy.norms if self.train_layernorm else ():
            if any(name.startswith(f"{block}.") for block in routed):
                found[name] = Place("norm", NormLayer, 0, 0, norm=True)
        return found

    def change(self, place: Place) -> Delta:
        adapter = Bottleneck(
            place.reads, place.width, self.bottleneck_dim, activation="relu", dropout=self.dropout
        )
        return Conditional(self, adapter, place.width) if place.role == "block" else adapter


class Conditional(Delta):
    """The adapter of a block and its router w."""

    def __init__(self, config: Config, adapter: Bottleneck, width: int):
        super().__init__(config, width, width, "")
        self.adapter = adapter
        self.router = nn.Parameter(torch.randn(width) / width**0.5)
        self.reduction = config.reduction
        self.config = config
        self.read = ""  # which token a head reads: "first" or "last"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        made: Tensor = self.adapter(x, y)
        return made

    def scores(self, states: Tensor, normed: Tensor) -> Tensor:
        """s (batch, n), in fp32 whatever the model computes in."""
        read = normed if self.config.router_input == "normed" else states
        with torch.autocast(states.device.type, enabled=False):
            return read.to(self.router.dtype) @ self.router

    def kept(self, real: Tensor) -> Tensor | None:
        """The place (batch,) of a token that is chosen in any case; real (batch, n): False for padding."""
        if self.read == "last":
            return real.shape[1] - 1 - real.flip(1).int().argmax(1)
        return real.int().argmax(1) if self.read == "first" else None

    def weigh(self, scores: Tensor, k: Tensor) -> Tensor:
        """Soft top-k (batch, n) of scores (batch, n)."""
        config = self.config
        with torch.autocast(scores.device.type, enabled=False):
            if config.solver == "exact":
                return soft_top_k(scores, k, config.eps)
            return iterative_top_k(
                scores, k, config.eps, config.solver_iters, config.eps_init, config.eps_decay
            )


class Tuner(PlacedTuner):
    """Puts conditional adapters beside the blocks of an encoder."""

    prefix = "coda_"

    def make_layer(self, config: Any, base_layer: nn.Module, name: str) -> DeltaLayer:
        place = self._places[name]
        if place.role != "block":
            return super().make_layer(config, base_layer, name)
        layer: Any = RoutedLayer(base_layer, f"{self.prefix}delta", place.width, place.heard)
        layer.place = place
        return layer

    def change(self, config: Config, name: str, place: Place) -> Delta:
        made = super().change(config, name, place)
        pools = structure.task(self.model) == "classification" and not self.model.config.is_encoder_decoder
        if isinstance(made, Conditional) and config.keep_read and pools:
            causal = any(getattr(module, "is_causal", False) for module in self.model.modules())
            made.read = "last" if causal else "first"
        return made

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: nn.Module, *args: Any, **kwargs: Any
    ) -> None:
        there = getattr(target, BESIDE, target)
        super()._create_and_replace(peft_config, adapter_name, there, *args, **kwargs)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        if isinstance(new_module, RoutedLayer):
            child.add_module(BESIDE, new_module)
        elif isinstance(child, RoutedLayer):
            delattr(parent, child_name)
        else:
            super()._replace_module(parent, child_name, new_module, child)


BESIDE = "routing"  # a block's child; its name must not hold the prefix, at which PEFT splits names

register("coda", Config, Tuner)
