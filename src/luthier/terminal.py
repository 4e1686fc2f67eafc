"""What a terminal shows while something takes long: one bar of ours, and not those of the libraries.

Loads no torch: whatever takes long may use it.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")


def progress(what: str) -> Progress:
    """A bar with a note and the time left, on stderr; disabled where that is no terminal.

    Its tasks have the field `note`.
    """
    console = Console(stderr=True)
    return Progress(
        TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip


def track(items: Sequence[Item], what: str) -> Iterator[Item]:
    """The items, one after another, under a bar that goes away when they are done."""
    with progress(what) as bar:
        task = bar.add_task("", total=len(items), note="")
        for item in items:
            yield item
            bar.advance(task)


@contextmanager
def no_bars() -> Iterator[None]:
    """No bars of transformers inside: reading and writing files takes seconds. A download keeps its bar.

    Those of libraries that take tqdm as it is (compressed-tensors) have no switch; downloads and transformers
    have classes of their own.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from tqdm import tqdm
    from transformers.utils import logging

    start = tqdm.__init__

    def unseen(bar: tqdm, *given: Any, **options: Any) -> None:
        start(bar, *given, **options | ({"disable": True} if type(bar) is tqdm else {}))

    shown, quiet_downloads = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.disable_progress_bar()  # switches those of downloads off too
    if not quiet_downloads:
        enable_progress_bars()
    tqdm.__init__ = unseen
    try:
        yield
    finally:
        tqdm.__init__ = start
        if shown:
            logging.enable_progress_bar()
        if quiet_downloads:
            disable_progress_bars()


@contextmanager
def no_peft_warnings() -> Iterator[None]:
    """None of the warnings of PEFT that a user has no use for.

    PEFT 0.21 asks a model for a name that transformers 5 has replaced; it lists missing keys, which
    `luthier.models.loading` refuses in its own words; and it proposes for EVA what `tuning/eva.py` is not.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
        warnings.filterwarnings("ignore", "lora with eva initialization used with", UserWarning)
        yield
