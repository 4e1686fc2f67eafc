"""Words that stand for classes, found from the states of a model at the gap of a cloze prompt.

A logistic regression p(y | h) ~ exp(h . w_y + b_y) is fitted on what the output embedding gets at the gap.
The output embedding's row o_w of a word lies in the same space, where it makes the word likely:

    s(y, w) = softmax_y(w_y . o_w + b_y)

The words with the highest s(y, w) stand for class y.
Source: Shin et al., 2020 (AutoPrompt), section 2.3; its code leaves b_y out and fits with Adam.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from luthier.data.rows import Row
from luthier.evaluation.cloze import Scorer, Template


def find_label_words(
    scorer: Scorer,
    template: Template,
    rows: Sequence[Row],
    classes: Tensor,
    names: Sequence[str],
    count: int,
) -> dict[str, list[str]]:
    """`count` words of one token for each class, lower case and none for two classes.

    Args:
        classes: number (n) of each row's class in `names`.
    """
    states = scorer.states(scorer.encode(template, rows))
    output = scorer.base.get_output_embeddings().weight.detach().float().cpu()
    scores = label_word_scores(*fit_probe(states, classes, len(names)), output)
    texts = scorer.token_texts
    found: dict[str, list[str]] = {name: [] for name in names}
    taken: set[str] = set()
    for name, row in zip(names, scores, strict=True):
        for token in row[: len(texts)].argsort(descending=True, stable=True).tolist():
            word = texts[token].strip()
            if not (word.isalpha() and word.islower() and len(word) > 1) or word in taken:
                continue
            if scorer.word_ids(word, spaced=template.spaced) == [token]:
                found[name].append(word)
                taken.add(word)
            if len(found[name]) == count:
                break
    return found


def fit_probe(states: Tensor, classes: Tensor, count: int, decay: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Logistic regression on states (n, d): weights (count, d) and biases (count)."""
    scale = states.pow(2).mean().sqrt().clamp_min(1e-12)
    x = states / scale
    weight = torch.zeros(count, states.shape[1], requires_grad=True)
    bias = torch.zeros(count, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(x @ weight.T + bias, classes) + decay * weight.pow(2).sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach() / scale, bias.detach()


def label_word_scores(weight: Tensor, bias: Tensor, output: Tensor) -> Tensor:
    """log s(y, w) from weights (C, d), biases (C) and the output embedding (V, d): (C, V)."""
    return (weight @ output.T + bias[:, None]).log_softmax(0)
