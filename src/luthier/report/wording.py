"""How numbers are written, and what each means in one sentence with its healthy range."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from luthier.evaluation import names


@dataclass(frozen=True)
class Meaning:
    """What a number says.

    Attributes:
        sentence: one sentence that a newcomer understands, with the healthy range where there is one.
        better: the direction of improvement; '' where neither is.
        share: the number is a share of 1 and is written as a percentage.
    """

    title: str
    sentence: str
    better: Literal["higher", "lower", ""] = ""
    share: bool = False


# Said at more length than in `luthier.evaluation.names`, which has the sentences of all other metrics.
METRICS = {
    "perplexity": Meaning(
        "Perplexity",
        "How many tokens the model hesitates between at each step, on average; 1 would be certainty.",
        "lower",
    ),
    "exact_match": Meaning(
        "Exact match", "Share of answers that equal the reference answer.", "higher", share=True
    ),
    "field_f1": Meaning(
        "Field F1",
        "Share of a record's fields that are right: the balance of those found and those missed.",
        "higher",
        share=True,
    ),
    "rouge1": Meaning("ROUGE-1", "Overlap of single words with the reference (F1).", "higher", share=True),
    "rouge2": Meaning("ROUGE-2", "Overlap of word pairs with the reference (F1).", "higher", share=True),
    "rougeL": Meaning(
        "ROUGE-L", "Longest sequence of words shared with the reference (F1).", "higher", share=True
    ),
    "f1": Meaning(
        "F1",
        "Balance of precision and recall, averaged over the classes; unlike accuracy it minds rare ones.",
        "higher",
        share=True,
    ),
    "loss": Meaning("Loss", "Mean negative log-likelihood of a reference token, in nats.", "lower"),
    "ended": Meaning(
        "Ended by itself",
        "Share of answers that ended with the end token before the length limit; healthy near 100%.",
        "higher",
        share=True,
    ),
}

LOGGED = {
    "loss": Meaning(
        "Training loss",
        "Mean negative log-likelihood of a trained token, in nats. Healthy: falls fast, then levels off.",
        "lower",
    ),
    "eval_loss": Meaning(
        "Held-out loss",
        "The same on data that is not trained on. Rising while the training loss falls means memorising.",
        "lower",
    ),
    "learning_rate": Meaning(
        "Learning rate", "Size of the optimizer's steps. Healthy: the planned schedule, warm-up and decay."
    ),
    "grad_norm": Meaning(
        "Gradient norm",
        "Length of the gradient before clipping. Healthy: same order of magnitude throughout, no spikes.",
    ),
    "mean_token_accuracy": Meaning(
        "Token accuracy", "Share of trained tokens that the model ranks first.", "higher", share=True
    ),
    "entropy": Meaning(
        "Entropy", "Spread of the model's next-token distribution, in nats; near 0 it has no doubts left."
    ),
    "kl": Meaning(
        "KL from the reference", "How far the policy has moved, in nats. Healthy: small, no jumps."
    ),
    "rewards/margins": Meaning(
        "Reward margin", "Chosen minus rejected implicit reward. Healthy: rises above 0.", "higher"
    ),
    "rewards/chosen": Meaning(
        "Reward of chosen answers", "May fall a little in DPO; healthy as long as the margin grows."
    ),
    "rewards/rejected": Meaning("Reward of rejected answers", "Healthy: falls below that of chosen ones."),
    "rewards/accuracies": Meaning(
        "Preference accuracy", "Share of pairs ranked rightly; 50% is chance.", "higher", share=True
    ),
    "reward": Meaning("Reward", "Mean reward of sampled answers.", "higher"),
}

WHEN = {
    "validate": "Before anything loads",
    "data": "While the data loads",
    "before": "Before the first step",
    "step1": "At the first step",
    "checkpoint": "At a checkpoint",
    "merge": "When the adapter is merged",
    "export": "When the model is written",
    "end": "At the end",
}


def meaning(name: str) -> Meaning:
    """What a metric says; an unknown one is shown under its own name, as it was measured."""
    for key in (name, name.rsplit("/", 1)[-1]):
        if key in METRICS:
            return METRICS[key]
        if key in names.METRICS:
            metric = names.METRICS[key]
            # All that a recipe can ask for are shares of one, but perplexity.
            better: Literal["higher", "lower"] = "higher" if metric.higher_is_better else "lower"
            return Meaning(_title(key), metric.help, better, share=metric.higher_is_better)
    return Meaning(_title(name), "A metric of the recipe's own; see the code that computes it.", "higher")


def _title(name: str) -> str:
    return name.replace("_", " ").strip().capitalize()


def logged_meaning(name: str) -> Meaning:
    """What a curve says; an unknown one is named as the trainer logs it."""
    if name in LOGGED:
        return LOGGED[name]
    if name.removeprefix("eval_") in METRICS:
        return METRICS[name.removeprefix("eval_")]
    return Meaning(_title(name), f"Logged by the trainer as “{name}”.")


def show(name: str, value: float | None) -> str:
    """A metric's value as it is read aloud: shares in percent, others with three figures."""
    if value is None:
        return "–"
    return percent(value) if meaning(name).share else significant(value)


def percent(value: float) -> str:
    return f"{100 * value:.1f}%" if math.isfinite(value) else str(value)


def significant(value: float, figures: int = 3) -> str:
    """`value` with so many significant figures, thousands separated, no exponent where it reads well."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size >= figures - 1:
        return f"{value:,.0f}"
    if size < -4:
        mantissa, exponent = f"{value:.{figures - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    return f"{value:.{figures - 1 - size}f}"


def count(value: float | None) -> str:
    """A number of things: 884,736 or 134.5M."""
    if value is None:
        return "–"
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{significant(value / size)}{unit}"
    return f"{value:,.0f}"


def size(value: float | None) -> str:
    """A number of bytes in decimal units, as `ls` and download pages write them."""
    if value is None:
        return "–"
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= step:
            return f"{significant(value / step)} {unit}"
    return f"{value:,.0f} B"


def duration(seconds: float | None) -> str:
    """A time: 4.2 s, 3 min 05 s, 2 h 10 min."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def interval(name: str, low: float | None, high: float | None) -> str:
    """A confidence interval: 81.0 – 91.0%; '' where there is none."""
    if low is None or high is None:
        return ""
    if meaning(name).share:
        return f"{100 * low:.1f} – {100 * high:.1f}%"
    return f"{significant(low)} – {significant(high)}"


def plain(value: Any) -> str:
    """Any value of a manifest, for a table's cell."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return significant(value)
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)
