"""Loading gives an account of every record, stops or sets aside as asked, and is right on real data."""

import json

import pytest

from luthier import checks
from luthier.data.load import leaks, load, prompt_key
from luthier.data.spec import DataSpec
from luthier.errors import DataError

GOOD = {"prompt": "Hi", "completion": "Yo"}
BAD = {"prompt": "Hi", "completion": ""}


@pytest.fixture
def file(tmp_path):
    def write(*rows, name="a.jsonl"):
        path = tmp_path / name
        path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
        return path

    return write


def spec(path, **options):
    return DataSpec.model_validate({"path": str(path), **options})


def numbered(count, start=0):
    return [{"prompt": f"What is {n}?", "completion": str(n)} for n in range(start, start + count)]


def test_rows_carry_their_origin_and_the_report_what_was_seen(file):
    path = file(*numbered(3))
    with checks.collect() as lines:
        loaded = load(path)
    assert loaded.type == "prompt_completion"
    assert loaded.records[2] == {
        "prompt": "What is 2?",
        "completion": "2",
        "origin": {"file": str(path), "line": 3},
    }
    assert (loaded.report.read, loaded.report.rows, loaded.report.format) == (3, 3, "prompt_completion")
    assert {line.name for line in lines} == {"format", "bad records"}
    assert all(line.when == "data" for line in lines)


def test_strict_stops_at_file_and_line(file):
    with pytest.raises(DataError, match=r"a\.jsonl:2: 'completion' is empty \(E_EMPTY\)") as caught:
        load(file(GOOD, BAD))
    assert "quarantine" in caught.value.fix


def test_quarantine_sets_bad_records_aside_with_reasons(file, tmp_path):
    path = file(*numbered(8), BAD, "{broken\n", name="a.jsonl")
    loaded = load(spec(path, on_bad="quarantine", max_bad=0.3))
    assert loaded.report.rejected == {"E_EMPTY": 1, "E_JSON": 1}
    assert len(loaded) + sum(loaded.report.rejected.values()) == loaded.report.read == 10
    aside = [json.loads(line) for line in (tmp_path / "a.rejected.jsonl").read_text().splitlines()]
    assert [(item["line"], item["code"]) for item in aside] == [(9, "E_EMPTY"), (10, "E_JSON")]
    assert aside[0]["row"] == BAD
    assert aside[1]["row"] == "{broken"


class TestSkip:
    def prompts(self, loaded):
        return [int(row["completion"]) for row in loaded.records]

    def test_and_limit_part_a_file_in_two(self, file):
        path = file(*numbered(10))
        assert self.prompts(load(spec(path, limit=4))) == [0, 1, 2, 3]
        rest = load(spec(path, skip=4))
        assert self.prompts(rest) == [4, 5, 6, 7, 8, 9]
        assert rest.records[0]["origin"]["line"] == 5
        assert (rest.report.read, rest.report.skipped, rest.report.rows) == (10, 4, 6)
        assert "the first 4 are left out" in rest.report.line()
        assert self.prompts(load(spec(path, skip=4, limit=3))) == [4, 5, 6]

    def test_counts_good_records_as_limit_does(self, file):
        path = file(BAD, *numbered(3), BAD, *numbered(3), *numbered(2, start=3))
        aside = {"on_bad": "quarantine", "max_bad": 0.5}
        for duplicates, order in (("keep", [0, 1, 2, 0, 1, 2, 3, 4]), ("drop", [0, 1, 2, 3, 4])):
            options = aside | {"duplicates": duplicates}
            for n in range(1, len(order)):
                assert self.prompts(load(spec(path, limit=n, **options))) == order[:n]
                assert self.prompts(load(spec(path, skip=n, **options))) == order[n:]

    def test_of_rows_where_a_record_gives_several(self, file):
        row = {"instruction": "Add.", "instances": [{"input": str(n), "output": str(n)} for n in range(3)]}
        path = file(row | {"is_classification": False}, name="s.jsonl")
        assert self.prompts(load(spec(path, skip=1))) == [1, 2]

    def test_what_is_left_out_does_not_leak_and_what_is_left_may(self, file):
        path = file(*numbered(4), *numbered(1), *numbered(3, start=4))
        held_out = spec(path, limit=4)
        with pytest.raises(DataError, match=r"a\.jsonl:5: its prompt is in the evaluation data too"):
            load(spec(path, skip=4), eval_path=held_out)
        rest = load(spec(path, skip=4, duplicates="drop"), eval_path=held_out)
        assert (self.prompts(rest), rest.report.leaked) == ([4, 5, 6], 0)

    def test_that_leaves_nothing_is_refused(self, file):
        path = file(*numbered(5))
        with pytest.raises(DataError, match=r"is left: skip: 5 leaves out all of its 5 good") as caught:
            load(spec(path, skip=5))
        assert "smaller skip" in caught.value.fix
        with pytest.raises(DataError, match="skip: 400 leaves out all of its 5"):
            load(spec(path, skip=400))

    def test_of_a_data_set_of_the_hub(self, monkeypatch):
        import datasets

        found = datasets.Dataset.from_list(numbered(5))
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found)
        assert self.prompts(load(spec("owner/numbers", split="train", skip=2, limit=2))) == [2, 3]

    def test_is_no_negative_number(self):
        with pytest.raises(ValueError, match="greater than or equal to 0"):
            spec("a.jsonl", skip=-1)


def test_too_many_bad_records_stop_also_under_quarantine(file):
    with pytest.raises(DataError, match=r"1 of 4 records .* are bad \(1 E_EMPTY\), 25\.0% and more than 5%"):
        load(spec(file(*numbered(3), BAD), on_bad="quarantine"))
    with pytest.raises(DataError, match=r"No record of .* can be used"):
        load(spec(file(BAD), on_bad="quarantine", max_bad=1.0))


def test_counts_add_up_where_a_record_gives_no_row_or_several(file):
    def prm(reason):
        step = {
            "completions": [{"text": "a", "rating": 1}, {"text": "b", "rating": -1}],
            "chosen_completion": 0,
        }
        return {"question": {"problem": "P"}, "label": {"steps": [step], "finish_reason": reason}}

    report = load(file(prm("solution"), prm("give_up"))).report
    assert (report.read, report.rows, report.noted) == (2, 2, {"S_SKIP": 1})


def test_copies_are_counted_and_dropped_on_request(file):
    path = file(GOOD, GOOD, *numbered(2))
    assert (len(load(path)), load(path).report.duplicates) == (4, 1)
    dropped = load(spec(path, duplicates="drop"))
    assert (len(dropped), dropped.report.dropped) == (3, 1)


def test_limit_takes_the_first_good_rows(file):
    path = file(BAD, *numbered(5))
    found = load(spec(path, on_bad="quarantine", max_bad=0.5, limit=2))
    assert [row["prompt"] for row in found.records] == ["What is 0?", "What is 1?"]


def test_leakage_is_refused_kept_or_set_aside(file):
    held_out = file({"prompt": "what  is 1? ", "completion": "one"}, name="test.jsonl")
    path = file(*numbered(30), name="train.jsonl")
    with pytest.raises(
        DataError, match=r"train\.jsonl:2: its prompt is in the evaluation data too \(W_LEAK\)"
    ):
        load(path, eval_path=held_out)
    found = load(spec(path, on_bad="quarantine"), eval_path=held_out)
    assert (len(found), found.report.leaked, found.report.rejected) == (29, 1, {"W_LEAK": 1})
    kept = load(spec(path, allow_leakage=True), eval_path=held_out)
    assert (len(kept), kept.report.leaked) == (30, 1)
    assert leaks(kept.records, load(held_out).records) == [1]


def test_prompts_are_compared_without_case_and_spacing():
    user = {"role": "user", "content": "Hi  THERE"}
    reply = {"role": "assistant", "content": "x"}
    assert prompt_key({"messages": [user, reply]}) == prompt_key({"prompt": [user], "completion": [reply]})
    assert prompt_key({"text": "a", "text_pair": "b"}) != prompt_key({"text": "a", "text_pair": "c"})


def test_unused_columns_are_said(file):
    rows = [{"instruction": "Q", "input": "", "output": "A", "id": 7, "source": "web"}]
    report = load(file(*rows)).report
    assert report.unused == ["id", "source"]
    assert "id, source" in report.line()


def test_wrong_column_is_answered_with_the_nearest(file):
    with pytest.raises(DataError, match="no column 'promt'") as caught:
        load(spec(file(GOOD), columns={"prompt": "promt"}))
    assert "prompt" in caught.value.fix


def test_unknown_format_shows_the_row_and_the_mapping(file):
    with pytest.raises(DataError, match=r'The first row is \{"question": "Q", "reply": "A"\}') as caught:
        load(file({"question": "Q", "reply": "A"}))
    assert "columns: {prompt: question, completion: reply}" in str(caught.value)
    found = load(
        spec(file({"question": "Q", "reply": "A"}), columns={"prompt": "question", "completion": "reply"})
    )
    assert found.type == "prompt_completion"


def test_fingerprint_is_of_the_rows_alone(file):
    one, other = load(file(*numbered(2), name="a.jsonl")), load(file(*numbered(2), name="b.jsonl"))
    assert one.fingerprint == other.fingerprint
    assert one.fingerprint != load(file(*numbered(3), name="c.jsonl")).fingerprint


def test_spec_refuses_unknown_names():
    from pydantic import ValidationError

    for options in ({"format": "alpacca"}, {"columns": {"promt": "q"}}, {"on_bad": "ignore"}, {"colums": {}}):
        with pytest.raises(ValidationError):
            spec("x", **options)
    with pytest.raises(ValidationError, match="no data format is called 'alpacca'") as caught:
        spec("x", format="alpacca")
    assert "'alpaca'" in caught.value.errors()[0]["ctx"]["fix"]


def test_reading_data_imports_no_torch():
    import subprocess
    import sys

    code = "import sys, luthier.data.load; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestRealData:
    def test_gsm8k(self, shared_data):
        train = load(shared_data / "gsm8k_train.jsonl")
        assert (train.report.format, len(train)) == ("gsm8k", 7473)
        assert train.records[0]["gold"] == "72"
        test = load(shared_data / "gsm8k_test_socratic.jsonl")
        golds = [row["gold"] for row in test.records]
        assert (test.report.format, len(golds)) == ("gsm8k_socratic", 1319)
        assert sum(gold.startswith("-") for gold in golds) == 2
        assert not any("," in gold or "." in gold for gold in golds)
        assert sum(len(row["steps"]) for row in test.records) == 4821
        assert leaks(train.records, test.records) == []

    def test_hh_rlhf(self, shared_data, tmp_path):
        path = shared_data / "hh_rlhf_harmless_base_test.jsonl.gz"
        loaded = load(spec(path, on_bad="quarantine"), rejected_file=tmp_path / "rejected.jsonl")
        rejected = loaded.report.rejected
        assert (loaded.report.read, loaded.type) == (2312, "preference")
        assert (rejected["E_PREFIX"], rejected["E_EMPTY"]) == (5, 4)
        assert len(loaded) + sum(rejected.values()) == 2312

    def test_classification_without_header(self, shared_data):
        columns = {"text": "0", "label": "1"}
        train = load(spec(shared_data / "sst2_train.tsv", columns=columns))
        assert (len(train), train.type) == (6920, "classification")
        assert {row["label"] for row in train.records} == {"0", "1"}

    def test_alpaca_and_self_instruct(self, shared_data):
        assert load(shared_data / "addsub_test.json").records[0]["gold"] == "4"
        assert len(load(shared_data / "self_instruct_seed_tasks.jsonl")) >= 175
        with pytest.raises(DataError, match="record 176: 'output' is empty"):
            load(shared_data / "llm_adapters_math_train.json")
