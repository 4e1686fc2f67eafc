"""P-tuning: learnt vectors anywhere in a template, made by a small network that ties them together.

Paper: Liu et al., 2021, "GPT Understands, Too", arXiv 2103.10385.
Pick it when the task is a template with gaps and there are tens of examples: real words of the task can
stay between the learnt ones. For vectors in front of the text prompt tuning, for more effect prefix tuning.
Cost: P x width numbers stored; the LSTM of half the width holds 14 width^2 more that only training needs.
P more tokens in every text.

A template {h_0 ... h_i, x, h_i+1 ... h_m, y} has m = P learnt vectors h at chosen places; the rest of it,
anchor words too, is text of the model's own. The vectors are read from one small sequence, in the order of
the template, whatever the text:

    lstm    h_i = W_2 relu( W_1 [forward LSTM(E)_i ; backward LSTM(E)_i] + b_1 ) + b_2
    mlp     h_i = W_2 relu( W_1 E_i + b_1 ) + b_2
    none    h_i = E_i
    E (P, width),    LSTM of `encoder_num_layers` layers with `encoder_hidden_size` units in each direction
    W_1 (width, 2 units) or (width, width),    W_2 (width, width)

The default of width / 2 units is the encoder of the authors' knowledge probing; `encoder_hidden_size` equal
to the width is that of their few-shot code. Trained: E, LSTM, W_1, b_1, W_2, b_2, and the new head of a
classifier. Frozen: all else. When saved, the vectors are evaluated once and the network is dropped.

`marker` names a token of the model's tokenizer which texts of the task do not use, such as BERT's [unused1]:
each text then holds it P times, where the vectors go ("<x> is located in the country of <x> ..."). Keep the
places out of what is trained and away from where texts are cut off. Without it the vectors stand in front
(as in prompt tuning). Templates of a text prompt (`luthier.evaluation.text_prompt`) may hold the marker: a
model with learnt vectors then answers at the gap between them.

Differs from the authors' code: the network never learns together with the model's own weights (their
few-shot runs tune both), and labels are the objective's, not words at a mask. PEFT's P_TUNING stands in
front only, and its MLP has three layers; files are its where ours are in front too (not of classifiers), and
of our own type P_TUNING_V1 otherwise.
"""

from dataclasses import dataclass
from typing import Literal

import peft
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.options import option
from luthier.tuning.input_prompts import InputPromptConfig, InputPromptTuner
from luthier.tuning.registration import register


@dataclass
class Config(InputPromptConfig):
    """Options of P-tuning."""

    num_virtual_tokens: int = option(20, "number P of learnt vectors", ge=1)
    marker: str | None = option(
        None, "token that stands P times in each text, where the vectors go; default: they go in front"
    )
    encoder: Literal["lstm", "mlp", "none"] = option(
        "lstm", "the network that makes the vectors: lstm, mlp, none", choices=("lstm", "mlp", "none")
    )
    encoder_hidden_size: int | None = option(
        None, "units of the LSTM in each direction; default: width / 2", ge=1
    )
    encoder_num_layers: int = option(2, "layers of the LSTM", ge=1)
    encoder_dropout: float = option(0.0, "dropout between the layers of the LSTM", ge=0, lt=1)

    def initial(self, model: PreTrainedModel, width: int) -> Tensor | nn.Module:
        if self.encoder == "none":
            return torch.randn(self.num_virtual_tokens, width)
        units = self.encoder_hidden_size or max(width // 2, 1)
        layers = self.encoder_num_layers if self.encoder == "lstm" else 0
        return PromptEncoder(self.num_virtual_tokens, width, units, layers, self.encoder_dropout)


class PromptEncoder(nn.Module):
    """The vectors (P, width) from a table of the same size, through an LSTM in both directions or none."""

    def __init__(self, length: int, width: int, units: int, layers: int, dropout: float):
        super().__init__()
        self.embedding = nn.Embedding(length, width)
        self.lstm = None
        if layers:
            # One layer has nothing to drop between, and torch says so.
            between = dropout if layers > 1 else 0.0
            self.lstm = nn.LSTM(width, units, layers, dropout=between, bidirectional=True, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(2 * units if layers else width, width), nn.ReLU(), nn.Linear(width, width)
        )

    def forward(self) -> Tensor:
        states = self.embedding.weight[None]  # (1, P, width)
        if self.lstm is not None:
            states, _ = self.lstm(states)  # (1, P, 2 units)
        vectors: Tensor = self.mlp(states)[0]
        return vectors


class Tuner(InputPromptTuner):
    prefix = "p_tuning_v1_"
    kind_of_peft = peft.PromptEncoderConfig


register("p_tuning_v1", Config, Tuner)
