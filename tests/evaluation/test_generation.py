"""Batched answers with left padding are those that each prompt gets alone."""

import pytest
import tiny
import torch

from luthier.evaluation.generation import end_tokens, generate


def prompts():
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(10, 200, (n,), generator=draw).tolist() for n in (3, 17, 8, 1, 17, 30)]


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, tiny.t5], ids=["llama", "gpt2", "t5"])
@pytest.mark.parametrize("pad", ["own", "eos"])
def test_batches_equal_one_by_one(build, pad):
    model, tokenizer = build(), tiny.tokenizer(pad=pad)
    together = generate(model, tokenizer, prompts(), batch_size=4, max_new_tokens=12)
    alone = [generate(model, tokenizer, [p], max_new_tokens=12)[0] for p in prompts()]
    assert [a.ids for a in together] == [a.ids for a in alone]


def test_an_answer_stops_at_any_end_token_and_says_so(tiny_llama, tiny_tokenizer):
    prompt = prompts()[:1]
    free = generate(tiny_llama, tiny_tokenizer, prompt, max_new_tokens=8)[0]
    assert not free.ended
    assert len(free.ids) == 8
    stop = free.ids[3]
    tiny_llama.generation_config.eos_token_id = [tiny_tokenizer.eos_token_id, stop]
    assert stop in end_tokens(tiny_llama, tiny_tokenizer)
    stopped = generate(tiny_llama, tiny_tokenizer, prompt, max_new_tokens=8)[0]
    assert stopped.ended
    assert stopped.ids == free.ids[: free.ids.index(stop)]
    assert stopped.text == tiny_tokenizer.decode(stopped.ids)
