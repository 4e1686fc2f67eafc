"""Which tuning method, of what size, at which learning rate: a race on the user's own rows.

Successive halving (Jamieson and Talwalkar, 2016, arXiv 1502.07943): every contender, a method at one learning
rate, trains for a few steps; the third with the lowest held-out loss trains three times as long, from the
beginning again, so that every learning rate is judged at the end of its own schedule; and so on. A lap is a
`luthier run`, so that what is finished stays finished, and a race that was cut off goes on.

Rows are held out of the training data, never taken from a test file: what is chosen by a figure cannot be
measured by it.
"""

import dataclasses
import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import taxonomy
from luthier.data.load import Loaded, load, prompt_key
from luthier.data.spec import DataSpec
from luthier.data.tokenize import class_names
from luthier.errors import LuthierError, MethodError, RecipeError
from luthier.recipe.manifest import write_json
from luthier.recipe.schema import Recipe

if TYPE_CHECKING:
    from luthier.recipe.context import Models

log = logging.getLogger("luthier.recipe")

METHODS = ("lora", "dora", "krona", "prefix", "top_layers", "full")
LAPS = (8, 24, 72)  # optimiser steps
KEPT = 3  # one of so many goes on
EQUAL = 0.01  # share of the loss below which two finalists count as equally good
HELD_OUT = 64  # rows, and never more than a fifth of the data
MEASURED = 2  # of them for each step of a lap: a loss costs half of what training on the same rows does
LEAST = 16
SAVED = 100  # steps after which a lap that takes longer leaves a checkpoint
OBJECTIVE = {"classification": "classification", "text": "pretrain"}  # by the type of the rows; sft otherwise

# Learning rates that a family's papers and users take, from careful to bold.
RATES = {
    "tuning/partial": (2e-5, 1e-4, 5e-4),
    "tuning/prompts": (1e-3, 1e-2, 5e-2),
    "tuning": (2e-4, 1e-3, 5e-3),
    "compression": (5e-5, 2e-4, 1e-3),  # scales of weights, which are small numbers themselves
}
# Options that set how many parameters a method has, and the values that are tried from the largest on.
SIZES = {
    "r": (64, 32, 16, 8, 4, 2, 1),
    "bottleneck_dim": (256, 128, 64, 32, 16, 8, 4),
    "encoder_hidden_size": (512, 256, 128, 64, 32, 16),
    "num_virtual_tokens": (100, 50, 20, 10, 5, 2, 1),
    "k": (8, 4, 2, 1),
    "init_r": (96, 48, 24, 12, 6, 3),
    "phm_rank": (16, 8, 4, 2, 1),
}
FOLLOW = {"r": ("lora_alpha", 2.0), "init_r": ("target_r", 2 / 3)}  # what goes with a size, as a multiple


@dataclass(frozen=True)
class Contender:
    """A method with its options, and a learning rate."""

    method: str
    options: dict[str, Any]
    rate: float
    trainable: int

    def __str__(self) -> str:
        written = "".join(f", {key} {value}" for key, value in self.options.items())
        return f"{self.method}{written} at {self.rate:g}"


@dataclass
class Lap:
    """What a contender did in one lap.

    Attributes:
        loss: mean held-out loss of a trained token (or row); None where the run failed, which `error` tells.
        seconds: of the training.
    """

    contender: Contender
    steps: int
    loss: float | None = None
    tokens_per_second: float = 0.0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    error: str = ""


@dataclass
class Race:
    """A finished race; `race.json` in its folder holds the same.

    Attributes:
        laps: of each round, best first.
        left_out: methods that could not start, each with the reason.
        why: the choice in words.
    """

    folder: Path
    laps: list[list[Lap]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    why: str = ""

    @property
    def winner(self) -> Contender:
        return chosen(self.laps[-1]).contender


def race(
    model: str | dict[str, Any],
    data: str | Path | DataSpec,
    *,
    folder: Path | str,
    budget: int | None = None,
    methods: Sequence[str] = METHODS,
    objective: str | dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    laps: Sequence[int] = LAPS,
    seed: int = 0,
    models: "Models | None" = None,
) -> Race:
    """Let methods race on the rows of `data`.

    Args:
        model: as in a recipe.
        folder: where the laps' runs and `race.json` go.
        budget: the most parameters that may learn; None takes every method at its default size.
        methods: names of tuning methods; each starts once for every learning rate of its family (`RATES`).
        objective: as in a recipe; by default what the rows are for.
        training: training arguments of every lap, such as the batch size; steps and rate are the race's.
        laps: optimiser steps of each lap.

    Raises:
        MethodError: a method does not exist, or none can start.
        RecipeError: the laps do not rise, or too few rows.
        LuthierError: every contender failed in the first lap; the message has each reason.
    """
    if not laps or sorted(set(laps)) != list(laps) or laps[0] < 1:
        raise RecipeError(f"laps {list(laps)} do not rise.", fix=f"Write, for example, {list(LAPS)}.")
    from luthier.recipe.context import Models

    result = Race(Path(folder))
    result.folder.mkdir(parents=True, exist_ok=True)
    loaded = load(data)
    training = {"per_device_train_batch_size": 4, "warmup_steps": 0.1} | (training or {})
    base = {
        "model": model,
        "seed": seed,
        "output": str(result.folder),
        "tune": {
            **_split(loaded, result.folder, seed),
            "objective": objective or OBJECTIVE.get(loaded.type, "sft"),
            "training": training,
        },
    }
    entered = _contenders(base, methods, budget, result.left_out)
    models = models or Models()
    for number, steps in enumerate(laps, 1):
        log.info("lap %d of %d: %d contenders, %d steps", number, len(laps), len(entered), steps)
        done = sorted((_lap(base, c, steps, models) for c in entered), key=_by_loss)
        result.laps.append(done)
        _require_one(done)
        entered = [lap.contender for lap in done[: -(-len(done) // KEPT)] if lap.loss is not None]
    result.why = _why(result, budget)
    write_json(result.folder / "race.json", _as_dict(result))
    return result


def _by_loss(lap: Lap) -> float:
    return float("inf") if lap.loss is None else lap.loss


def sized(model: str | dict[str, Any], name: str, budget: int | None, objective: str = "sft") -> Contender:
    """The method at the largest size within the budget, and the middle learning rate of its family.

    Raises:
        MethodError: its smallest size has more parameters, or it cannot be put on the model.
    """
    base = {"model": model, "output": ".", "seed": 0, "tune": {"data": "-", "objective": objective}}
    options, count = _size(base, name, budget)
    return Contender(name, options, _rates(name)[1], count)


# Who starts ---------------------------------------------------------------------------------------------


def _contenders(
    base: dict[str, Any], methods: Sequence[str], budget: int | None, left_out: dict[str, str]
) -> list[Contender]:
    found = []
    for name in methods:
        try:
            options, trainable = _size(base, name, budget)
        except MethodError as error:
            left_out[name] = str(error)
            log.info("%s does not start: %s", name, error)
            continue
        found += [Contender(name, options, rate, trainable) for rate in _rates(name)]
    if not found:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in left_out.items())
        raise MethodError(f"No method can start:\n{reasons}", fix="Raise the budget, or name other methods.")
    return found


def _rates(name: str) -> tuple[float, ...]:
    path = taxonomy.find(name, "tuning").path
    return next(rates for start, rates in RATES.items() if path.startswith(start))


def _size(base: dict[str, Any], name: str, budget: int | None) -> tuple[dict[str, Any], int]:
    """The options under which the method is as large as the budget allows, and its parameters."""
    tried: list[dict[str, Any]] = _sizes(name) if budget is not None else [{}]
    found = _count(base, name, tried[-1])
    if budget is not None and found > budget:
        raise MethodError(f"{name} has {found:,} parameters at its smallest, and the budget is {budget:,}.")
    low, high = 0, len(tried) - 1  # `high` fits; halved, for to put a method on a skeleton takes a second
    while low < high:
        middle = (low + high) // 2
        try:
            count = _count(base, name, tried[middle])
        except MethodError:
            count = None  # more blocks than the model has, say
        if count is None or (budget is not None and count > budget):
            low = middle + 1
        else:
            high, found = middle, count
    return tried[high], found


def _sizes(name: str) -> list[dict[str, Any]]:
    """The options that set how many parameters the method has, from the largest on."""
    known = {option.name: option.default for option in taxonomy.find(name, "tuning").options()}
    tried: list[dict[str, Any]] = []
    smallest: dict[str, Any] = {}
    for knob in (option for option in SIZES if option in known):
        # One after the other: those before stay at their smallest, and this one has been at its default.
        below = known[knob] if smallest and known[knob] else float("inf")
        tried += [smallest | {knob: size} for size in SIZES[knob] if size < below]
        smallest[knob] = SIZES[knob][-1]
    for knob, (other, share) in FOLLOW.items():
        if other in known:
            tried = [o | {other: round(share * o[knob])} if knob in o else o for o in tried]
    return tried or [{}]


def _count(base: dict[str, Any], name: str, options: dict[str, Any]) -> int:
    """Parameters that would learn."""
    from luthier.recipe.planner import trainable

    return trainable(_recipe(base, "count", {"name": name} | options, {}))


# A lap --------------------------------------------------------------------------------------------------


def _lap(base: dict[str, Any], contender: Contender, steps: int, models: "Models") -> Lap:
    from luthier.recipe.runner import run

    lap = Lap(contender, steps)
    method = {"name": contender.method} | contender.options
    label = f"{contender.method}-{contender.rate:g}-{steps}"
    training = {
        "max_steps": steps,
        "learning_rate": contender.rate,
        "eval_strategy": "steps",
        "eval_steps": steps,  # once, at the end
        "save_strategy": "steps" if steps > SAVED else "no",
        "save_steps": SAVED,
    }
    held_out = base["tune"]["eval_data"] | {"limit": max(LEAST, MEASURED * steps)}
    base = base | {"tune": base["tune"] | {"eval_data": held_out}}
    try:
        made = _recipe(base, label, method, training)
        found = run(made, models=models, trial=True).stages[0].manifest
    except LuthierError as error:
        lap.error = str(error)
        log.info("%s failed: %s", contender, error)
        return lap
    lap.loss = found.metrics["eval_loss"]
    lap.tokens_per_second = found.metrics["tokens_per_second"]
    lap.seconds, lap.peak_memory_bytes = found.seconds, found.peak_memory_bytes
    log.info("%s: held-out loss %.4g", contender, lap.loss)
    return lap


def _recipe(base: dict[str, Any], name: str, method: dict[str, Any], training: dict[str, Any]) -> Recipe:
    tune = base["tune"] | {"method": method, "training": base["tune"].get("training", {}) | training}
    common = {key: base[key] for key in ("model", "seed", "output")}
    return Recipe.model_validate(common | {"name": name, "stages": [{"tune": tune}]})


def _require_one(laps: list[Lap]) -> None:
    if all(lap.loss is None for lap in laps):
        reasons = "\n".join(f"  {lap.contender}: {lap.error}" for lap in laps)
        raise RecipeError(f"Every contender failed:\n{reasons}")


def _split(loaded: Loaded, folder: Path, seed: int) -> dict[str, Any]:
    """`data` and `eval_data` of the laps: files of rows drawn with the seed; no prompt is in both."""
    rows = list(loaded.records)
    random.Random(seed).shuffle(rows)
    count = min(HELD_OUT, len(rows) // 5)
    held_out = rows[:count]
    known = {prompt_key(row) for row in held_out}
    train = [row for row in rows[count:] if prompt_key(row) not in known]
    if not held_out or not train:
        raise RecipeError(
            f"{loaded.spec.path} has {len(rows)} rows, too few to hold some out.",
            fix="Give more data, or choose a method by hand.",
        )
    shared: dict[str, Any] = {"format": loaded.type}
    if loaded.type == "classification":  # few rows may lack a class
        shared["labels"] = loaded.spec.labels or class_names(loaded)
    found = {}
    for name, part in (("data", train), ("eval_data", held_out)):
        file = folder / f"{name}.jsonl"
        plain = ({key: value for key, value in row.items() if key != "origin"} for row in part)
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in plain))
        found[name] = {"path": str(file), **shared}
    return found


# The choice ---------------------------------------------------------------------------------------------


def chosen(laps: list[Lap]) -> Lap:
    """The fastest of those whose loss is within a hundredth of the lowest."""
    best = min(lap.loss for lap in laps if lap.loss is not None)
    equal = [lap for lap in laps if lap.loss is not None and lap.loss <= best * (1 + EQUAL)]
    return max(equal, key=lambda lap: lap.tokens_per_second)


def _why(result: Race, budget: int | None) -> str:
    """The choice in a few sentences."""
    final = result.laps[-1]
    won = chosen(final)
    size = f"{won.contender.trainable:,} parameters learn"
    size += f", of {budget:,} allowed" if budget is not None else ""
    text = [
        f"{won.contender} was chosen among {len(result.laps[0])} contenders: "
        f"held-out loss {won.loss:.4g} after {won.steps} steps; {size}."
    ]
    others = [lap for lap in final if lap is not won and lap.loss is not None]
    for lap in others[:2]:
        apart = (_by_loss(lap) - _by_loss(won)) / _by_loss(won)
        kind = "no worse, but slower" if apart <= EQUAL else f"{apart:.1%} higher"
        text.append(f"{lap.contender}: {lap.loss:.4g} ({kind}, {lap.tokens_per_second:.0f} tokens/s).")
    out = sorted({lap.contender.method for lap in result.laps[0]} - {lap.contender.method for lap in final})
    if out:
        text.append(f"Left behind before the last lap: {', '.join(out)}.")
    if result.left_out:
        text.append(f"Did not start: {', '.join(result.left_out)}.")
    return " ".join(text)


def _as_dict(result: Race) -> dict[str, Any]:
    return {
        "winner": dataclasses.asdict(result.winner),
        "why": result.why,
        "laps": [[dataclasses.asdict(lap) for lap in laps] for laps in result.laps],
        "left_out": result.left_out,
    }
