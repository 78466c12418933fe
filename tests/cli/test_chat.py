"""`openbook chat` on a pipe and on a pseudo-terminal."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from openbook.cli.main import main
from openbook.engine.model import AnswerStream, Model, Prompt
from openbook.engine.request import SamplingParams
from openbook.tasks.base import Effort

ScriptedModel = Callable[[Callable[[str], str]], Model]

# The command, with a model slow enough to be interrupted: it counts, for ten seconds.
SLOW_CHAT = """
import sys, time
from openbook.engine.native_runner import NativeBatch
forward = NativeBatch.forward
def slow_forward(self, *arguments):
    time.sleep(0.1)
    return forward(self, *arguments)
NativeBatch.forward = slow_forward
from openbook.cli.main import main
sys.exit(main())
"""


def chat(
    lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[str, str]:
    """Type `lines` into a chat through a pipe; returns stdout and stderr, the introduction left out."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("".join(f"{line}\n" for line in lines).encode())))
    assert main(["chat", "any", *options]) == 0
    out, err = capsys.readouterr()
    return out, err.partition("Ctrl-D leaves.\n")[2]


@pytest.fixture
def echo(scripted_model: ScriptedModel, monkeypatch: pytest.MonkeyPatch) -> Model:
    """`Model.load` gives a model that answers with all it was told so far."""
    model = scripted_model(lambda prompt: f"<think>hm</think>[{prompt}]")
    monkeypatch.setattr(Model, "load", lambda *args, **options: model)
    return model


def test_it_says_at_the_start_what_the_model_was_trained_on(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["chat", str(tiny_folder)]) == 0
    assert capsys.readouterr() == (
        "",
        "tiny was trained on 3 kinds of problems: gcd, spell_backward, lcm.\n"
        "Asked for anything else, it may be wrong. `openbook tasks gcd` shows how a problem is put.\n"
        "/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.\n",
    )


def test_the_conversation_goes_on_until_reset(
    echo: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = chat(["a", "b", "", "/reset", "c"], monkeypatch, capsys)
    assert out == "[a]\n[a[a]b]\n[c]\n"
    assert err == "hm\nhm\n(the conversation is empty)\nhm\n"


def test_quit_ends_it_and_hidden_thinking_is_not_shown(
    echo: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(["a", " /quit ", "b"], monkeypatch, capsys, "--hide-thinking") == ("[a]\n", "")


def test_effort_changes_what_the_model_is_given(
    echo: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[str] = []
    stream_with = Model.stream_with

    def record(self: Model, prompt: Prompt, effort: Effort, params: SamplingParams) -> AnswerStream:
        given.append(effort)
        return stream_with(self, prompt, effort, params)

    monkeypatch.setattr(Model, "stream_with", record)
    _, err = chat(["a", "/effort low", "b", "/effort lo", "c"], monkeypatch, capsys, "--effort", "high")
    assert given == ["high", "low", "low"]
    assert "(effort low)\n" in err
    assert "openbook: unknown effort 'lo': did you mean 'low'? expected low, medium, high\n" in err


def test_help_and_unknown_commands(
    echo: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = chat(["/help", "/rest", "a"], monkeypatch, capsys)
    assert out == "[a]\n"
    assert "/reset                    forget the conversation\n" in err
    assert "openbook: unknown command '/rest': did you mean '/reset'? /help lists all\n" in err


def test_a_conversation_past_the_context_says_so_and_drops_nothing(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"Hello\n{'y' * 150}\n{'z' * 200}\n/reset\n{'z' * 200}\n"))
    assert main(["chat", str(tiny_folder), "--max-tokens", "8"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("openbook:")]
    assert len(lines) == 3
    for line in lines[:2]:
        assert "tokens and the model's context is 160 (prompt and answer): shorten the prompt, or /reset" in line
    assert lines[2] == (
        "openbook: the prompt has 203 tokens and the model's context is 160 (prompt and answer): shorten the prompt"
    )


def test_a_line_that_is_no_text_is_refused_and_the_next_one_answered(
    echo: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\nb\n"), encoding="utf-8"))
    assert main(["chat", "any"]) == 0
    out, err = capsys.readouterr()
    assert out == "[b]\n"
    assert "openbook: the prompt is not valid Unicode text at character 1: remove what stands there\n" in err


def test_json_prints_the_conversation_at_the_end(
    echo: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = chat(["a", "b"], monkeypatch, capsys, "--json")
    assert json.loads(out) == {
        "model": "scripted",
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "[a]"},
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "[a[a]b]"},
        ],
    }


def test_ctrl_c_before_an_answer_has_begun_stops_it(
    echo: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream_with = Model.stream_with

    def interrupted(self: Model, prompt: Prompt, effort: Effort, params: SamplingParams) -> AnswerStream:
        monkeypatch.setattr(Model, "stream_with", stream_with)
        raise KeyboardInterrupt

    monkeypatch.setattr(Model, "stream_with", interrupted)
    assert chat(["a", "b"], monkeypatch, capsys) == ("[b]\n", "(stopped)\nhm\n")


class Terminal:
    """A process on a pseudo-terminal.

    Args:
        arguments: its command line.
        environment: its environment variables.
        sigint: what it finds done about Ctrl-C; a process inherits it, so that of the tests must not show through.
    """

    def __init__(self, arguments: list[str], environment: dict[str, str], sigint: signal.Handlers) -> None:
        self._master, slave = pty.openpty()

        def become_a_terminal_process() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C reaches a process only on its controlling terminal
            signal.signal(signal.SIGINT, sigint)

        self.process = subprocess.Popen(
            arguments,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            preexec_fn=become_a_terminal_process,
        )
        os.close(slave)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, text: str, timeout_s: float = 30.0) -> str:
        """Read until `text` shows up; returns what came before it and drops both."""
        end_s = time.monotonic() + timeout_s
        while text not in self.seen:
            left_s = end_s - time.monotonic()
            assert left_s > 0, f"waited for {text!r}, saw {self.seen!r}"
            if select.select([self._master], [], [], left_s)[0]:
                try:
                    self.seen += os.read(self._master, 4096).decode(errors="replace")
                except OSError:  # the process has gone
                    assert text in self.seen, f"waited for {text!r}, saw {self.seen!r}"
        before, _, self.seen = self.seen.partition(text)
        return before

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self._master)


@pytest.fixture(params=[signal.SIG_DFL, signal.SIG_IGN], ids=["foreground", "background"])
def terminal(tiny_folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Terminal]:
    """A slow chat, as a shell starts it, and as one without job control starts what stands behind a `&`."""
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    terminal = Terminal([sys.executable, "-c", SLOW_CHAT, "chat", str(tiny_folder)], environment, request.param)
    yield terminal
    terminal.close()


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Terminal, tmp_path: Path) -> None:
    terminal.wait_for("> ")
    terminal.type("Hello\n")
    terminal.wait_for("Hello")
    terminal.wait_for("\n")  # readline has the line
    time.sleep(0.5)  # a few tokens of more than a hundred
    terminal.type("\x03")
    terminal.wait_for("(stopped)", timeout_s=30.0)
    terminal.wait_for("> ", timeout_s=5.0)

    # A signal between the prompt and readline's wait for a key is seen with the next key only: no human is that fast.
    terminal.type("half a line")
    terminal.wait_for("half a line", timeout_s=5.0)
    time.sleep(0.3)
    terminal.type("\x03")
    terminal.wait_for("(Ctrl-D or /quit leaves)", timeout_s=5.0)
    terminal.wait_for("> ", timeout_s=5.0)

    terminal.type("/effort high\n")
    terminal.wait_for("(effort high)", timeout_s=5.0)
    terminal.wait_for("> ", timeout_s=5.0)
    terminal.type("\x04")
    assert terminal.process.wait(timeout=10) == 0
    assert (tmp_path / "openbook" / "chat_history").read_text().splitlines()[-2:] == ["Hello", "/effort high"]
