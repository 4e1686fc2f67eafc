"""The tiny models are what the other tests take them for."""

import pytest
import tiny
import torch

BUILDERS = [tiny.llama, tiny.gpt2, tiny.bert, tiny.t5]


@pytest.mark.parametrize("build", BUILDERS)
def test_same_seed_gives_the_same_model_and_leaves_the_random_stream(build):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = build(), build()
    assert torch.equal(torch.rand(1), expected)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_tokenizer_keeps_any_text_and_renders_chatml():
    made = tiny.tokenizer()
    text = "Füße, 漢字 and a tab\t."
    assert made.decode(made(text).input_ids) == text
    assert len(made) <= tiny.VOCAB
    chat = made.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nHi<|im_end|>\n"
    assert made.convert_tokens_to_ids(tiny.SPECIALS) == list(range(5))


def test_pad_token_variants():
    assert tiny.tokenizer().pad_token_id == tiny.PAD
    shared = tiny.tokenizer(pad="eos")
    assert shared.pad_token_id == shared.eos_token_id == tiny.IM_END
    assert tiny.tokenizer(pad="none").pad_token_id is None
    assert tiny.tokenizer(bos=True)("a").input_ids[0] == tiny.BOS
