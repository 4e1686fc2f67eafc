"""Prefix tuning: learnt keys and values in front of the text, in every layer.

Paper: Li & Liang, 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv 2101.00190.
Pick it when a frozen model must write differently for many tasks that share it, from little data; nothing
folds into the weights. LoRA usually learns more from the same data.
Cost: 2 P L H d numbers stored, for L layers of H key/value heads of width d; the projection holds about
hidden x (width + 2 L H d) more in training. P more keys in each layer, no more queries.

A model of L layers with H key/value heads of width d. The prefix of length P is a table

    P_theta (P, 2 L H d) = [K_1 V_1 ... K_L V_L],    K_l, V_l (P, H d)
    o = softmax( q [K_l; K]^T s + mask ) [V_l; V]    in layer l, the prefix open to every query

Learnt directly the table is hard to train. `prefix_projection` makes it of a small one, row by row:

    P_theta[i] = W_2 tanh( W_1 P'[i] + b_1 ) + b_2
    P' (P, width), W_1 (hidden, width), W_2 (2 L H d, hidden)

Trained: P', W_1, b_1, W_2, b_2 (or the table), and the new head of a classifier. Frozen: all else. The loss
is the objective's. After training the projection is evaluated once and dropped; checkpoints keep it.

An encoder-decoder gets three prefixes, each with a projection of its own: in the encoder's self-attention, in
the decoder's, and in front of the encoder's states in cross-attention.

`init_text` starts the prefix from the keys and values that the model itself computes for a text. With the
projection, W_2 and b_2 are solved for them (least squares), instead of 500 steps of Adam as in the authors'
code.

As in the authors' code: the projection's hidden width is its own option (the paper gives it to P'), and the
positions of the text begin at P. Differs from it: position tables of an encoder-decoder are not shifted, so
that no positions are lost.

Files are those of PEFT's PREFIX_TUNING where PEFT's class computes the same: decoders and encoders whose
forward takes a cache. PEFT's class gives an encoder-decoder one prefix of the three; our file is then of our
own type, PREFIX.
"""

from dataclasses import dataclass

from luthier.options import option
from luthier.tuning.attention_prompt_tuner import AttentionPromptConfig, AttentionPromptTuner
from luthier.tuning.registration import register


@dataclass
class Config(AttentionPromptConfig):
    """Options of prefix tuning."""

    num_virtual_tokens: int = option(20, "length P of the prefix", ge=1)
    prefix_projection: bool = option(True, "learn the prefix through an MLP, which is dropped afterwards")
    encoder_hidden_size: int = option(512, "hidden width of that MLP", ge=1)
    init_text: str | None = option(
        None, "text whose keys and values the prefix starts from, repeated or cut to P tokens"
    )
    shift_positions: bool = option(True, "positions of the text begin at P")


class Tuner(AttentionPromptTuner):
    prefix = "prefix_"


register("prefix", Config, Tuner)
