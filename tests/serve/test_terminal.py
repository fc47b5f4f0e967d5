"""`internlm chat`: turns, commands, interrupts and files, with a scripted answerer."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Generator, Sequence
from pathlib import Path

import pytest

from internlm.data.formats import Conversation, read_samples
from internlm.errors import DataError, EngineError, StorageError, UsageError
from internlm.serve.chat.answer import Facts, Settings
from internlm.serve.chat.conversation import Chat
from internlm.serve.chat.lines import InputHistory
from internlm.serve.chat.terminal import COMMANDS, Screen, Terminal, say
from internlm.text.chat import Message
from tests.serve.parrots import Parrot


class Talk:
    """A terminal whose lines are a script."""

    def __init__(self, parrot: Parrot, settings: Settings | None = None, system: str | None = None) -> None:
        self.out, self.remarks = io.StringIO(), io.StringIO()
        self.screen = Screen(self.out, self.remarks)
        self.chat = Chat(parrot, settings, system, self.screen.note)
        self.inputs = InputHistory(None)

    def __call__(self, *lines: str | type[BaseException]) -> str:
        """Type lines (or what a key raises), and return the answers shown since the last call."""
        script = iter(lines)

        def read(prompt: str) -> str:
            line = next(script, EOFError)
            if isinstance(line, str):
                return line
            raise line

        before = len(self.out.getvalue())
        Terminal(self.chat, self.screen, self.inputs).converse(read)
        return self.out.getvalue()[before:]

    @property
    def notes(self) -> str:
        return self.remarks.getvalue()


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str) -> Message:
    return Message("assistant", text)


def test_every_question_sees_the_turns_before_it() -> None:
    parrot = Parrot("It is 4.", "And now 5.")
    assert Talk(parrot, system="Be brief.")("What?", "More?") == "It is 4.\nAnd now 5.\n"
    system = Message("system", "Be brief.")
    assert parrot.asked == [
        [system, user("What?")],
        [system, user("What?"), assistant("It is 4."), user("More?")],
    ]


@pytest.mark.parametrize(("clear", "leave"), [("/clear", "/exit"), ("end", "exit"), (" /clear ", "exit ")])
def test_clear_forgets_and_exit_leaves_also_in_the_words_of_lmdeploy(clear: str, leave: str) -> None:
    parrot = Parrot("one", "two", "never")
    talk = Talk(parrot)
    assert talk("a", clear, "b", leave, "c") == "one\ntwo\n"
    assert parrot.asked[1] == [user("b")]
    assert ('"""end""" asks it' in talk.notes) == (clear == "end")


def test_help_names_every_command_at_any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in ("40", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        talk = Talk(Parrot())
        talk("/help")
        assert all(name in talk.notes for name in COMMANDS)
        assert max(map(len, talk.notes.splitlines())) < int(columns)


def test_unknown_commands_ask_nothing_and_paths_are_questions() -> None:
    parrot = Parrot("reply", "reply")
    talk = Talk(parrot)
    talk("/cleer", "/wxyz", "  ", "/usr/bin is what?", "/undo it", "/ is a path too")
    assert "no such command: /cleer. Did you mean '/clear'? /help lists them" in talk.notes
    assert "no such command: /wxyz. /help lists them" in talk.notes
    assert "/undo: nothing stands after this command (got 'it')" in talk.notes
    assert [asked[-1].content for asked in parrot.asked] == ["/usr/bin is what?", "/ is a path too"]


def test_retry_asks_again_and_replaces_the_answer() -> None:
    parrot = Parrot("one", "two", "three")
    talk = Talk(parrot, Settings(seed=7))
    assert talk("a", "b", "/retry") == "one\ntwo\nthree\n"
    assert parrot.asked[2] == parrot.asked[1] == [user("a"), assistant("one"), user("b")]
    assert talk.chat.history == [user("a"), assistant("one"), user("b"), assistant("three")]
    assert [settings.seed for settings in parrot.settings] == [7, 8, 9], "or it would say the same again"


def test_retry_without_a_question_says_so() -> None:
    talk = Talk(Parrot("one"))
    talk("/retry", "a", "/undo", "/retry")
    assert talk.notes.count("there is no question to ask again") == 2


def test_a_failed_question_leaves_the_conversation_as_it_was_and_can_be_asked_again() -> None:
    parrot = Parrot("one", EngineError("half an answer"), EngineError("broken"), "two")
    talk = Talk(parrot)
    shown = talk("a", "b")
    assert shown == "one\nhalf an answer\n", "what came of it was shown"
    assert talk.chat.history == [user("a"), assistant("one")]
    talk("/retry")
    assert talk.chat.history == [user("a"), assistant("one")]
    talk("/retry")
    assert talk.chat.history == [user("a"), assistant("one"), user("b"), assistant("two")]
    assert "[half an answer]" in talk.notes


def test_a_retry_that_fails_keeps_the_answer_before() -> None:
    talk = Talk(Parrot("one", EngineError("broken")))
    talk("a", "/retry")
    assert talk.chat.history == [user("a"), assistant("one")]


def test_undo_takes_back_the_last_turn() -> None:
    parrot = Parrot("one", "two", "three")
    talk = Talk(parrot)
    talk("a", "你" * 100, "/undo", "c", "/undo", "/undo", "/undo")
    assert parrot.asked[2] == [user("a"), assistant("one"), user("c")]
    assert f"[taken back: {'你' * 59}…]" in talk.notes
    assert "there is no turn to take back" in talk.notes
    assert talk.chat.history == []


def test_the_system_message_can_be_shown_changed_and_taken_off() -> None:
    parrot = Parrot("one", "two", "three")
    talk = Talk(parrot)
    talk("/system", "/system Be  brief.", "a", "/system", "/system none", "b")
    assert "[system message: the chat format's own]" in talk.notes
    assert talk.notes.count("[system message: Be  brief.]") == 2
    assert parrot.asked[0] == [Message("system", "Be  brief."), user("a")]
    assert parrot.asked[1] == [user("a"), assistant("one"), user("b")]


def test_settings_can_be_shown_and_changed() -> None:
    parrot = Parrot("one", "two", "three")
    talk = Talk(parrot, Settings(temperature=0.5))
    talk("/set", "/set temperature 0", "/set top_k=5", "/set seed  3", '/set stop ["a", "b c"]', "x")
    assert "temperature        0.5\n" in talk.notes
    assert "temperature        0\n" in talk.notes
    assert "seed               none\n" in talk.notes
    assert parrot.settings[0] == Settings(temperature=0, top_k=5, seed=3, stop=("a", "b c"))
    talk("/set stop ###", "/set seed none", "/set top_p .5", "/set temperature default", "y")
    assert parrot.settings[1] == Settings(top_k=5, top_p=0.5, stop=("###",))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set temprature 1", "no such setting (got 'temprature'); allowed: temperature, "),
        ("/set temprature", "Did you mean 'temperature'?"),
        ("/set temperature hot", "temperature: is no number (got 'hot')"),
        ("/set temperature -1", "temperature: is out of range"),
        ("/set top_k 1.5", "top_k: is no whole number (got 1.5)"),
        ('/set stop ["a", 1]', "stop: is no text, and no list of texts"),
        ('/set stop ["a"', "stop: is no JSON"),
    ],
)
def test_a_wrong_setting_changes_nothing(line: str, message: str) -> None:
    talk = Talk(Parrot())
    talk(line)
    assert message in talk.notes
    assert talk.chat.settings == Settings()


def test_a_saved_conversation_goes_on_in_another_chat(tmp_path: Path) -> None:
    file = tmp_path / "new" / "my talk.jsonl"
    talk = Talk(Parrot("one\u2028", "二 \x1b"), Settings(temperature=0.3, seed=5, stop=("###",)), system="Be brief.")
    talk("a", '"""', "line\tone", "line two", '"""', f"/save {file}")
    assert f"[saved in {file}]" in talk.notes
    parrot = Parrot("three")
    other = Talk(parrot)
    other(f"/load {file}", "c", "/save", "/load")
    assert f"[2 turns loaded from {file}]" in other.notes
    assert f"[3 turns loaded from {file}]" in other.notes, "the file is known by now"
    assert other.chat.history[:4] == talk.chat.history
    assert other.chat.history[2] == user("line\tone\nline two")
    assert parrot.asked[0][0] == Message("system", "Be brief.")
    assert parrot.settings[0] == Settings(temperature=0.3, seed=5 + 2, stop=("###",)), "the random stream goes on"
    assert file.read_text(encoding="utf-8").count("\n") == 1


def test_a_saved_conversation_can_be_trained_on(tmp_path: Path) -> None:
    talk = Talk(Parrot("one", "two"), system="Be brief.")
    talk("a", "b", f"/save {tmp_path / 'talk.jsonl'}")
    (sample,) = read_samples(tmp_path / "talk.jsonl")
    assert isinstance(sample, Conversation)
    assert list(sample.messages) == [Message("system", "Be brief."), *talk.chat.history]


def test_only_saved_conversations_are_written_over(tmp_path: Path) -> None:
    file = tmp_path / "main.py"
    file.write_text("print()\n")
    talk = Talk(Parrot("one"))
    talk("a", f"/save {file}", f"/save {tmp_path}", "/save", f"/save {file}/x", f"/save {'x' * 300}")
    assert file.read_text() == "print()\n"
    assert talk.notes.count("exists and is no saved conversation. Choose another name.") == 2
    assert "/save: a file is wanted. Say /save FILE." in talk.notes
    assert len(list(tmp_path.iterdir())) == 1
    talk(f"/save {tmp_path / 'talk'}")
    talk.chat.clear()
    talk(f"/save {tmp_path / 'talk'}")
    assert json.loads((tmp_path / "talk").read_text())["messages"] == []


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, StorageError),
        (b"", DataError),
        (b"\xff\xfe", DataError),
        (b"[" * 100000, DataError),
        (b"{}\n{}\n", DataError),
        (b'{"messages": 3}', DataError),
        (b'{"messages": [3]}', DataError),
        (b'{"messages": [{"role": "user", "content": "a"}]}', DataError),
        (b'{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}', DataError),
        (b'{"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": "b"}]}', DataError),
        (b'{"messages": [], "settings": 1}', DataError),
        (b'{"messages": [], "answers": -1}', DataError),
        (b'{"messages": [], "settings": {"temprature": 1}}', UsageError),
        (b'{"messages": [], "settings": {"temperature": "1"}}', UsageError),
        (b'{"messages": [], "settings": {"seed": true}}', UsageError),
        (b'{"messages": [], "settings": {"temperature": -1}}', EngineError),
    ],
)
def test_what_is_no_saved_conversation_changes_nothing(
    content: bytes | None, error: type[Exception], tmp_path: Path
) -> None:
    talk = Talk(Parrot("one"), Settings(temperature=0.1), system="x")
    talk("a")
    if content is not None:
        (tmp_path / "talk").write_bytes(content)
    with pytest.raises(error):
        talk.chat.load(tmp_path / "talk")
    assert (talk.chat.history, talk.chat.system) == ([user("a"), assistant("one")], "x")
    assert talk.chat.settings == Settings(temperature=0.1)


@pytest.mark.parametrize("content", ["", "One moment.", None])
def test_a_conversation_with_calls_of_tools_is_refused_with_a_word(content: str | None, tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": content, "tool_calls": [call]}]
    (tmp_path / "talk").write_text(json.dumps({"messages": messages}))
    with pytest.raises(DataError, match=r"message 2: belongs to a call of a tool.*`internlm serve` has tools"):
        Talk(Parrot("one")).chat.load(tmp_path / "talk")


def test_stats_tell_of_the_last_answer_and_the_context() -> None:
    talk = Talk(Parrot("one two three", length=100))
    talk("/stats", "a", "/stats")
    before, after = talk.notes.split("turns")[1:]
    assert before.split() == ["0", "model", "parrot"]
    assert "prompt      10 tokens, 4 cached\n" in after
    assert "answer      3 tokens, stop\n" in after
    assert "context     13 of 100 (13%) tokens used\n" in after
    assert "tokens/s" in after
    assert "first text  after 0.0" in after


def test_quoted_lines_are_one_question_and_never_a_command() -> None:
    parrot = Parrot(*["ok"] * 4)
    talk = Talk(parrot)
    talk('"""', "/clear", "", "  b ", '"""', '"""/exit"""', '"""a', 'b"""  ', '"""', "c", '"""')
    assert [asked[-1].content for asked in parrot.asked] == ["/clear\n\n  b ", "/exit", "a\nb", "c"]
    assert talk.inputs.texts == ["/clear\n\n  b ", "/exit", "a\nb", "c"]


def test_ctrl_c_at_the_prompt_drops_what_was_typed_and_says_how_to_leave() -> None:
    parrot = Parrot("one")
    talk = Talk(parrot)
    talk('"""', "lost", KeyboardInterrupt, "a", '"""', "lost too")
    assert [asked[-1].content for asked in parrot.asked] == ["a"]
    assert "/exit or Ctrl-D leaves" in talk.notes


def test_the_oldest_turns_are_dropped_when_the_context_is_full_and_that_is_said() -> None:
    talk = Talk(Parrot("one", "two", "three", turns=1))
    assert talk("a", "b", "c") == "one\ntwo\nthree\n"
    assert talk.notes == "[the context is full: the oldest 1 turn dropped]\n"
    assert talk.chat.history == [user("b"), assistant("two"), user("c"), assistant("three")]
    talk.chat.answerer = parrot = Parrot("four", turns=0)
    talk("d")
    assert parrot.asked == [[user("d")]]
    assert "the oldest 2 turns dropped" in talk.notes


class Interrupted(Parrot):
    """Hears Ctrl-C after each of its words but the first."""

    def answer(self, messages: Sequence[Message], settings: Settings) -> Generator[str]:
        for number, piece in enumerate(super().answer(messages, settings)):
            if number:
                os.kill(os.getpid(), signal.SIGINT)
            yield piece


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said() -> None:
    before = signal.getsignal(signal.SIGINT)
    talk = Talk(Interrupted("one two three four", "fine"))
    assert talk("count", "more") == "one two\nfine\n"
    assert talk.chat.history[1] == assistant("one two")
    assert talk.notes == "[stopped]\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_an_answer_that_ctrl_c_breaks_off_by_an_exception_is_kept_too() -> None:
    class Blocked(Interrupted):
        def interrupt(self) -> None:
            raise KeyboardInterrupt

    talk = Talk(Blocked("one two three four", "fine"))
    say(talk.chat, talk.chat.answer("count"), talk.screen)
    assert talk("more") == "fine\n"
    assert talk.chat.history[:2] == [user("count"), assistant("one")]
    assert talk.notes == "[stopped]\n"


def test_a_second_ctrl_c_ends_the_answer_at_once_and_the_chat_goes_on() -> None:
    class Deaf(Interrupted):
        def interrupt(self) -> None:
            pass

    before = signal.getsignal(signal.SIGINT)
    talk = Talk(Deaf("one two three four", "fine"))
    assert talk("count", "more") == "one two\nfine\n"
    assert talk.chat.history[1] == assistant("one two")
    pieces = talk.chat.answerer.lines = ["one two three four"]  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        say(talk.chat, talk.chat.answer("count"), talk.screen)
    assert not pieces
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("reason", ["timeout", "content_filter"])
def test_an_answer_that_the_server_ends_early_is_kept_with_a_note(reason: str) -> None:
    class Ended(Parrot):
        def answer(self, messages: Sequence[Message], settings: Settings) -> Generator[str]:
            yield from super().answer(messages, settings)
            self.facts = Facts(reason)

    talk = Talk(Ended("one"))
    talk("a")
    assert talk.chat.history == [user("a"), assistant("one")]
    assert talk.notes == f"[the answer ended early: {reason}]\n"


def test_control_characters_do_not_reach_the_terminal() -> None:
    talk = Talk(Parrot("a\x1b[2J\tb\nc\x07\x9b", EngineError("\x1b[2J")))
    assert talk("x") == "a[2J\tb\nc\n"
    assert talk.chat.history[1].content == "a\x1b[2J\tb\nc\x07\x9b"
    talk("y", "/system \x1b]0;title\x07")
    assert "\x1b" not in talk.notes


def test_remarks_stand_on_lines_of_their_own_and_are_dim_only_where_colours_are_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Tty(io.StringIO):
        def isatty(self) -> bool:
            return True

    def shown(**environment: str) -> str:
        for name in ("NO_COLOR", "TERM"):
            monkeypatch.setenv(name, environment.get(name, ""))
        both = Tty()
        chat = Chat(Parrot(""), note=(screen := Screen(both, both)).note)
        screen.write("half a line")
        say(chat, chat.answer("x"), screen)
        return both.getvalue()

    assert shown(TERM="xterm") == "half a line\n\x1b[2m[the answer is empty]\x1b[0m\n"
    for environment in ({"TERM": "xterm", "NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert shown(**environment) == "half a line\n[the answer is empty]\n"


def test_text_that_is_no_unicode_is_mended_before_it_is_asked() -> None:
    parrot = Parrot("one")
    Talk(parrot)("a\udcffb\0c")
    assert parrot.asked[0] == [user("a?bc")]


def test_halves_of_characters_in_an_answer_are_mended_and_can_be_saved(tmp_path: Path) -> None:
    talk = Talk(Parrot("\ud83d\ude00 \ud800"))
    talk("smile", f"/save {tmp_path / 'talk'}")
    assert talk.chat.history[1] == assistant("\U0001f600 ?")
    assert json.loads((tmp_path / "talk").read_text(encoding="utf-8"))["messages"][1]["content"] == "\U0001f600 ?"


def test_ctrl_c_between_reading_and_answering_keeps_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk(Parrot("one", "two"))

    def add(text: str) -> None:
        if text == "pressed":
            raise KeyboardInterrupt

    monkeypatch.setattr(talk.inputs, "add", add)
    talk("a", "pressed", "b")
    assert [message.content for message in talk.chat.history] == ["a", "one", "b", "two"]


@pytest.mark.parametrize("line", ["/save a\0b", "/load a\0b", f"/save {'x' * 5000}", "/load /", "/save /"])
def test_a_name_that_is_no_file_s_is_a_remark(line: str) -> None:
    talk = Talk(Parrot("one", "two"))
    assert talk("a", line, "b") == "one\ntwo\n"
    assert "[forgotten" not in talk.notes
    assert talk.notes.count("[") == 1
