"""A chat streams what `generate` gives, keeps each side's own conversation, and outlives an interruption."""

import io
import json

import peft
import pytest
import tiny
import torch
from rich.console import Console

from luthier.chat import Chat, base_of, open_chat
from luthier.cli import chat as cli
from luthier.errors import DataError, LuthierError, ModelError


@pytest.fixture
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture
def adapted():
    """A tiny model with an adapter that changes what it says."""
    model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def say(chat: Chat, text: str, pieces: list | None = None):
    kept = pieces if pieces is not None else []
    return chat.say(text, lambda side, piece: kept.append((side, piece)))


def oracle(model, tokenizer, messages: list[dict], count: int) -> str:
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_pieces_are_the_answer_that_generate_gives(tokenizer):
    model, pieces = tiny.llama(), []
    chat = Chat(model, tokenizer, max_new_tokens=12)
    [answer] = say(chat, "Where is my order?", pieces)
    expected = oracle(model, tokenizer, [{"role": "user", "content": "Where is my order?"}], 12)
    assert "".join(piece for _, piece in pieces) == expected
    assert answer.text == expected.strip()
    assert answer.ended == "length"
    assert answer.tokens == 12


def test_the_second_message_is_answered_in_the_light_of_the_first(tokenizer):
    model = tiny.llama()
    chat = Chat(model, tokenizer, system="Be brief.", max_new_tokens=8)
    [first] = say(chat, "Hello")
    [second] = say(chat, "And now?")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "And now?"},
    ]
    assert second.text == oracle(model, tokenizer, messages, 8).strip()


def test_an_end_token_ends_the_answer(tokenizer):
    model = tiny.llama()
    free = Chat(model, tokenizer, max_new_tokens=8)
    ids = []
    stop = free._ids([{"role": "user", "content": "Hi"}])
    ids = model.generate(torch.tensor([stop]), max_new_tokens=8, do_sample=False, pad_token_id=0)[
        0, len(stop) :
    ]
    chat = Chat(model, tokenizer, max_new_tokens=8, generation={"eos_token_id": int(ids[2])})
    [answer] = say(chat, "Hi")
    assert answer.ended == "end"
    assert answer.tokens == [int(i) for i in ids].index(int(ids[2])) + 1


class TestBase:
    def test_an_adapters_base_is_the_same_weights_without_it(self, adapted, tokenizer):
        chat = Chat(adapted, tokenizer, base=True, max_new_tokens=10)
        tuned, base = say(chat, "Hello")
        message = [{"role": "user", "content": "Hello"}]
        assert (tuned.side, base.side) == ("tuned", "base")
        assert base.text == oracle(tiny.llama(), tokenizer, message, 10).strip()
        assert tuned.text == oracle(adapted, tokenizer, message, 10).strip()
        assert tuned.text != base.text

    def test_each_side_remembers_its_own_answers(self, adapted, tokenizer):
        chat = Chat(adapted, tokenizer, base=True, max_new_tokens=6)
        say(chat, "One")
        answers = say(chat, "Two")
        for side, answer in zip(chat.sides, answers, strict=True):
            assert side.messages[-1]["content"] == answer.text
        assert chat.sides[0].messages[1] != chat.sides[1].messages[1]
        expected = oracle(tiny.llama(), tokenizer, chat.sides[1].messages[:3], 6).strip()
        assert answers[1].text == expected

    def test_a_model_without_an_adapter_has_no_base_inside(self, tokenizer):
        with pytest.raises(ModelError, match="no adapter"):
            Chat(tiny.llama(), tokenizer, base=True)

    def test_another_model_can_be_the_base(self, tokenizer):
        chat = Chat(tiny.llama(1), tokenizer, base=tiny.llama(0), max_new_tokens=6)
        _, base = say(chat, "Hello")
        assert (
            base.text == oracle(tiny.llama(0), tokenizer, [{"role": "user", "content": "Hello"}], 6).strip()
        )


class TestContext:
    def test_the_oldest_turns_are_dropped_and_counted(self, tokenizer):
        model = tiny.llama(max_position_embeddings=96)
        chat = Chat(model, tokenizer, system="Be brief.", max_new_tokens=16)
        dropped = [say(chat, f"Question number {i}, please?")[0].dropped for i in range(6)]
        assert dropped[0] == 0
        assert sum(dropped) > 0
        assert len(chat._ids(chat.sides[0].messages[:-1])) + 16 <= 96
        assert chat.sides[0].messages[0]["role"] == "user"
        assert "Be brief." in tokenizer.decode(chat._ids(chat.sides[0].messages[:-1]))

    def test_a_message_that_is_too_long_by_itself_is_refused_and_forgotten(self, tokenizer):
        chat = Chat(tiny.llama(max_position_embeddings=64), tokenizer, max_new_tokens=16)
        with pytest.raises(DataError, match=r"leaves 48 beside an answer of up to 16"):
            say(chat, "word " * 200)
        assert chat.sides[0].messages == []
        assert say(chat, "Hi")[0].tokens > 0


class TestInterruption:
    def interrupt_after(self, count: int, pieces: list):
        def write(side, piece):
            pieces.append((side, piece))
            if len(pieces) == count:
                raise KeyboardInterrupt

        return write

    def test_it_stops_the_answer_and_keeps_what_was_said(self, adapted, tokenizer):
        chat = Chat(adapted, tokenizer, base=True, max_new_tokens=40)
        pieces: list = []
        answers = chat.say("Hello", self.interrupt_after(3, pieces))
        assert [a.ended for a in answers] == ["stopped"]
        assert {side for side, _ in pieces} == {"tuned"}
        said = "".join(piece for _, piece in pieces).strip()
        assert chat.sides[0].messages[-1] == {"role": "assistant", "content": said}
        assert chat.sides[1].messages == []

    def test_the_session_goes_on_with_the_adapter_on(self, adapted, tokenizer):
        chat = Chat(adapted, tokenizer, base=True, max_new_tokens=20)
        seen: list = []

        def write(side, piece):
            seen.append(side)
            if side == "base":
                raise KeyboardInterrupt

        chat.say("Hello", write)
        chat.reset()
        tuned, _ = say(chat, "Again")
        assert tuned.text == oracle(adapted, tokenizer, [{"role": "user", "content": "Again"}], 20).strip()


class TestCommands:
    def test_reset_and_system_start_anew(self, tokenizer):
        chat = Chat(tiny.llama(), tokenizer, max_new_tokens=4)
        say(chat, "Hello")
        assert chat.command("/system You are a printer.") == "The system prompt is set. A new conversation."
        assert chat.sides[0].messages == []
        assert chat.command("/system") == "System prompt: You are a printer."
        say(chat, "Hello")
        chat.command("/reset")
        assert chat.sides[0].messages == []
        assert chat.system == "You are a printer."

    def test_help_names_every_command_and_quit_leaves(self, tokenizer):
        chat = Chat(tiny.llama(), tokenizer)
        assert all(name in (chat.command("/help") or "") for name in ("/system", "/reset", "/help", "/quit"))
        assert chat.command("/quit") is None

    def test_a_misspelt_command_is_answered_with_the_nearest(self, tokenizer):
        with pytest.raises(LuthierError, match="Did you mean '/reset'"):
            Chat(tiny.llama(), tokenizer).command("/rest")


def test_without_a_chat_template_the_text_goes_on():
    tokenizer = tiny.tokenizer(template=None)
    model = tiny.gpt2()
    chat = Chat(model, tokenizer, max_new_tokens=5)
    [answer] = say(chat, "The printer")
    ids = tokenizer("The printer", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert answer.text == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("make", [tiny.bert, tiny.t5])
def test_only_causal_models_chat(make, tokenizer):
    with pytest.raises(ModelError, match="causal language model"):
        Chat(make(), tokenizer)


class TestTerminal:
    def talk(self, text: str, chat: Chat, monkeypatch) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        out, err = io.StringIO(), io.StringIO()
        console = Console(file=out, soft_wrap=True)
        cli.talk(chat, cli.messages(console), console, Console(file=err, soft_wrap=True))
        return out.getvalue(), err.getvalue()

    def test_a_pipe_is_answered_line_by_line(self, tokenizer, monkeypatch):
        model = tiny.llama()
        out, err = self.talk(
            "Hello\n\n/reset\n/nope\nAgain\n", Chat(model, tokenizer, max_new_tokens=6), monkeypatch
        )
        for text in ("Hello", "Again"):
            assert oracle(model, tokenizer, [{"role": "user", "content": text}], 6).strip() in out
        assert "A new conversation." in err
        assert "no command '/nope'" in err
        assert "cut at 6 tokens" in err

    def test_quit_leaves_the_rest_unread(self, tokenizer, monkeypatch):
        chat = Chat(tiny.llama(), tokenizer, max_new_tokens=4)
        assert self.talk("/quit\nHello\n", chat, monkeypatch) == ("", "")

    def test_three_quotes_hold_a_message_of_several_lines(self, monkeypatch):
        monkeypatch.setattr("sys.stdin", io.StringIO('one\n"""\ntwo\n\nthree\n"""\nfour\n"""\nfive\n'))
        assert list(cli.messages(Console())) == ["one", "two\n\nthree", "four", "five"]

    def test_two_sides_are_named(self, adapted, tokenizer, monkeypatch):
        out, _ = self.talk("Hello\n", Chat(adapted, tokenizer, base=True, max_new_tokens=4), monkeypatch)
        assert out.index("tuned:") < out.index("base:")

    def test_a_wide_terminal_shows_columns(self, adapted, tokenizer):
        out = io.StringIO()
        console = Console(file=out, force_terminal=True, width=100)
        chat = Chat(adapted, tokenizer, base=True, max_new_tokens=4)
        answers = cli._shown(chat, "Hello", console)
        assert [a.side for a in answers] == ["tuned", "base"]
        assert any("tuned" in line and "base" in line for line in out.getvalue().splitlines())


class TestByName:
    @pytest.fixture
    def folders(self, tmp_path, tokenizer):
        """A base, and a run that tuned it whole."""
        for seed, folder in ((0, tmp_path / "base"), (1, tmp_path / "run" / "01-tune" / "model")):
            tiny.llama(seed).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        recipe = {"name": "run", "model": {"name": str(tmp_path / "base")}}
        (tmp_path / "run" / "run.json").write_text(json.dumps({"recipe": recipe}))
        return tmp_path

    def test_the_base_of_a_run_is_what_it_started_from(self, folders, tokenizer):
        for name in ("run", "run/01-tune", "run/01-tune/model"):
            assert base_of(str(folders / name)) == str(folders / "base")
        chat = open_chat(str(folders / "run"), base=True, max_new_tokens=5)
        tuned, base = say(chat, "Hello")
        message = [{"role": "user", "content": "Hello"}]
        assert tuned.text == oracle(tiny.llama(1), tokenizer, message, 5).strip()
        assert base.text == oracle(tiny.llama(0), tokenizer, message, 5).strip()

    def test_a_model_of_unknown_origin_is_refused_a_base(self, folders):
        with pytest.raises(ModelError, match="does not say which model"):
            open_chat(str(folders / "base"), base=True)
