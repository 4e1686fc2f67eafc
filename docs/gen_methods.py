"""mkdocs hook: a page for every method of the tree, made from its file, and the navigation that leads there.

The tree of folders is the only list: a new method file has its page without an edit here.
"""

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from luthier import taxonomy
from luthier.options import Option
from luthier.taxonomy import Method

ROOT = Path(__file__).parent.parent
FAMILIES = {
    "tuning": "Which parameters learn.",
    "compression": "How the model gets small and fast.",
    "alignment": "What the model learns from.",
    "acceleration": "How the same numbers come sooner.",
}


def own_methods() -> list[Method]:
    """The methods of this package; those of other packages have pages of their own."""
    return [method for method in taxonomy.methods() if method.origin == "luthier"]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the tree to the navigation: branch, family, method."""
    section: list[Any] = [{"All methods": "methods/index.md"}]
    for method in own_methods():
        level = section
        for part in method.path.split("/")[:-1]:
            found = next((entry[part] for entry in level if isinstance(entry.get(part), list)), None)
            if found is None:
                found = []
                level.append({part: found})
            level = found
        level.append({method.name: f"methods/{method.path}.md"})
    assert config.nav is not None
    config.nav.append({"Methods": section})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    files.append(File.generated(config, "methods/index.md", content=overview()))
    for method in own_methods():
        files.append(File.generated(config, f"methods/{method.path}.md", content=page(method)))
    return files


def overview() -> str:
    """All methods in one table a branch."""
    parts = [
        "# Methods",
        "The tree of folders in the package is the taxonomy of the field; `luthier methods` prints it. "
        "A recipe names a method by its last part (`method: lora`) and sets its options beside the name.",
    ]
    branch = ""
    for method in own_methods():
        if method.branch != branch:
            branch = method.branch
            parts.append(f"\n## {branch}\n\n{FAMILIES[branch]}\n")
            parts.append("| method | what it is | pick it when |\n|---|---|---|")
        place = method.path.removeprefix(f"{branch}/")
        parts.append(f"| [{place}]({method.path}.md) | {_cell(method.title)} | {_cell(method.when)} |")
    return "\n\n".join(parts[:2]) + "\n" + "\n".join(parts[2:]) + "\n"


def page(method: Method) -> str:
    """Title, paper, advice, cost, text of the file, options and recipe of one method."""
    facts = {
        "Paper:": method.paper,
        "Pick it when": method.when,
        "Cost:": method.cost,
        "Place:": f"`{method.path}`",
    }
    parts = [f"# {method.title}"]
    parts.append("\n".join(f"- **{name}** {' '.join(text.split())}" for name, text in facts.items() if text))
    parts.append(_body(method))
    if options := method.options():
        parts.append(f"## Options\n\n{_table(options)}")
    recipe = ROOT / "recipes" / f"{method.path}.yaml"
    if recipe.is_file():
        text = recipe.read_text(encoding="utf-8").rstrip()
        parts.append(f"## Recipe\n\n`luthier run {recipe.relative_to(ROOT)}`\n\n```yaml\n{text}\n```")
    return "\n\n".join(part for part in parts if part) + "\n"


def _body(method: Method) -> str:
    """The docstring without its title and its marked paragraphs, which stand above it."""
    paragraphs = method.doc.split("\n\n")
    return "\n\n".join(p for p in paragraphs[1:] if not p.startswith(tuple(taxonomy.MARKS)))


def _table(options: list[Option]) -> str:
    rows = ["| option | type | default | range | meaning |", "|---|---|---|---|---|"]
    for o in options:
        cells = (f"`{o.name}`", f"`{o.type}`", f"`{o.default!r}`", o.range(), o.help)
        rows.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(rows)


def _cell(text: str) -> str:
    """Text for a table's cell: a bar outside code would end it."""
    parts = " ".join(text.split()).split("`")
    return "`".join(part if i % 2 else part.replace("|", "\\|") for i, part in enumerate(parts))
