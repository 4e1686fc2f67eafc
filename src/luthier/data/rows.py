"""Canonical rows: what every format becomes, and the checks that a field passes on the way.

A message is {role, content, ...} with role in system, user, assistant, tool, developer. A field such as
`prompt` is a string ("standard") or a list of messages ("conversational"); one data set has one kind.

| type                | fields |
|---------------------|--------|
| text                | text |
| messages            | messages, tools? |
| prompt_only         | prompt, gold?, tools? |
| prompt_completion   | prompt, completion, gold?, steps?, tools? |
| preference          | prompt, chosen, rejected, margin?, p?, score_chosen?, score_rejected?, tools? |
| preference_implicit | chosen, rejected and the same options; strings that hold the prompt |
| unpaired            | prompt, completion, label: bool, tools? |
| stepwise            | prompt, completions: [str], labels: [bool | float | None] |
| classification      | text, text_pair?, label: int | str | bool |
| multiple_choice     | prompt, choices: [str], label: int (the right one) |

Every type may have a `task`: str, the name of one of several tasks that the data set mixes.
"""

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.data.spec import DataSpec

Row = dict[str, Any]
Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool", "developer")
KEPT_IN_MESSAGE = ("name", "tool_calls", "tool_call_id", "thinking", "reasoning_content", "weight")
OPTIONAL = {
    "messages": ("tools",),
    "prompt_only": ("gold", "tools"),
    "prompt_completion": ("gold", "steps", "tools"),
    "preference": ("margin", "p", "score_chosen", "score_rejected", "tools"),
    "unpaired": ("tools",),
}

# NUL, the byte order mark, the replacement character and lone surrogates: never meant, and some tokenizers
# refuse them.
_CONTROL = re.compile("[\x00\ufeff\ufffd\ud800-\udfff]")


class Reject(Exception):
    """A record that cannot be used: its code (E_...) and the reason in words."""

    def __init__(self, code: str, reason: str):
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason


def clean(value: Any, notes: list[str]) -> Any:
    """The value with control characters stripped from every string; notes W_CTRL where there were any."""
    if isinstance(value, str):
        if _CONTROL.search(value):
            notes.append("W_CTRL")
            return _CONTROL.sub("", value)
        return value
    if isinstance(value, list):
        return [clean(item, notes) for item in value]
    if isinstance(value, dict):
        return {key: clean(item, notes) for key, item in value.items()}
    return value


def present(row: Row, key: str) -> Any:
    """The value of a field that must be there. Raises E_KEYS."""
    if row.get(key) is None:
        raise Reject("E_KEYS", f"'{key}' is missing" if key not in row else f"'{key}' is null")
    return row[key]


def string(row: Row, key: str, *, empty: bool = False) -> str:
    """A field that must be a string. Raises E_KEYS, E_TYPE, E_EMPTY."""
    value = present(row, key)
    if not isinstance(value, str):
        raise Reject("E_TYPE", f"'{key}' is {type_name(value)}, not text")
    if not empty and not value.strip():
        raise Reject("E_EMPTY", f"'{key}' is empty")
    return value


def type_name(value: Any) -> str:
    names = {type(None): "null", dict: "an object", list: "a list", bool: "true/false", str: "text"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def listed(value: Any) -> Any:
    """A list, also where a CSV cell or a Parquet column holds it as JSON text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def boolean(row: Row, key: str) -> bool:
    """true/false, 0/1, or these as text (CSV). Raises E_KEYS, E_TYPE."""
    value = present(row, key)
    if isinstance(value, str):
        value = {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower(), value)
    if value in (0, 1) and isinstance(value, bool | int | float):
        return bool(value)
    raise Reject("E_TYPE", f"'{key}' is {value!r}, not true or false")


def number(row: Row, key: str) -> float:
    value = present(row, key)
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise Reject("E_TYPE", f"'{key}' is {value!r}, not a number") from None


def is_conversation(value: Any) -> bool:
    value = listed(value)
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and ("role" in m or "from" in m) for m in value)
    )


def text_or_messages(row: Row, key: str, spec: "DataSpec", notes: list[str], *, answer: bool = False) -> Any:
    """A field that may be a string or a list of messages; `answer`: its last message is the assistant's."""
    value = present(row, key)
    if is_conversation(value):
        return messages(listed(value), spec, notes, answer=answer)
    return string(row, key)


def messages(value: Any, spec: "DataSpec", notes: list[str], *, answer: bool) -> list[Message]:
    """Normal messages in an order that a chat template takes. Raises E_TYPE, E_EMPTY, E_ROLE.

    Args:
        answer: whether the last message must be the assistant's.
    """
    value = listed(value)
    if not isinstance(value, list):
        raise Reject("E_TYPE", f"the conversation is {type_name(value)}, not a list of messages")
    if not value:
        raise Reject("E_EMPTY", "the conversation has no message")
    turns = [_message(item, index) for index, item in enumerate(value)]
    if spec.merge_consecutive:
        turns = _merged(turns, notes)
    for index, (before, turn) in enumerate(zip([None, *turns], turns, strict=False)):
        if turn["role"] in ("system", "developer") and index:
            raise Reject("E_ROLE", f"message {index + 1} is a {turn['role']} message, which must come first")
        if before is not None and before["role"] == turn["role"] and turn["role"] in ("user", "assistant"):
            raise Reject("E_ROLE", f"messages {index} and {index + 1} are both the {turn['role']}'s")
    if answer and turns[-1]["role"] != "assistant":
        raise Reject("E_ROLE", f"the last message is the {turns[-1]['role']}'s, not the assistant's")
    return turns


def _message(item: Any, index: int) -> Message:
    where = f"message {index + 1}"
    if not isinstance(item, dict):
        raise Reject("E_TYPE", f"{where} is {type_name(item)}, not an object with role and content")
    role = item.get("role")
    if role not in ROLES:
        raise Reject("E_ROLE", f"{where} has role {role!r}; known are {', '.join(ROLES)}")
    turn = {"role": role, "content": _content(item, where)}
    turn |= {key: item[key] for key in KEPT_IN_MESSAGE if item.get(key) is not None}
    if turn.get("weight", 1) not in (0, 1):
        raise Reject("E_TYPE", f"{where} has weight {turn['weight']!r}; 0 (not trained) or 1 are possible")
    return turn


def _content(item: Message, where: str) -> str:
    content = item.get("content")
    if isinstance(content, list):
        parts = [p if isinstance(p, str) else p.get("text") if isinstance(p, dict) else None for p in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise Reject("E_TYPE", f"{where} holds a part that is not text; images are not supported")
        content = "".join(texts)
    if content is None and item.get("tool_calls"):
        return ""
    if content is None:
        raise Reject("E_KEYS", f"{where} has no content")
    if not isinstance(content, str):
        raise Reject("E_TYPE", f"{where} has content that is {type_name(content)}, not text")
    # A tool may rightly answer nothing, and a system message may be blank; a turn of the dialogue may not.
    if not content.strip() and item["role"] in ("user", "assistant") and not item.get("tool_calls"):
        raise Reject("E_EMPTY", f"{where} ({item['role']}) is empty")
    return content


def _merged(turns: list[Message], notes: list[str]) -> list[Message]:
    merged: list[Message] = []
    for turn in turns:
        if merged and merged[-1]["role"] == turn["role"] and turn["role"] in ("user", "assistant"):
            merged[-1] = merged[-1] | {"content": merged[-1]["content"] + "\n\n" + turn["content"]}
            notes.append("E_ROLE")
        else:
            merged.append(turn)
    return merged


def options(row: Row, type: str) -> Row:
    """The optional fields of a canonical type that a row has."""
    kept = {key: row[key] for key in OPTIONAL.get(type, ()) if row.get(key) is not None}
    if "tools" in kept:
        kept["tools"] = listed(kept["tools"])
        if not isinstance(kept["tools"], list):
            raise Reject("E_TYPE", "'tools' is not a list of tool descriptions")
    for key in ("margin", "score_chosen", "score_rejected", "p"):
        if key in kept:
            kept[key] = number(row, key)
    if "p" in kept and not (0 <= kept["p"] <= 1):
        raise Reject("E_PROB", f"'p' is {kept['p']!r}, not a probability")
    return kept


def differing(chosen: Any, rejected: Any) -> None:
    """Raises E_SAME where two answers are the same but for white space at their ends."""
    same = (
        chosen.strip() == rejected.strip()
        if isinstance(chosen, str) and isinstance(rejected, str)
        else chosen == rejected
    )
    if same:
        raise Reject("E_SAME", "'chosen' and 'rejected' are the same")


def split_prompt(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], ...]:
    """Prompt, chosen and rejected of two conversations that begin alike. Raises E_PREFIX, E_SAME, E_ROLE."""
    if chosen == rejected:
        raise Reject("E_SAME", "'chosen' and 'rejected' are the same")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared in (len(chosen), len(rejected)):
        raise Reject("E_PREFIX", "one conversation is the beginning of the other")
    if chosen[shared]["role"] != "assistant" or rejected[shared]["role"] != "assistant" or not shared:
        raise Reject("E_PREFIX", f"the prompts differ, from message {shared + 1} on")
    return chosen[:shared], chosen[shared:], rejected[shared:]
