"""Whether a recipe measures a model on what it was trained on.

A row of training data leaks where its prompt is in the data of an evaluation that comes after the training
(`luthier.data.load.prompt_key`). Rows that are in a stage's own `eval_data` are seen to when its data load:
`on_bad: quarantine` leaves them out. Here nothing is left out, for what is trained must not depend on what
is measured later: a leak is refused, unless the data of either stage say `allow_leakage`.
"""

import hashlib
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from luthier import checks
from luthier.data.load import Loaded, load, prompt_key
from luthier.recipe.schema import CompressStage, EvaluateStage, TuneStage


def stage_data(
    stage: TuneStage | CompressStage | EvaluateStage, folder: Path | None = None
) -> tuple[Loaded, Loaded | None]:
    """The rows that a stage reads, and its held-out data if it has some.

    Args:
        folder: where bad records are set aside (rejected.jsonl, eval-rejected.jsonl); None: nowhere.

    Raises:
        DataError: they cannot be read, or what is trained is in the held-out data too.
    """

    def aside(name: str) -> Path:
        return Path(os.devnull) if folder is None else folder / name

    spec = getattr(stage, "eval_data", None)
    assert stage.data is not None
    held_out = None if spec is None else load(spec, rejected_file=aside("eval-rejected.jsonl"))
    return load(stage.data, eval_path=held_out, rejected_file=aside("rejected.jsonl")), held_out


def prompts(loaded: Loaded) -> list[bytes]:
    """What identifies the prompt of each row, in 16 bytes."""
    return [hashlib.blake2b(prompt_key(row).encode(), digest_size=16).digest() for row in loaded.records]


def prove(
    tune: TuneStage, evaluate: EvaluateStage, trained: Sequence[bytes], measured: Collection[bytes]
) -> checks.Check:
    """Hold the prompts that `tune` trains on against those that `evaluate` measures.

    Raises:
        CheckError: some are the same, and neither stage's data allow it.
    """
    known = set(measured)
    leaked = [index for index, prompt in enumerate(trained) if prompt in known]
    allowed = tune.data.allow_leakage or evaluate.data.allow_leakage
    detail = f"of {len(trained)} rows of {tune.data.path}, their prompt is in {evaluate.data.path} too"
    if leaked:
        detail += f"; the first is {stage_data(tune)[0].where(leaked[0])}"
    return checks.record(
        "data",
        "train/test leakage",
        allowed or not leaked,
        len(leaked),
        None if allowed else 0,
        detail,
        fix=f"Take them out of one of the two files, or write allow_leakage: true in the data of stage "
        f"'{evaluate.name}' (or of '{tune.name}', for all evaluations).",
    )
