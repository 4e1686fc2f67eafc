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


class TestTemplate:
    """A4: whose chat template is used is said before training, on loading an adapter, and on saving."""

    @pytest.fixture
    def said(self, tmp_path):
        """What is said of a template in training and saving with it."""

        def say(template, own=tiny.CHATML):
            folder = luthier.save(tiny.llama(), tmp_path / "m", tiny.tokenizer(template=own))
            model, tokenizer = luthier.load(folder, dtype="float32")
            tokenizer.chat_template = template
            (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
            with checks.collect() as lines:
                options = {"args": {"output_dir": str(tmp_path / "out")}, "tokenizer": tokenizer}
                method = luthier.method("lora")(r=2)
                trainer = luthier.trainer("sft", model, tmp_path / "rows.jsonl", method=method, **options)
                luthier.save(trainer.model, tmp_path / "adapter", tokenizer)
            return [(line.when, line.value, line.detail) for line in lines if line.name == "chat template"]

        return say

    def test_of_the_models_own(self, said):
        assert said(tiny.CHATML) == [("before", "the model's own", ""), ("export", "the model's own", "")]

    def test_that_overrides_the_models_own(self, said, tmp_path):
        found = said(LLAMA2)
        assert [(when, value) for when, value, _ in found] == [
            ("before", "not the model's own"),
            ("export", "not the model's own"),
        ]
        assert found[0][2].startswith("it writes '[INST] Hello [/INST]', and the model's own '<|im_start|>us")
        with checks.collect() as lines:
            luthier.load(tmp_path / "adapter")
        assert ("before", "not the model's own") in [
            (line.when, line.value) for line in lines if line.name == "chat template"
        ]

    def test_of_a_model_that_has_none(self, said):
        assert said(LLAMA2, own=None)[0][:2] == ("before", "added: the model has none")
        assert said(None, own=None) == []

    def test_that_is_taken_away(self, said):
        assert said(None)[0][1] == "taken away: the model has one"


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
