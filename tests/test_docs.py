"""Every Python snippet of README and docs runs, and the site builds with a page for every method.

The snippets of a page share a namespace and an empty folder. There `smollm2-135m` is a tiny model, so that
they run offline and at once. An HTML comment that begins with `setup` holds code that a page needs and its
reader does not; one that begins with `skip:` and a reason, before a snippet, leaves it out (only where it
cannot run without a network).
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from luthier import taxonomy

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(
    r"<!--\s*setup\n(?P<setup>.*?)-->|(?:<!--\s*skip:(?P<skip>[^>]*)-->\s*)?^```python\n(?P<code>.*?)^```",
    re.M | re.S,
)


def snippets(page: Path) -> list[tuple[int, str]]:
    """(line, code) of the page's set-up and snippets, in order; those with a reason to skip are left out."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        if match["skip"] is not None:
            assert match["skip"].strip(), f"{page.name}: a skipped snippet needs a reason"
            continue
        group = "setup" if match["setup"] is not None else "code"
        found.append((text.count("\n", 0, match.start(group)) + 1, match[group]))
    return found


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory):
    """A folder with a tiny chat model."""
    import tiny

    folder = tmp_path_factory.mktemp("models") / "smollm2-135m"
    tiny.llama(max_position_embeddings=512).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def bench(tmp_path, monkeypatch, stand_in):
    """An empty folder to work in, where the alias stands for the tiny model."""
    from luthier.models import sources

    original = sources._alias
    monkeypatch.setattr(
        sources,
        "_alias",
        lambda name: sources.Source(name, "alias", stand_in) if name == "smollm2-135m" else original(name),
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("page", [p for p in PAGES if snippets(p)], ids=lambda p: p.name)
def test_snippets_run(page, bench):
    namespace: dict = {"__name__": "__main__"}
    for line, code in snippets(page):
        # Blank lines before the code make a traceback name the page's own line.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


def test_a_skipped_snippet_is_left_out_and_set_up_comes_first(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- setup\nx = 1\n-->\n\n```python\ny = x\n```\n"
        "<!-- skip: needs the Hub -->\n```python\nraise\n```\n"
    )
    assert [code for _, code in snippets(page)] == ["x = 1\n", "y = x\n"]
    assert [line for line, _ in snippets(page)] == [2, 6]


def test_the_readme_says_which_branches_have_no_method_yet():
    (note,) = re.findall(r"^> \*\*State\*\*.*?(?=^[^>]|\Z)", (ROOT / "README.md").read_text(), re.M | re.S)
    there = {method.branch for method in taxonomy.methods()}
    for branch in ("tuning", "compression", "alignment"):
        assert (f"no {branch} yet" in note) == (branch not in there), branch


def test_the_site_builds_with_a_page_for_every_method(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for method in taxonomy.methods():
        if method.origin != "luthier":
            continue
        page = (tmp_path / "methods" / method.path / "index.html").read_text(encoding="utf-8")
        assert method.title in page
        for option in method.options():
            assert f"<code>{option.name}</code>" in page
    assert not list(tmp_path.glob("*.py"))
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    fetched = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"?(https?:[^\s\">]+)", html)
    assert fetched == [], "a reader's browser asks no third party"
