"""The metrics by name and what each needs, readable without torch (recipes are validated with it)."""

from dataclasses import dataclass

PROMPT_FILE = "prompt.json"  # of a text prompt (`luthier.evaluation.text_prompt`) in its folder


@dataclass(frozen=True)
class MetricName:
    """A metric that can be asked for.

    Attributes:
        tasks: kinds of model that it can be measured on.
        rows: types of rows that it needs.
        help: what it says, in one sentence.
        generates: the model writes answers for it; metrics that do share them.
        higher_is_better: which way is good.
    """

    name: str
    tasks: tuple[str, ...]
    rows: tuple[str, ...]
    help: str
    generates: bool = False
    higher_is_better: bool = True


_WRITTEN = ("causal", "seq2seq")
_ANSWERS = ("prompt_completion", "messages", "prompt_only")  # prompt_only where it has a gold answer

METRICS = {
    metric.name: metric
    for metric in (
        MetricName(
            "perplexity",
            ("causal",),
            ("text", "prompt_completion", "messages"),
            "exp of the mean negative log-likelihood of a token (of a trained token, for chats).",
            higher_is_better=False,
        ),
        MetricName(
            "exact_match",
            _WRITTEN,
            _ANSWERS,
            "Share of answers equal to the reference; JSON is compared as objects.",
            generates=True,
        ),
        MetricName(
            "field_f1",
            _WRITTEN,
            _ANSWERS,
            "Micro-averaged F1 of the fields of JSON records.",
            generates=True,
        ),
        MetricName("rouge1", _WRITTEN, _ANSWERS, "Overlap of single words (F1).", generates=True),
        MetricName("rouge2", _WRITTEN, _ANSWERS, "Overlap of word pairs (F1).", generates=True),
        MetricName("rougeL", _WRITTEN, _ANSWERS, "Longest common run of words (F1).", generates=True),
        MetricName(
            "final_number",
            _WRITTEN,
            _ANSWERS,
            "Share of answers whose last number, or number after ####, is the reference's.",
            generates=True,
        ),
        MetricName(
            "multiple_choice",
            ("causal",),
            ("multiple_choice",),
            "Share of questions whose right choice has the highest log-likelihood.",
        ),
        MetricName(
            "multiple_choice_norm",
            ("causal",),
            ("multiple_choice",),
            "The same with the log-likelihood divided by the length of the choice in letters.",
        ),
        MetricName("accuracy", ("classification",), ("classification",), "Share of right classes."),
        MetricName(
            "f1", ("classification",), ("classification",), "F1 of each class, averaged over the classes."
        ),
        MetricName("binary_f1", ("classification",), ("classification",), "F1 of the second of two classes."),
    )
}
