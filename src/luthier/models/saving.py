"""Models and adapters saved as folders that `from_pretrained` and PEFT load, whole or not at all.

Beside the usual files lies `luthier.json`: checksums of all files, and for an adapter the fingerprint of the
base model that it was trained on. `luthier.models.loading` checks both.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import luthier
from luthier import checks, files
from luthier.compression import clustered_storage, storage
from luthier.errors import ModelError
from luthier.models import per_layer, quantized, sources, structure, tokens, vocabulary
from luthier.resources import explain
from luthier.terminal import no_bars
from luthier.tuning import registration
from luthier.tuning.attention_prompts import underlying
from luthier.tuning.hooks import save_adapter
from luthier.tuning.probe import distance, evaluating, probe_inputs
from luthier.tuning.residual import changes_base

log = logging.getLogger("luthier.models")

AUTO_CLASSES = {
    "causal": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "masked": "AutoModelForMaskedLM",
    None: "AutoModel",
}
SCRIPT = Path(__file__).with_name("reload.py")
NEW_TOKENS = 8
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
TOLERANCE_HALF = 1e-3  # the same computation on the same machine: mostly equal to the bit
TOLERANCE_COARSE = 0.1  # compressed-tensors rounds inputs with steps in half precision, ours are float32
TEXTS = ["The order 4711 came on 3 May.", '  Füße\n\t漢字 {"a": 1}', ""]
CHAT = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "?"},
]
SAMPLES = 4096  # elements of each parameter that enter a fingerprint


def save(model: nn.Module, folder: Path | str, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
    """Write a whole model, or the adapter of a `PeftModel`, with generation config, tokenizer and template.

    The folder appears whole: it is written beside its place and moved there. A folder that we saved before
    is replaced; any other that is not empty is refused.

    Raises:
        ModelError: the folder holds other files, or the model's generation config is not valid.
        ResourceError: the folder cannot be written, or the disk is full.
    """
    return write_whole(Path(folder).absolute(), model, tokenizer, partial(_write, model))


def write_whole(
    folder: Path,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    write: Callable[[Path], None],
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """A folder with what `write` puts into it, the tokenizer and our record; it appears whole, see `save`.

    Args:
        extra: what the record holds beside what it holds of every model.
    """
    _require_free(folder)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        write(draft)
        if tokenizer is not None:
            tokens.say_template("export", structure.base(model), tokenizer)
            tokenizer.save_pretrained(str(draft))
        content = json.dumps(_record(model, draft) | dict(extra or {}), indent=1)
        (draft / sources.RECORD).write_text(content, encoding="utf-8")
        _publish(draft, folder)
    except SafetensorError as error:  # this is how safetensors reports a full disk
        code = re.search(r"os error (\d+)", str(error))
        raise explain(OSError(int(code[1]) if code else 0, str(error)), folder) from error
    except OSError as error:
        raise explain(error, folder) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    log.info("saved %s", folder)
    return folder


def fingerprint(model: nn.Module, rows: int | None = None) -> str:
    """A short text that tells whether two models have the same weights, whatever dtype they were loaded in.

    Two parts, "names-weights": of the names and shapes of the parameters, and of up to 4096 elements of each,
    rounded to bfloat16. Of a `PeftModel` it is the base's, as far as the adapter left it unchanged; of a
    classifier it leaves out what lies above the last block, which may be new and random at each load.

    Args:
        rows: of the embedding and its head take so many only, without those of tokens that were added.
    """
    names, weights = hashlib.sha256(), hashlib.sha256()
    prefix = getattr(model.base_model, "prefix", None) if isinstance(model, PeftModel) else None
    base = structure.base(model)
    above = structure.groups(base)[-1][1] if structure.task(model) == "classification" else []
    skipped = {name for name, _ in above}
    per_token = {id(p) for p in vocabulary.parameters(base).values()} if rows is not None else set()
    for name, parameter in base.named_parameters():
        if (prefix and prefix in name) or ".modules_to_save." in name or name in skipped:
            continue
        name = vocabulary.WRAPPERS.sub("", name)
        parameter = parameter[:rows] if id(parameter) in per_token else parameter
        names.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].to("cpu", torch.bfloat16).contiguous()
        weights.update(sample.view(torch.uint8).numpy().tobytes())
    return f"{names.hexdigest()[:12]}-{weights.hexdigest()[:20]}"


def verify_export(
    folder: Path | str,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    probe_ids: Tensor | None = None,
) -> None:
    """Prove that a saved folder is the model: load it in a fresh process without luthier, and compare.

    Compared are the logits of a probe, a few greedily generated tokens, and the token ids of some texts and
    of a chat; and generation must stop at the token that ends a turn of the chat template.

    Args:
        folder: what `save` wrote.
        model: the model as it is in memory.
        tokenizer: the tokenizer that was saved with it.
        probe_ids: token ids (batch, seq) without padding; a few drawn ones by default.

    Raises:
        CheckError: something differs.
        ModelError: the folder cannot be loaded.
    """
    folder = Path(folder).absolute()
    inputs = probe_inputs(model)
    if probe_ids is not None:
        inputs["input_ids"] = probe_ids.to(model.device)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "decoder_input_ids" in inputs:
            inputs["decoder_input_ids"] = inputs["input_ids"].clone()
    prove_reload(reload_request(folder, model, tokenizer), model, inputs, tokenizer)


def prove_reload(
    request: dict[str, Any],
    model: nn.Module,
    inputs: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
    ends: list[int] | None = None,
) -> None:
    """Load what `request` names in a fresh process, and hold it against the model (see `verify_export`).

    Args:
        request: what `reload_request` gave, perhaps changed.
        ends: the tokens at which generation stops, where the folder states more than transformers reads.
    """
    generates = bool(request["new_tokens"])
    found, metadata = _in_fresh_process(request, inputs)
    with storage.as_saved(model), evaluating(model):
        logits = model(**inputs).logits.float().cpu()
        inputs.pop("decoder_input_ids", None)
        length = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
        generated = model.generate(**inputs, do_sample=False, **length).cpu() if generates else None
    tolerance = TOLERANCE.get(structure.base(model).dtype, TOLERANCE_HALF)
    if tolerance == TOLERANCE_HALF and storage.rounds_inputs(model):
        tolerance = TOLERANCE_COARSE
    error = distance(found["logits"][:, -logits.shape[1] :], logits)  # PEFT's own prompts have logits too
    fix = "Do not use the folder; report this with the recipe that made it."
    name = Path(request["folder"]).name
    checks.record("export", "logits after reload", error <= tolerance, error, tolerance, name, fix=fix)
    if generated is not None:
        differing = int((found["generated"] != generated).sum())
        if differing and tolerance == TOLERANCE_COARSE:
            differing = _clearly_worse(model, found["generated"], inputs["input_ids"].shape[1], tolerance)
        checks.record("export", "generated tokens after reload", not differing, differing, 0, fix=fix)
    if tokenizer is not None:
        stops = json.loads(metadata["ends"]) if ends is None else ends
        _prove_tokens(model, tokenizer, json.loads(metadata["tokens"]), stops)


def _clearly_worse(model: Any, generated: Tensor, start: int, tolerance: float) -> int:
    """How many tokens from `start` on the model itself finds less likely than another, beyond doubt.

    Where inputs are rounded in half precision, tokens that are about equally likely change places.
    """
    with storage.as_saved(model), evaluating(model):
        logits = model(input_ids=generated.to(model.device)).logits[:, start - 1 : -1].float().cpu()
    chosen = logits.gather(-1, generated[:, start:, None])[..., 0]  # (batch, new)
    room = 2 * tolerance * logits.square().mean(-1).sqrt()  # two logits, each off by so much
    return int((logits.amax(-1) - chosen > room).sum())


def reload_request(
    folder: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    """What `reload.py` is told to load, and as what."""
    base = structure.base(model)
    generates = structure.task(model) in ("causal", "seq2seq")
    adapter = isinstance(model, PeftModel)
    remote = type(base).__module__.startswith("transformers_modules")
    by_layer = per_layer.is_per_layer(base)
    options: dict[str, Any] = {"attn_implementation": underlying(base.config._attn_implementation)}
    if remote:
        options["trust_remote_code"] = True
    if adapter:  # the base is loaded as it was here, whatever dtype its folder has
        options["dtype"] = str(base.dtype).removeprefix("torch.")
        if structure.task(model) == "classification":
            options["num_labels"] = base.config.num_labels
    held = base.config.quantization_config.to_dict() if quantized.of(base) is not None else None
    return {
        "folder": str(folder),
        "base": base.name_or_path if adapter else str(folder),
        "rows": vocabulary.rows(model),
        "pad_token_id": getattr(base.config, "pad_token_id", None),
        "quantization": held,
        "adapter": str(folder) if adapter else None,
        "ours": adapter and registration.is_ours(PeftConfig._get_peft_type(str(folder))),
        "per_layer": by_layer,
        "clustered": bool(clustered_storage.found(model)),
        "class": AUTO_CLASSES[structure.task(model)] if remote or by_layer else type(base).__name__,
        "options": options,
        "device": str(base.device),
        "threads": torch.get_num_threads(),
        "new_tokens": NEW_TOKENS if generates else 0,
        "texts": TEXTS if tokenizer is not None else [],
        "chat": CHAT if tokenizer is not None and tokenizer.chat_template else [],
    }


def _in_fresh_process(request: dict[str, Any], inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict]:
    with tempfile.TemporaryDirectory(prefix="luthier-") as name:
        place = Path(name)
        (place / "request.json").write_text(json.dumps(request), encoding="utf-8")
        save_file(
            {key: value.cpu().contiguous() for key, value in inputs.items()}, place / "inputs.safetensors"
        )
        paths = [str(place / file) for file in ("request.json", "inputs.safetensors", "answer.safetensors")]
        # -I: neither the working directory nor PYTHONPATH can lend the folder what it lacks.
        done = subprocess.run([sys.executable, "-I", str(SCRIPT), *paths], capture_output=True, text=True)
        if done.returncode:
            raise ModelError(
                f"{request['folder']} cannot be loaded in a fresh process: "
                + " ".join(done.stderr.strip().splitlines()[-3:])[-800:]
            )
        with safe_open(paths[-1], framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def _prove_tokens(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, found: list[list[int]], ends: int | list[int] | None
) -> None:
    expected = probe_tokens(tokenizer)
    same = sum(a == b for a, b in zip(found, expected, strict=True))
    checks.record(
        "export", "token ids after reload", found == expected, same, len(expected), "texts and chat"
    )
    end = tokens.end_of_turn(tokenizer)
    if end is not None and structure.task(model) == "causal":
        token = tokenizer.convert_ids_to_tokens(end)
        checks.record(
            "export",
            "generation stops where a turn ends",
            end in (ends if isinstance(ends, list) else [ends]),
            str(ends),
            detail=f"{token} is {end}",
            fix=f"Set model.generation_config.eos_token_id to {end} before saving.",
            refuse=not isinstance(model, PeftModel),  # an adapter's generation config is its base's
        )


def probe_tokens(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of some texts, and of a chat where there is a template for it."""
    found = [tokenizer(text).input_ids for text in TEXTS]
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
        found.append(tokenizer(str(text), add_special_tokens=False).input_ids)
    return found


def check_files(folder: Path) -> None:
    """Prove that the weight files are whole, and that those which we saved are as we wrote them.

    Raises:
        ModelError: a file is missing, cut short or changed.
    """
    written = sources.record(folder).get("files", {})
    for path in sorted(folder.glob(sources.WEIGHTS)):
        try:
            with safe_open(str(path), framework="pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path} is damaged ({path.stat().st_size} bytes): {error}.", fix="Copy or save it again."
            ) from error
    weights = {name: entry for name, entry in written.items() if name.endswith((".safetensors", ".gguf"))}
    if found := files.damage(folder, weights):
        path, how = found
        raise ModelError(
            f"{path} {how}; {sources.RECORD} lists it.",
            fix=f"Copy or save it again; if it was changed on purpose, delete {folder / sources.RECORD}.",
        )


def _require_free(folder: Path) -> None:
    if folder.is_file():
        raise ModelError(f"{folder} is a file; a model is saved as a folder.", fix="Choose another name.")
    if not folder.is_dir():
        return
    ours = {sources.RECORD, *sources.record(folder).get("files", {})}
    others = sorted(p.name for p in folder.iterdir() if p.name not in ours)
    if others:
        raise ModelError(
            f"{folder} holds files that a model saved there would replace ({', '.join(others[:5])}).",
            fix="Choose a folder of its own, or empty this one.",
        )


def _write(model: nn.Module, draft: Path) -> None:
    if isinstance(model, PeftModel):
        save_adapter(model, draft)
        known = getattr(structure.base(model), "luthier_origin", {})
        if known.get("rows") != vocabulary.rows(model):
            vocabulary.complete(model, draft)
        return
    try:
        with no_bars():
            if storage.quantized_layers(model):
                storage.save(model, draft)
            else:
                model.save_pretrained(str(draft))
    except ValueError as error:
        raise ModelError(f"The model cannot be saved: {error}") from error


def _record(model: nn.Module, draft: Path) -> dict[str, Any]:
    base = structure.base(model)
    record: dict[str, Any] = {"luthier": luthier.__version__, "class": type(base).__name__}
    record["task"] = structure.task(model)
    if isinstance(model, PeftModel):
        record["base"] = _base(model)
        if record["task"] == "classification":
            record["id2label"] = base.config.id2label
    record["files"] = files.listing(draft, draft.iterdir())
    return record


def _base(model: PeftModel) -> dict[str, Any]:
    """Name and fingerprint of the model that an adapter belongs to, as it was loaded.

    Raises:
        ModelError: the base has changed since then in a way that the adapter does not hold.
    """
    base = model.get_base_model()
    known = getattr(base, "luthier_origin", None)
    if known is None:
        return {"name": base.name_or_path, "fingerprint": fingerprint(model)}
    found = fingerprint(model, known["rows"])
    config = model.peft_config[model.active_adapter]
    rewritten = isinstance(config, LoraConfig) and changes_base(config)
    holds_change = rewritten or getattr(config, "bias", "none") != "none"
    # A tuner that renames the base's parameters in its own way cannot be compared.
    same_names = found.split("-")[0] == known["fingerprint"].split("-")[0]
    if same_names and found != known["fingerprint"] and not holds_change:
        raise ModelError(
            f"The adapter's base is no longer '{known['name']}' as it was loaded: its weights have changed.",
            fix="Save the base as a whole model first, load that, and train the adapter on it.",
        )
    return known


def _publish(draft: Path, folder: Path) -> None:
    """Move the finished folder to its place; a former one is moved away first, and comes back on failure."""
    if not folder.is_dir():
        draft.rename(folder)
        return
    former = folder.with_name(f".{folder.name}.{os.getpid()}.former")
    folder.rename(former)
    try:
        draft.rename(folder)
    except OSError:
        former.rename(folder)
        raise
    shutil.rmtree(former, ignore_errors=True)
