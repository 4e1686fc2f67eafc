"""Runs in processes of their own that are killed, really, at a chosen moment."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

# One server imports torch and the rest once; each run is a fork of it, a tenth of a second away.
PROCESSES = multiprocessing.get_context("forkserver")
PRELOAD = [
    "luthier.recipe.stages.tune",
    "luthier.recipe.stages.evaluate",
    "luthier.alignment.sl.sft",
    "luthier.recipe.planner",
]
WRITES = ("os.rename", "os.replace", "os.remove", "os.rmdir", "os.mkdir", "os.link", "shutil.rmtree")


def start(recipe: Path, die_at: int | None = None, count_in: Path | None = None, **options: Any) -> Any:
    """Start a run in a process of its own.

    Args:
        die_at: kill itself (SIGKILL) before its so-many-th change of a file below the recipe's folder.
        count_in: file that gets the number of such changes when the run ends.
    """
    PROCESSES.set_forkserver_preload(PRELOAD)
    process = PROCESSES.Process(target=_run, args=(recipe, die_at, count_in, options))
    process.start()
    return process


def finish(recipe: Path, die_at: int | None = None, count_in: Path | None = None, **options: Any) -> int:
    """Run to the end of the process, and give its exit code: 0, or -9 for a kill."""
    process = start(recipe, die_at, count_in, **options)
    process.join(120)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def _run(recipe: Path, die_at: int | None, count_in: Path | None, options: dict[str, Any]) -> None:
    import torch

    from luthier.recipe.runner import run

    torch.set_num_threads(1)
    folder = str(recipe.parent)
    changes = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal changes
        if event == "open":
            path, mode, flags = arguments
            writes = (mode or "").strip("rbt") != "" or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))
            if not writes:
                return
        elif event in WRITES:
            path = arguments[0]
        else:
            return
        if isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(folder):
            changes += 1
            if changes == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    try:
        run(recipe, **options)
    except KeyboardInterrupt:
        sys.exit(130)
    if count_in is not None:
        count_in.write_text(str(changes))
