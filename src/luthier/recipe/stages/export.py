"""Write the model as a folder of its own that others load, and prove it in a fresh process."""

from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from luthier.compression import gptq_layout
from luthier.models.gguf_writing import save_gguf, verify_gguf
from luthier.models.saving import save, verify_export
from luthier.recipe.context import Context
from luthier.recipe.schema import ExportStage
from luthier.recipe.stages import StageResult
from luthier.tuning.convert import to_lora
from luthier.tuning.merge import merge


def run(stage: ExportStage, context: Context) -> StageResult:
    """`model/` (an adapter is merged into it) or `adapter/` (as it is, or as a LoRA).

    Raises:
        MethodError: the adapter is no change of linear weights, which alone can be a LoRA.
        CheckError: the merged model is not the tuned one, or the folder does not reload as what was saved.
    """
    model, tokenizer = context.lend(train=False)
    if stage.format == "gguf":
        return _gguf(stage, context, model, tokenizer)
    if stage.format == "gptq":
        return _gptq(stage, context, model, tokenizer)
    dtype = None if stage.dtype == "auto" else getattr(torch, stage.dtype)
    if stage.merge:
        model = merge(model, dtype)
    else:
        model = model if stage.rank is None else to_lora(model, stage.rank)
        model = model if dtype is None else model.to(dtype)
    folder = save(model, context.work / ("adapter" if isinstance(model, PeftModel) else "model"), tokenizer)
    verify_export(folder, model, tokenizer)
    return StageResult(
        details={
            "format": stage.format,
            "merged": bool(stage.merge),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        total=sum(parameter.numel() for parameter in model.parameters()),
    )


def _gguf(
    stage: ExportStage, context: Context, model: Any, tokenizer: PreTrainedTokenizerBase
) -> StageResult:
    assert stage.gguf_type is not None
    merged = merge(model, torch.float32) if stage.merge else model  # rounded once, to the file's type
    file = save_gguf(merged, context.work / "model", tokenizer, stage.gguf_type)
    verify_gguf(file, merged, tokenizer)
    return StageResult(
        details={"format": stage.format, "gguf_type": stage.gguf_type, "merged": bool(stage.merge)},
        total=sum(parameter.numel() for parameter in merged.parameters()),
    )


def _gptq(
    stage: ExportStage, context: Context, model: Any, tokenizer: PreTrainedTokenizerBase
) -> StageResult:
    merged = merge(model) if stage.merge else model  # of PEQA's scales; others leave no codes
    folder = gptq_layout.save(merged, context.work / "model", tokenizer)
    gptq_layout.verify(folder, merged)
    return StageResult(
        details={"format": stage.format, "merged": bool(stage.merge)},
        total=sum(parameter.numel() for parameter in merged.parameters()),
    )
