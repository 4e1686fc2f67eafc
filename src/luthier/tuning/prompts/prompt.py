"""Prompt tuning: learnt vectors in front of the input, and nothing else.

Paper: Lester et al., 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv 2104.08691.
Pick it when one large model serves many tasks and each may add only a few thousand numbers; below a billion
parameters prefix tuning and LoRA learn clearly more. It works on any architecture.
Cost: P x width numbers; P more tokens in every text, through the whole model.

The embedded text X (T, width) gets P learnt rows in front:

    input = [P_e; X],    P_e (P, width),    theta* = argmax over P_e of sum log p(Y | [P_e; X])

Trained: P_e, and the new head of a classifier. Frozen: all else. Labels, logits and pooled outputs are those
of the text alone.

    decoder           in front of the first real token, padding on either side; before each packed document
    encoder-decoder   in front of the encoder's text; the decoder attends to all P + T states
    encoder           behind the first token ([CLS]), which the classifier reads

`init` says what P_e starts from, which matters the more the smaller the model is:

    vocabulary   embeddings of tokens drawn from the 5,000 most frequent, without replacement (the ids' order
                 stands for their frequency)
    text         embeddings of the tokens of `init_text`, repeated or cut to P
    random       U(-0.5, 0.5)

`init_labels` fills the first rows with class labels, each the mean of its tokens' embeddings; the rest follow
`init`. This is the paper's own start.

The paper trains with Adafactor at a constant rate of 0.3 (`optim: adafactor, optim_args:
"scale_parameter=False,relative_step=False"`). For AdamW take a rate at which a step moves a row by 1% to 10%
of its length: rate x sqrt(width) / length.

Differs from PEFT's class: prompts stand beside the text and not before its padding; a classifier reads its
own token; the rows are of the embedding layer, scale included. Files are those of PEFT's PROMPT_TUNING where
the two compute the same (decoders, encoder-decoders), and of our own type PROMPT for classifiers.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.errors import MethodError
from luthier.options import option
from luthier.tuning.input_prompts import InputPromptConfig, InputPromptTuner, embedded, frequent_ids
from luthier.tuning.registration import register
from luthier.tuning.soft_prompts import text_ids


@dataclass
class Config(InputPromptConfig):
    """Options of prompt tuning."""

    num_virtual_tokens: int = option(20, "number P of learnt vectors", ge=1)
    init: Literal["vocabulary", "text", "random"] = option(
        "vocabulary",
        "where they start: vocabulary (frequent tokens), text (the words of init_text), random",
        choices=("vocabulary", "text", "random"),
    )
    init_text: str | None = option(None, "text whose tokens they start from, repeated or cut to P")
    init_labels: list[str] | None = option(None, "class labels that the first of them start from")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.init == "text") != (self.init_text is not None):
            raise MethodError(
                "init: text and init_text go together.", fix="Write both, such as init_text: 'Summarise:'."
            )

    def initial(self, model: PreTrainedModel, width: int) -> Tensor:
        length = self.num_virtual_tokens
        if model.device.type == "meta" or self.inference_mode or self.init == "random":
            rows = torch.rand(length, width) - 0.5
        elif self.init_text is not None:
            rows = embedded(model, torch.tensor(text_ids(model, self.init_text, length)))
        else:
            rows = embedded(model, frequent_ids(model, length))
        labels = [] if model.device.type == "meta" or self.inference_mode else self.init_labels or []
        for row, label in enumerate(labels[:length]):
            ids = torch.tensor(text_ids(model, label))
            rows[row] = embedded(model, ids).mean(0)
        return rows


class Tuner(InputPromptTuner):
    prefix = "prompt_"


register("prompt", Config, Tuner)
