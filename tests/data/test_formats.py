"""Every format is recognised by its fields, converts to its canonical type, and converting again changes
nothing; every bad record gets its code."""

import pytest

from luthier.data import formats
from luthier.data.rows import Reject
from luthier.data.spec import DataSpec
from luthier.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
OTHER = {"role": "assistant", "content": "Go away."}
HH = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: Go away."}
STEP = {"completions": [{"text": "a", "rating": 1}], "chosen_completion": 0, "human_completion": None}


def convert(row, format=None, **spec):
    spec = DataSpec.model_validate({"path": "x", **spec})
    row = formats.rename(row, spec.columns)
    return formats.convert(row, format or formats.detect([row]), spec, [])


# format, row, canonical rows
CASES = [
    ("text", {"text": "Once."}, [{"text": "Once."}]),
    ("messages", {"messages": [USER, ASSISTANT]}, [{"messages": [USER, ASSISTANT]}]),
    ("prompt_only", {"prompt": "Hi"}, [{"prompt": "Hi"}]),
    ("prompt_completion", {"prompt": "Hi", "completion": " Yo"}, [{"prompt": "Hi", "completion": " Yo"}]),
    (
        "prompt_completion",
        {"prompt": [USER], "completion": [ASSISTANT]},
        [{"prompt": [USER], "completion": [ASSISTANT]}],
    ),
    (
        "preference",
        {"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": 2, "p": 0.75},
        [{"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": 2.0, "p": 0.75}],
    ),
    (  # as in ultrafeedback_binarized: the conversations hold the prompt once more
        "preference",
        {"prompt": "Hi", "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
        [{"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER]}],
    ),
    (
        "preference_implicit",
        {"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
        [{"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER]}],
    ),
    ("preference_implicit", {"chosen": "Q: 1", "rejected": "Q: 2"}, [{"chosen": "Q: 1", "rejected": "Q: 2"}]),
    (
        "unpaired",
        {"prompt": "Hi", "completion": "Yo", "label": "false"},
        [{"prompt": "Hi", "completion": "Yo", "label": False}],
    ),
    (
        "stepwise",
        {"prompt": "1+1?", "completions": ["one", " ", "two"], "labels": [1, 0, 0.5]},
        [{"prompt": "1+1?", "completions": ["one", "two"], "labels": [True, 0.5]}],
    ),
    ("classification", {"text": "good", "label": 1}, [{"text": "good", "label": 1}]),
    (
        "multiple_choice",
        {"prompt": "1+1?", "choices": ["one", "two"], "label": "two"},
        [{"prompt": "1+1?", "choices": ["one", "two"], "label": 1}],
    ),
    (
        "classification",
        {"premise": "a", "hypothesis": "b", "label": "entailment"},
        [{"text": "a", "text_pair": "b", "label": "entailment"}],
    ),
    (
        "multiple_choice",
        {"prompt": "1+1?", "choices": ["two", "three"], "label": "three"},
        [{"prompt": "1+1?", "choices": ["two", "three"], "label": 1}],
    ),
    (
        "alpaca",
        {"instruction": "Add.", "input": "1 2", "output": "3", "answer": "3"},
        [{"prompt": "Add.\n\n1 2", "completion": "3", "gold": "3"}],
    ),
    ("alpaca", {"instruction": "Go.", "input": "", "output": "3"}, [{"prompt": "Go.", "completion": "3"}]),
    (
        "alpaca",
        {"instruction": "Q", "output": "A", "system": "Be kind.", "history": [["q", "a"]]},
        [
            {
                "prompt": [
                    {"role": "system", "content": "Be kind."},
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "a"},
                    {"role": "user", "content": "Q"},
                ],
                "completion": [{"role": "assistant", "content": "A"}],
            }
        ],
    ),
    (
        "alpaca_preference",
        {"instruction": "Q", "chosen": "good", "rejected": "bad"},
        [{"prompt": "Q", "chosen": "good", "rejected": "bad"}],
    ),
    (
        "alpaca_preference",
        {"instruction": "Q", "output": ["good", "bad"]},
        [{"prompt": "Q", "chosen": "good", "rejected": "bad"}],
    ),
    (
        "alpaca_kto",
        {"instruction": "Q", "output": "A", "kto_tag": True},
        [{"prompt": "Q", "completion": "A", "label": True}],
    ),
    (
        "self_instruct",
        {"instruction": "Q", "instances": [{"input": "", "output": "A"}, {"input": "x", "output": "B"}]},
        [{"prompt": "Q", "completion": "A"}, {"prompt": "Q\n\nx", "completion": "B"}],
    ),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": "gpt", "value": "(the end of an earlier answer)"},
                {"from": "human", "value": "Hi"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                {"from": "observation", "value": "42"},
                {"from": "gpt", "value": "Hello."},
            ],
            "system": "Be kind.",
            "tools": '[{"name": "f"}]',
        },
        [
            {
                "messages": [
                    {"role": "system", "content": "Be kind."},
                    USER,
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
                    },
                    {"role": "tool", "content": "42"},
                    ASSISTANT,
                ],
                "tools": [{"name": "f"}],
            }
        ],
    ),
    ("hh_rlhf", HH, [{"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER]}]),
    ("hh_red_team", {"transcript": "\n\nHuman: Bad?\n\nAssistant: No.", "rating": 0}, [{"prompt": "Bad?"}]),
    (
        "scored",
        {
            "instruction": "Q",
            "completions": [{"response": "x", "overall_score": 2}, {"response": "y", "overall_score": 7.5}],
        },
        [{"prompt": "Q", "chosen": "y", "rejected": "x", "margin": 5.5}],
    ),
    (
        "gsm8k",
        {"question": "Q", "answer": "1,000+234\n#### 1,234"},
        [{"prompt": "Q", "completion": "1,000+234\n#### 1,234", "gold": "1234"}],
    ),
    (
        "gsm8k_socratic",
        {"question": "Q", "answer": "How many? ** One.\n#### -1"},
        [
            {
                "prompt": "Q",
                "completion": "How many? ** One.\n#### -1",
                "gold": "-1",
                "steps": [{"question": "How many?", "answer": "One."}],
            }
        ],
    ),
    (
        "math_shepherd",
        {"input": "1+1? Step 1: 1+1=2 ки\nStep 2: 3 ки", "label": "1+1? Step 1: 1+1=2 +\nStep 2: 3 -"},
        [{"prompt": "1+1?", "completions": ["Step 1: 1+1=2", "Step 2: 3"], "labels": [True, False]}],
    ),
    (
        "prm800k",
        {
            "question": {"problem": "P"},
            "label": {
                "finish_reason": "solution",
                "steps": [
                    {
                        "completions": [{"text": "a", "rating": 0}, {"text": "b", "rating": -1}],
                        "chosen_completion": 0,
                        "human_completion": None,
                    },
                    {
                        "completions": [
                            {"text": "c", "rating": -1},
                            {"text": "d", "rating": 1, "flagged": True},
                        ],
                        "chosen_completion": None,
                        "human_completion": {"text": "h", "rating": None},
                    },
                ],
            },
        },
        [
            {"prompt": "P", "completions": ["b"], "labels": [False]},
            {"prompt": "P", "completions": ["a", "c"], "labels": [True, False]},
            {"prompt": "P", "completions": ["a", "h"], "labels": [True, True]},
        ],
    ),
]


@pytest.mark.parametrize(
    ("format", "row", "expected"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)]
)
def test_format_is_detected_and_converted(format, row, expected):
    assert formats.detect([row]) == format
    assert convert(row) == expected


@pytest.mark.parametrize("case", CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_converting_twice_equals_once(case):
    format, row, _ = case
    for canonical in convert(row):
        again = formats.detect([canonical])
        assert convert(canonical, again) == [canonical]
        assert formats.FORMATS[again].type == formats.FORMATS[format].type


def test_every_format_has_a_case():
    assert {case[0] for case in CASES} == set(formats.FORMATS)


BAD = [
    ("E_KEYS", "prompt_completion", {"prompt": "Hi"}),
    ("E_KEYS", "prompt_completion", {"prompt": "Hi", "completion": None}),
    ("E_KEYS", "messages", {"messages": [{"role": "user"}]}),
    ("E_TYPE", "prompt_completion", {"prompt": "Hi", "completion": 7}),
    ("E_TYPE", "messages", {"messages": "Hi"}),
    ("E_TYPE", "messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}, ASSISTANT]}),
    ("E_TYPE", "messages", {"messages": [USER, ASSISTANT | {"weight": 0.5}]}),
    ("E_TYPE", "preference", {"prompt": "Hi", "chosen": "a", "rejected": [ASSISTANT]}),
    ("E_TYPE", "unpaired", {"prompt": "Hi", "completion": "a", "label": "maybe"}),
    ("E_TYPE", "multiple_choice", {"prompt": "1+1?", "choices": ["two", "three"], "label": 2}),
    ("E_TYPE", "classification", {"text": "a", "label": 0.5}),
    ("E_TYPE", "multiple_choice", {"prompt": "1+1?", "choices": ["one", "two"], "label": 2}),
    ("E_TYPE", "multiple_choice", {"prompt": "1+1?", "choices": "one or two", "label": 0}),
    ("E_TYPE", "prm800k", {"question": {"problem": "P"}, "label": {"steps": ["not a step"]}}),
    ("E_TYPE", "text", ["a list"]),
    ("E_EMPTY", "prompt_completion", {"prompt": "Hi", "completion": " \n"}),
    ("E_EMPTY", "messages", {"messages": [USER, {"role": "assistant", "content": ""}]}),
    ("E_EMPTY", "hh_rlhf", HH | {"chosen": "\n\nHuman: Hi\n\nAssistant: "}),
    ("E_ROLE", "messages", {"messages": [USER]}),
    ("E_ROLE", "messages", {"messages": [USER, USER, ASSISTANT]}),
    ("E_ROLE", "messages", {"messages": [ASSISTANT]}),
    ("E_ROLE", "messages", {"messages": [USER, {"role": "system", "content": "x"}, ASSISTANT]}),
    ("E_ROLE", "messages", {"messages": [{"role": "wizard", "content": "x"}, ASSISTANT]}),
    ("E_ROLE", "sharegpt", {"conversations": [{"from": "human", "value": "Hi"}]}),
    ("E_SAME", "preference", {"prompt": "Hi", "chosen": "a", "rejected": "a "}),
    ("E_SAME", "scored", {"prompt": "Q", "completions": ["a", "b"], "scores": [1, 1]}),
    ("E_PREFIX", "preference_implicit", {"chosen": [USER, ASSISTANT], "rejected": [OTHER]}),
    ("E_PREFIX", "hh_rlhf", HH | {"chosen": "\n\nHuman: Ho\n\nAssistant: Hello."}),
    ("E_LEN", "stepwise", {"prompt": "P", "completions": ["a"], "labels": [True, False]}),
    ("E_LEN", "stepwise", {"prompt": "P", "completions": ["a"], "labels": [2]}),
    ("E_LEN", "stepwise", {"prompt": "P", "completions": ["a"], "labels": [None]}),
    ("E_LEN", "math_shepherd", {"input": "P Step 1: a ки", "label": "P Step 1: a ?"}),
    ("E_PROB", "preference", {"prompt": "Hi", "chosen": "a", "rejected": "b", "p": float("nan")}),
]


@pytest.mark.parametrize(("code", "format", "row"), BAD, ids=[f"{b[0]}-{i}" for i, b in enumerate(BAD)])
def test_bad_record_gets_its_code(code, format, row):
    with pytest.raises(Reject) as caught:
        formats.convert(row, format, DataSpec(path="x"), [])
    assert caught.value.code == code
    assert caught.value.reason


def test_repairs_are_noted():
    def notes(row, format, **spec):
        found: list[str] = []
        rows = formats.convert(row, format, DataSpec.model_validate({"path": "x", **spec}), found)
        return rows, found

    assert notes({"text": "a\x00b\ufeff\ud800"}, "text") == ([{"text": "ab"}], ["W_CTRL"])
    assert notes({"question": "Q", "answer": "no number"}, "gsm8k")[1] == ["E_GOLD"]
    assert notes({"prompt": "P", "completions": ["a", ""], "labels": [1, 0]}, "stepwise")[1] == ["E_STEP"]
    control = {"question": {"problem": "P"}, "label": {"steps": [STEP], "finish_reason": "give_up"}}
    assert notes(control, "prm800k") == ([], ["S_SKIP"])
    merged, found = notes({"messages": [USER, USER, ASSISTANT]}, "messages", merge_consecutive=True)
    assert merged[0]["messages"][0]["content"] == "Hi\n\nHi"
    assert found == ["E_ROLE"]


def test_options_of_the_formats():
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert convert(row, alpaca_join="\n")[0]["prompt"] == "Add.\n1 2"
    wrapped = convert(row, template="alpaca")[0]["prompt"]
    assert wrapped.startswith("Below is an instruction that describes a task, paired with an input")
    assert wrapped.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    neutral = {
        "question": {"problem": "P"},
        "label": {
            "steps": [STEP | {"completions": [{"text": "a", "rating": 0}]}],
            "finish_reason": "solution",
        },
    }
    assert convert(neutral)[0]["labels"] == [True]
    assert convert(neutral, neutral="negative")[0]["labels"] == [False]


def test_mapped_columns_become_ours():
    row = {"q": "Hi", "a": "Yo", "text": "noise"}
    assert convert(row, "prompt_completion", columns={"prompt": "q", "completion": "a"}) == [
        {"prompt": "Hi", "completion": "Yo"}
    ]


def test_unknown_columns_are_answered_with_the_mapping_to_write():
    with pytest.raises(DataError, match="question, response") as caught:
        formats.detect([{"question": "Q", "response": "A"}])
    assert "columns: {prompt: question, completion: response}" in str(caught.value)
    with pytest.raises(DataError) as caught:
        formats.detect([{"0": "fine film", "1": "1"}])
    assert "columns: {text: '0', label: '1'}" in str(caught.value), "YAML needs the quotes"


def test_rows_of_strings_and_of_messages_do_not_mix():
    with pytest.raises(DataError, match="2 rows of strings with 1 rows of messages"):
        formats.one_kind([{"prompt": "a"}, {"prompt": "b"}, {"prompt": [USER]}])


def test_hh_dialogue_is_its_turns_exactly():
    from luthier.data.foreign import hh_turns

    text = "\n\nHuman:  What?\nAssistant: in a line of its own\n\nAssistant:\n\nHuman: So\n\nAssistant: Yes "
    turns = hh_turns(text)
    assert "".join(f"\n\n{speaker}:{raw}" for speaker, raw in turns) == text
    assert [speaker for speaker, _ in turns] == ["Human", "Assistant", "Human", "Assistant"]


def test_trl_takes_converted_rows_unchanged(tiny_tokenizer):
    from trl import maybe_apply_chat_template

    for row in ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, {"prompt": "Hi", "completion": "Yo"}):
        assert maybe_apply_chat_template(convert(row)[0], tiny_tokenizer) == row
    rendered = maybe_apply_chat_template(convert(HH)[0], tiny_tokenizer)
    assert "Hi" in rendered["prompt"]
    assert "Hello." in rendered["chosen"]
    assert "Go away." in rendered["rejected"]
