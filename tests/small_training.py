"""A few training steps on a tiny model, asking a tuning method's hooks as any trainer of ours does."""

import random
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

from luthier.tuning import hooks


class HookedTrainer(Trainer):
    def create_optimizer(self, model=None):
        if self.optimizer is None:
            groups = hooks.parameter_groups(self.model, self.args)
            if groups is not None:
                kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
                self.optimizer = kind(groups, **options)
        return super().create_optimizer(model)


def rows(model: nn.Module, count: int = 8, length: int = 12, seed: int = 0) -> list[dict]:
    """Rows of one length, so that the default collator stacks them; labels fit the model's task."""
    dice = random.Random(seed)
    made = []
    for _ in range(count):
        ids = [dice.randrange(5, 300) for _ in range(length)]
        row = {"input_ids": ids, "attention_mask": [1] * length, "labels": list(ids)}
        if _classifies(model):
            row["labels"] = dice.randrange(3)
        made.append(row)
    return made


def _classifies(model: nn.Module) -> bool:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(inner).__name__.endswith("ForSequenceClassification")


def arguments(folder: Path, **changes) -> TrainingArguments:
    options = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "lr_scheduler_type": "linear",
        "gradient_checkpointing": False,
        "bf16": False,
        "seed": 0,
    }
    return TrainingArguments(**(options | changes))


def trainer(model: nn.Module, folder: Path, data: list[dict] | None = None, **changes) -> HookedTrainer:
    return HookedTrainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=rows(model) if data is None else data,
        callbacks=hooks.callbacks(model),
    )


def train(model: nn.Module, folder: Path, data: list[dict] | None = None, **changes) -> nn.Module:
    set_seed(0)
    trainer(model, folder, data, **changes).train()
    return model


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def batch(model: nn.Module, count: int = 2, seed: int = 7) -> dict[str, torch.Tensor]:
    return {k: torch.tensor([row[k] for row in rows(model, count, seed=seed)]) for k in rows(model, 1)[0]}


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    return model(**batch(model)).logits.float()


def disturb(model: nn.Module, size: float = 0.05, seed: int = 1) -> nn.Module:
    """Random changes of the weights that learn, as if trained: a fresh adapter has no effect."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return model


def half(model: nn.Module) -> nn.Module:
    """bfloat16 weights, as `from_pretrained` gives them: buffers keep their precision."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model
