"""Every container gives the same records, each with its line; what cannot be read is told with its place."""

import gzip
import json

import pytest

from luthier.data.reading import read
from luthier.data.spec import DataSpec
from luthier.errors import DataError

ROWS = [{"prompt": "Was ist 1+1? ä→", "completion": "2"}, {"prompt": 'say "hi",\nnow', "completion": "hi"}]


def raws(path, **spec):
    return list(read(DataSpec.model_validate({"path": str(path), **spec})))


def rows(path, **spec):
    return [raw.row for raw in raws(path, **spec)]


def write(path, text, **how):
    path.write_text(text, encoding="utf-8", **how)
    return path


def jsonl(values):
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def test_all_containers_give_the_same_rows(tmp_path):
    import csv

    import pyarrow as pa
    import pyarrow.parquet as pq

    write(tmp_path / "a.jsonl", jsonl(ROWS))
    write(tmp_path / "bom.jsonl", "\ufeff" + jsonl(ROWS))
    write(tmp_path / "a.json", json.dumps(ROWS))
    write(tmp_path / "data.json", json.dumps({"data": ROWS}))
    write(tmp_path / "lines.json", jsonl(ROWS))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(ROWS).encode()))
    for name, delimiter in (("a.csv", ","), ("b.csv", ";")):
        with open(tmp_path / name, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for path in tmp_path.iterdir():
        assert rows(path) == ROWS, path.name


def test_records_know_their_line(tmp_path):
    found = raws(write(tmp_path / "a.jsonl", '{"text": "a"}\n\n{"text": "b"}\n'))
    assert [raw.line for raw in found] == [1, 3]
    assert found[1].where.endswith("a.jsonl:3")
    found = raws(write(tmp_path / "a.csv", 'prompt,completion\n"two\nlines",x\ny,z\n'))
    assert [raw.line for raw in found] == [2, 4]


def test_unreadable_lines_are_told_apart(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "b\xff"}\nnot json\n{"text": "c')
    faults = [raw.fault for raw in raws(path)]
    assert faults[0] is None
    assert faults[1][0] == "E_UTF8"
    assert "0xff" in faults[1][1]
    assert faults[2][0] == "E_JSON"
    assert "not JSON" in faults[2][1]
    assert faults[3][0] == "E_JSON"
    assert "torn" in faults[3][1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b" \n\n", "is empty"),
        ("a.json", b'[{"a": 1},\n{"a"', "a.json:2 is not JSON"),
        ("a.txt", b"fine\nbroken \xff", "a.txt:2: byte 12 .* not UTF-8"),
        ("a.csv", "a,b\nä".encode("latin-1"), "a.csv:2: .* not UTF-8"),
        ("a.csv", "a,b\n".encode("utf-16"), "UTF-16"),
        ("a.jsonl.gz", b"no gzip", "cannot be read"),
        ("a.parquet", b"no parquet", "not a whole Parquet file"),
        ("a.pdf", b"x", "suffix of no kind of data file"),
    ],
)
def test_unreadable_file_is_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        raws(tmp_path / name)


def test_header_that_names_a_column_twice(tmp_path):
    with pytest.raises(DataError, match="names a column twice"):
        raws(write(tmp_path / "a.csv", "a,a\n1,2\n"), header=True)


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "tickets_train.jsonl", jsonl(ROWS))
    with pytest.raises(DataError, match=r"tickets_train\.jsonl"):
        raws(tmp_path / "ticket_train.jsonl")
    with pytest.raises(DataError, match="does not exist either"):
        raws(tmp_path / "no" / "such.jsonl")


def test_name_without_file_and_network_is_no_hub_data_set():
    with pytest.raises(DataError, match="no file or folder 'nobody/nothing-here' here, and as a data set"):
        raws("nobody/nothing-here")


def test_relative_path_is_found_in_the_recipes_folder(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", jsonl(ROWS))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    spec = DataSpec(path="a.jsonl")
    with pytest.raises(DataError):
        list(read(spec))
    spec.base = tmp_path
    assert [raw.row for raw in read(spec)] == ROWS
    assert "base" not in spec.model_dump()


def test_cells_that_do_not_fit_the_header_are_faults(tmp_path):
    found = raws(write(tmp_path / "a.csv", "a,b\n1,2,3\n4,5\n"))
    assert found[0].fault[0] == "E_KEYS"
    assert found[1].row == {"a": "4", "b": "5"}


def test_file_without_header_is_not_robbed_of_its_first_row(tmp_path):
    path = write(tmp_path / "a.tsv", 'a film that "works\t1\n"quoted"\t0\n')
    assert rows(path) == [{"0": 'a film that "works', "1": "1"}, {"0": "quoted", "1": "0"}]
    path = write(tmp_path / "b.tsv", "text\tlabel\ngood\tpos\n")
    assert rows(path) == [{"text": "good", "label": "pos"}]
    assert rows(path, header=False)[0] == {"0": "text", "1": "label"}


def test_plain_text_by_file_paragraph_line_and_separator(tmp_path):
    path = write(tmp_path / "a.txt", "One.\r\nTwo.\n\n \nThree.\n")
    assert rows(path) == [{"text": "One.\nTwo.\n\n \nThree.\n"}]
    assert [raw.row["text"] for raw in raws(path, rows="paragraph")] == ["One.\nTwo.", "Three."]
    assert [raw.line for raw in raws(path, rows="paragraph")] == [1, 5]
    assert [row["text"] for row in rows(path, rows="line")] == ["One.", "Two.", "Three."]
    path = write(tmp_path / "b.txt", "name : X||X is a pub.\nno separator\n")
    found = raws(path, separator="||")
    assert found[0].row == {"prompt": "name : X", "completion": "X is a pub."}
    assert found[1].fault[0] == "E_KEYS"


def test_folder_reads_its_files_but_never_train_and_test_together(tmp_path):
    write(tmp_path / "a.jsonl", jsonl(ROWS[:1]))
    write(tmp_path / "b.jsonl", jsonl(ROWS[1:]))
    write(tmp_path / "a.rejected.jsonl", jsonl([{"line": 1}]))
    write(tmp_path / "notes.md", "not data")
    assert rows(tmp_path) == ROWS
    write(tmp_path / "train.jsonl", jsonl(ROWS))
    write(tmp_path / "test.jsonl", jsonl(ROWS[:1]))
    with pytest.raises(DataError, match=r"both train.jsonl and test.jsonl"):
        raws(tmp_path)
    assert rows(tmp_path, split="test") == ROWS[:1]
    with pytest.raises(DataError, match="split 'dev'"):
        raws(tmp_path, split="dev")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data file"):
        raws(tmp_path / "empty")


def test_folder_that_datasets_saved(tmp_path):
    from datasets import Dataset

    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert rows(tmp_path / "saved") == ROWS


def test_record_of_200000_characters_is_read(tmp_path):
    long = "x" * 200_000
    assert rows(write(tmp_path / "a.csv", f"prompt,completion\n{long},y\n"))[0]["prompt"] == long
    assert rows(write(tmp_path / "a.jsonl", jsonl([{"text": long}])))[0]["text"] == long
