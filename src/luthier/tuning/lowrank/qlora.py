"""QLoRA: LoRA on a base that is held in 4 bits.

Paper: Dettmers et al., 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314.
Pick it when the model does not fit in 16 bits: its weights take about a quarter, and answers hardly suffer.
Cost: r(in + out) parameters a linear layer; 4.127 bits for each frozen weight (4.5 with `double_quant:
false`). Each product makes its weights anew, once in the forward pass and once in the backward pass.

A frozen weight W (out, in) is held as the nearest of 16 numbers q in each block of 64, times the block's
largest size c. c - mean(c) is held in 8 bits, 256 to a block of its own. With W^ = c q made anew:

    y = W^ x + b + s B A D(x),    A (r, in), B (out, r),    s = alpha / r, or alpha / sqrt(r) with use_rslora

nf4 has for q the quantiles of a normal distribution, which weights are near to; fp4 has floats of 4 bits.
Gradients go through W^ to A and B. Start: A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0: the model starts as the base
in 4 bits. Trained: A and B, and the new head of a classifier. Frozen: all else. Not quantised: embeddings,
norms and the head.

The base comes in 4 bits out of the loader: a recipe's tune stage asks for it, Python writes
`luthier.load(name, quantization="nf4-dq")`. What is saved is an ordinary LoRA, with the quantisation of its
base written down beside it, so that `luthier.load` of the adapter gives the model that was trained.

Merging is W^ + s B A in float32, rounded once, and saved dense: never back into 4 bits, where most of B A is
lost, and never into the W before quantisation, which is another model. That the dequantised model is the one
in 4 bits, and the merged model the unmerged one, is proven on a probe.

The layers are PEFT's and bitsandbytes'. Differs from the paper: the learning rate is not held constant unless
the recipe says so; norms stay in the model's dtype, as transformers computes them in float32 anyway. Paged
optimizers (training: {optim: paged_adamw_32bit}) page between GPU and CPU memory, and do nothing on a CPU.
"""

from dataclasses import dataclass
from typing import Any

import peft
from torch import nn

from luthier.errors import MethodError
from luthier.models import quantized
from luthier.options import option
from luthier.tuning.peft_options import Where, peft_options


@peft_options
@dataclass
class Config(Where, peft.LoraConfig):
    """Options of QLoRA; the rarer fields of `peft.LoraConfig` can be given too."""

    r: int = option(64, "rank of the update", ge=1)
    lora_alpha: int = option(16, "scale: the update is multiplied by alpha / r", ge=1)
    lora_dropout: float = option(0.0, "dropout on the input of the adapter", ge=0, lt=1)
    target_modules: list[str] | str | None = option(
        "all-linear", "names of the layers to adapt, a regular expression, or all-linear (all but the head)"
    )
    use_rslora: bool = option(False, "scale by alpha / sqrt(r), which keeps large ranks learning")
    quant_type: str = option("nf4", "numbers that weights are rounded to", choices=("nf4", "fp4"))
    double_quant: bool = option(True, "hold the blocks' constants in 8 bits")

    def __post_init__(self) -> None:
        self.require_where(self.target_modules)
        super().__post_init__()
        if self.init_lora_weights not in (True, "gaussian"):
            raise MethodError(
                f"init_lora_weights: {self.init_lora_weights} factorises weights that are held in 4 bits.",
                fix="Leave it out, or write gaussian.",
            )

    @property
    def quantization(self) -> str:
        """How the base is to be loaded."""
        return f"{self.quant_type}{'-dq' if self.double_quant else ''}"

    def to_dict(self) -> dict[str, Any]:
        """The fields of an ordinary `adapter_config.json`: without ours, which tell of the base."""
        return {k: v for k, v in super().to_dict().items() if k not in ("quant_type", "double_quant")}

    def check_model(self, model: nn.Module) -> None:
        found = quantized.of(model)
        if found != self.quantization and not next(model.parameters()).is_meta:  # a plan's has no weights
            raise MethodError(
                f"qlora wants a base in {self.quantization}, and this one is "
                + ("not quantised." if found is None else f"in {found}."),
                fix=f"Load it with luthier.load(name, quantization='{self.quantization}').",
            )
