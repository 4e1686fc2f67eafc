"""LoRA: low-rank adaptation.

Paper: Hu et al., 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685. Options:
rsLoRA (Kalajdzievski, 2023, arXiv 2312.03732), LoRA+ (Hayou et al., 2024, arXiv 2402.12354), PiSSA (Meng
et al., 2024, arXiv 2404.02948), OLoRA (Büyükakyüz, 2024, arXiv 2406.01775), EVA (Paischer et al., 2024,
arXiv 2410.07170).
Pick it when you want a small adapter that costs nothing once merged: the default among all tuning methods.
Cost: r(in + out) parameters a linear layer; 2r(in + out) more operations a token until merged.

A frozen weight W (out, in) gets an update of rank r:

    y = W x + b + s B A D(x),    A (r, in), B (out, r),    s = alpha / r, or alpha / sqrt(r) with use_rslora

D is dropout on the adapter's branch. Trained: A and B, and the new head of a classifier. Frozen: all else.

`init_lora_weights`:

    true            A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0     (the official code; the paper says Gaussian)
    gaussian        A ~ N(0, 1/r^2), B = 0
    pissa           W = U S V^T: B = U_r sqrt(S_r / s), A = sqrt(S_r / s) V_r^T, base becomes W - s B A
    pissa_niter_N   the same with N rounds of a randomised SVD, far cheaper
    olora           W = Q R: B = Q_r, A = R_r, base becomes W - s B A
    eva             A = V_r^T, B = 0, for what the layer reads in `eva_batches` batches of the training data,
                    X (tokens, in) = U S V^T     (`tuning/eva.py`)

Pissa and olora change the base. An adapter that fits the *original* base is the difference to the start,
s (B A - B0 A0) = s [B, B0] [A; -A0]: an ordinary LoRA of rank 2r. `luthier.save` writes it.

LoRA+ (`loraplus_lr_ratio`) trains B at `ratio` times the learning rate of A.

The layers are PEFT's. Ours: options with ranges, LoRA+ through the trainer's parameter groups, EVA through a
callback, the conversion above, and refusing OLoRA on GPT-2's transposed weights, where PEFT's fails at the
first forward.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D

from luthier.errors import MethodError
from luthier.models.structure import linears
from luthier.options import option
from luthier.tuning import residual
from luthier.tuning.eva import StartFromData
from luthier.tuning.groups import Named, decay_groups
from luthier.tuning.peft_options import Where, peft_options


@peft_options
@dataclass
class Config(Where, peft.LoraConfig):
    """Options of LoRA; the rarer fields of `peft.LoraConfig` can be given too."""

    r: int = option(16, "rank of the update", ge=1)
    lora_alpha: int = option(32, "scale: the update is multiplied by alpha / r", ge=1)
    lora_dropout: float = option(0.0, "dropout on the input of the adapter", ge=0, lt=1)
    target_modules: list[str] | str | None = option(
        "all-linear", "names of the layers to adapt, a regular expression, or all-linear (all but the head)"
    )
    use_rslora: bool = option(False, "scale by alpha / sqrt(r), which keeps large ranks learning")
    init_lora_weights: bool | str = option(
        True, "initialisation: true, gaussian, orthogonal, pissa, pissa_niter_N, olora or eva"
    )
    eva_config: Any = None
    eva_batches: int = option(8, "batches of training data that eva reads", ge=1)
    loraplus_lr_ratio: float | None = option(None, "learning rate of B over that of A (LoRA+)", ge=1)

    def __post_init__(self) -> None:
        self.require_where(self.target_modules)
        if self.init_lora_weights == "eva" and self.eva_config is None:
            self.eva_config = peft.EvaConfig(rho=1.0)  # for PEFT's own `initialize_lora_eva_weights`
        super().__post_init__()
        name = self.init_lora_weights
        known = ("gaussian", "orthogonal", "pissa", "olora", "eva")
        if isinstance(name, str) and name not in known and not _is_niter(name):
            raise MethodError(
                f"init_lora_weights: '{name}' is not an initialisation.",
                fix="Choose from: true, gaussian, orthogonal, pissa, pissa_niter_N (N rounds), olora, eva.",
            )
        self._initial: dict[str, Tensor] = {}

    def to_dict(self) -> dict[str, Any]:
        """The fields of an ordinary `adapter_config.json`: without ours, which only training needs."""
        fields = super().to_dict()
        fields.pop("loraplus_lr_ratio")
        fields.pop("eva_batches")
        if self.init_lora_weights == "eva":  # PEFT cannot read its own record of it
            fields |= {"init_lora_weights": True, "eva_config": None}
        return fields

    def check_model(self, model: nn.Module) -> None:
        if self.init_lora_weights == "olora" and any(isinstance(m, Conv1D) for m in linears(model).values()):
            raise MethodError(
                "init_lora_weights: olora cannot be used on transposed weights (GPT-2's Conv1D).",
                fix="Write init_lora_weights: pissa.",
            )
        if self.init_lora_weights == "eva" and model.config.is_encoder_decoder:
            raise MethodError(
                "init_lora_weights: eva reads the tokens that are trained, and an encoder has others.",
                fix="Write init_lora_weights: pissa.",
            )

    def callbacks(self, model: nn.Module) -> list[TrainerCallback]:
        return [StartFromData(model, self.eva_batches)] if self.init_lora_weights == "eva" else []

    def attached(self, model: peft.PeftModel) -> None:
        if residual.changes_base(self):
            self._initial = residual.factors(model)

    def save_adapter(self, model: peft.PeftModel, folder: Path | str) -> None:
        """Write an ordinary LoRA for the original base, also where the initialisation changed the base."""
        if self._initial:
            residual.save_for_original_base(model, self._initial, folder)
        else:
            model.save_pretrained(str(folder))

    def parameter_groups(self, model: nn.Module, args: TrainingArguments) -> list[dict[str, Any]] | None:
        """LoRA+: B at `loraplus_lr_ratio` times the rate. None without it.

        An embedding's zero factor is A (`lora_embedding_A`), so there the fast one is A.
        """
        if self.loraplus_lr_ratio is None:
            return None
        fast: Named = []
        slow: Named = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                starts_at_zero = ".lora_B." in name or ".lora_embedding_A." in name
                (fast if starts_at_zero else slow).append((name, parameter))
        return [
            *decay_groups(model, slow, args, lr=args.learning_rate),
            *decay_groups(model, fast, args, lr=args.learning_rate * self.loraplus_lr_ratio),
        ]


def _is_niter(name: str) -> bool:
    return name.startswith("pissa_niter_") and name.removeprefix("pissa_niter_").isdigit()
