"""Serial adapters: small bottleneck networks with a skip connection behind the sub-layers of a frozen model.

Paper: Houlsby et al., 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv 1902.00751; the placement
`pfeiffer`: Pfeiffer et al., 2021, "AdapterFusion: Non-Destructive Task Composition for Transfer Learning",
arXiv 2005.00247.
Pick it when one frozen encoder (or T5, BART) serves many tasks that are added one by one, or as what `fusion`
mixes. It cannot be merged; where an adapter must cost nothing when it serves, choose LoRA.
Cost: 2 m d + m + d parameters a place, two places a block (houlsby) or one (pfeiffer), and 2 d for each
LayerNorm that learns; 4 m d operations a token and place.

With the width d, the bottleneck m and a non-linearity f:

    A(x) = W_up f(W_down x + b_down) + b_up,    W_down (m, d), W_up (d, m)

`placement`, where F is a sub-layer, N a norm, h the stream, and v what F gives after its dropout:

    houlsby    behind attention and FFN:  h <- h + v + A(v)        and N( h + v + A(v) ) in post-norm blocks
    pfeiffer   behind the FFN alone:      h <- h + v + A(h + v)    pre-norm blocks (Llama, GPT-2, T5)
                                          h <- N( h + v + A(N(h + v)) )    post-norm blocks (BERT, BART)

In the last line N is the same frozen norm twice, and the skip around A starts before it. A norm of the
sub-layer's own output (Gemma 2) belongs to F. Both halves of an encoder-decoder have adapters; behind
cross-attention only with `cross_attention`.

Start: `zero` has W_up = 0, so that the model starts as its base. `normal` is the paper's: both matrices
N(0, init_std^2) cut off at two standard deviations, a small change from the beginning.
Trained: the adapters, the new head of a classifier, and (houlsby) gain and bias of every LayerNorm. Frozen:
all else, a pooler too. The norms are kept as differences from the base's, one set for each adapter.

Differs from the paper: `zero` is the default. Where a model's dropout is no module (BART), the adapter stands
before it, which is the same when it serves. An adapter of a linear f, which could be folded into the weights,
is not offered.
"""

from dataclasses import dataclass

from luthier.errors import MethodError
from luthier.options import option
from luthier.tuning.bottleneck import (
    Anatomy,
    Bottleneck,
    NormLayer,
    OutputLayer,
    OutputNormLayer,
    Place,
    PlacedConfig,
    PlacedTuner,
    StreamLayer,
)
from luthier.tuning.registration import register

HOULSBY_DIM = 64
PFEIFFER_FACTOR = 16


@dataclass
class Config(PlacedConfig):
    """Options of serial adapters."""

    placement: str = option(
        "houlsby", "behind attention and FFN, or behind the FFN alone", choices=("houlsby", "pfeiffer")
    )
    bottleneck_dim: int | None = option(
        None, "width m of the bottleneck; default: 64 for houlsby, width / 16 for pfeiffer", ge=1
    )
    reduction_factor: float | None = option(None, "m as width / reduction_factor instead", gt=0)
    non_linearity: str | None = option(
        None,
        "f; default: gelu_tanh for houlsby, relu for pfeiffer",
        choices=("relu", "gelu", "gelu_tanh", "leaky_relu", "silu", "tanh"),
    )
    train_layernorm: bool | None = option(
        None, "every LayerNorm learns too; default: with houlsby it does, with pfeiffer it does not"
    )
    cross_attention: bool = option(False, "for houlsby: adapters behind cross-attention too")
    layers_to_transform: list[int] | int | None = option(
        None, "indices of the blocks with adapters, within encoder and decoder each; default: all"
    )
    dropout: float = option(0.0, "dropout on the bottleneck", ge=0, lt=1)
    init: str = option("zero", "start as the base, or small and random", choices=("zero", "normal"))
    init_std: float = option(0.01, "standard deviation of the random start", gt=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bottleneck_dim is not None and self.reduction_factor is not None:
            raise MethodError(
                "bottleneck_dim and reduction_factor both set the width of the bottleneck.",
                fix="Write one of them.",
            )
        houlsby = self.placement == "houlsby"
        if self.non_linearity is None:
            self.non_linearity = "gelu_tanh" if houlsby else "relu"
        if self.train_layernorm is None:
            self.train_layernorm = houlsby

    @property
    def starts_as_base(self) -> bool:
        return self.init == "zero"

    def why_not_alone(self) -> str:
        return (
            "its LayerNorms learnt too (train it with train_layernorm: false)" if self.train_layernorm else ""
        )

    def places(self, anatomy: Anatomy) -> dict[str, Place]:
        found = {}
        for sub in self.chosen(anatomy):
            width = anatomy.features[sub.last][0]
            if self.placement == "houlsby":
                learns = bool(self.train_layernorm) and sub.end in anatomy.norms
                layer = OutputNormLayer if learns else OutputLayer
                if sub.kind != "cross" or self.cross_attention:
                    found[sub.end] = Place(sub.kind, layer, width, width, norm=learns)
            elif sub.kind == "ffn" and sub.after is not None:
                found[sub.after] = Place(sub.kind, NormLayer, width, width, norm=bool(self.train_layernorm))
            elif sub.kind == "ffn":
                found[sub.end] = Place(sub.kind, StreamLayer, width, width, heard=sub.stream)
        for name in anatomy.norms if self.train_layernorm else ():
            if not found.setdefault(name, Place("norm", NormLayer, 0, 0, norm=True)).norm:
                raise MethodError(
                    f"The norm '{name}' cannot learn beside the adapter that reads behind it.",
                    fix="Write train_layernorm: false, or placement: houlsby.",
                )
        return found

    def dim(self, width: int) -> int:
        """m for a model of `width`; never 0."""
        if self.bottleneck_dim is not None:
            return self.bottleneck_dim
        if self.reduction_factor is None and self.placement == "houlsby":
            return HOULSBY_DIM
        return max(1, int(width / (self.reduction_factor or PFEIFFER_FACTOR)))

    def change(self, place: Place) -> Bottleneck:
        assert self.non_linearity is not None
        return Bottleneck(
            place.reads,
            place.width,
            self.dim(place.width),
            activation=self.non_linearity,
            dropout=self.dropout,
            std=0.0 if self.starts_as_base else self.init_std,
        )


class Tuner(PlacedTuner):
    """Puts serial adapters on a model."""

    prefix = "serial_"


register("serial", Config, Tuner)
