"""Faults that are silent in the plain stack (transformers, TRL), planted, beside what happens here.

Each test first shows the fault with the plain stack, so that it fails on the day that the stack is mended.
"""

import json

import pytest
import rendering
import tiny
import torch
from transformers import DataCollatorForLanguageModeling

from luthier.data.load import load
from luthier.data.packing import PackedCollator, PaddedCollator, pack
from luthier.data.tokenize import encode
from luthier.errors import DataError

MESSAGES = [
    {"role": "user", "content": "Question: what is 12 + 30?"},
    {"role": "assistant", "content": "Answer: 42."},
    {"role": "user", "content": "Please send my money back."},
    {"role": "assistant", "content": "The box was empty."},
]


@pytest.fixture
def encoded(tmp_path):
    def run(tokenizer, rows, max_length=None, **settings):
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return encode(load(path), tokenizer, max_length=max_length, use_cache=False, **settings)

    return run


def test_mask_of_a_template_without_generation_marks_is_empty(encoded):
    tokenizer = rendering.tokenizer(rendering.CHATML)
    plain = tokenizer.apply_chat_template(MESSAGES, return_assistant_tokens_mask=True, return_dict=True)
    assert not any(plain["assistant_masks"]), "the plain stack trains on nothing"
    [labels] = encoded(tokenizer, [{"messages": MESSAGES}]).dataset["labels"]
    learnt = tokenizer.decode([token for token in labels if token >= 0])
    assert learnt == "Answer: 42.<|im_end|>The box was empty.<|im_end|>"


def test_end_token_is_masked_where_it_is_the_pad_token(encoded):
    tokenizer = rendering.tokenizer(rendering.CHATML, pad="eos")
    ids = tokenizer.apply_chat_template(MESSAGES[:2], return_dict=False)
    plain = DataCollatorForLanguageModeling(tokenizer, mlm=False)([{"input_ids": ids}])["labels"][0]
    assert tokenizer.eos_token_id not in plain, "the plain collator hides every end token"
    data = encoded(tokenizer, [{"messages": MESSAGES[:2]}]).dataset
    labels = PaddedCollator(tokenizer.pad_token_id)([data[0]])["labels"][0]
    assert labels[labels >= 0][-1] == tokenizer.eos_token_id


def test_rendering_and_tokenising_doubles_the_begin_token(encoded):
    tokenizer = rendering.tokenizer(rendering.LLAMA3, bos=True)
    plain = tokenizer(tokenizer.apply_chat_template(MESSAGES, tokenize=False))["input_ids"]
    assert plain[:2] == [tiny.BOS, tiny.BOS]
    [ids] = encoded(tokenizer, [{"messages": MESSAGES}]).dataset["input_ids"]
    assert ids[0] == tiny.BOS != ids[1]
    assert ids == plain[1:]


def test_truncation_that_hides_the_answer_gives_a_loss_of_nan(encoded):
    tokenizer = rendering.tokenizer(rendering.CHATML)
    long = [{"role": "user", "content": "x " * 100}, MESSAGES[1]]
    ids = tokenizer.apply_chat_template(long, return_dict=False, truncation=True, max_length=32)
    with torch.no_grad():
        loss = tiny.llama()(input_ids=torch.tensor([ids]), labels=torch.full((1, 32), -100)).loss
    assert loss.isnan(), "the plain stack goes on with it"
    with pytest.raises(DataError, match=r"1 of 1 examples lose all their trained tokens .* max_length 32"):
        encoded(tokenizer, [{"messages": long}], max_length=32)


def test_mask_by_prefixes_is_wrong_where_the_template_rewrites_history(encoded):
    """The usual recipe: the mask of turn 1 reaches from len(prompt) to len(prompt + answer)."""
    tokenizer = rendering.tokenizer(rendering.FORGETFUL)
    whole = tokenizer.apply_chat_template(MESSAGES, return_dict=False)
    prompt = tokenizer.apply_chat_template(MESSAGES[:1], return_dict=False, add_generation_prompt=True)
    after = tokenizer.apply_chat_template(MESSAGES[:2], return_dict=False)
    assert "Please" in tokenizer.decode(whole[len(prompt) : len(after)] + whole[len(after) :][:8])
    assert tokenizer.decode(whole[len(prompt) : len(after)]) != tokenizer.decode(after[len(prompt) :])
    found = encoded(tokenizer, [{"messages": MESSAGES}])
    for turn, (ids, labels) in zip(
        (1, 3), zip(found.dataset["input_ids"], found.dataset["labels"], strict=True), strict=True
    ):
        served = tokenizer.apply_chat_template(MESSAGES[:turn], return_dict=False, add_generation_prompt=True)
        assert ids[: len(served)] == served
        assert all(label == -100 for label in labels[: len(served)])
        learnt = tokenizer.decode([t for t in labels if t >= 0])
        assert learnt == f"<think>\n\n</think>\n\n{MESSAGES[turn]['content']}<|im_end|>"


def test_concatenated_documents_see_each_other(encoded):
    tokenizer, model = rendering.tokenizer(rendering.CHATML), tiny.llama()
    rows = [{"messages": MESSAGES[:2]}, {"messages": MESSAGES[2:]}]
    data = encoded(tokenizer, rows).dataset
    batch = PackedCollator()(list(pack(data, 128)))
    alone = [PaddedCollator(tiny.PAD)([row]) for row in data]
    with torch.no_grad():
        packed = model(**batch, use_cache=False).loss
        plain = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        counts = [(a["labels"][:, 1:] >= 0).sum() for a in alone]
        expected = sum(model(**a).loss * n for a, n in zip(alone, counts, strict=True)) / sum(counts)
    assert abs(plain - expected) > 1e-3, "without restarting positions the loss is another"
    assert abs(packed - expected) < 1e-5
