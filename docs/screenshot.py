"""Take the picture of a report that README and docs show: `python docs/screenshot.py runs/tickets`.

Needs Debian's `chromium`. The page is drawn at twice its size, light, from its top.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--force-device-scale-factor=2",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a run's or comparison's folder")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images" / "report.png")
    parser.add_argument("--size", default="1240,900", help="width,height of the window")
    options = parser.parse_args()
    options.out.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        page = (options.folder / "report.html").resolve()
        places = [
            f"--user-data-dir={profile}",
            f"--window-size={options.size}",
            f"--screenshot={options.out}",
        ]
        subprocess.run(["chromium", *ARGUMENTS, *places, page.as_uri()], check=True, timeout=120)


if __name__ == "__main__":
    main()
