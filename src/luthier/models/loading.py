"""Load a model and its tokenizer by name, strictly: all weights of the file are used, none is left random.

transformers and PEFT fill what a file lacks with random numbers and a warning. Here that is an error which
lists the keys; a new classification head is the only part that may be new, and it is said.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import luthier.models.per_layer  # noqa: F401  (the Auto classes know its model type by it)
from luthier import checks
from luthier.compression import storage
from luthier.errors import ModelError, did_you_mean
from luthier.models import gguf, keys, quantized, saving, sources, structure, tokens, vocabulary
from luthier.models.placement import Placement, place
from luthier.terminal import no_bars, no_peft_warnings
from luthier.tuning import soft_prompts
from luthier.tuning.registration import register_all

log = logging.getLogger("luthier.models")

AUTO: dict[str, Any] = {
    "causal": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
    "seq2seq": AutoModelForSeq2SeqLM,
    "masked": AutoModelForMaskedLM,
}


def load(
    name: str | Path,
    *,
    task: str = "causal",
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    attn: str = "auto",
    trust_remote_code: bool = False,
    num_labels: int | None = None,
    revision: str | None = None,
    train: bool = False,
    quantization: str | None = None,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer; for an adapter its base with the adapter on it.

    Args:
        name: alias, folder, GGUF file, adapter folder, folder of a run, or Hub id.
        task: "causal", "classification", "seq2seq" or "masked".
        dtype, device, attn: see `luthier.models.placement.place`.
        trust_remote_code: run the Python code that a Hub model brings. Off unless asked for.
        num_labels: size of a new classification head.
        revision: branch, tag or commit on the Hub.
        train: the loaded weights will learn: the adapter's if `name` is one, else the model's own.
        quantization: hold the linear layers in 4 bits, frozen: "nf4", "nf4-dq", "fp4" or "fp4-dq" (see
            `luthier.models.quantized`). An adapter's base is held as it was in training.

    Raises:
        ModelError: there is no such model, its files are damaged, or its weights do not fit.
    """
    if task not in AUTO:
        raise ModelError(f"Unknown task '{task}'.", fix=did_you_mean(task, AUTO))
    source = sources.locate(name)
    options: dict[str, Any] = {"task": task, "trust_remote_code": trust_remote_code, "num_labels": num_labels}
    if source.base is not None:
        base_options = options | {"dtype": dtype, "device": device, "attn": attn}
        base_options["quantization"] = quantization
        return _load_adapter(source, base_options, revision=revision, train=train)
    where = place(dtype, device, attn, train=train)
    path = gguf.converted(source) if source.gguf_file else source.path
    if path is not None:
        saving.check_files(path)
    place_on_disk = str(path or source.hub_id)
    options["quantization"] = quantization
    model = _load_model(source.name, place_on_disk, where, revision=revision, **options)
    known = source.name if source.kind in ("alias", "hub") else str(Path(source.name).expanduser().resolve())
    note_origin(model, known, revision)
    if quantization is not None:
        model.luthier_origin["quantization"] = quantization
    tokenizer = tokens.load(source.name, place_on_disk, trust_remote_code, revision)
    tokens.fit(model, tokenizer, task)
    model.luthier_template = tokenizer.chat_template
    return model, tokenizer


def note_origin(model: PreTrainedModel, name: str, revision: str | None = None) -> None:
    """Write on a model what it is as it stands: what adapters that are put on it name as their base."""
    model.luthier_origin = {
        "name": name,
        "revision": revision,
        "fingerprint": saving.fingerprint(model),
        "rows": vocabulary.rows(model),
    }


def _load_model(
    name: str,
    path: str,
    where: Placement,
    *,
    task: str,
    trust_remote_code: bool,
    num_labels: int | None,
    revision: str | None,
    quantization: str | None,
) -> PreTrainedModel:
    options: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
    if revision is not None:
        options["revision"] = revision
    if where.device != "cpu":
        options["device_map"] = {"": where.device}
    if quantization is not None:
        options["quantization_config"] = quantized.config(quantization, task, where.dtype)
        options["device_map"] = {"": where.device}  # left out, it would be the first GPU
    try:
        with no_bars():
            model, info = AUTO[task].from_pretrained(
                path,
                dtype=where.dtype,
                attn_implementation=where.attn,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except torch.OutOfMemoryError:
        raise
    except tokens.FAILURES as error:
        raise _explained(error, name, task) from error
    _require_all_keys(model, info, name, task)
    quantized.settle(model)
    return storage.restore(model)


def _explained(error: BaseException, name: str, task: str) -> ModelError:
    """What transformers said, in one sentence, and what to do where the cause is known."""
    text = str(error)
    fix = None
    if "trust_remote_code" in text:
        text, fix = "it brings Python code of its own", "If you trust it, write trust_remote_code: true."
    elif "Unrecognized configuration class" in text:
        text = f"its architecture has no {task} head in transformers"
        fix = f"Choose another task ({', '.join(AUTO)})."
    elif "mismatch" in text.lower():
        fix = "Give the num_labels that the model was saved with, or the matching config.json."
    elif "does not appear to have a file named" in text or "safetensors" in text:
        fix = "Only safetensors are read: convert it with save_pretrained where you trust it."
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    return ModelError(f"Model '{name}' cannot be loaded as {task}: {' '.join(lines[:3])[:600]}.", fix=fix)


def _require_all_keys(model: PreTrainedModel, info: dict[str, Any], name: str, task: str) -> None:
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if info["mismatched_keys"]:
        raise ModelError(
            f"Model '{name}': shapes differ from the config's: {keys.shown(info['mismatched_keys'])}."
        )
    if task == "classification":
        # What lies above the last block may be new, and the head that was there before is not used.
        above = {n for n, _ in structure.groups(model)[-1][1]} - keys.of(model, structure.final_norm(model))
        new = [key for key in missing if key in above]
        missing = [key for key in missing if key not in above]
        if new:
            left_out = [key for key in unexpected if not key.startswith(f"{model.base_model_prefix}.")]
            unexpected = [key for key in unexpected if key not in left_out]
            _announce(model, new, left_out)
    if missing or unexpected:
        saved = (model.config.architectures or ["of an unnamed class"])[0]
        raise ModelError(
            f"Model '{name}', saved as {saved}, does not fit {type(model).__name__}: "
            + keys.difference(missing, unexpected),
            fix=_fitting(saved, task)
            or keys.prefix_fix(missing, unexpected)
            or "Choose the task that the model was saved for.",
        )


def _fitting(saved: str, task: str) -> str | None:
    """What to write where the class that a model was saved as is one of another task."""
    for other, classes in structure.CLASSES.items():
        if other != task and saved in classes.values():
            return f"It was saved for {other}: write task: {other}."
    return None


def _announce(model: PreTrainedModel, new: list[str], left_out: list[str]) -> None:
    parameters = dict(model.named_parameters())
    shapes = ", ".join(f"{key} {tuple(parameters[key].shape)}" for key in new)
    detail = f"random, to be trained: {shapes}" + (f"; not used: {keys.shown(left_out)}" if left_out else "")
    checks.record("before", "new classification head", True, len(new), detail=detail)


def _load_adapter(
    source: sources.Source, base_options: dict[str, Any], *, revision: str | None, train: bool
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    path = source.path or _fetch(source, revision)
    task, trained_for = base_options["task"], sources.record(path).get("task") or _task_of(path)
    if trained_for and trained_for != task:
        raise ModelError(
            f"Adapter '{source.name}' was trained for {trained_for}, not for {task}.",
            fix=f"Write task: {trained_for}.",
        )
    record = sources.record(path)
    if labels := record.get("id2label"):
        base_options["num_labels"] = len(labels)
    base_options["quantization"] = base_options["quantization"] or sources.base_quantization(path)
    model, tokenizer = load(str(source.base), **base_options)
    if isinstance(model, PeftModel):
        raise ModelError(
            f"Adapter '{source.name}' stands on another adapter ('{source.base}').",
            fix="Merge the lower one into its base first, and save the result as a model.",
        )
    trust = base_options["trust_remote_code"]
    return load_onto(model, tokenizer, path, name=source.name, trust_remote_code=trust, train=train)


def load_onto(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    name: str = "",
    trust_remote_code: bool = False,
    train: bool = False,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """An adapter's folder on its base, which `load` gave, and the adapter's tokenizer if it has its own.

    Args:
        name: of the adapter, for messages; default: its path.
        train: the adapter's weights will learn.

    Raises:
        ModelError: the files are damaged, or do not fit the base.
        CheckError: the base is not the one that the adapter was trained on.
    """
    name = name or str(path)
    saving.check_files(path)
    record = sources.record(path)
    labels = record.get("id2label")
    if labels:
        model.config.id2label = {int(i): label for i, label in labels.items()}
        model.config.label2id = {label: i for i, label in model.config.id2label.items()}
    _require_same_base(model, record)
    vocabulary.fit(model, path, name)
    if any((path / file).is_file() for file in tokens.FILES):
        tokenizer = tokens.load(name, str(path), trust_remote_code, None)
        tokens.fit(model, tokenizer, structure.task(model) or "causal")
        tokens.say_template("before", model, tokenizer)
    adapted = _put_on(model, path, name, train)
    checks.record("before", "adapter loaded whole", True, len(keys.in_file(path)), detail=name)
    return adapted, tokenizer


def _fetch(source: sources.Source, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["adapter_*", "*.json", "*.jinja", "*.model"]
    try:
        return Path(snapshot_download(str(source.hub_id), revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ModelError(f"Adapter '{source.name}' cannot be fetched: {error}") from error


def _task_of(path: Path) -> str | None:
    register_all()
    tasks = {"CAUSAL_LM": "causal", "SEQ_CLS": "classification", "SEQ_2_SEQ_LM": "seq2seq"}
    return tasks.get(PeftConfig.from_pretrained(str(path)).task_type)


def _require_same_base(model: nn.Module, record: dict[str, Any]) -> None:
    expected = record.get("base", {}).get("fingerprint")
    if expected is None:
        return
    found = model.luthier_origin["fingerprint"]
    # float16 is not bfloat16's kind of rounding: there only names and shapes can be compared.
    if model.dtype == torch.float16:
        expected, found = expected.split("-")[0], found.split("-")[0]
    checks.record(
        "before",
        "base of the adapter unchanged",
        found == expected,
        found,
        expected,
        str(record["base"].get("name")),
        fix="Load the adapter on the model that it was trained on.",
    )


def _put_on(model: PreTrainedModel, path: Path, name: str, train: bool) -> PeftModel:
    adapted = soft_prompts.load(model, path, train=train)  # of PEFT's kind, on our mechanism
    if adapted is not None:
        return adapted
    register_all()  # again, for methods in files that were named since
    try:
        with no_peft_warnings():
            adapted = PeftModel.from_pretrained(
                model, str(path), is_trainable=train, torch_device=str(model.device)
            )
    except torch.OutOfMemoryError:
        raise
    except tokens.FAILURES as error:
        raise ModelError(f"Adapter '{name}' does not fit its base: {error}") from error
    missing, unexpected = keys.adapter_difference(adapted, path)
    if missing or unexpected:
        raise ModelError(
            f"Adapter '{name}' does not fit its base: {keys.difference(missing, unexpected)}",
            fix=keys.prefix_fix(missing, unexpected) or "Save it again from the model that was trained.",
        )
    return adapted
