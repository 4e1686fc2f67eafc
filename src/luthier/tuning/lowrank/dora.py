"""DoRA: weight-decomposed low-rank adaptation.

Paper: Liu et al., 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353.
Pick it when the rank must be small: at rank 4 and below it usually beats LoRA; start a little below LoRA's
learning rate.
Cost: r(in + out) + out parameters a linear layer; 20 to 100% more training time than LoRA, nothing once
merged.

Each frozen weight W (out, in) is split into the length of its rows and their direction; LoRA turns the
direction, a vector m (out) learns the lengths:

    V = W + s B A,    n_i = ||V_i||_2,    W' = diag(m / n) V,    y = W' x + b
    y = W x + b + (c - 1) * (W D(x)) + c * s B A D(x),    c = m / n

A (r, in), B (out, r), s = alpha / r. At the start m = ||W_i|| and B = 0, so W' = W. The norm n is a
constant for the gradient (section 4.3). Trained: A, B, m. Frozen: W, b. The bias is not scaled.

The layer is PEFT's and its checkpoint an ordinary PEFT DoRA. Ours, registered as PEFT's custom modules:

- n without the (out, in) product: n^2 = ||W_i||^2 + 2s [(W A^T) * B]_i 1 + s^2 [(B (A A^T)) * B]_i 1, with
  ||W_i|| cached; PEFT builds B A through an identity matrix in every forward.
- A row of W that is all zero gives n = 0 and NaN in PEFT (huggingface/peft#2049). Here c_i = 1 where
  n_i < eps.
- No weight decay on m: it is a length, and pulling it to zero is no prior (the Trainer would decay it).

The authors' code is under a non-commercial licence; none of it was read into this file.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.other import transpose
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.pytorch_utils import Conv1D

from luthier.errors import MethodError
from luthier.options import option
from luthier.tuning import residual
from luthier.tuning.groups import decay_groups
from luthier.tuning.peft_options import Where, peft_options

EPS = 1e-12


@peft_options
@dataclass
class Config(Where, peft.LoraConfig):
    """Options of DoRA; the rarer fields of `peft.LoraConfig` can be given too."""

    r: int = option(16, "rank of the update of the direction", ge=1)
    lora_alpha: int = option(32, "scale: the update is multiplied by alpha / r", ge=1)
    lora_dropout: float = option(0.0, "dropout on the input of the adapter", ge=0, lt=1)
    target_modules: list[str] | str | None = option(
        "all-linear", "names of the layers to adapt, a regular expression, or all-linear (all but the head)"
    )
    use_rslora: bool = option(False, "scale by alpha / sqrt(r), which keeps large ranks learning")
    use_dora: bool = True

    def __post_init__(self) -> None:
        self.require_where(self.target_modules)
        super().__post_init__()
        if not self.use_dora:
            raise MethodError("use_dora: false is plain LoRA.", fix="Write method: lora.")
        # PEFT annotates the mapping with classes but only calls what it holds; None leaves the layer to PEFT.
        self._register_custom_module({nn.Linear: dora_linear, Conv1D: dora_linear})
        self._initial: dict[str, Tensor] = {}

    def attached(self, model: peft.PeftModel) -> None:
        if residual.changes_base(self):
            self._initial = residual.factors(model)

    def save_adapter(self, model: peft.PeftModel, folder: Path | str) -> None:
        """Write an ordinary DoRA for the original base, also where the initialisation changed the base."""
        if self._initial:
            residual.save_for_original_base(model, self._initial, folder)
        else:
            model.save_pretrained(str(folder))

    def parameter_groups(self, model: nn.Module, args: TrainingArguments) -> list[dict[str, Any]]:
        """One rate for all; the magnitudes without weight decay."""
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        lengths = [p for n, p in named if ".lora_magnitude_vector." in n]
        rest = [(n, p) for n, p in named if ".lora_magnitude_vector." not in n]
        groups = decay_groups(model, rest, args, lr=args.learning_rate)
        return [*groups, {"params": lengths, "weight_decay": 0.0, "lr": args.learning_rate}]


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float, base: Tensor) -> Tensor:
    """Norms (out) of the rows of W + s B A, from W (out, in), A (r, in), B (out, r) and base = ||W_i|| (out).

    Exactly `base` where B = 0.
    """
    cross = ((weight @ a.T) * b).sum(1)
    square = ((b @ (a @ a.T)) * b).sum(1)
    growth = (2 * scale * cross + scale**2 * square) / base.clamp_min(EPS) ** 2
    mixed = base * (1 + growth).clamp_min(0).sqrt()
    # Without a length of its own to grow from, the row is s B A alone.
    return torch.where(base < EPS, scale * square.clamp_min(0).sqrt(), mixed)


def scale_rows(magnitude: Tensor, norms: Tensor) -> Tensor:
    """c = m / n (out), and 1 where n < eps."""
    empty = norms < EPS
    return torch.where(empty, 1, magnitude / norms.masked_fill(empty, 1))


class Magnitude(DoraLinearLayer):
    """PEFT's holder of m, with the guarded and cheaper norm. Its one weight is m (out)."""

    def base_norms(self, base_layer: nn.Module) -> Tensor:
        """||W_i|| (out) in fp32, computed anew when the base weight was replaced or written to."""
        weight = base_layer.weight
        key = (weight.data_ptr(), weight._version, weight.dtype, weight.device)
        if self._dora_cache.get("key") != key:
            rows = transpose(weight.detach(), self.fan_in_fan_out).float()
            self._dora_cache.update(key=key, norms=torch.linalg.vector_norm(rows, dim=1))
        return self._dora_cache["norms"]

    @torch.no_grad()
    def norms(self, base_layer: nn.Module, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """||V_i|| (out) in fp32, a constant for the gradient."""
        weight = transpose(base_layer.weight, self.fan_in_fan_out)  # (out, in)
        kind = "cpu" if weight.is_meta else weight.device.type  # the planner's meta device has no autocast
        with torch.autocast(kind, enabled=False):
            return row_norms(weight.float(), a.float(), b.float(), scale, self.base_norms(base_layer))

    def train(self, mode: bool = True) -> "Magnitude":
        # PEFT drops its caches here, at every step; ours depends on the frozen weight alone.
        return nn.Module.train(self, mode)

    def get_weight_norm(
        self, weight: Tensor, lora_weight: Tensor, scaling: float, adapter_name: str | None = None
    ) -> Tensor:
        """The direct norm, which starts m and merges; 1 for an empty row, which merges to empty."""
        rows = transpose(weight, self.fan_in_fan_out) + scaling * lora_weight
        norms = torch.linalg.vector_norm(rows.float(), dim=1).to(weight.dtype)
        if not hasattr(self, "weight"):
            return norms
        return torch.where(norms < EPS, torch.ones_like(norms), norms)

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: nn.Linear,
        lora_B: nn.Linear,
        scaling: float,
        base_layer: nn.Module,
        base_result: Tensor | None = None,
        adapter_name: str = "default",
    ) -> Tensor:
        """What is added to the base layer's output: (..., in) -> (..., out)."""
        norms = self.norms(base_layer, lora_A.weight, lora_B.weight, scaling)
        c = scale_rows(self.weight.float(), norms).to(x.dtype)
        if base_result is None:
            base_result = F.linear(x, transpose(base_layer.weight, self.fan_in_fan_out).to(x.dtype))
        elif base_layer.bias is not None:
            base_result = base_result - base_layer.bias
        return (c - 1) * base_result + c * (lora_B(lora_A(x)) * scaling)


class Variant(DoraLinearVariant):
    """PEFT's DoRA on linear layers, with `Magnitude` in it."""

    @staticmethod
    def init(module: Linear, adapter_name: str, **kwargs: Any) -> None:
        DoraLinearVariant.init(module, adapter_name, **kwargs)
        plain = module.lora_magnitude_vector[adapter_name]
        ours = Magnitude(plain.fan_in_fan_out)
        # PEFT starts m in the base's dtype; half precision would move the output at step 0.
        ours.weight = nn.Parameter(
            ours.norms(
                module.get_base_layer(),
                module.lora_A[adapter_name].weight,
                module.lora_B[adapter_name].weight,
                module.scaling[adapter_name],
            )
        )
        module.lora_magnitude_vector[adapter_name] = ours

    @staticmethod
    def unmerge(module: Linear, active_adapter: str, orig_weight: Tensor) -> Tensor:
        restored = DoraLinearVariant.unmerge(module, active_adapter, orig_weight)
        if not torch.isfinite(restored).all():
            raise MethodError(
                "A merged row of length 0 cannot be unmerged: its direction is lost.",
                fix="Load the base and the adapter again.",
            )
        return restored


class DoraLinear(Linear):
    """PEFT's adapted linear layer, choosing `Variant`."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        return {**super().lora_variants, ("use_dora",): Variant}


def dora_linear(target: nn.Module, adapter_name: str, config: Config, **kwargs: Any) -> DoraLinear | None:
    """`DoraLinear` on a plain layer; None for a quantised one (an `nn.Linear` too), which PEFT handles."""
    base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
    if type(base) not in (nn.Linear, Conv1D) or kwargs.pop("parameter_name", None):
        return None
    transposed = isinstance(base, Conv1D)
    config.fan_in_fan_out = transposed
    return DoraLinear(target, adapter_name, config=config, is_target_conv_1d_layer=transposed, **kwargs)
