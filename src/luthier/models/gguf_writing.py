"""A whole model in one GGUF file, for llama.cpp and what builds on it; and the proof that it is the model.

Names, order of rows and metadata are those that llama.cpp's converter writes. Matrices are held in the kind
asked for, vectors (norms, biases) in F32, as llama.cpp's quantiser leaves them. Two exceptions are its own:

    the head, or the embedding where it is the head too: Q8_0 in files of fewer bits. llama.cpp takes Q6_K for
    rows of a multiple of 256, which only its own program can write.
    a matrix whose rows are no multiple of 32: F16.

In the architecture "llama" the rows of q and k are reordered: llama.cpp rotates neighbouring pairs, where
transformers rotates the two halves of a head.
"""

import copy
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from luthier import checks
from luthier.compression.linear import dequantize, quantized_layers
from luthier.errors import ModelError, nearest
from luthier.models import gguf, gguf_blocks, gguf_vocabulary, quantized, saving, sources, structure
from luthier.terminal import track
from luthier.tuning.probe import distance, evaluating, probe_inputs

log = logging.getLogger("luthier.models.gguf")

# transformers' model type: the architecture in the file. llama.cpp runs Mistral as "llama".
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
SCALINGS = ("default", "linear", "llama3")
# Spaces before digits, long numbers, contractions, marks and line ends.
SPLIT = [
    "x   12, 4711 and 3.14159",
    "I'LL don't WE'VE",
    "a\r\n\r\n  b\t\t1\n\n\n",
    "(([[ == !== ]])) été ½²",
    "<|im_end|> x",
]
QWEN3_HEAD = 128  # transformers takes this for every Qwen3 in a GGUF file


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file: `part` of `owner`, held as `kind`; rows reordered where `heads` are given."""

    name: str
    owner: nn.Module
    part: str
    shape: tuple[int, ...]
    kind: str
    heads: int | None = None

    def encode(self) -> NDArray[Any]:
        return gguf_blocks.encode(self.name, self.owner, self.part, self.kind)


def save_gguf(
    model: nn.Module, folder: Path | str, tokenizer: PreTrainedTokenizerBase, kind: str = "Q8_0"
) -> Path:
    """Write a causal language model as `model-<kind>.gguf` into a folder of its own, which appears whole.

    Beside it lie the tokenizer's own files: a GGUF file holds most of them, not all. transformers reads them
    with `AutoTokenizer.from_pretrained(folder)`; given `gguf_file` too, it forgets which are special.

    Args:
        kind: F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1 or Q4_0.

    Returns:
        The path of the file.

    Raises:
        ModelError: the model, its tokenizer or the kind cannot be written.
        ResourceError: the folder cannot be written, or the disk is full.
    """
    require_writable(model, kind)
    assert isinstance(model, PreTrainedModel)
    entries = list(_entries(model, kind))
    _say_exceptions(model, entries, kind)
    name = f"model-{kind}.gguf"
    extra = {"gguf": kind, "rope_parameters": model.config.rope_parameters}
    write = partial(_write, model, entries, tokenizer, kind, name)
    return saving.write_whole(Path(folder).absolute(), model, tokenizer, write, extra) / name


def require_writable(model: nn.Module, kind: str = "Q8_0") -> None:
    """Raise ModelError, with the reason, where a model cannot be written. Works on meta tensors."""
    gguf_blocks.require(kind)
    if isinstance(model, PeftModel):
        raise ModelError(
            "An adapter is no GGUF model.", fix="Merge it first: luthier.tuning.merge.merge(model)."
        )
    config: Any = model.config
    kinds = ", ".join(ARCHITECTURES)
    if config.model_type not in ARCHITECTURES or structure.task(model) != "causal":
        near = nearest(config.model_type, ARCHITECTURES)
        raise ModelError(
            f"{type(model).__name__} (model type '{config.model_type}') cannot be written as GGUF.",
            fix=f"Supported are causal language models of the types {kinds}"
            + (f"; the nearest is {near[0]}." if near else ".")
            + " Export safetensors, and convert that with llama.cpp.",
        )
    if quantized.of(model) is not None:
        raise ModelError(
            "The model is held in 4 bits by bitsandbytes.", fix="Load it without quantization, then export."
        )
    if reason := _unreadable(config):
        raise ModelError(
            f"transformers could not read the GGUF file of this model back: {reason}.",
            fix="Export safetensors, and convert that with llama.cpp.",
        )


def _say_exceptions(model: PreTrainedModel, entries: list[_Entry], kind: str) -> None:
    """Say in lines of the report what the file does not hold as it was asked for."""
    odd = [] if kind in gguf_blocks.PLAIN else [e for e in entries if len(e.shape) > 1 and e.kind == "F16"]
    if odd:
        detail = f"rows of {odd[0].shape[-1]} values, no multiple of {gguf_blocks.BLOCK}: {_listed(odd)}"
        checks.record("export", f"matrices in F16, not {kind}", True, len(odd), detail=detail)
    if any(layer.scheme.activation_bits for layer in quantized_layers(model).values()):
        detail = "GGUF holds weights; how activations are rounded is left to who computes with them"
        checks.record("export", "activations are not rounded", True, detail=detail)


def _listed(entries: list[_Entry]) -> str:
    names = [entry.name for entry in entries]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def file_size(model: PreTrainedModel, kind: str) -> int:
    """Bytes of a model's tensors in a file of `kind`. Works on meta tensors."""
    return sum(gguf_blocks.nbytes(entry.shape, entry.kind) for entry in _entries(model, kind))


def _unreadable(config: Any) -> str | None:
    """What of a model's structure transformers does not take from a GGUF file, in words."""
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        return "it has biases that its architecture usually has not"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}, not silu"
    scaling = config.rope_parameters.get("rope_type", "default")
    if scaling not in SCALINGS:
        return f"its RoPE is scaled by '{scaling}' (supported: {', '.join(SCALINGS)})"
    usual = QWEN3_HEAD if config.model_type == "qwen3" else config.hidden_size // config.num_attention_heads
    if config.model_type.startswith("qwen") and _head(config) != usual:
        return f"its heads have {_head(config)} values, and it takes {usual}"
    return None


def _head(config: Any) -> int:
    """Values of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _entries(model: PreTrainedModel, kind: str) -> Iterator[_Entry]:
    """The tensors of the file. Weights that share one storage are written once, as the first of them."""
    import gguf as package

    config: Any = model.config
    architecture = ARCHITECTURES[config.model_type]
    number = next(n for n, name in package.MODEL_ARCH_NAMES.items() if name == architecture)
    names = package.get_tensor_name_map(number, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    head = model.get_output_embeddings().weight
    coded, seen = quantized_layers(model), set()
    for path, module in model.named_modules():
        parts = {part: p for part, p in module._parameters.items() if p is not None}
        if path in coded:
            parts["weight"] = module.codes
        for part, tensor in parts.items():
            name = names.get_name(f"{path}.{part}", try_suffixes=(f".{part}",))
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if name is None:
                raise ModelError(f"GGUF has no name for {path}.{part} in the architecture {architecture}.")
            is_head = tensor is head or name == "output.weight"
            turned = heads.get(path.rpartition(".")[2]) if architecture == "llama" else None
            held = _kind(name, tuple(tensor.shape), kind, is_head)
            yield _Entry(name, module, part, tuple(tensor.shape), held, turned)


def _kind(name: str, shape: tuple[int, ...], kind: str, is_head: bool) -> str:
    """In which kind a tensor is held, where the file is of `kind`."""
    if len(shape) == 1:
        return "F32"
    if kind in gguf_blocks.PLAIN:
        return kind
    if shape[-1] % gguf_blocks.BLOCK:
        return "F16"
    return "Q8_0" if is_head else kind


def _write(
    model: PreTrainedModel,
    entries: list[_Entry],
    tokenizer: PreTrainedTokenizerBase,
    kind: str,
    name: str,
    draft: Path,
) -> None:
    import gguf as package

    writer = package.GGUFWriter(str(draft / name), ARCHITECTURES[model.config.model_type])
    try:
        _add_metadata(writer, model, entries, kind)
        gguf_vocabulary.write(writer, tokenizer, len(structure.embeddings(model).weight))
        factors = _frequency_factors(model)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        for entry in entries:
            size = gguf_blocks.nbytes(entry.shape, entry.kind)
            writer.add_tensor_info(
                entry.name, entry.shape, np.dtype(np.float32), size, gguf_blocks.type_of(entry.kind)
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for entry in track(entries, "writing GGUF"):
            data = entry.encode()
            writer.write_tensor_data(data if entry.heads is None else _interleave(data, entry.heads))
    finally:
        writer.close()


def _interleave(data: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows (or a vector) of q or k in llama.cpp's order: the halves of each head alternate."""
    return np.ascontiguousarray(data.reshape(heads, 2, -1, *data.shape[1:]).swapaxes(1, 2)).reshape(
        data.shape
    )


def _add_metadata(writer: Any, model: PreTrainedModel, entries: list[_Entry], kind: str) -> None:
    import gguf as package

    config: Any = model.config
    total = sum(math.prod(entry.shape) for entry in entries)
    writer.add_type(package.GGUFType.MODEL)
    known = getattr(model, "luthier_origin", {}).get("name") or model.name_or_path or type(model).__name__
    writer.add_name(Path(known).name)
    writer.add_size_label(package.size_label(total, 0, 0, 0))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_context(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if _head(config) * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(_head(config))
        writer.add_value_length(_head(config))
    prefix = "" if kind == "F32" else "MOSTLY_"
    writer.add_file_type(package.LlamaFileType[f"{prefix or 'ALL_'}{kind}"])
    writer.add_vocab_size(len(structure.embeddings(model).weight))
    if ARCHITECTURES[config.model_type] == "llama":
        writer.add_rope_dimension_count(_head(config))
    if config.rope_parameters.get("rope_type") == "linear":
        writer.add_rope_scaling_type(package.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    writer.add_quantization_version(package.GGML_QUANT_VERSION)


def _context(config: Any) -> int:
    """The context length: within a sliding window, which these architectures of llama.cpp do not have."""
    longest: int = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    if window is None or not getattr(config, "use_sliding_window", True) or window >= longest:
        return longest
    detail = f"the attention's window; the model itself reads {longest}"
    checks.record("export", "context length", True, window, detail=detail)
    return int(window)


def _frequency_factors(model: PreTrainedModel) -> NDArray[np.float32] | None:
    """By what llama.cpp divides the frequencies of RoPE under Llama 3's scaling; None without it."""
    config: Any = model.config
    if config.rope_parameters.get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = _head(config)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, width, 2).float() / width)
    return (plain / scaled).numpy().astype(np.float32)


def verify_gguf(file: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Prove that a GGUF file is the model with its weights rounded as the file's kind says.

    transformers reads it in a fresh process without luthier. Compared are the logits of a probe and a few
    greedily generated tokens in float32, with those of the model whose own weights were rounded before any
    row was moved; and the token ids of some texts, by the files beside and by the header alone.

    Args:
        file: what `save_gguf` wrote.
        model: the model as it is in memory.

    Raises:
        CheckError: something differs.
        ModelError: the file cannot be loaded.
    """
    rounded = _rounded(model, str(sources.record(file.parent)["gguf"]))
    inputs = probe_inputs(model)
    with evaluating(model), evaluating(rounded):
        change = distance(rounded(**inputs).logits.float(), model(**inputs).logits.float())
    detail = "of the logits of a probe, relative; what the rounding to the file's kind costs"
    checks.record("export", "change by rounding", True, change, detail=detail)
    rounded.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    request = saving.reload_request(file.parent, rounded, tokenizer)
    request["class"] = "AutoModelForCausalLM"
    # transformers reads the base of RoPE from the file, and not how it is scaled.
    request["options"] |= {
        "gguf_file": file.name,
        "dtype": "float32",
        "rope_parameters": model.config.rope_parameters,
    }
    saving.prove_reload(request, rounded, inputs, tokenizer, gguf_vocabulary.ends(tokenizer))
    _prove_header(file, tokenizer)


@torch.no_grad()
def _rounded(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """A copy of the model in float32, each weight as the file holds it."""
    entries = [(entry, gguf_blocks.decode(entry.encode(), entry.kind)) for entry in _entries(model, kind)]
    made = dequantize(copy.deepcopy(model))
    for parameter in made.parameters():  # not model.float(): RoPE's buffers have a precision of their own
        parameter.data = parameter.data.float()
    places = {module: path for path, module in model.named_modules()}
    for entry, values in entries:
        parameter = getattr(made.get_submodule(places[entry.owner]), entry.part)
        parameter.copy_(torch.from_numpy(values))
    return made


def _prove_header(file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Hold the tokenizer that the header alone states against the model's own.

    Text is split as llama.cpp and `luthier.load` do it. transformers does not know all of these ways, and
    then reads the header otherwise; the line that says so is no failure: the own files lie beside.
    """
    read = gguf.header_tokenizer(file)
    expected, plain = _token_ids(tokenizer), _token_ids(read)
    gguf.set_pre_tokenizer(read, gguf.header(file)[0], file)
    found = _token_ids(read)
    name = "token ids by the header alone"
    same = sum(a == b for a, b in zip(found, expected, strict=True))
    checks.record("export", name, found == expected, same, len(expected), "texts and chat")
    if plain != expected:
        same = sum(a == b for a, b in zip(plain, expected, strict=True))
        detail = "it splits digits otherwise; with the files beside, and in llama.cpp, all are the same"
        checks.record("export", f"{name}, in transformers", True, f"{same} of {len(expected)}", detail=detail)


def _token_ids(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Those of an export's proof, and of texts in which ways to split differ."""
    return saving.probe_tokens(tokenizer) + [tokenizer(text).input_ids for text in SPLIT]
