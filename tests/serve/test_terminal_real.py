"""`internlm chat` as a person meets it: the command in a terminal, driven key by key."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import prompt_toolkit  # noqa: F401  without it some of these would be tests of something else
import pytest

from internlm.model.config import ModelConfig
from tests.processes import INTERNLM, environment
from tests.serve.parrots import ENDLESS, FakeServer, chain_model, export, serving

LONG = ModelConfig(vocab_size=300, hidden_size=16, num_layers=1, num_heads=2, ffn_size=16, context_length=20000)
COMMAND = [*INTERNLM[1:], "chat"]
WITHOUT_TOOLKIT = [
    "-c",
    "import sys; sys.modules['prompt_toolkit'] = None; from internlm.cli import main; sys.exit(main())",
    "chat",
]
PROMPT = r"\n(?:\x1b\[[?0-9;]*[a-zA-Z])*>(?: |\x08)"
"""With what a line editor sends around it."""
CTRL_C, ALT_ENTER, UP = "\x03", "\x1b\r", "\x1b[A"
Start = Callable[..., pexpect.spawn]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts the command in a terminal of 40 columns."""
    running = []

    def begin(*words: str, term: str = "xterm", command: list[str] = COMMAND, **changes: str) -> pexpect.spawn:
        # It asks the terminal where the cursor is, and nobody answers here.
        settings = {"TERM": term, "XDG_STATE_HOME": str(tmp_path / "state"), "PROMPT_TOOLKIT_NO_CPR": "1"}
        variables = environment(**settings | changes)
        for size in ("COLUMNS", "LINES"):  # what runs the tests may have its own
            variables.pop(size, None)
        child = pexpect.spawn(
            sys.executable,
            [*command, *words],
            cwd=str(tmp_path),
            env=variables,
            encoding="utf-8",
            timeout=60,
            dimensions=(24, 40),
        )
        # The prompt is waited for, so that keys need not be held back; each pause of these is 0.05 or 0.1 s else.
        child.delaybeforesend = child.ptyproc.delayafterclose = 0.01
        running.append(child)
        return child

    yield begin
    for child in running:
        child.close(force=True)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """Return a server that says <…> to what it is asked, so that its words are not taken for the echo of the keys."""
    with serving() as state:
        state.form = "<{}>"
        yield state


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose answers end with the context only."""
    return export(chain_model(ENDLESS, LONG), LONG, tmp_path_factory.mktemp("model") / "out")


def asked(server: FakeServer) -> list[str]:
    return [body["messages"][-1]["content"] for body in server.bodies]


def leave(child: pexpect.spawn) -> None:
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_a_conversation_with_a_model_is_stopped_saved_and_gone_on_with(
    start: Start, endless: Path, server: FakeServer, tmp_path: Path
) -> None:
    file = tmp_path / "talk.jsonl"
    child = start(str(endless), "--temperature", "0", "--max-tokens", "19000")
    child.expect("/exit leaves")
    child.expect(PROMPT)
    child.sendline("What?")
    child.expect(re.escape(ENDLESS * 3))
    child.send(CTRL_C)
    child.expect(r"\[stopped\]")
    child.sendline("/set max_tokens 6")
    child.expect("max_tokens         6")
    child.sendline("你好")
    child.expect(r"Be 4你\r\n")
    child.expect(r"cut after 6 tokens")
    child.sendline(f"/save {file.name}")
    child.expect("saved in talk.jsonl")
    child.sendline("/stats")
    child.expect(r"turns       2\r\n")
    child.expect(r"answer      6 tokens, length")
    child.expect(PROMPT)
    leave(child)
    record = json.loads(file.read_text(encoding="utf-8"))
    texts = [message["content"] for message in record["messages"]]
    assert texts[0] == "What?"
    assert texts[1].startswith(ENDLESS * 3)
    assert texts[2:] == ["你好", "Be 4你"]

    child = start("--url", server.url, term="dumb")
    child.expect(PROMPT)
    child.sendline("/load talk.jsonl")
    child.expect("2 turns loaded")
    child.sendline("/undo")
    child.expect(r"taken back: 你好")
    child.sendline("/set")
    child.expect(r"max_tokens         6\r\n")
    child.sendline("/retry")
    child.expect(r"<What\?>\r\n")
    child.sendline("/save")
    child.expect("saved in")
    child.send(CTRL_C)
    child.expect("/exit or Ctrl-D leaves")
    child.expect(PROMPT)
    leave(child)
    record = json.loads(file.read_text(encoding="utf-8"))
    assert [message["content"] for message in record["messages"]] == ["What?", "<What?>"]
    assert server.bodies[-1]["max_tokens"] == 6


@pytest.mark.parametrize("way", ["toolkit", "readline", "dumb"])
def test_several_lines_can_be_typed_everywhere(way: str, start: Start, server: FakeServer) -> None:
    command = COMMAND if way == "toolkit" else WITHOUT_TOOLKIT
    child = start("--url", server.url, term="dumb" if way == "dumb" else "xterm", command=command)
    child.expect(PROMPT)
    for line in ('"""', "/clear is 你好", "second"):
        child.sendline(line)
        child.expect(r"\n(?:\x1b\[[?0-9;]*[a-zA-Z])*\.\.\.")
    child.sendline('"""')
    child.expect("\r\nsecond>\r\n")
    child.sendline("one")
    child.expect("<one>\r\n")
    child.expect(PROMPT)
    leave(child)
    assert asked(server) == ["/clear is 你好\nsecond", "one"]


def test_alt_enter_begins_a_line_and_a_pasted_text_is_one_question(start: Start, server: FakeServer) -> None:
    child = start("--url", server.url)
    child.expect(PROMPT)
    child.send(f"first 中文{ALT_ENTER}second\r")
    child.expect("\r\nsecond>\r\n")
    child.expect(PROMPT)
    child.send("\x1b[200~third\nfourth\x1b[201~\r")
    child.expect("\r\nfourth>\r\n")
    child.expect(PROMPT)
    leave(child)
    assert asked(server) == ["first 中文\nsecond", "third\nfourth"]


@pytest.mark.parametrize("command", [COMMAND, WITHOUT_TOOLKIT], ids=["toolkit", "readline"])
def test_what_was_typed_comes_back_in_the_next_session_unless_that_is_off(
    command: list[str], start: Start, server: FakeServer, tmp_path: Path
) -> None:
    file = tmp_path / "state" / "internlm" / "chat_history.jsonl"
    child = start("--url", server.url, "--no-history", command=command)
    child.expect(PROMPT)
    child.sendline("secret")
    child.expect("<secret>\r\n")
    child.expect(PROMPT)
    leave(child)
    assert not file.exists()
    child = start("--url", server.url, command=command)
    child.expect(PROMPT)
    child.sendline("a question")
    child.expect("<a question>\r\n")
    child.expect(PROMPT)
    leave(child)
    assert file.read_text() == '"a question"\n'
    assert file.stat().st_mode & 0o777 == 0o600
    child = start("--url", server.url, command=command)
    child.expect(PROMPT)
    child.send(UP)
    child.expect("a question")
    child.send("\r")
    child.expect("<a question>\r\n")
    child.expect(PROMPT)
    leave(child)
    assert asked(server) == ["secret", "a question", "a question"]
    assert file.read_text() == '"a question"\n'


def test_ctrl_c_stops_the_answer_of_a_server_and_the_conversation_goes_on(start: Start, server: FakeServer) -> None:
    server.pause_s = 0.1
    child = start("--url", server.url)
    child.expect(PROMPT)
    child.sendline(" ".join(f"word{number}" for number in range(100)))
    child.expect("<word0 word1 word2")
    child.send(CTRL_C)
    child.expect(r"\[stopped\]")
    assert server.gone.wait(10)
    child.sendline("more")
    child.expect("<more>\r\n")
    child.expect(PROMPT)
    leave(child)
    kept = server.bodies[1]["messages"][1]["content"]
    assert kept.startswith("<word0 word1 word2")
    assert "word50" not in kept


def test_no_colour_is_used_where_none_is_wanted(start: Start, server: FakeServer) -> None:
    for changes, dim in (({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True)):
        child = start("--url", server.url, command=WITHOUT_TOOLKIT, **changes)
        child.expect(PROMPT)
        before = child.before
        child.sendline("/help")
        child.expect("kept")
        assert ("\x1b[2m" in before) == ("\x1b[2m" in child.before) == dim
        lines = re.sub("\x1b\\[[?0-9;]*[a-zA-Z]", "", child.before).splitlines()
        assert [line for line in lines if len(line) >= 40] == []
        child.expect(PROMPT)
        leave(child)


def test_answers_can_go_into_a_file_while_remarks_stay_on_the_terminal(
    start: Start, server: FakeServer, tmp_path: Path
) -> None:
    script = f"{shlex.join(INTERNLM)} chat --url {server.url} > {tmp_path / 'answers'}"
    child = start(command=["-c", "import os, sys; os.execvp('sh', ['sh', '-c', sys.argv[1]])", script])
    child.expect(PROMPT)
    child.sendline("one 你")
    child.expect(PROMPT)
    child.sendline("exit")
    child.expect("exit means /exit here")
    child.expect(pexpect.EOF)
    assert (tmp_path / "answers").read_text(encoding="utf-8") == "<one 你>\n"


def test_a_pipe_is_one_question_and_a_closed_input_is_an_error(server: FakeServer) -> None:
    command = [*INTERNLM, "chat", "--url", server.url]
    piped = subprocess.run(command, input=b"/clear\n\n\xff\n", capture_output=True, timeout=60)
    assert (piped.returncode, piped.stdout.decode(), piped.stderr) == (0, "</clear\n\n\ufffd>\n", b"")
    shell = f"{shlex.join(command)} <&-"
    closed = subprocess.run(shell, shell=True, capture_output=True, timeout=60)
    assert closed.returncode == 2
    assert b"no input to read a question from. Give -p TEXT." in closed.stderr


def test_ctrl_c_in_a_single_answer_ends_with_130_and_what_was_said(server: FakeServer) -> None:
    server.pause_s = 0.1
    command = [*INTERNLM, "chat", "--url", server.url, "-p", "word " * 200]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    said = child.stdout.read(10)
    child.send_signal(signal.SIGINT)
    rest, remarks = child.communicate(timeout=60)
    assert (child.returncode, remarks) == (130, b"[stopped]\n")
    assert re.fullmatch(r"<word( word)*\n", (said + rest).decode())
