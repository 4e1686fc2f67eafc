"""Pure converters from the formats that users bring: a row in, canonical rows out (or `Reject`).

Each takes the row, the spec (for its options) and a list of notes, to which it adds the code of anything
it repaired. One row may give several (PRM800K) or none (a control row, noted S_SKIP).
"""

import json
import re
from typing import TYPE_CHECKING, Any

from luthier.data.rows import (
    Message,
    Reject,
    Row,
    boolean,
    differing,
    listed,
    messages,
    number,
    present,
    split_prompt,
    string,
    type_name,
)

if TYPE_CHECKING:
    from luthier.data.spec import DataSpec

SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool", "function_call": "assistant", "developer": "developer",
}  # fmt: skip
_ALPACA_WRAPPER = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_GSM8K_GOLD = re.compile(r"#### (-?[0-9.,]+)")
_SHEPHERD_TAG = "ки"


# Alpaca ------------------------------------------------------------------------------------------------


def alpaca_prompt(row: Row, spec: "DataSpec") -> str | list[Message]:
    instruction = string(row, "instruction")
    given = row.get("input") or ""
    if not isinstance(given, str):
        raise Reject("E_TYPE", f"'input' is {type_name(given)}, not text")
    if spec.template == "alpaca":
        paired = ", paired with an input that provides further context" if given.strip() else ""
        block = f"### Input:\n{given}\n\n" if given.strip() else ""
        text = _ALPACA_WRAPPER.format(paired=paired, instruction=instruction, input=block)
    else:
        text = instruction + (spec.alpaca_join + given if given.strip() else "")
    if "system" not in row and "history" not in row:
        return text
    turns = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for pair in listed(row.get("history")) or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise Reject("E_TYPE", "'history' is not a list of [user, assistant] pairs")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages([*turns, {"role": "user", "content": text}], spec, [], answer=False)


def _reply(prompt: Any, text: str) -> Any:
    """A completion in the shape of its prompt."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def alpaca(row: Row, spec: "DataSpec", notes: list[str]) -> list[Row]:
    prompt = alpaca_prompt(row, spec)
    converted = {"prompt": prompt, "completion": _reply(prompt, string(row, "output"))}
    if isinstance(row.get("answer"), str) and row["answer"].strip():
        converted["gold"] = row["answer"].strip()
    return [converted]


def alpaca_preference(row: Row, spec: "DataSpec", notes: list[str]) -> list[Row]:
    prompt = alpaca_prompt(row, spec)
    pair = listed(row.get("output"))
    if "chosen" not in row and isinstance(pair, list):
        if len(pair) != 2:
            raise Reject("E_LEN", f"'output' holds {len(pair)} answers, not [good, bad]")
        row = {"chosen": pair[0], "rejected": pair[1]}
    chosen, rejected = string(row, "chosen"), string(row, "rejected")
    differing(chosen, rejected)
    return [{"prompt": prompt, "chosen": _reply(prompt, chosen), "rejected": _reply(prompt, rejected)}]


def alpaca_kto(row: Row, spec: "DataSpec", notes: list[str]) -> list[Row]:
    prompt = alpaca_prompt(row, spec)
    completion = _reply(prompt, string(row, "output"))
    return [{"prompt": prompt, "completion": completion, "label": boolean(row, "kto_tag")}]


def self_instruct(row: Row, spec: "DataSpec", notes: list[str]) -> list[Row]:
    instances = listed(present(row, "instances"))
    if not isinstance(instances, list) or not instances or not all(isinstance(i, dict) for i in instances):
        raise Reject("E_TYPE", "'instances' is not a list of {input, output}")
    plain = {key: value for key, value in row.items() if key in ("instruction", "system")}
    return [converted for instance in instances for converted in alpaca(plain | instance, spec, notes)]


# Conversations -----------------------------------------------------------------------------------------


def sharegpt(row: Row, spec: "DataSpec", notes: list[str]) -> list[Row]:
    items = listed(row["conversations"] if row.get("conversations") is not None else present(row, "messages"))
    if not isinstance(items, list):
        raise Reject("E_TYPE", f"'conversations' is {type_name(items)}, not a list")
    turns = [_sharegpt_turn(item, index) for index, item in enumerate(items)]
    first = 1 if turns and turns[0]["role"] == "system" else 0
    if len(turns) > first and turns[first]["role"] == "assistant":
        del turns[first]  # an answer to nothing: the export began in the middle
        notes.append("E_ROLE")
    if isinstance(row.get("system"), str) and row["system"].strip() and not first:
        turns.insert(0, {"role": "system", "content": row["system"]})
    converted: Row = {"messages": messages(turns, spec, notes, answer=True)}
    if tools := listed(row.get("tools")):
        if not isinstance(tools, list):
            raise Reject("E_TYPE", "'tools' is not a list of tool descriptions")
        converted["tools"] = tools
    return [converted]


def _sharegpt_turn(item: Any, index: int) -> Message:
    if not isinstance(item, dict):
        raise Reject("E_TYPE", f"message {index + 1} is {type_name(item)}, not an object")
    speaker = item.get("from", item.get("role"))
    content = item.get("value", item.get("content"))
    role = SHAREGPT_ROLES.get(str(speaker).lower())
    if role is None:
        raise Reject("E_ROLE", f"message {index + 1} is from {speaker!r}; known: {', '.join(SHAREGPT_ROLES)}")
    if speaker == "function_call":
        try:
            calls = json.loads(content) if isinstance(content, str) else content
        except json.JSONDecodeError:
            raise Reject("E_TYPE", f"message {index + 1}: the function call is not JSON") from None
        calls = calls if isinstance(calls, list) else [calls]
        return {
            "role": role,
            "content": "",
            "tool_calls": [{"type": "function", "function": call} for call in calls],
        }
    kept = {key: value for key, value in item.items() if key not in ("from", "value", "role", "content")}
    return {"role": role, "content": content, **kept}


# Human feedback ----------------------------------------------------------------------------------------


def hh_turns(text: str) -> list[tuple[str, str]]:
    """(speaker, raw text) of a dialogue in Anthropic's form; raw texts keep their white space.

    "".join(f"\\n\\n{speaker}:{raw}") over the turns is the dialogue again, exactly.
    """
    parts = _HH_TURN.split(text)
    if parts[0]:
        raise Reject("E_TYPE", r"the dialogue does not start with '\n\nHuman:'")
    return list(zip(parts[1::2], parts[2::2], strict=True))


def hh_rlhf(row: Row, spec: "DataSpec", notes: list[str]) -> list[Row]:
    chosen, rejected = (hh_turns(string(row, key)) for key in ("chosen", "rejected"))
    if chosen == rejected:
        raise Reject("E_SAME", "'chosen' and 'rejected' are the same")
    if chosen[:-1] != rejected[:-1]:
        raise Reject("E_PREFIX", "the dialogues differ before their last turn")
    for side, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns[-1][0] != "Assistant":
            raise Reject("E_ROLE", f"'{side}' does not end with the assistant's turn")
        if not turns[-1][1].strip():
            raise Reject("E_EMPTY", f"'{side}' ends with an empty answer")
    roles = {"Human": "user", "Assistant": "assistant"}
    both = [
        messages([{"role": roles[s], "content": raw.strip()} for s, raw in turns], spec, notes, answer=True)
        for turns in (chosen, rejected)
    ]
    prompt, *answers = both[0][:-1], both[0][-1:], both[1][-1:]
    if not prompt:
        raise Reject("E_EMPTY", "the dialogue has no prompt")
    differing(answers[0][0]["content"], answers[1][0]["content"])
    return [{"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}]


def hh_red_team(row: Row, spec: "DataSpec", notes: list[str]) -> list[Row]:
    for speaker, raw in hh_turns(string(row, "transcript")):
        if speaker == "Human":
            return [{"prompt": string({"prompt": raw.strip()}, "prompt")}]
    raise Reject("E_EMPTY", "the transcript has no human turn")


def scored(row: Row, spec: "DataSpec", notes: list[str]) -> list[Row]:
    """Best against worst of several scored completions, with the gap as `margin` (UltraFeedback)."""
    prompt = string(row, "prompt" if row.get("prompt") is not None else "instruction")
    items = listed(present(row, "completions"))
    if not isinstance(items, list) or len(items) < 2:
        raise Reject("E_LEN", "'completions' needs two completions or more")
    scores = listed(row.get("scores") if row.get("scores") is not None else row.get("ratings"))
    if scores is not None and (not isinstance(scores, list) or len(scores) != len(items)):
        raise Reject("E_LEN", f"there are {len(items)} completions and another number of scores")
    ranked = []
    for index, item in enumerate(items):
        item = {"text": item} if isinstance(item, str) else item
        if not isinstance(item, dict):
            raise Reject("E_TYPE", f"completion {index + 1} is {type_name(item)}")
        key = next((k for k in ("text", "response", "content") if k in item), "text")
        rate = next((k for k in ("score", "overall_score", "rating") if k in item), "score")
        given = {rate: scores[index]} if scores is not None else item
        ranked.append((number(given, rate), string(item, key)))
    (high, best), (low, worst) = max(ranked, key=lambda r: r[0]), min(ranked, key=lambda r: r[0])
    if not high - low > spec.min_gap:
        raise Reject("E_SAME", f"no two scores differ by more than {spec.min_gap:g}")
    differing(best, worst)
    return [{"prompt": prompt, "chosen": best, "rejected": worst, "margin": high - low}]


def implicit_messages(chosen: list[Message], rejected: list[Message]) -> Row:
    prompt, chosen, rejected = split_prompt(chosen, rejected)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


# Steps of reasoning ------------------------------------------------------------------------------------


def gsm8k_gold(answer: str) -> str | None:
    """The final number of a GSM8K answer, commas removed; None where there is none."""
    found = _GSM8K_GOLD.findall(answer)
    return found[-1].replace(",", "").rstrip(".") if found else None


def gsm8k(row: Row, spec: "DataSpec", notes: list[str]) -> list[Row]:
    answer = string(row, "answer")
    converted: Row = {"prompt": string(row, "question"), "completion": answer}
    gold = gsm8k_gold(answer)
    if gold is None:
        notes.append("E_GOLD")  # of use for training all the same
    else:
        converted["gold"] = gold
    return [converted]


def gsm8k_socratic(row: Row, spec: "DataSpec", notes: list[str]) -> list[Row]:
    [converted] = gsm8k(row, spec, notes)
    lines = [line for line in converted["completion"].split("\n") if line and not line.startswith("####")]
    pairs = [line.split(" ** ", 1) for line in lines]
    if any(len(pair) != 2 for pair in pairs):
        raise Reject("E_TYPE", "a line of the answer has no ' ** ' between sub-question and step")
    return [converted | {"steps": [{"question": q, "answer": a} for q, a in pairs]}]


def math_shepherd(row: Row, spec: "DataSpec", notes: list[str]) -> list[Row]:
    text, marked = string(row, "input"), string(row, "label")
    pieces = text.split(_SHEPHERD_TAG)
    labels, at = [], 0
    for piece in pieces[:-1]:
        at += len(piece)
        if marked[at - len(piece) : at] != piece or marked[at : at + 1] not in ("+", "-"):
            raise Reject("E_LEN", "'label' is not 'input' with each tag replaced by + or -")
        labels.append(marked[at] == "+")
        at += 1
    start = pieces[0].find("Step 1:")
    if len(pieces) < 2 or start < 0:
        raise Reject("E_TYPE", "'input' has no 'Step 1:', so the prompt cannot be told from the first step")
    steps = [pieces[0][start:].strip(), *(piece.strip() for piece in pieces[1:-1])]
    return [stepwise_row(string({"prompt": pieces[0][:start].strip()}, "prompt"), steps, labels, notes)]


def stepwise_row(prompt: str, steps: Any, labels: Any, notes: list[str]) -> Row:
    """A canonical stepwise row. Raises E_TYPE, E_LEN; an empty step goes with its label, noted E_STEP."""
    if not isinstance(steps, list) or not isinstance(labels, list):
        raise Reject("E_TYPE", "'completions' and 'labels' must be lists")
    if len(steps) != len(labels):
        raise Reject("E_LEN", f"there are {len(steps)} completions and {len(labels)} labels")
    if any(not isinstance(step, str) for step in steps):
        raise Reject("E_TYPE", "a completion is not text")
    for label in labels:
        if label is not None and not (isinstance(label, bool | int | float) and 0 <= label <= 1):
            raise Reject("E_LEN", f"label {label!r} is not true, false, null or a number in [0, 1]")
    kept = [(step, label) for step, label in zip(steps, labels, strict=True) if step.strip()]
    if len(kept) < len(steps):
        notes.append("E_STEP")
    if not any(label is not None for _, label in kept):
        raise Reject("E_LEN", "no step has a label")
    return {
        "prompt": prompt,
        "completions": [step for step, _ in kept],
        "labels": [bool(label) if label in (0, 1) else label for _, label in kept],
    }


def prm800k(row: Row, spec: "DataSpec", notes: list[str]) -> list[Row]:
    """Every rated step in its context: the chosen path, and the path so far plus each other completion."""
    if (
        row.get("is_quality_control_question")
        or row.get("is_initial_screening_question")
        or row["label"].get("finish_reason") in ("bad_problem", "give_up")
    ):
        notes.append("S_SKIP")
        return []
    problem = string(row["question"], "problem")
    path: list[str] = []
    labels: list[bool | None] = []
    found: list[tuple[list[str], list[bool | None]]] = []
    for step in listed(row["label"].get("steps")) or []:
        choice = step.get("chosen_completion")
        completions = step.get("completions") or []
        for index, completion in enumerate(completions):
            rated = _prm_label(completion, spec)
            if index != choice and rated is not None:
                found.append(([*path, completion["text"]], [*labels, rated]))
        human = step.get("human_completion")
        if isinstance(choice, int) and 0 <= choice < len(completions):
            path, labels = (
                [*path, completions[choice]["text"]],
                [*labels, _prm_label(completions[choice], spec)],
            )
        elif human is not None:
            path, labels = [*path, human if isinstance(human, str) else human["text"]], [*labels, True]
        else:
            break
    found.append((path, labels))
    rows = [stepwise_row(problem, p, lab, notes) for p, lab in found if any(v is not None for v in lab)]
    if not rows:
        raise Reject("E_LEN", "no step has a rating")
    return rows


def _prm_label(completion: Row, spec: "DataSpec") -> bool | None:
    rating = completion.get("rating")
    if rating is None or completion.get("flagged"):
        return None
    return rating > 0 or (rating == 0 and spec.neutral == "positive")
