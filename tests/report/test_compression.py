"""The page of a run that compresses says what each layer has become: in words, in maps and in a table."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import made_runs
import pytest

import luthier
from luthier.report import charts, compression, wording
from luthier.report.comparison import label_of, read_settings
from luthier.report.read import read_run
from luthier.report.report import write_comparison, write_report

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
DATA = {"type": "text", "format": "text", "read": 1, "rows": 1, "files": ["plays.txt"]}
CALIBRATION = {"data": {"path": "plays.txt", "format": "auto"}, "samples": 64, "max_length": 256}


def record(name: str, **changes) -> dict:
    empty = {"bits": None, "sparsity": None, "seconds": 0.5, "note": ""}
    return {"name": name, "before": 0.02, "after": 0.01} | empty | changes


def layers(blocks: int = 4, **changes) -> list[dict]:
    """A record of each kind in each block; `down_proj` has the most bits, and errors grow with depth."""
    return [
        record(f"model.layers.{b}.{k}", bits=8 if "down" in k else 3, after=0.001 * (b + 1)) | changes
        for b in range(blocks)
        for k in KINDS
    ]


def write_run(folder, records, methods=({"name": "gptq", "bits": 3},), calibration=CALIBRATION, **details):
    """A run of one compress stage."""
    config = {"method": list(methods), "calibration": calibration}
    made = made_runs.manifest("compress", "compress", config)
    made["details"] |= {"layers": records, "bytes_before": 538_000_000} | details
    if calibration:
        made["details"] |= {"data": DATA, "calibration_tokens": 16384}
    made["artefacts"] = {
        "model/model.safetensors": {"bytes": 134_500_000},
        "model/config.json": {"bytes": 900},
    }
    made_runs.write(folder / "01-compress" / "manifest.json", made)
    status = {"folder": "01-compress", "kind": "compress", "name": "compress", "status": "done"}
    recipe = made_runs.recipe({"compress": config})
    made_runs.write(
        folder / "run.json", {"name": "small", "status": "done", "recipe": recipe, "stages": [status]}
    )
    return folder


class Page(HTMLParser):
    """Text of the page, its maps as {title: {title of a cell: strength}}, and the rows of its last table."""

    def __init__(self, folder):
        super().__init__()
        self.maps: dict[str, dict[str, str]] = {}
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.map = self.look = self.inside = ""
        self.feed(write_report(folder).read_text())

    def handle_starttag(self, tag, attrs):
        known = dict(attrs)
        if tag == "svg":
            self.map = known["aria-label"]
            self.maps[self.map] = {}
        if tag == "rect":
            self.look = known.get("fill-opacity") or known["class"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.inside = tag

    def handle_data(self, data):
        if self.inside == "title" and self.map and data.startswith("block "):
            self.maps[self.map][data] = self.look
        if self.rows and self.rows[-1] and self.inside in ("td", "th", "button"):
            self.rows[-1][-1] += data.strip()
        if self.inside not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def map_of(self, title: str) -> dict[str, str]:
        return next(cells for name, cells in self.maps.items() if name.startswith(title))

    def table(self) -> dict[str, dict[str, str]]:
        """{part: {column: text}} of the table of all parts."""
        heads = next(row for row in self.rows if row and row[0] == "Part")
        rows = self.rows[self.rows.index(heads) + 1 :]
        return {
            row[0]: dict(zip(heads, row, strict=True))
            for row in rows
            if len(row) == len(heads) and "." in row[0]
        }


def test_the_stage_is_told_with_each_method_its_paper_and_both_sizes(tmp_path):
    methods = [{"name": "smoothquant", "alpha": 0.5}, {"name": "gptq", "bits": 8}]
    text = Page(write_run(tmp_path, layers(), methods)).text
    assert "compressed with smoothquant and gptq" in text
    for name in ("smoothquant", "gptq"):
        method = luthier.method(name)
        assert method.title in text
        assert method.paper in text.replace("“", '"')
    assert "538 MB → 134 MB, 25% of what they took" in text
    assert "method.1.bits" in text
    assert "layers.0" not in text.split("Compression")[0]


def test_a_method_that_is_not_known_here_has_its_name(tmp_path):
    assert "my_own" in Page(write_run(tmp_path, layers(), [{"name": "my_own"}])).text


def test_the_data_of_calibration_have_an_account(tmp_path):
    text = Page(write_run(tmp_path, layers())).text
    assert re.search(r"plays\.txt +calibrated on +01-compress", text)
    assert re.search(r"Calibration +16384 tokens, in at most 64 windows of up to 256", text)
    assert "calibration_tokens" not in text


def test_maps_lay_blocks_across_and_kinds_down_and_more_is_stronger(tmp_path):
    page = Page(write_run(tmp_path, layers()))
    bits, errors = page.map_of("Bits of a weight"), page.map_of("Error of the output")
    assert len(bits) == len(errors) == 12
    assert float(bits["block 2, down_proj: 8"]) > float(bits["block 2, q_proj: 3"])
    strength = [float(errors[f"block {b}, q_proj: {0.001 * (b + 1):.4f}"]) for b in range(4)]
    assert all(weaker < stronger for weaker, stronger in pairwise(strength))
    assert any("0.0010 to 0.0040, the most in block 3" in title for title in page.maps)


def test_every_value_stands_in_the_table(tmp_path):
    found = Page(write_run(tmp_path, layers())).table()
    assert len(found) == 12
    row = found["model.layers.3.mlp.down_proj"]
    assert (row["Bits"], row["Error"], row["Error of plain rounding or masking"]) == ("8", "0.0040", "0.020")


def test_what_is_the_same_everywhere_is_said_in_words_and_not_drawn(tmp_path):
    page = Page(write_run(tmp_path, layers(bits=4)))
    assert not any(title.startswith("Bits") for title in page.maps)
    assert re.search(r"Bits of a weight +4 in all 12", page.text)


def test_of_several_methods_the_last_state_is_shown_and_all_errors_listed(tmp_path):
    pruned = layers(bits=None, sparsity=0.5, after=0.1)
    rounded = layers(after=0.002)[1:]  # one layer is only pruned
    page = Page(write_run(tmp_path, [*pruned, *rounded], [{"name": "sparsegpt"}, {"name": "gptq"}]))
    found = page.table()
    assert len(found) == 12
    assert found["model.layers.1.self_attn.q_proj"]["Sparsity"] == "50.0%"
    assert found["model.layers.1.self_attn.q_proj"]["Error, method by method"] == "0.10, 0.0020"
    assert found["model.layers.0.self_attn.q_proj"]["Bits"] == "–"
    assert "block 1, q_proj: 0.0020" in page.map_of("Error of the output")
    assert "0.10, then 0.0020 in the mean" in page.text
    assert "Of the last method, against the layer as it found it." in page.text


def test_an_error_without_data_is_called_the_weights(tmp_path):
    assert "Error of the weight" in Page(write_run(tmp_path, layers(), calibration=None)).text


def test_layers_left_out_and_errors_that_are_not_finite_are_seen(tmp_path):
    records = layers(sparsity=0.5)[:-1]
    records[0]["after"] = float("nan")
    cells = Page(write_run(tmp_path, records)).map_of("Error of the output")
    assert cells["block 3, down_proj: left as it was"] == "cell empty"
    assert cells["block 0, q_proj: nan"] == "cell bad"


def test_blocks_of_a_structured_method_have_a_table_that_is_open(tmp_path):
    records = [
        record(
            f"model.layers.{b}.{part}",
            before=0.0,
            after=0.1 * b,
            sparsity=0.25 * b,
            note=f"{4 - b} of 4 {unit} kept",
        )
        for b in range(4)
        for part, unit in (("mlp", "neurons"), ("self_attn", "heads"))
    ]
    page = Page(write_run(tmp_path, records, [{"name": "llm_pruner"}]))
    assert page.table()["model.layers.3.mlp"]["Remark"] == "1 of 4 neurons kept"
    assert "Error of plain rounding or masking" not in page.table()["model.layers.3.mlp"]
    assert "block 3, self_attn: 75.0%" in page.map_of("Sparsity")
    html = (tmp_path / "report.html").read_text()
    assert re.search(r"<details[^>]* open>\s*<summary>What was changed", html)


def test_a_part_outside_of_the_blocks_has_a_table_and_no_map(tmp_path):
    channels = record("model.embed_tokens", after=0.1, sparsity=0.25, note="24 of 32 channels kept")
    page = Page(write_run(tmp_path, [channels], [{"name": "llm_pruner"}]))
    assert page.maps == {}
    assert page.table()["model.embed_tokens"]["Sparsity"] == "25.0%"


@pytest.mark.parametrize("records", [[], None, ["odd", {}, {"name": "model.layers.0.mlp"}]])
def test_records_may_be_missing_or_odd(tmp_path, records):
    assert "compressed with gptq" in Page(write_run(tmp_path, records)).text


def test_a_stage_before_says_the_size_from_which_it_started(tmp_path):
    folder = write_run(tmp_path, layers())
    tuned = made_runs.tune() | {"artefacts": {"model/model.safetensors": {"bytes": 269_000_000}}}
    made_runs.write(folder / "00-tune" / "manifest.json", tuned)
    (folder / "run.json").unlink()
    run = read_run(folder)
    assert compression.sizes(run, run.stages[-1]) == (269_000_000, 134_500_000)


def test_a_first_evaluation_alone_is_said_to_be_before_compression(tmp_path):
    folder = write_run(tmp_path, layers())
    (folder / "01-compress").rename(folder / "02-compress")
    made_runs.write(folder / "01-before" / "manifest.json", made_runs.before())
    (folder / "run.json").unlink()
    assert "Measured before compression; the evaluation after it has not ended." in Page(folder).text


def test_kinds_are_named_by_the_shortest_end_that_is_their_own():
    kinds = ["b.*.attention.query", "b.*.attention.output.dense", "b.*.output.dense"]
    found = compression._short_names(kinds)
    assert list(found.values()) == ["query", "attention.output.dense", "*.output.dense"]


def test_experts_of_a_block_share_a_cell():
    for name in ("model.layers.3.mlp.experts.0.up_proj", "model.layers.3.mlp.experts.11.up_proj"):
        assert compression._place(name) == ("model.layers.*.mlp.experts.*.up_proj", 3)


def test_numbers_stand_in_cells_only_where_all_have_room():
    few = {("q", b): 0.5 for b in range(3)}
    many = {("q", b): 0.5 for b in range(60)}
    for cells, shown in ((few, 3), (many, 0)):
        svg = charts.heat_map(cells, title="", write=wording.percent)
        assert svg.count('class="value"') == shown


def test_what_shades_stand_for_stays_in_the_picture():
    for values in ([0.1, 0.2], [0.048, 0.049, 0.050, 0.051, 0.052, 0.053]):
        cells = {("gate_proj", block): value for block, value in enumerate(values)}
        svg = charts.heat_map(cells, title="", write="{:.3f}".format)
        below = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="start"[^>]*>([\d.]+)<', svg)
        ends = [float(x) + 6.3 * len(text) for x, _, text in below]
        assert len(ends) == 2  # the two values, or the least and the most of six
        assert max(ends) <= charts.WIDTH


def test_numbers_of_blocks_do_not_touch():
    for blocks in (2, 30, 80, 126):
        svg = charts.heat_map({("gate_proj", b): float(b) for b in range(blocks)}, title="", write=str)
        found = re.findall(r'<text x="([\d.]+)" y="36" text-anchor="middle">(\d+)<', svg)
        places = [float(x) for x, _ in found]
        assert len(found) >= 2
        assert all(b - a > 6.3 * len(str(blocks - 1)) for a, b in pairwise(places))


@pytest.mark.parametrize(
    ("values", "log", "expected"),
    [
        ([1, 2, 3], False, [0, 0.5, 1]),
        ([1, 10, 100], True, [0, 0.5, 1]),
        ([1, 2, 3], True, [0, 0.5, 1]),  # near enough to each other for even steps
        ([2, 2], False, [1, 1]),
        ([0, 0], True, [1, 1]),
    ],
)
def test_shades_go_from_the_least_to_the_most(values, log, expected):
    shade = charts._shading(values, log)
    assert [shade(v) for v in values] == pytest.approx(expected)


def test_nothing_is_weaker_than_the_least_of_the_rest():
    shade = charts._shading([0.0, 1e-5, 1e-1], True)
    assert 0 == shade(0.0) < shade(1e-5) < shade(1e-1)


class TestComparison:
    @pytest.fixture
    def folder(self, tmp_path):
        methods = ["rtn", {"name": "gptq", "bits": 3}, ["smoothquant", {"name": "gptq", "bits": 8}]]
        rows = [
            {
                "settings": {"compress.method": method},
                "seed": 0,
                "run": f"run-{i}",
                "status": "done",
                "error": None,
            }
            | {
                "metrics": {"perplexity": made_runs.metric(20.0 + i, 1.0)},
                "trainable": None,
                "tune_seconds": None,
            }
            | {
                "artefact_bytes": 1e8 * (i + 1),
                "bits": 3.0 + i / 2,
                "sparsity": 0.5 if i else None,
                "seconds": 9.0,
            }
            for i, method in enumerate(methods)
        ]
        record = {"name": "small", "status": "done", "vary": {"compress.method": methods}, "seeds": [0]}
        made_runs.write(tmp_path / "comparison.json", record | {"rows": rows})
        return tmp_path

    def test_it_has_columns_of_bits_and_sparsity(self, folder):
        html = write_comparison(folder).read_text()
        assert re.search(r'data-value="3.5">3.5</td>\s*<td class="num" data-value="0.5">50.0%</td>', html)
        assert "Trainable parameters" not in html
        assert "Tuning time" not in html

    def test_lists_of_methods_are_one_label(self, folder):
        settings = read_settings(json.loads((folder / "comparison.json").read_text()))
        assert [s.label for s in settings] == ["rtn", "gptq bits=3", "smoothquant + gptq bits=8"]
        assert label_of({"compress.method.0.bits": 3}, ["compress.method.0.bits"]) == "bits=3"
