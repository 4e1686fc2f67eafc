"""The metrics by name and what each needs, readable without torch (recipes are validated with it)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MetricName:
    name: str
    tasks: tuple[str, ...]
    generates: bool = False


METRICS = {
    m.name: m
    for m in (
        MetricName("perplexity", ("causal",)),
        MetricName("exact_match", ("causal", "seq2seq"), generates=True),
        MetricName("field_f1", ("causal", "seq2seq"), generates=True),
        MetricName("rouge", ("causal", "seq2seq"), generates=True),
        MetricName("multiple_choice", ("causal",)),
        MetricName("accuracy", ("classification",)),
        MetricName("f1", ("classification",)),
    )
}
