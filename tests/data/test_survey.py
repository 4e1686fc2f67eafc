"""The survey finds what is planted: bad records, copies, leaks, lengths, answers that a cut would lose."""

import json

import rendering

from luthier.data.spec import DataSpec
from luthier.data.survey import histogram, survey


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSpec(path=str(path))


def row(n, prompt=None):
    return {"prompt": prompt or f"What is {n}?", "completion": str(n)}


def test_planted_faults_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    train = write(tmp_path / "train.jsonl", [row(1), row(1), row(2), {"prompt": "x"}, row(3, "y" * 300)])
    test = write(tmp_path / "test.jsonl", [row(2)])
    found = survey(
        train,
        eval_spec=test,
        tokenizer=rendering.tokenizer(rendering.CHATML),
        max_length=64,
        rejected_file=tmp_path / "rejected.jsonl",
    )
    report = found.loaded.report
    assert (report.read, report.rows, report.rejected) == (5, 4, {"E_KEYS": 1})
    assert (report.duplicates, report.leaked) == (1, 1)
    assert (found.unit, len(found.lengths), found.truncated, found.emptied) == ("tokens", 4, 1, 1)
    assert found.empty_labels == [f"{tmp_path}/train.jsonl:5"]
    assert found.faulty


def test_clean_data_are_not_faulty_and_other_types_are_measured_in_characters(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "ab", "chosen": "cde", "rejected": "f"}])
    clean = survey(path, rejected_file=tmp_path / "rejected.jsonl")
    assert not clean.faulty
    assert (clean.unit, clean.lengths) == ("characters", [6])


def test_histogram_counts_every_length_once():
    bins = histogram([1, 8, 9, 16, 64, 64], bins=8)
    assert bins[0] == (1, 8, 2)
    assert bins[1] == (9, 16, 2)
    assert bins[-1] == (57, 64, 2)
    assert sum(count for _, _, count in histogram([1] * 5)) == 5
