"""Adapters whose initialisation wrote a residual into the base (PiSSA, OLoRA), saved for the original base.

With (A0, B0) the factors at the start, the base is W - s B0 A0 and the model W + s (B A - B0 A0). That is
s [B, B0] [A; -A0]: an ordinary adapter of rank 2r on W, at the same scale s. Under DoRA the direction's
matrix V = W + s (B A - B0 A0) is the same too, so the magnitudes stay right.
"""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor

from luthier.tuning.lora_factors import adapter_state, write_lora


def changes_base(config: LoraConfig) -> bool:
    """Whether the initialisation writes a residual into the base weights."""
    name = config.init_lora_weights
    return isinstance(name, str) and (name.startswith("pissa") or name == "olora")


def factors(model: PeftModel) -> dict[str, Tensor]:
    """Copies of the adapter's A (r, in) and B (out, r) under their names in the adapter file, on the CPU."""
    state = get_peft_model_state_dict(model)
    return {
        name: tensor.detach().cpu().clone()
        for name, tensor in state.items()
        if name.endswith((".lora_A.weight", ".lora_B.weight"))
    }


def save_for_original_base(model: PeftModel, initial: dict[str, Tensor], folder: Path | str) -> None:
    """Write the adapter so that any PEFT loads it onto the base as it was before attaching.

    Args:
        initial: `factors(model)` from before training.
    """
    state = adapter_state(model)
    for name, start in initial.items():
        side_by_side = name.endswith(".lora_B.weight")  # B (out, 2r), A (2r, in)
        state[name] = torch.cat([state[name].cpu(), start if side_by_side else -start], dim=int(side_by_side))
    # s = alpha / r, or alpha / sqrt(r): keep it while r doubles.
    grow = 2**0.5 if model.peft_config[model.active_adapter].use_rslora else 2
    write_lora(model, state, folder, rank=lambda r: 2 * r, grow=grow)
