"""Write the page of a run or of a comparison: one HTML file that needs nothing else, now or in ten years.

Only the JSON files of the folder are read, so that a page can be written while a run is at work, after it
failed, or on another machine.
"""

import logging
import os
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from luthier import __version__
from luthier.report import comparison_page, run_page, wording
from luthier.report.read import read_comparison, read_run

log = logging.getLogger("luthier.report")


def write_report(run_folder: str | Path) -> Path:
    """`report.html` of the run in `run_folder`.

    Raises:
        DataError: the folder is not a run's.
    """
    folder = Path(run_folder)
    return _write(folder, "run.html.j2", run_page.page(read_run(folder)))


def write_comparison(folder: str | Path) -> Path:
    """`report.html` of the comparison in `folder`.

    Raises:
        DataError: the folder is not a comparison's.
    """
    folder = Path(folder)
    return _write(folder, "comparison.html.j2", comparison_page.page(read_comparison(folder), folder))


def _write(folder: Path, template: str, values: dict[str, Any]) -> Path:
    """Render and replace the page at once: a reader never sees half of it."""
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    html = _environment().get_template(template).render(values, version=__version__, written=written)
    page = folder / "report.html"
    draft = folder / f".report.html.{os.getpid()}"
    draft.write_text(html, encoding="utf-8")
    os.replace(draft, page)
    log.info("report: %s", page)
    return page


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("luthier.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": wording.size,
        "count": wording.count,
        "duration": wording.duration,
        "plain": wording.plain,
    }
    environment.globals |= {"show": wording.show, "interval": wording.interval}
    return environment
