"""The page of general text: every token counts once, and a damaged model shows."""

from importlib import resources

import pytest
import tiny
import torch

from luthier import checks
from luthier.evaluation import forgetting
from luthier.models import structure


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    model = tiny.llama().eval()
    torch.nn.init.zeros_(structure.head(model).weight)
    found = forgetting.general_perplexity(model, tiny.tokenizer())
    assert found == pytest.approx(structure.head(model).weight.shape[0], rel=1e-4)


def test_it_is_the_perplexity_of_the_paragraphs_one_by_one():
    model, tokenizer = tiny.llama().eval(), tiny.tokenizer()
    page = resources.files("luthier.evaluation").joinpath("general.txt").read_text(encoding="utf-8")
    total, count = 0.0, 0
    for paragraph in page.strip().split("\n\n"):
        ids = torch.tensor([tokenizer(paragraph).input_ids])
        assert ids.shape[1] <= model.config.max_position_embeddings, "a window would have to slide"
        with torch.no_grad():
            losses = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        total, count = total - losses.sum().item(), count + len(losses)
    expected = torch.tensor(total / count).exp().item()
    assert forgetting.general_perplexity(model, tokenizer) == pytest.approx(expected, rel=1e-4)


def test_the_line_states_both_and_refuses_nothing():
    with checks.collect() as lines:
        forgetting.record(20.0, 30.0)
    assert lines[0].passed
    assert lines[0].value == 1.5
    assert "20 before, 30 after" in lines[0].detail
