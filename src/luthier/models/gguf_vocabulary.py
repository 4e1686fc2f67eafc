"""A byte-level BPE tokenizer as the metadata of a GGUF file: tokens, merges, and how text is split.

The file has no `tokenizer.json`. How text is split before the merges is a name that llama.cpp knows, each
with patterns of its own; a tokenizer that splits in another way is refused, for it would be wrong in silence.
There is no place for a normaliser either: of those only NFC is let through, which changes nothing in most
texts.
"""

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from luthier import checks
from luthier.errors import ModelError
from luthier.models import gguf, tokens

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of tokens in the file
SPECIAL = ("bos", "eos", "unk", "pad", "sep", "mask")
# Names whose patterns transformers has too; the first of several for one pattern is llama.cpp's usual one.
_BY_PATTERN = ("llama-bpe", "qwen2", "tekken", "gpt-4o", "qwen35")


def write(writer: Any, tokenizer: PreTrainedTokenizerBase, rows: int) -> str:
    """Add a tokenizer's metadata to a `gguf.GGUFWriter`.

    Args:
        rows: of the model's embedding: the list of tokens has as many.

    Returns:
        The name of the way in which text is split.

    Raises:
        ModelError: the tokenizer cannot be stated in a GGUF file.
    """
    core = _core(tokenizer)
    name = splitting(core)
    before, after = _around(tokenizer)
    words, types = _words(tokenizer, rows)
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(before)
    if after:
        writer.add_add_eos_token(True)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(words)
    writer.add_token_types(types)
    merges = core["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    for kind in SPECIAL:
        number = getattr(tokenizer, f"{kind}_token_id", None)
        if number is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    end = tokens.end_of_turn(tokenizer)
    if end is not None and end != tokenizer.eos_token_id:
        writer.add_eot_token_id(end)
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": key, "template": text} for key, text in template.items()]
    if template:
        writer.add_chat_template(template)
    return name


def ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens at which llama.cpp stops, as far as the file states them."""
    found = (tokenizer.eos_token_id, tokens.end_of_turn(tokenizer))
    return [token for token in dict.fromkeys(found) if token is not None]


def splitting(core: dict[str, Any]) -> str:
    """llama.cpp's name for how the tokenizer in a `tokenizer.json` splits text before the merges.

    Raises:
        ModelError: it has none.
    """
    step = core.get("pre_tokenizer") or {}
    steps = [_step(s) for s in (step["pretokenizers"] if step.get("type") == "Sequence" else [step])]
    whole_words = bool(core["model"].get("ignore_merges"))
    for name, expected in _known().items():
        if steps == expected and whole_words <= (name in gguf.WHOLE_WORDS):
            return name
    raise ModelError(
        f"The tokenizer splits text in a way that GGUF has no name for: {json.dumps(step)[:300]}.",
        fix=f"Known are those of {', '.join(_known())}. Export safetensors instead.",
    )


def _known() -> dict[str, list[tuple[Any, ...]]]:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    own = ("ByteLevel", True)
    known: dict[str, list[tuple[Any, ...]]] = {"gpt-2": [own], "smollm": [("Digits", True), own]}
    for name in _BY_PATTERN:
        if name in GGUF_PRE_TOKENIZER_SPLITS:
            known[name] = [
                ("Split", GGUF_PRE_TOKENIZER_SPLITS[name], "isolated", False),
                ("ByteLevel", False),
            ]
    return known


def _step(step: dict[str, Any]) -> tuple[Any, ...]:
    """What decides of one step, so that two can be compared."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return kind, step.get("use_regex", True)
    if kind == "Digits":
        return kind, step["individual_digits"]
    if kind == "Split":
        return kind, step["pattern"].get("Regex"), step["behavior"].lower(), step["invert"]
    return (json.dumps(step),)


def _core(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer as its `tokenizer.json`, if it is of the kind that can be written."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    core: dict[str, Any] = (
        json.loads(backend.to_str()) if hasattr(backend, "to_str") else {"model": {"type": "unknown"}}
    )
    kind, decoder = core["model"].get("type"), (core.get("decoder") or {}).get("type")
    if kind != "BPE" or decoder != "ByteLevel":
        raise ModelError(
            f"The tokenizer is no byte-level BPE (model {kind}, decoder {decoder}): its scores, which GGUF "
            "needs, are not in its files.",
            fix="Export safetensors, and convert that with llama.cpp beside the original tokenizer.model.",
        )
    normalizer = core.get("normalizer")
    parts: list[Any] = normalizer.get("normalizers", [normalizer]) if normalizer else []
    if any(part["type"] != "NFC" for part in parts):
        raise ModelError(
            f"The tokenizer changes text before it splits it ({', '.join(p['type'] for p in parts)}), which "
            "GGUF cannot state.",
            fix="Export safetensors.",
        )
    if parts:
        detail = "the file cannot say so; most text is in NFC already"
        checks.record("export", "normalises to NFC", True, "left out", detail=detail)
    return core


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokenizer puts its begin and its end token around a text."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    found = tokenizer("a").input_ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for before in (False, True):
        for after in (False, True):
            if found == [bos] * before + plain + [eos] * after:
                return before, after
    raise ModelError(
        f"The tokenizer puts other tokens than begin and end around a text ({found} for {plain}), which GGUF "
        "cannot state.",
        fix="Export safetensors.",
    )


def _words(tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[list[str], list[int]]:
    """The tokens by id, and their types; rows of the embedding without a token get a name of their own."""
    by_id = {number: word for word, number in tokenizer.get_vocab().items()}
    if max(by_id) >= rows:
        raise ModelError(
            f"The tokenizer has ids up to {max(by_id)}, but the model's embedding has {rows} rows.",
            fix="Use the tokenizer that the model was saved with.",
        )
    added = tokenizer.added_tokens_decoder
    types = [
        UNUSED
        if i not in by_id
        else NORMAL
        if i not in added
        else CONTROL
        if added[i].special
        else USER_DEFINED
        for i in range(rows)
    ]
    return [by_id.get(i, f"[PAD{i}]") for i in range(rows)], types
