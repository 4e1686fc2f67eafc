"""Batched answers with left padding are those that each prompt gets alone, and end where they should."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from luthier.errors import DataError
from luthier.evaluation.generation import generate, generation_config


def prompts():
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(10, 200, (n,), generator=draw).tolist() for n in (3, 17, 8, 1, 17, 30)]


def lora():
    return get_peft_model(tiny.llama(), LoraConfig(target_modules="all-linear", init_lora_weights=False))


def greedy(model, ids, new, ends):
    """One token at a time without a cache; the tokens before the end token."""
    ids, made = list(ids), []
    for _ in range(new):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
        made.append(token)
    return made


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, lora])
@pytest.mark.parametrize("pad", ["own", "eos"])
def test_batches_equal_a_naive_loop_one_by_one(build, pad):
    model, tokenizer = build(), tiny.tokenizer(pad=pad)
    ends = {tiny.IM_END, 250}  # a second end token, so that some answers end early
    found = generate(
        model, tokenizer, prompts(), batch_size=4, options={"max_new_tokens": 12, "eos_token_id": list(ends)}
    )
    for answer, prompt in zip(found, prompts(), strict=True):
        expected = greedy(model.eval(), prompt, 12, ends)
        assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)
        assert answer.tokens == len(expected)
        assert answer.finished == (len(expected) < 12)


def test_an_encoder_decoder_answers_alike_in_batches(tiny_t5, tiny_tokenizer):
    together = generate(tiny_t5, tiny_tokenizer, prompts(), batch_size=4, options={"max_new_tokens": 8})
    alone = [generate(tiny_t5, tiny_tokenizer, [p], options={"max_new_tokens": 8})[0] for p in prompts()]
    assert together == alone


def test_an_answer_stops_at_any_end_token_and_says_so(tiny_llama, tiny_tokenizer):
    prompt = prompts()[:1]
    free = greedy(tiny_llama, prompt[0], 8, {tiny.IM_END})
    assert len(free) == 8
    options = {"max_new_tokens": 8}
    assert not generate(tiny_llama, tiny_tokenizer, prompt, options=options)[0].finished
    tiny_llama.generation_config.eos_token_id = [tiny_tokenizer.eos_token_id, free[3]]
    stopped = generate(tiny_llama, tiny_tokenizer, prompt, options=options)[0]
    assert stopped.finished
    assert stopped.tokens == free.index(free[3])


def test_the_templates_end_of_turn_ends_an_answer_though_the_model_does_not_know_it(tiny_llama):
    tokenizer = tiny.tokenizer(eos="<|endoftext|>")  # ChatML ends turns with another token
    tiny_llama.generation_config.eos_token_id = tiny.END_OF_TEXT
    ends = generation_config(tiny_llama, tokenizer, {}).eos_token_id
    assert set(ends) == {tiny.END_OF_TEXT, tiny.IM_END}


def test_greedy_is_the_default_whatever_the_model_says(tiny_llama, tiny_tokenizer):
    tiny_llama.generation_config.do_sample = True
    tiny_llama.generation_config.temperature = 2.0
    first, second = (
        generate(tiny_llama, tiny_tokenizer, prompts(), options={"max_new_tokens": 6}) for _ in range(2)
    )
    assert first == second


def test_sampling_follows_its_seed(tiny_llama, tiny_tokenizer):
    options = {"max_new_tokens": 10, "do_sample": True, "temperature": 3.0}

    def sample(seed):
        return generate(tiny_llama, tiny_tokenizer, prompts(), options=options, seed=seed)

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)


def test_a_prompt_that_leaves_no_room_is_refused(tiny_llama, tiny_tokenizer):
    with pytest.raises(DataError, match=r"Prompt 2 of 2 has 250 tokens.*6 are left"):
        generate(tiny_llama, tiny_tokenizer, [[7] * 9, [7] * 250], options={"max_new_tokens": 7})


def test_the_mode_of_the_model_is_left_as_it_was(tiny_llama, tiny_tokenizer):
    generate(tiny_llama.train(), tiny_tokenizer, prompts()[:1], options={"max_new_tokens": 2})
    assert tiny_llama.training
