"""What the assistant writes is found in any template; templates that serve another prompt than they train on
are handled as they are served, or refused by name."""

from pathlib import Path

import pytest
import rendering
import trl

from luthier.data.chat import Renderer
from luthier.errors import DataError

CHAT = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And 3+3?"},
    {"role": "assistant", "content": "Six."},
]
THOUGHT = [
    CHAT[0],
    {"role": "assistant", "content": "<think>\nadd\n</think>\n\nFour."},
    CHAT[2],
    {"role": "assistant", "content": "<think>\nsum\n</think>\n\nSix."},
]
# Templates of vision models that want content as parts; that open a thought and then write it closed; with
# thoughts, those that have no place for them.
_VISION = {"idefics3", "llava_next", "smolvlm"}
_CLOSED = {"nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"}
REFUSED = {
    "plain": _VISION | _CLOSED,
    "thinking": _VISION | {"gemma4", "gemma4_v3", "gemma4_v4", "qwen3_5_nothink"},
}
TEMPLATES = sorted(
    path
    for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja")
    if not path.stem.endswith("_training")  # TRL's own rewrites for training, which nobody serves
)


def trained(template, messages, turns=(1, 3), **options):
    return Renderer(rendering.tokenizer(template, bos=True), options).trained(messages, None, list(turns))


def written(rendered):
    return [[item.text[start:stop] for start, stop in item.spans] for item in rendered]


def test_prefix_template_is_one_text_with_a_span_a_turn():
    assert written(trained(rendering.CHATML, CHAT)) == [["Four.<|im_end|>", "Six.<|im_end|>"]]


def test_nothing_behind_the_end_token_is_trained():
    [item] = trained(rendering.CHATML, CHAT)
    assert item.text[item.spans[0][1] :].startswith("\n<|im_start|>")
    assert item.text[item.spans[1][1] :] == "\n"


def test_template_that_rewrites_history_gives_each_turn_as_it_is_served():
    rendered = trained(rendering.FORGETFUL, CHAT)
    assert written(rendered) == [
        ["<think>\n\n</think>\n\nFour.<|im_end|>"],
        ["<think>\n\n</think>\n\nSix.<|im_end|>"],
    ]
    assert "<think>" not in rendered[1].text[: rendered[1].spans[0][0]], "the context is what is served"
    assert len(trained(rendering.FORGETFUL, CHAT, turns=[3])) == 1, "the last turn alone needs no splitting"


def test_opened_thought_is_put_back_between_prompt_and_answer():
    rendered = trained(rendering.OPENER, THOUGHT)
    assert written(rendered) == [["add\n</think>\n\nFour.<|im_end|>"], ["sum\n</think>\n\nSix.<|im_end|>"]]
    assert all(
        item.text[: item.spans[0][0]].endswith("<|im_start|>assistant\n<think>\n") for item in rendered
    )
    assert written(trained(rendering.OPENER, CHAT))[0] == ["\n</think>\n\nFour.<|im_end|>"]


def test_template_that_serves_another_prompt_is_refused_by_name():
    tokenizer = rendering.tokenizer(rendering.INCONSISTENT)
    tokenizer.name_or_path = "acme/odd-model"
    with pytest.raises(DataError, match=r"acme/odd-model .*cannot be trained on.*'model") as caught:
        Renderer(tokenizer).trained(CHAT, None, [1, 3])
    assert "template" in caught.value.fix


def test_template_that_leaves_out_thoughts_is_refused():
    said = [CHAT[0], CHAT[1] | {"reasoning_content": "two and two"}]
    with pytest.raises(DataError, match="leaves out the thoughts"):
        trained(rendering.CHATML, said, turns=[1])


def test_template_without_the_role_is_told_with_the_templates_words():
    with pytest.raises(DataError, match=r"roles system, user.*Only user and assistant roles are supported"):
        trained(rendering.MISTRAL, [{"role": "system", "content": "x"}, *CHAT], turns=[2])


def test_conversation_without_template_is_refused():
    with pytest.raises(DataError, match="has no chat template"):
        Renderer(rendering.tokenizer(None))


def test_template_without_end_token_is_given_one():
    bare = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    bare += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    [item] = trained(bare, CHAT)
    assert item.end
    assert not trained(rendering.CHATML, CHAT)[0].end


def test_options_reach_the_template():
    template = "{{ mood }}" + rendering.CHATML
    assert trained(template, CHAT, mood="!")[0].text.startswith("!")


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.stem)
@pytest.mark.parametrize("kind", ["plain", "thinking"])
def test_every_known_template_is_trained_as_served_or_refused(path, kind):
    """For the templates of 40 model families that TRL ships: each trained text begins with the prompt that
    is served at that turn, and what is trained says what the assistant said."""
    messages = CHAT if kind == "plain" else THOUGHT
    tokenizer = rendering.tokenizer(path.read_text(), bos=True)
    if path.stem in REFUSED[kind]:
        with pytest.raises(DataError, match="The chat template of") as caught:
            Renderer(tokenizer).trained(messages, None, [1, 3])
        assert caught.value.fix
        return
    rendered = Renderer(tokenizer).trained(messages, None, [1, 3])
    spans = [(item.text, start, stop) for item in rendered for start, stop in item.spans]
    assert len(spans) == 2
    for turn, (text, start, stop), answer, thought in zip(
        [1, 3], spans, ["Four.", "Six."], ["add", "sum"], strict=True
    ):
        assert answer in text[start:stop]
        assert kind == "plain" or thought in text[start:stop]
        assert "What is 2+2?" not in text[start:stop]
        assert "And 3+3?" not in text[start:stop]
        if kind == "plain":
            served = tokenizer.apply_chat_template(
                messages[:turn], tokenize=False, add_generation_prompt=True
            )
            assert text[:start] == served
