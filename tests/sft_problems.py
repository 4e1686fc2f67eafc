"""Small training problems: rows of unequal lengths, and trainers over them."""

import random
from typing import Any

import peft
import tiny
import torch
from datasets import Dataset

import luthier.alignment.trainer
from luthier.alignment.sl.sft import Config

ARGUMENTS = {
    "use_cpu": True, "per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 1e-2, "seed": 3,
    "bf16": False, "save_strategy": "no", "logging_steps": 1, "lr_scheduler_type": "linear",
}  # fmt: skip


def rows(count: int = 12, seed: int = 0, longest: int = 14) -> Dataset:
    """Token ids with a masked start, no two lengths alike by design."""
    dice = random.Random(seed)
    made = []
    for _ in range(count):
        ids = [dice.randrange(5, tiny.VOCAB) for _ in range(dice.randrange(4, longest))]
        cut = dice.randrange(1, len(ids) - 1)
        made.append({"input_ids": ids, "labels": [-100] * cut + ids[cut:]})
    return Dataset.from_list(made)


def lora(dropout: float = 0.0, **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, **options)


def sft(model: Any, folder: Any, *, data: Any = None, packing: Any = "auto", **options: Any) -> Any:
    """A trainer for SFT on `model`; `options` are trainer's, or training arguments."""
    ours = {
        k: options.pop(k) for k in ("method", "eval_data", "callbacks", "expected_memory") if k in options
    }
    return luthier.alignment.trainer.trainer(
        Config(packing=packing),
        model,
        rows() if data is None else data,
        tokenizer=tiny.tokenizer(),
        args={**ARGUMENTS, "output_dir": str(folder), **options},
        **ours,
    )


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
