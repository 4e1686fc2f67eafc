"""The ticket generator: records stand in their mails, and test mails share nothing with training mails."""

import json

import pytest

from luthier.data import tickets
from luthier.errors import DataError


def some(split, count=400, seed=0):
    return list(tickets.tickets(split, count, seed))


def test_the_same_seed_gives_the_same_files_and_more_rows_add_to_fewer(tmp_path):
    train, test = tickets.write(tmp_path / "a", seed=3, train=20, test=5)
    more, _ = tickets.write(tmp_path / "b", seed=3, train=30, test=5)
    other, _ = tickets.write(tmp_path / "c", seed=4, train=20, test=5)
    assert len(train.read_text().splitlines()) == 20
    assert len(test.read_text().splitlines()) == 5
    assert more.read_text().startswith(train.read_text())
    assert other.read_text() != train.read_text()


def test_train_and_test_share_no_template_no_mail_and_no_brand():
    train, test = some("train"), some("test")
    assert not {t.frames for t in train} & {t.frames for t in test}
    assert not {t.mail for t in train} & {t.mail for t in test}
    assert not set(tickets.brands("train")) & set(tickets.brands("test"))
    for ticket in test:
        assert not any(f"{brand} " in ticket.mail for brand in tickets.brands("train"))


@pytest.mark.parametrize("split", ["train", "test"])
def test_what_the_record_says_stands_in_the_mail(split):
    for ticket in some(split):
        record = ticket.record
        assert list(record) == list(tickets.FIELDS)
        assert record["category"] in tickets.CATEGORIES
        assert record["urgency"] in tickets.URGENCIES
        assert record["action"] in (*tickets.ACTIONS, None)
        for name in ("product", "order"):
            if record[name] is not None:
                assert record[name] in ticket.mail


def test_fields_are_absent_about_as_often_as_stated():
    found = some("train", 2000)
    for name in ("product", "order", "date", "action"):
        share = sum(t.record[name] is None for t in found) / len(found)
        assert abs(share - tickets.ABSENT[name]) < 0.05


def test_rows_are_chats_with_compact_json():
    (row,) = [ticket.row() for ticket in some("test", 1)]
    system, _, assistant = row["messages"]
    assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]
    assert system["content"] == tickets.INSTRUCTION
    answer = assistant["content"]
    assert json.dumps(json.loads(answer), separators=(",", ":"), ensure_ascii=False) == answer


def test_a_count_below_one_is_refused(tmp_path):
    with pytest.raises(DataError, match="at least one"):
        tickets.write(tmp_path, train=0)
