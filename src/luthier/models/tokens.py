"""A model's tokenizer: loaded from its own files, and made to agree with it on padding and end tokens."""

import logging
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from luthier import checks
from luthier.errors import ModelError
from luthier.models import structure

log = logging.getLogger("luthier.models")

FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
FAILURES = (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError)


def load(name: str, path: str, trust_remote_code: bool, revision: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder or on the Hub.

    Raises:
        ModelError: there are no files of one, or they cannot be read.
    """
    # Without its files transformers makes an empty tokenizer of the model's kind.
    if Path(path).is_dir() and not any((Path(path) / file).is_file() for file in FILES):
        raise ModelError(
            f"Model '{name}' has no tokenizer (looked for {', '.join(FILES)} in {path}).",
            fix="Save the tokenizer into the same folder: luthier.save(model, folder, tokenizer).",
        )
    options = {} if revision is None else {"revision": revision}
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # tokenizers raises no other kind, transformers half a dozen
        reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else error
        raise ModelError(
            f"The tokenizer of '{name}' cannot be loaded ({reason}).", fix="Copy or save its files again."
        ) from error


def fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str) -> None:
    """Make model and tokenizer agree on padding and on the token that ends a turn.

    Raises:
        ModelError: the tokenizer has ids that the model has no embedding for.
    """
    rows = structure.embeddings(model).weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise ModelError(
            f"The tokenizer has ids up to {largest}, but the model's embedding has {rows} rows.",
            fix="Use the tokenizer that the model was saved with.",
        )
    if task == "classification":
        _require_own_pad(model, tokenizer, rows)
    elif tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masks are made from lengths, never from this id
    generation = getattr(model, "generation_config", None)
    if generation is None or task != "causal":
        return
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
    end = end_of_turn(tokenizer)
    ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    if end is not None and end not in ends:
        generation.eos_token_id = [end, *(e for e in ends if e is not None)]
        detail = f"added {tokenizer.convert_ids_to_tokens(end)} to the end tokens"
        checks.record("before", "generation stops where a turn ends", True, detail=detail)


def _require_own_pad(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """A pad token that is no end token: a decoder's class is read at the last token that is not padding, so
    with pad = eos the final end token would have no say."""
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        taken = {tokenizer.eos_token, tokenizer.bos_token}
        special = [tokenizer.unk_token, *tokenizer.all_special_tokens]
        free = [token for token in special if token and token not in taken]
        tokenizer.add_special_tokens({"pad_token": free[0] if free else "<|pad|>"})
        if len(tokenizer) > rows:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            structure.embeddings(model).weight.data[rows:] = 0  # never attended to; the same at every load
        log.info("padding with %s, apart from the end token", tokenizer.pad_token)
    model.config.pad_token_id = tokenizer.pad_token_id


def say_template(when: checks.When, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Say in a line whether chats are rendered as the model's own tokenizer renders them.

    Another template is right where it is meant; where it is not, training and serving differ in silence.
    A model that `luthier.load` did not load is not known well enough.
    """
    if not hasattr(model, "luthier_template"):
        return
    own, used = model.luthier_template, tokenizer.chat_template
    if own == used:
        if own:
            checks.record(when, "chat template", True, "the model's own")
        return
    detail = f"it writes {_sample(tokenizer, used)}"
    if not own:
        checks.record(when, "chat template", True, "added: the model has none", detail=detail)
        return
    whose = "not the model's own" if used else "taken away: the model has one"
    detail += f", and the model's own {_sample(tokenizer, own)}"
    checks.record(when, "chat template", True, whose, detail=detail)


def _sample(tokenizer: PreTrainedTokenizerBase, template: Any) -> str:
    """How a template begins a chat."""
    if not template:
        return "nothing around a message"
    turns = [{"role": "user", "content": "Hello"}]
    try:
        text = tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, TypeError, ValueError) as error:  # several templates of one name, say
        return f"what cannot be shown ({error})"
    return repr(str(text)[:80])


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the special token with which the chat template ends an assistant's turn; None without one."""
    if not tokenizer.chat_template:
        return None
    mark = "luthier"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
    rest = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(mark)[2]
    added = set(tokenizer.added_tokens_decoder)
    ids = tokenizer(rest, add_special_tokens=False).input_ids
    return next((token for token in ids if token in added), None)
