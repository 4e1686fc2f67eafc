"""Ids and masks equal a brute-force oracle for four families of templates; begin and end tokens, truncation
and class numbers are right; what would train on nothing is refused."""

import json

import pytest
import rendering
import tiny

from luthier import checks
from luthier.data.load import load
from luthier.data.spec import DataSpec
from luthier.data.tokenize import (
    encode,
    encode_classification,
    encode_pretrain,
    encode_seq2seq,
    gold,
    prompt_ids,
    prompt_text,
)
from luthier.errors import CheckError, DataError

EOS = tiny.IM_END


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path):
    def make(rows, **options):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load(DataSpec.model_validate({"path": str(path), **options}))

    return make


def columns(encoded):
    return list(zip(encoded.dataset["input_ids"], encoded.dataset["labels"], strict=True))


def chat(*turns):
    roles = ["user", "assistant"] * len(turns)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]}


class TestMask:
    @pytest.mark.parametrize("family", rendering.FAMILIES)
    @pytest.mark.parametrize("pad", ["own", "eos"])
    def test_equals_the_brute_force_oracle(self, data, family, pad):
        template, segments, system = rendering.FAMILIES[family]
        tokenizer = rendering.tokenizer(template, bos=True, pad=pad)
        dialogues = rendering.conversations(60, system=system)
        found = encode(data([{"messages": m} for m in dialogues]), tokenizer, max_length=None)
        for messages, (ids, labels) in zip(dialogues, columns(found), strict=True):
            assert (ids, labels) == rendering.oracle(tokenizer, segments(messages))
            assert ids == tokenizer.apply_chat_template(messages, return_dict=False), "template applied once"

    @pytest.mark.parametrize("family", rendering.FAMILIES)
    def test_last_turn_only(self, data, family):
        template, segments, system = rendering.FAMILIES[family]
        tokenizer = rendering.tokenizer(template, bos=True)
        dialogues = rendering.conversations(20, seed=1, system=system)
        for train_on in ("assistant_last", "completion"):
            found = encode(
                data([{"messages": m} for m in dialogues]), tokenizer, max_length=None, train_on=train_on
            )
            for messages, (ids, labels) in zip(dialogues, columns(found), strict=True):
                before = len(rendering.oracle(tokenizer, segments(messages[:-1]))[0])
                expected_ids, expected = rendering.oracle(tokenizer, segments(messages))
                assert ids == expected_ids
                assert labels == [-100] * before + expected[before:]

    def test_all_trains_everything_up_to_the_last_end_token(self, data):
        tokenizer = rendering.tokenizer(rendering.CHATML)
        [(ids, labels)] = columns(
            encode(data([chat("Hi", "Yo")]), tokenizer, max_length=None, train_on="all")
        )
        assert labels == [*ids[:-1], -100]
        assert ids[-2] == EOS

    def test_answer_that_begins_with_a_newline_is_cut_where_it_is_served(self, data):
        """'assistant\\n' + '\\nYes' would merge into one token that no served prompt contains."""
        tokenizer = rendering.tokenizer(rendering.CHATML)
        tokenizer.add_tokens(["\n\n"])
        messages = chat("Hi", "\nYes", "So", "\n\nNo")["messages"]
        [(ids, labels)] = columns(encode(data([{"messages": messages}]), tokenizer, max_length=None))
        assert (ids, labels) == rendering.oracle(tokenizer, rendering.chatml(messages))

    def test_weight_zero_is_context_only(self, data):
        tokenizer = rendering.tokenizer(rendering.CHATML)
        messages = chat("Hi", "wrong", "So", "right")["messages"]
        messages[1]["weight"] = 0
        [(_, labels)] = columns(encode(data([{"messages": messages}]), tokenizer, max_length=None))
        assert tokenizer.decode([t for t in labels if t >= 0]) == "right<|im_end|>"

    def test_completion_of_messages_is_trained_and_its_prompt_is_not(self, data):
        tokenizer = rendering.tokenizer(rendering.CHATML)
        messages = chat("Hi", "earlier", "So", "now")["messages"]
        rows = [{"prompt": messages[:3], "completion": messages[3:]}]
        [(_, labels)] = columns(encode(data(rows), tokenizer, max_length=None))
        assert tokenizer.decode([t for t in labels if t >= 0]) == "now<|im_end|>"

    def test_prompt_and_completion_are_a_chat_where_there_is_a_template(self, data):
        tokenizer = rendering.tokenizer(rendering.CHATML)
        rows = [{"prompt": " Hi ", "completion": " Yo"}]
        assert columns(encode(data(rows), tokenizer, max_length=None)) == columns(
            encode(data([chat("Hi", "Yo")]), tokenizer, max_length=None)
        )

    def test_template_that_rewrites_history_gives_an_example_a_turn(self, data):
        tokenizer = rendering.tokenizer(rendering.FORGETFUL)
        found = encode(data([chat("a", "b", "c", "d"), chat("e", "f")]), tokenizer, max_length=None)
        assert found.source == [0, 0, 1]
        assert found.report.split == 1

    def test_tokenizer_that_trims_offsets_gives_the_same_mask(self, data):
        from tokenizers import processors

        tokenizer = rendering.tokenizer(rendering.MISTRAL, bos=True)
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        dialogues = rendering.conversations(20, system=False)
        found = encode(data([{"messages": m} for m in dialogues]), tokenizer, max_length=None)
        for messages, pair in zip(dialogues, columns(found), strict=True):
            assert pair == rendering.oracle(tokenizer, rendering.mistral(messages))


class TestPlain:
    """Prompt and completion without template: joined verbatim, with begin and end tokens."""

    ROWS = (
        {"prompt": "Question: 1+1?\nAnswer:", "completion": " 2"},
        {"prompt": "Translate: ", "completion": "the box"},
        {"prompt": "Say:\n\n", "completion": "\n\nyes"},
    )

    @pytest.mark.parametrize("bos", [False, True])
    @pytest.mark.parametrize("pad", ["own", "eos"])
    def test_prompt_is_tokenised_as_it_is_served(self, data, bos, pad):
        tokenizer = rendering.tokenizer(rendering.CHATML, bos=bos, pad=pad)
        tokenizer.add_tokens(["\n\n\n", " the"])
        loaded = data(self.ROWS)
        found = encode(loaded, tokenizer, max_length=None, chat="off")
        for row, (ids, labels) in zip(self.ROWS, columns(found), strict=True):
            prompt = [tiny.BOS] * bos + tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
            answer = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], EOS]
            assert (ids, labels) == (prompt + answer, [-100] * len(prompt) + answer)
            assert prompt_ids(row, tokenizer, chat="off") == prompt

    def test_begin_token_is_never_doubled(self, data):
        tokenizer = rendering.tokenizer(rendering.LLAMA3, bos=True)
        texts = encode(data([{"text": "<s>once"}, {"text": "twice"}]), tokenizer, max_length=None)
        assert [ids.count(tiny.BOS) for ids, _ in columns(texts)] == [1, 1]
        chats = encode(data([chat("Hi", "Yo")]), tokenizer, max_length=None)
        assert [ids.count(tiny.BOS) for ids, _ in columns(chats)] == [1]
        plain = encode(data(self.ROWS[:1]), tokenizer, max_length=None, chat="off")
        assert [ids.count(tiny.BOS) for ids, _ in columns(plain)] == [1]

    def test_template_with_two_begin_tokens_is_refused(self, data):
        tokenizer = rendering.tokenizer("{{ bos_token }}" + rendering.LLAMA3, bos=True)
        with pytest.raises(CheckError, match="one beginning-of-text token"):
            encode(data([chat("Hi", "Yo")]), tokenizer, max_length=None)

    def test_text_is_trained_whole_and_ends(self, data):
        tokenizer = rendering.tokenizer(None, bos=True)
        [(ids, labels)] = columns(encode(data([{"text": "Once upon."}]), tokenizer, max_length=None))
        assert (
            ids == labels == [tiny.BOS, *tokenizer("Once upon.", add_special_tokens=False)["input_ids"], EOS]
        )

    def test_answer_without_end_token_is_refused(self, data):
        tokenizer = rendering.tokenizer(None)
        tokenizer.eos_token = None
        with pytest.raises(CheckError, match="end token trained"):
            encode(data([{"prompt": "Hi", "completion": "Yo"}]), tokenizer, max_length=None)

    def test_tokenizer_that_cannot_be_asked_in_parts_still_learns_the_whole_answer(self, data):
        """SentencePiece puts a space before every text: '▁box' holds the prompt's last space."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        vocabulary = {"<unk>": 0, "</s>": 1, "▁Say:": 2, "▁box": 3, "▁": 4}
        core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.Metaspace()
        core.decoder = decoders.Metaspace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
        with checks.collect() as lines:
            found = encode(data([{"prompt": "Say: ", "completion": "box"}]), tokenizer, max_length=None)
        assert columns(found) == [([2, 3, 1], [-100, 3, 1])]
        [line] = [line for line in lines if line.name == "prompts as served"]
        assert (line.passed, line.value, line.tolerance) == (False, 0, 1)


class TestServing:
    """The prompt of evaluation and chat is the beginning of the training example."""

    @pytest.mark.parametrize("family", rendering.FAMILIES)
    def test_prompt_ids_begin_the_training_example(self, data, family):
        template, _, system = rendering.FAMILIES[family]
        tokenizer = rendering.tokenizer(template, bos=True)
        dialogues = rendering.conversations(20, seed=2, system=system)
        loaded = data([{"messages": m} for m in dialogues])
        for row, (ids, labels) in zip(
            loaded.records, columns(encode(loaded, tokenizer, max_length=None)), strict=True
        ):
            prompt = prompt_ids(row, tokenizer)
            assert ids[: len(prompt)] == prompt
            assert labels[len(prompt) - 1] < 0 <= labels[len(prompt)]

    def test_prompt_text_and_gold_of_every_type(self):
        tokenizer = rendering.tokenizer(rendering.CHATML)
        messages = chat("Hi", "Yo ")["messages"]
        served = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        for row in (
            {"messages": messages},
            {"prompt": messages[:1], "completion": messages[1:]},
            {"prompt": "Hi", "completion": " Yo"},
        ):
            assert prompt_text(row, tokenizer) == served
            assert gold(row) == "Yo"
        assert prompt_text({"prompt": "Hi"}, tokenizer, chat="off") == "Hi"
        assert gold({"prompt": "Q", "completion": "1+1\n#### 2", "gold": "2"}) == "2"
        with pytest.raises(DataError, match="no reference answer"):
            gold({"prompt": "Hi", "origin": {}})
        with pytest.raises(DataError, match="no prompt"):
            prompt_text({"text": "Hi"}, tokenizer)


class TestTruncation:
    def rows(self):
        return [chat("Hi", "Yo")] * 99 + [chat("x" * 300, "Yo")]

    def test_lost_answers_are_refused_with_the_length_that_keeps_them(self, data):
        tokenizer = rendering.tokenizer(rendering.CHATML)
        rows = [chat("Hi", "Yo")] * 90 + [chat("x" * 100, "Yo")] * 10
        with pytest.raises(
            DataError, match=r"10 of 100 examples lose all .*data\.jsonl:91\. A length of"
        ) as caught:
            encode(data(rows), tokenizer, max_length=60)
        fit = int(caught.value.fix.split("max_length to ")[1].split(",")[0])
        assert encode(data(rows), tokenizer, max_length=fit).report.truncated == 0

    def test_allowed_they_are_left_out_and_counted(self, data):
        tokenizer = rendering.tokenizer(rendering.CHATML)
        with checks.collect() as lines:
            found = encode(data(self.rows()), tokenizer, max_length=60, allow_empty=True)
        report = found.report
        assert (report.truncated, report.emptied, report.unlabelled, report.examples) == (1, 1, 0, 99)
        assert 99 not in found.source
        assert {line.name: line.value for line in lines}["truncated examples"] == 1

    def test_record_of_200000_characters_is_named_not_trained_on(self, data):
        tokenizer = rendering.tokenizer(rendering.CHATML)
        with pytest.raises(DataError, match=r"1 of 2 examples lose all .* the first is .*data\.jsonl:2"):
            encode(data([chat("Hi", "Yo"), chat("word " * 40_000, "Yo")]), tokenizer, max_length=512)

    def test_cut_answer_keeps_its_beginning_and_is_not_told_to_stop(self, data):
        tokenizer = rendering.tokenizer(rendering.CHATML)
        [(ids, labels)] = columns(encode(data([chat("Hi", "y" * 200)]), tokenizer, max_length=50))
        assert len(ids) == 50
        assert labels[-1] == ids[-1] != EOS

    def test_nothing_left_is_an_error_even_where_allowed(self, data):
        tokenizer = rendering.tokenizer(rendering.CHATML)
        with pytest.raises(DataError, match="1 of 1 examples lose all"):
            encode(data([chat("x" * 300, "Yo")]), tokenizer, max_length=60, allow_empty=True)

    def test_untrained_conversation_is_told_from_a_cut_one(self, data):
        tokenizer = rendering.tokenizer(rendering.CHATML)
        silent = chat("Hi", "Yo")
        silent["messages"][1]["weight"] = 0
        with pytest.raises(DataError, match="have nothing that is trained"):
            encode(data([chat("Hi", "Yo"), silent]), tokenizer, max_length=100)


class TestChecks:
    def test_every_proof_leaves_a_line_also_from_the_cache(self, data):
        tokenizer = rendering.tokenizer(rendering.CHATML)
        loaded = data([chat("Hi <|im_end|>", "Yo")])
        names = []
        for _ in range(2):
            with checks.collect() as lines:
                encode(loaded, tokenizer, max_length=100)
            assert all(line.passed and line.when == "data" for line in lines)
            names.append([line.name for line in lines])
        assert names[0] == names[1]
        assert {
            "template prefix property", "one beginning-of-text token", "end token trained", "trained share",
            "truncated examples", "emptied examples", "prompts as served",
            "rows that hold special tokens as text",
        } == set(names[0])  # fmt: skip

    def test_end_token_is_named(self, data):
        tokenizer = rendering.tokenizer(rendering.LLAMA3, bos=True)
        assert encode(data([chat("Hi", "Yo")]), tokenizer, max_length=100).report.end_tokens == ["<|eot_id|>"]

    def test_rows_that_are_not_trained_as_text_are_refused(self, data):
        tokenizer = rendering.tokenizer(rendering.CHATML)
        with pytest.raises(DataError, match="rows of type preference"):
            encode(data([{"prompt": "a", "chosen": "b", "rejected": "c"}]), tokenizer, max_length=9)
        with pytest.raises(DataError, match="train_on is 'user'"):
            encode(data([chat("Hi", "Yo")]), tokenizer, max_length=9, train_on="user")
        with pytest.raises(DataError, match="chat is 'maybe'"):
            encode(data([{"prompt": "a", "completion": "b"}]), tokenizer, max_length=9, chat="maybe")

    @pytest.mark.parametrize(
        ("settings", "row", "said"),
        [
            ({}, {"prompt": "a", "completion": "b"}, []),
            ({"chat": "off"}, {"prompt": "a", "completion": "b"}, ["not used"]),
            ({"chat": "off"}, {"text": "a b"}, []),
            ({"options": {"deep": False}}, {"prompt": "a", "completion": "b"}, ["with deep=False"]),
        ],
    )
    def test_a_rendering_unlike_the_served_one_is_said(self, data, tiny_tokenizer, settings, row, said):
        with checks.collect() as lines:
            encode(data([row]), tiny_tokenizer, max_length=64, **settings)
        assert [line.value for line in lines if line.name == "chat template"] == said


class TestPretrain:
    def test_blocks_keep_every_token_and_never_mix_documents(self, data):
        tokenizer = rendering.tokenizer(None, bos=True)
        rows = [{"text": "Order 4711 arrived. " * n} for n in (1, 5, 20)]
        found = encode_pretrain(data(rows), tokenizer, max_length=32)
        joined = {index: [] for index in range(3)}
        for source, (ids, labels) in zip(found.source, columns(found), strict=True):
            assert ids == labels
            assert len(ids) <= 32
            joined[source] += ids
        for index, row in enumerate(rows):
            whole = [tiny.BOS, *tokenizer(row["text"], add_special_tokens=False)["input_ids"], EOS]
            # A last block of one token (which nothing predicts) is the only thing that may go.
            assert joined[index] in (whole, whole[:-1])
        with pytest.raises(DataError, match="takes text"):
            encode_pretrain(data([chat("Hi", "Yo")]), tokenizer, max_length=32)


class TestClassification:
    def test_names_numbers_and_lengths(self, data):
        tokenizer = tiny.tokenizer(bos=True)
        rows = [{"text": "good", "label": "pos"}, {"text": "bad " * 30, "label": "neg"}]
        found = encode_classification(data(rows), tokenizer, max_length=10)
        assert found.label_names == ["neg", "pos"]
        assert found.dataset["labels"][:] == [1, 0]
        assert found.dataset["input_ids"][0] == tokenizer("good")["input_ids"]
        assert len(found.dataset["input_ids"][1]) == 10
        assert found.report.truncated == 1

    def test_held_out_data_takes_the_numbers_of_training(self, data):
        tokenizer = tiny.tokenizer()
        train = encode_classification(
            data([{"text": "a", "label": n} for n in ("x", "y", "z")]), tokenizer, max_length=9
        )
        test = data([{"text": "a", "label": "z"}])
        found = encode_classification(test, tokenizer, max_length=9, labels=train.label_names)
        assert found.dataset["labels"][:] == [2]
        with pytest.raises(DataError, match=r"data\.jsonl:1: label 'zz' is none of the 3 classes"):
            encode_classification(
                data([{"text": "a", "label": "zz"}]), tokenizer, max_length=9, labels=train.label_names
            )

    @pytest.mark.parametrize(
        ("labels", "names", "numbers"),
        [
            ([0, 2], ["0", "1", "2"], [0, 2]),
            ([-1, 1], ["-1", "1"], [0, 1]),
            (["10", "9", "0"], [str(n) for n in range(11)], [10, 9, 0]),
            ([True, False], ["false", "true"], [1, 0]),
            ([1, 5], ["1", "5"], [0, 1]),
        ],
    )
    def test_kinds_of_labels(self, data, labels, names, numbers):
        rows = [{"text": "a", "label": label} for label in labels]
        found = encode_classification(data(rows), tiny.tokenizer(), max_length=9)
        assert (found.label_names, found.dataset["labels"][:]) == (names, numbers)

    def test_named_classes_for_numbers(self, data):
        loaded = data([{"text": "a", "label": 1}, {"text": "b", "label": 0}], labels=["neg", "pos"])
        found = encode_classification(loaded, tiny.tokenizer(), max_length=9)
        assert (found.label_names, found.dataset["labels"][:]) == (["neg", "pos"], [1, 0])

    def test_one_class_is_refused(self, data):
        with pytest.raises(DataError, match="one class only"):
            encode_classification(data([{"text": "a", "label": "x"}]), tiny.tokenizer(), max_length=9)

    def test_pairs(self, data):
        loaded = data([{"premise": "a", "hypothesis": "b", "label": n} for n in (0, 1)])
        plain = tiny.tokenizer()
        found = encode_classification(loaded, plain, max_length=9)
        assert plain.decode(found.dataset["input_ids"][0]) == "a\nb"
        paired = tiny.tokenizer()
        paired.sep_token = "<|endoftext|>"
        expected = paired("a", "b")["input_ids"]
        assert encode_classification(loaded, paired, max_length=9).dataset["input_ids"][0] == expected


class TestSeq2seq:
    def test_target_ends_once_and_loses_its_end_where_cut(self, data):
        tokenizer = tiny.tokenizer(template=None)
        rows = [{"prompt": "Hi", "completion": "Yo"}, {"prompt": "Hi " * 40, "completion": "no " * 40}]
        found = encode_seq2seq(data(rows), tokenizer, max_length=20, max_target_length=10)
        (source, target), (long_source, long_target) = columns(found)
        assert source == tokenizer("Hi")["input_ids"]
        assert target == [*tokenizer("Yo")["input_ids"], EOS]
        assert (len(long_source), len(long_target)) == (20, 10)
        assert EOS not in long_target
        assert found.report.truncated == 1

    def test_batch_runs_through_a_model(self, data, tiny_t5):
        from luthier.data.packing import PaddedCollator

        rows = [{"prompt": "Hi", "completion": "Yo"}, {"prompt": "a b c", "completion": "d e f"}]
        found = encode_seq2seq(data(rows), tiny.tokenizer(template=None), max_length=20)
        batch = PaddedCollator(tiny.PAD)([found.dataset[0], found.dataset[1]])
        assert tiny_t5(**batch).loss.isfinite()
