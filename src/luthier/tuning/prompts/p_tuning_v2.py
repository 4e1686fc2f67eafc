"""P-tuning v2: deep prompts for understanding, learnt directly, with a classification head.

Paper: Liu et al., 2022, "P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across
Scales and Tasks", arXiv 2110.07602.
Pick it when a frozen encoder must classify or tag and weights may not change; give it many epochs and a
hundred times the learning rate of fine-tuning. For a decoder that writes, prefix tuning.
Cost: 2 P L H d numbers, for L layers of H key/value heads of width d, and the head. P more keys in each
layer, no more queries; the backward pass goes down to the lowest layer with prompts.

In layer l every query sees P learnt pairs before the text's keys and values:

    o = softmax( q [K_l; K]^T s + mask ) [V_l; V],    K_l, V_l (P, H d) ~ N(0, 0.02^2)

Trained: K_l, V_l of the layers `first_layer` to `last_layer`, and the new head on the first token or on
every one. Frozen: all else, the pooler too. Dropout acts on all numbers of the prompts, for every text
anew, as the backbone's acts on its states.

What differs from prefix tuning is the use and the defaults: no projection (`prefix_projection` brings it
back; the paper finds that it helps some tasks and hurts others), a small start, dropout, a head instead of
a verbaliser. Prompts in the upper layers matter most: with `first_layer` above 0 the layers below keep
nothing for the backward pass.

As in the authors' code the positions of the text begin at P, so T + P must fit into the model's positions.
Differs from it: a classifier keeps the head of its architecture (RoBERTa's has two layers, and both learn).
Training over several data sets with a head each, which the paper describes and its code leaves out, is not
here.

Files are those of PEFT's PREFIX_TUNING where PEFT's class computes the same, and of our own type P_TUNING_V2
otherwise (some layers only, encoders whose forward takes no cache, encoder-decoders).
"""

from dataclasses import dataclass

from luthier.errors import MethodError
from luthier.options import option
from luthier.tuning.attention_prompt_tuner import AttentionPromptConfig, AttentionPromptTuner
from luthier.tuning.registration import register


@dataclass
class Config(AttentionPromptConfig):
    """Options of P-tuning v2."""

    num_virtual_tokens: int = option(20, "length P of the prompts; hard tagging tasks want 100", ge=1)
    prompt_dropout: float = option(0.1, "dropout on the prompts' keys and values", ge=0, lt=1)
    first_layer: int = option(0, "lowest layer with prompts, counted from 0", ge=0)
    last_layer: int | None = option(None, "highest layer with prompts; default: the model's highest", ge=0)
    init_std: float = option(0.02, "standard deviation of the prompts' start", ge=0)
    prefix_projection: bool = option(False, "learn the prompts through an MLP, which is dropped afterwards")
    encoder_hidden_size: int = option(512, "hidden width of that MLP", ge=1)
    shift_positions: bool = option(True, "positions of the text begin at P")

    def layers(self, count: int) -> range:
        end = count if self.last_layer is None else self.last_layer + 1
        if not self.first_layer < end <= count:
            raise MethodError(
                f"Prompts in layers {self.first_layer} to {end - 1} of a stack of {count} layers.",
                fix=f"Choose first_layer <= last_layer, both from 0 to {count - 1}.",
            )
        return range(self.first_layer, end)


class Tuner(AttentionPromptTuner):
    prefix = "p_tuning_v2_"


register("p_tuning_v2", Config, Tuner)
