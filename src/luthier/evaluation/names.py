"""The metrics by name and what each needs, readable without torch (recipes are validated with it)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MetricName:
    """A metric that a recipe can ask for.

    Attributes:
        tasks: of the models that it can be measured on.
        generates: needs answers of the model, so generation options apply.
        higher_is_better: False for perplexity.
    """

    name: str
    tasks: tuple[str, ...]
    generates: bool = False
    higher_is_better: bool = True


METRICS = {
    metric.name: metric
    for metric in (
        MetricName("perplexity", ("causal",), higher_is_better=False),
        MetricName("exact_match", ("causal", "seq2seq"), generates=True),
        MetricName("field_f1", ("causal", "seq2seq"), generates=True),
        MetricName("rougeL", ("causal", "seq2seq"), generates=True),
        MetricName("accuracy", ("classification",)),
        MetricName("f1", ("classification",)),
    )
}
