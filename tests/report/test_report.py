"""The page is one file that needs nothing else, says what the files say, and bears whatever is missing."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import made_runs
import pytest

import luthier.report
from luthier.errors import DataError
from luthier.report.report import write_comparison, write_report

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Collects elements and text, and refuses tags that are not closed in order."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []  # a cell of a table ends in a space
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.texts.append(" " if tag in ("td", "th") else "")

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def run(tmp_path):
    return made_runs.finished_run(tmp_path / "tickets")


@pytest.fixture
def compared(tmp_path):
    return made_runs.comparison(tmp_path / "tickets-compare")


@pytest.mark.parametrize("make", ["run", "compared"])
class TestOneFile:
    def written(self, make, request) -> Path:
        folder = request.getfixturevalue(make)
        return write_report(folder) if make == "run" else write_comparison(folder)

    def test_nothing_is_fetched(self, make, request):
        html = self.written(make, request).read_text()
        assert not re.search(r"https?://|@import|url\(", html)
        page = Page(html)
        for _, attributes in page.elements:
            for name in ("src", "href"):
                target = attributes.get(name) or "#"
                assert target.startswith(("#", "data:")), target

    def test_headings_are_a_tree_and_each_figure_says_what_it_shows(self, make, request):
        page = read(self.written(make, request))
        levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
        assert levels.count(1) == 1
        assert levels[0] == 1
        assert all(after - before <= 2 for before, after in pairwise(levels))
        svgs = [attributes for tag, attributes in page.elements if tag == "svg"]
        assert svgs
        assert all(a.get("role") == "img" and a.get("aria-label") for a in svgs)

    def test_links_inside_the_page_lead_somewhere(self, make, request):
        page = read(self.written(make, request))
        ids = {a["id"] for _, a in page.elements if "id" in a}
        links = {
            a["href"][1:] for tag, a in page.elements if tag == "a" and (a["href"] or "").startswith("#")
        }
        assert links <= ids

    def test_writing_again_replaces_it_and_leaves_no_draft(self, make, request):
        page = self.written(make, request)
        self.written(make, request)
        assert [p.name for p in page.parent.glob("*report*")] == ["report.html"]


class TestRun:
    def test_the_result_comes_first_with_intervals_and_what_the_number_means(self, run):
        text = read(write_report(run)).text
        assert text.index("1.5%") < text.index("86.5%") < text.index("All 9 proofs hold")
        assert "81.8 – 91.2%" in text
        assert "Share of answers that equal the reference answer." in text
        assert "85.0 points higher; the intervals lie apart." in text

    def test_overlapping_intervals_are_called_chance(self, run):
        manifest = made_runs.after() | {"metrics": {"exact_match": made_runs.metric(0.02, 0.02)}}
        made_runs.write(run / "03-after" / "manifest.json", manifest)
        assert (
            "0.5 points higher, but the intervals overlap: it may be chance." in read(write_report(run)).text
        )

    def test_a_lower_perplexity_is_good_and_a_lower_share_is_bad(self, run):
        html = write_report(run).read_text()
        assert '<p class="verdict good">87% lower' in html
        manifest = made_runs.before() | {"metrics": {"exact_match": made_runs.metric(0.99, 0.005)}}
        made_runs.write(run / "01-before" / "manifest.json", manifest)
        assert '<p class="verdict bad">12.5 points lower' in write_report(run).read_text()

    def test_failed_checks_come_first(self, run):
        manifest = made_runs.tune()
        manifest["checks"].append(made_runs.check("merge", "merged equals unmerged", False, 0.4, 1e-5))
        made_runs.write(run / "02-tune" / "manifest.json", manifest)
        text = read(write_report(run)).text
        assert "1 of 10 proofs failed" in text
        assert text.index("merged equals unmerged") < text.index("end token trained")
        assert re.search(r"merged equals unmerged ?: 0.400, held to 1e-5", text)

    def test_every_check_shows_its_number_and_tolerance(self, run):
        html = write_report(run).read_text()
        for check in [*made_runs.tune()["checks"], *made_runs.after()["checks"]]:
            assert check["name"] in html
        assert re.search(
            r"peak memory against estimate</th><td class=\"num\">1.08</td><td class=\"num\">1.30<", html
        )

    def test_estimates_stand_beside_measurements(self, run):
        text = read(write_report(run)).text
        assert "2.08 GB 1.93 GB +8%" in text
        assert "4.88M 4.88M exact" in text
        assert "weights 538 MB, adapter 19.5 MB, activations 900 MB" in text

    def test_what_was_not_asked_for_is_in_the_table_but_no_headline(self, run):
        manifest = made_runs.after()
        manifest["metrics"]["ended"] = made_runs.metric(0.99, 0.01)
        made_runs.write(run / "03-after" / "manifest.json", manifest)
        assert read(write_report(run)).text.count("Ended by itself") == 1

    def test_it_says_how_to_reproduce(self, run):
        text = read(write_report(run)).text
        assert "pip install luthier==0.1.0 torch==2.13.0" in text
        assert "luthier run recipes/quickstart.yaml" in text
        assert "learning_rate: 0.001" in text

    def test_the_reason_of_the_precision_is_said_once_or_for_each_stage_that_differs(self, run):
        assert read(write_report(run)).text.count("float32 (no fast bf16 here) on cpu") == 1
        manifest = made_runs.tune()
        manifest["details"]["placement"]["reason"] = "float32 (the weights learn) on cpu"
        made_runs.write(run / "02-tune" / "manifest.json", manifest)
        text = read(write_report(run)).text
        assert re.search(r"Precision in 01-before, 03-after ?float32 \(no fast bf16 here\)", text)
        assert re.search(r"Precision in 02-tune ?float32 \(the weights learn\) on cpu", text)

    def test_it_says_what_became_of_the_data(self, run):
        fault = {"where": "train.jsonl:7", "code": "E_EMPTY", "reason": "its answer is <empty>"}
        account = {
            "type": "messages", "format": "chatml", "read": 1500, "rows": 1490, "duplicates": 6, "dropped": 6,
            "rejected": {"E_EMPTY": 4}, "faults": [fault], "rejected_file": "02-tune/rejected.jsonl",
            "noted": {}, "leaked": 0, "unused": ["id"],
            "encoding": {"examples": 1490, "tokens": 200000, "trained": 50000, "truncated": 3, "emptied": 0,
                         "max_length": 512, "length_50": 120, "length_99": 300, "longest": 700},
        }  # fmt: skip
        manifest = made_runs.tune()
        manifest["details"]["data"] = account
        made_runs.write(run / "02-tune" / "manifest.json", manifest)
        seen = {"type": "messages", "format": "chatml", "read": 200, "rows": 200}
        for name, made in (("01-before", made_runs.before()), ("03-after", made_runs.after())):
            made["details"]["data"] = seen
            made_runs.write(run / name / "manifest.json", made)
        text = read(write_report(run)).text
        for words in (
            "data/tickets/train.jsonl trained on02-tune",
            "1490 of messages, from 1500 records",
            "4 E_EMPTY",
            "6, of which 6 left out",
            "1490 of 200,000 tokens, 25.0% trained",
            "3 examples, cut at 512",
            "02-tune/rejected.jsonl",
            "train.jsonl:7 E_EMPTY its answer is <empty>",
            "data/tickets/test.jsonl evaluated01-before, 03-after",
        ):
            assert words in text
        assert "data.read" not in text

    def test_text_of_the_data_is_escaped(self, run):
        html = write_report(run).read_text()
        assert "<b>Please</b>" not in html
        assert "&lt;b&gt;Please&lt;/b&gt;" in html

    def test_numbers_that_are_not_finite_do_not_stop_it(self, run):
        manifest = made_runs.tune()
        manifest["history"][20]["loss"] = float("nan")
        made_runs.write(run / "02-tune" / "manifest.json", manifest)
        broken = made_runs.after() | {
            "metrics": {"perplexity": {"value": float("inf"), "low": 1.0, "high": float("inf")}}
        }
        made_runs.write(run / "03-after" / "manifest.json", broken)
        text = read(write_report(run)).text
        assert "The training loss was not finite at step 21" in text


class TestMissingParts:
    def test_a_run_at_work_shows_the_curve_of_its_last_checkpoint(self, run):
        (run / "02-tune").rename(run / "02-tune.partial")
        (run / "02-tune.partial" / "manifest.json").unlink()
        shutil.rmtree(run / "03-after")
        for step in (9, 100):
            state = run / f"02-tune.partial/checkpoints/checkpoint-{step}/trainer_state.json"
            made_runs.write(state, {"log_history": made_runs.history(step)})
        made_runs.change_record(
            run, {"02-tune": "running", "03-after": "pending"}, status="running", finished=None
        )
        page = read(write_report(run))
        assert "The run is still at work." in page.text
        assert "Measured before tuning; the evaluation after it has not ended." in page.text
        hover = next(
            json.loads(a["data-hover"]) for tag, a in page.elements if tag == "svg" and "data-hover" in a
        )
        assert hover[0]["points"][-1][2] == 100

    def test_a_failed_stage_shows_its_error_and_the_checks_made_so_far(self, run):
        shutil.rmtree(run / "02-tune")
        shutil.rmtree(run / "03-after")
        made_runs.change_record(
            run,
            {"02-tune": "failed", "03-after": "pending"},
            status="failed",
            error="The loss is not finite at step 3.",
        )
        record = json.loads((run / "run.json").read_text())
        record["stages"][1]["checks"] = [made_runs.check("before", "target patterns matched", value=7)]
        made_runs.write(run / "run.json", record)
        text = read(write_report(run)).text
        assert "The run failed in 02-tune. The loss is not finite at step 3." in text
        assert "02-tune starts again from its beginning." in text
        assert "target patterns matched" in text
        assert "tune failed" in text

    @pytest.mark.parametrize("status", ["failed", "interrupted"])
    def test_a_stopped_run_says_what_is_kept_and_how_to_go_on(self, run, status):
        (run / "02-tune").rename(run / "02-tune.partial")
        shutil.rmtree(run / "03-after")
        made_runs.write(
            run / "02-tune.partial/checkpoints/checkpoint-40/trainer_state.json",
            {"log_history": made_runs.history(40)},
        )
        made_runs.change_record(
            run,
            {"02-tune": status, "03-after": "pending"},
            status=status,
            error="The loss exploded.",
            command="luthier run tickets.yaml --force seed=1 --from 1",
        )
        text = read(write_report(run)).text
        where = "The run failed in 02-tune." if status == "failed" else "Interrupted in 02-tune."
        assert f"{where} The loss exploded. Done and kept: 01-before." in text
        assert "02-tune goes on from its checkpoint at step 40" in text
        assert "goes on from there: luthier run tickets.yaml seed=1 " in text

    def test_nothing_but_the_recipe(self, tmp_path):
        made_runs.write(tmp_path / "run.json", {"status": "running", "recipe": made_runs.recipe()})
        assert "there is no result to show yet" in read(write_report(tmp_path)).text

    def test_an_evaluation_alone_claims_no_change(self, run):
        shutil.rmtree(run / "01-before")
        assert "There is no evaluation before" in read(write_report(run)).text

    def test_stages_without_run_json(self, run):
        (run / "run.json").unlink()
        assert "86.5%" in read(write_report(run)).text

    @pytest.mark.parametrize(
        "name", ["inputs", "versions", "checks", "history", "details", "seconds", "metrics"]
    )
    def test_any_field_may_be_missing(self, run, name):
        for stage in ("01-before", "02-tune", "03-after"):
            path = run / stage / "manifest.json"
            record = json.loads(path.read_text())
            del record[name]
            made_runs.write(path, record)
        read(write_report(run))

    def test_a_half_written_file_counts_as_missing(self, run):
        (run / "02-tune" / "manifest.json").write_text('{"stage": "tu')
        with (run / "03-after" / "predictions.jsonl").open("a") as file:
            file.write('{"index": 60, "pro')
        assert "86.5%" in read(write_report(run)).text

    def test_a_folder_that_is_no_run_is_refused(self, tmp_path):
        with pytest.raises(DataError, match="not a run folder"):
            write_report(tmp_path)
        with pytest.raises(DataError, match="not a comparison folder"):
            write_comparison(tmp_path)


def test_the_command_tells_a_run_from_a_comparison_and_loads_no_torch(run, compared):
    code = (
        "import sys; from luthier.cli.main import app\n"
        "sys.argv = ['luthier', 'report', sys.argv[1]]\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    for folder, word in ((run, "Run report"), (compared, "Comparison")):
        done = subprocess.run(
            [sys.executable, "-c", code, folder], capture_output=True, text=True, check=True
        )
        assert Path(done.stdout.strip()) == folder / "report.html"
        assert word in (folder / "report.html").read_text()


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(scheme):
    """WCAG 2.2, 1.4.3: at least 4.5 between text and its ground."""
    style = (Path(luthier.report.__file__).parent / "templates" / "style.css").read_text()
    block = re.findall(r":root \{(.*?)\}", style, re.S)[scheme]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    grounds = {"bg", "surface", "raised"}
    pairs = [(text, ground) for text in ("text", "muted", "accent", "second") for ground in grounds]
    pairs += [(text, ground) for text in ("good", "bad", "warn") for ground in ("raised", f"{text}-soft")]
    pairs += [("text", "bad-soft"), ("text", "warn-soft"), ("muted", "bad-soft"), ("accent", "accent-soft")]
    pairs += [("text", "heat")]
    for text, ground in pairs:
        light, dark = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)
