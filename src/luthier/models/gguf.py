"""GGUF files: their header read without torch, and the whole converted once to a safetensors folder.

A converted model is an ordinary one: it can be trained, saved and measured without the GGUF file. Weights
are unpacked to float32, in which the block formats' products of two half-precision numbers are exact.
"""

import fcntl
import hashlib
import importlib
import logging
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from luthier.errors import ModelError
from luthier.resources import explain

if TYPE_CHECKING:
    from luthier.models.sources import Source

log = logging.getLogger("luthier.models.gguf")

CONVERSION = 1  # raise it when converted folders must be made anew

# Types of values in the header, by number: struct format, or None for those of variable length.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings",
    "rope.dimension_count": "head_dim",
    "vocab_size": "vocab_size",
}
# Byte-level pre-tokenisers by the name in the header: whether each digit stands alone. transformers gives all
# of them GPT-2's; a tokenizer that splits otherwise than in training is wrong in silence.
_SINGLE_DIGITS = {"smollm": True, "gpt-2": False, "default": False}
# Those under which llama.cpp takes a word that is a token whole, whatever the merges would make of it.
WHOLE_WORDS = ("llama-bpe", "tekken")


def header(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Metadata (arrays left out) and tensor names of a GGUF file, version 2 or 3.

    Raises:
        ModelError: it is no GGUF file, or ends too early.
    """
    with path.open("rb") as file:
        magic = file.read(4)
        if magic != b"GGUF":
            raise ModelError(f"{path} is no GGUF file: it begins with {magic!r}.")
        try:
            version, tensors, pairs = struct.unpack("<IQQ", file.read(20))
            if version not in (2, 3):
                raise ModelError(f"{path} is GGUF version {version}; 2 and 3 can be read.")
            found = {}
            for _ in range(pairs):
                key = _string(file)
                value = _value(file, _scalar(file, "I"))
                if value is not None:
                    found[key] = value
            return found, [_tensor_name(file) for _ in range(tensors)]
        except (struct.error, UnicodeDecodeError, KeyError) as error:
            raise ModelError(
                f"{path} is damaged: its header cannot be read ({error}).", fix="Get the file again."
            ) from error


def config(path: Path) -> dict[str, Any]:
    """The sizes in a GGUF header, under the names of a `config.json`."""
    found, names = header(path)
    kind = found.get("general.architecture", "")
    sizes = {
        ours: found[f"{kind}.{theirs}"] for theirs, ours in _SIZES.items() if f"{kind}.{theirs}" in found
    }
    return {
        "model_type": kind,
        "tie_word_embeddings": "output.weight" not in names,
        "is_encoder_decoder": kind.startswith("t5"),
        **sizes,
    }


def cache_folder() -> Path:
    """Folder of what we make once and keep: `$LUTHIER_CACHE`, or `~/.cache/luthier`."""
    return Path(os.environ.get("LUTHIER_CACHE") or Path.home() / ".cache" / "luthier")


def target(source: "Source") -> Path:
    """The folder of the cache that a GGUF file is converted to; another version of the file has another."""
    assert source.path is not None
    assert source.gguf_file is not None
    path = (source.path / source.gguf_file).resolve()
    state = path.stat()
    key = hashlib.sha256(f"{path}:{state.st_size}:{state.st_mtime_ns}:{CONVERSION}".encode()).hexdigest()[:12]
    name = source.name if source.kind == "alias" else path.stem
    return cache_folder() / "models" / f"{name}-{key}"


def converted(source: "Source") -> Path:
    """The safetensors folder of a GGUF file, made on the first call.

    Processes that ask at once wait for the one that converts; a conversion that was cut off leaves no folder.

    Raises:
        ModelError: the file is damaged, or its architecture or tokenizer is not supported.
        ResourceError: the cache cannot be written.
    """
    folder = target(source)
    if folder.is_dir():
        return folder
    lock = folder.with_name(f"{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        fix = "Set LUTHIER_CACHE to a folder that you may write in."
        raise explain(error, folder.parent, fix=fix) from error
    with _lock(lock):
        if not folder.is_dir():
            for left in folder.parent.glob(f".{folder.name}.*"):  # of a conversion that was killed
                shutil.rmtree(left, ignore_errors=True)
            assert source.path is not None
            assert source.gguf_file is not None
            _convert(source.path, source.gguf_file, folder)
    return folder


def _convert(path: Path, file: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    from luthier.models import sources
    from luthier.models.saving import check_files, save
    from luthier.terminal import no_bars

    check_files(path)
    log.info("converting %s to safetensors, once; it is kept in %s", file, folder)
    found, names = header(path / file)
    scaled = _scaled_rope(found, names, sources.record(path), path / file)
    try:
        # Without `dequantize` the weights stay packed, and neither learn nor can be saved.
        with no_bars(), _bar_of_ours():
            model = AutoModelForCausalLM.from_pretrained(
                path,
                gguf_file=file,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                **scaled,
            )
        ours = "gguf" in sources.record(path)  # then the tokenizer's own files lie beside
        tokenizer = AutoTokenizer.from_pretrained(path) if ours else header_tokenizer(path / file)
    except (ValueError, OSError, RuntimeError, ImportError, KeyError, IndexError) as error:
        raise ModelError(f"{path / file} cannot be converted: {error}") from error
    if not ours:
        set_pre_tokenizer(tokenizer, found, path / file)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config._name_or_path = file
    # The header states one end token; a chat model ends its turn with it, and generation must stop there.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    save(model, folder, tokenizer)


def header_tokenizer(file: Path) -> Any:
    """The tokenizer as transformers reads it from a GGUF file's header.

    It would take a `tokenizer.json` beside the file instead, and then none of the special tokens.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="luthier-") as place:
        (Path(place) / file.name).symlink_to(file.resolve())
        return AutoTokenizer.from_pretrained(place, gguf_file=file.name)


def _scaled_rope(
    found: dict[str, Any], names: list[str], record: dict[str, Any], path: Path
) -> dict[str, Any]:
    """What to give transformers where the RoPE is scaled: it reads the base from a GGUF file, and no scaling.

    Raises:
        ModelError: the scaling is in the file in a way that the config of a model cannot state.
    """
    if "gguf" in record:  # we wrote the file, and beside it what it was made from
        return {"rope_parameters": record["rope_parameters"]}
    kind = found.get("general.architecture", "")
    scaling = found.get(f"{kind}.rope.scaling.type", "none")
    if scaling == "linear":
        base, factor = found[f"{kind}.rope.freq_base"], found[f"{kind}.rope.scaling.factor"]
        return {"rope_parameters": {"rope_type": "linear", "rope_theta": base, "factor": factor}}
    if scaling != "none" or "rope_freqs.weight" in names:
        how = scaling if scaling != "none" else "a factor for each frequency"
        raise ModelError(
            f"{path}: its RoPE is scaled by {how}, which cannot be read back from a GGUF file.",
            fix="Use the model's safetensors folder, whose config.json says it.",
        )
    return {}


@contextmanager
def _bar_of_ours() -> Iterator[None]:
    """Our bar over the tensors: none of transformers' settings silences its own, which is tqdm's itself.

    It hangs on a name inside transformers. Where a version has that no more, or calls it otherwise, the
    conversion goes on without our bar.
    """
    from luthier.terminal import track

    try:
        reading: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    except ImportError:
        reading = None
    theirs = getattr(reading, "tqdm", None)
    if theirs is None:
        yield
        return

    def ours(*given: Any, **options: Any) -> Any:
        if len(given) == 1 and isinstance(given[0], Sequence):
            return track(given[0], "converting")
        return theirs(*given, **options)

    reading.tqdm = ours
    try:
        yield
    finally:
        reading.tqdm = theirs


def set_pre_tokenizer(tokenizer: Any, found: dict[str, Any], path: Path) -> None:
    """Split text as the model's own tokenizer does, which transformers reads from the header only in part."""
    from tokenizers import pre_tokenizers

    core = tokenizer.backend_tokenizer
    if found.get("tokenizer.ggml.pre") in WHOLE_WORDS:
        core.model.ignore_merges = True
    if found.get("tokenizer.ggml.model") != "gpt2" or not isinstance(
        core.pre_tokenizer, pre_tokenizers.ByteLevel
    ):
        return
    name = found.get("tokenizer.ggml.pre", "default")
    if name not in _SINGLE_DIGITS:
        raise ModelError(
            f"{path}: its pre-tokeniser '{name}' is not known, so text would be split wrongly.",
            fix="Use the model's safetensors folder, which has its own tokenizer.",
        )
    if _SINGLE_DIGITS[name]:
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock that the system frees when the process ends, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _scalar(file: BinaryIO, form: str) -> Any:
    return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))[0]


def _string(file: BinaryIO) -> str:
    return file.read(_scalar(file, "Q")).decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    """The value at the file's position; an array is passed over and gives None."""
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _scalar(file, _SCALARS[kind])
    inner, count = _scalar(file, "I"), _scalar(file, "Q")
    if inner in _SCALARS:
        file.seek(count * struct.calcsize(f"<{_SCALARS[inner]}"), 1)
    else:
        for _ in range(count):
            _value(file, inner)
    return None


def _tensor_name(file: BinaryIO) -> str:
    name = _string(file)
    dimensions = _scalar(file, "I")
    file.seek(8 * dimensions + 12, 1)  # the sizes, the type and the offset
    return name
