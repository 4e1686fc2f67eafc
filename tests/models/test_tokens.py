"""Model and tokenizer agree on padding and on where a turn ends."""

import json

import pytest
import tiny

import luthier
from luthier import checks
from luthier.errors import ModelError
from luthier.models.tokens import end_of_turn

BASH = "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + '\n' }}{% endfor %}"
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "eos", "expected"),
    [
        (tiny.CHATML, "<|im_end|>", tiny.IM_END),
        (tiny.CHATML, "<|endoftext|>", tiny.IM_END),
        (LLAMA2, "<|endoftext|>", tiny.END_OF_TEXT),
        (BASH, "<|endoftext|>", None),
        (None, "<|endoftext|>", None),
    ],
)
def test_end_of_turn_is_what_the_template_puts_after_an_answer(template, eos, expected):
    assert end_of_turn(tiny.tokenizer(template=template, eos=eos)) == expected


def test_generation_stops_at_the_end_of_a_turn(tmp_path):
    """A base model's end token is not its chat template's: generation would run on for ever."""
    model = tiny.llama(eos_token_id=tiny.END_OF_TEXT)
    path = luthier.save(model, tmp_path / "m", tiny.tokenizer(eos="<|endoftext|>"))
    with checks.collect() as lines:
        loaded, _ = luthier.load(path)
    assert loaded.generation_config.eos_token_id == [tiny.IM_END, tiny.END_OF_TEXT]
    assert any("added <|im_end|>" in line.detail for line in lines)


def test_pad_is_set_for_batches_and_for_generation(tmp_path):
    path = luthier.save(tiny.llama(pad_token_id=None), tmp_path / "m", tiny.tokenizer(pad="none"))
    model, tokenizer = luthier.load(path)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_folder_without_tokenizer_is_refused(tmp_path, tiny_llama):
    path = luthier.save(tiny_llama, tmp_path / "m")
    with pytest.raises(ModelError, match=r"has no tokenizer.*luthier\.save"):
        luthier.load(path)


def test_tokenizer_of_a_larger_model_is_refused(tmp_path, tiny_tokenizer):
    path = luthier.save(tiny.llama(vocab_size=300), tmp_path / "m", tiny_tokenizer)
    with pytest.raises(ModelError, match=r"ids up to \d+, but the model's embedding has 300 rows"):
        luthier.load(path)


def test_broken_tokenizer_file_is_named(tmp_path, tiny_llama, tiny_tokenizer):
    path = luthier.save(tiny_llama, tmp_path / "m", tiny_tokenizer)
    (path / "tokenizer.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(ModelError, match=r"tokenizer of .* cannot be loaded"):
        luthier.load(path)
