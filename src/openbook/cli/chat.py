"""`openbook chat`: talk to a model in the terminal."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from openbook.cli.options import (
    EFFORTS,
    cache_option,
    dtype_option,
    effort_option,
    json_option,
    model_argument,
    print_json,
    profile_option,
    seed_option,
)
from openbook.cli.stream_view import StreamView
from openbook.core.errors import UserError, unknown_name

if TYPE_CHECKING:
    from openbook.engine.choices import CacheKind, Dtype, Profile
    from openbook.engine.model import Message, Model
    from openbook.engine.request import SamplingParams
    from openbook.tasks.base import Effort

HELP = """\
/effort low|medium|high   how much the model may think
/image FILE               show an image with the next question
/reset                    forget the conversation
/help                     this list
/quit                     leave (as Ctrl-D does)
Ctrl-C stops an answer; a stopped answer stays in the conversation as far as it got."""

PROMPT = "> "
MAX_HISTORY_LINES = 1000


@contextlib.contextmanager
def _ctrl_c_interrupts() -> Iterator[None]:
    """On a terminal Ctrl-C raises KeyboardInterrupt, whatever started the chat.

    A shell without job control (a script, CI) starts what it puts behind with `&` with SIGINT ignored. Every process
    below inherits that, and Python then installs no handler: the terminal would echo ^C and the answer go on.
    """
    if not sys.stdin.isatty() or signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@click.command("chat", short_help="Talk to a model in the terminal.")
@model_argument(default="nano")
@effort_option()
@click.option("--show-thinking/--hide-thinking", default=True, show_default=True, help="Print the thinking, dimmed.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the most likely token.")
@seed_option(None, "Random numbers at a temperature above 0; without it they differ on every run.")
@click.option("--max-tokens", type=int, help="Most tokens an answer, thinking included.  [default: up to the context]")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@profile_option
@cache_option
@dtype_option
@json_option
@_ctrl_c_interrupts()
def command(
    model: str,
    effort: Effort,
    show_thinking: bool,
    temperature: float,
    seed: int | None,
    max_tokens: int | None,
    device: str,
    profile: Profile | None,
    cache: CacheKind | None,
    dtype: Dtype | None,
    as_json: bool,
) -> None:
    """Talk to MODEL in the terminal. Lines that start with / are commands; /help lists them.

    Without a terminal it answers each line of standard input; with --json it prints the conversation at the end.
    """
    from openbook.engine.model import Model, resolve_seed
    from openbook.engine.request import SamplingParams

    params = SamplingParams(temperature=temperature, seed=resolve_seed(seed, temperature), max_tokens=max_tokens)
    loaded = Model.load(model, profile=profile, device=device, dtype=dtype, cache=cache)
    if loaded.is_base:
        raise UserError(
            f"the model {loaded.name} has no chat template, it continues texts: use `openbook run {model} TEXT`, or a "
            "model made for chat"
        )
    view = StreamView(show_thinking=show_thinking, answer_stream=sys.stderr if as_json else None)
    conversation = Conversation(loaded, effort, params, view)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # one bad line must not take the rest along
    _say(introduction(loaded))
    with _line_history() if sys.stdin.isatty() else contextlib.nullcontext():
        talk(conversation)
    if as_json:
        print_json({"model": loaded.name, "messages": conversation.messages})


class Conversation:
    """The messages so far, and what a line does to them."""

    def __init__(self, model: Model, effort: Effort, params: SamplingParams, view: StreamView) -> None:
        self._model, self._effort, self._params, self._view = model, effort, params, view
        self.messages: list[Message] = []
        self._image_parts: list[Mapping[str, Any]] = []  # for the next question
        self.is_over = False

    def handle(self, line: str) -> None:
        """Obey a command, or answer a question.

        Raises:
            UserError: an unknown command, a wrong effort, or a conversation that no longer fits into the context.
        """
        line = line.strip()
        if line.startswith("/"):
            self._obey(*line.split(maxsplit=1))
        elif line:
            self._ask(line)

    def _obey(self, name: str, argument: str = "") -> None:
        if name == "/effort":
            if argument not in EFFORTS:
                raise unknown_name("effort", argument, EFFORTS, f"expected {', '.join(EFFORTS)}")
            self._effort = cast("Effort", argument)
            _say(f"(effort {argument})")
        elif name == "/image":
            self._show_image(argument)
        elif name == "/reset":
            self.messages.clear()
            self._image_parts.clear()
            _say("(the conversation is empty)")
        elif name == "/help":
            _say(HELP)
        elif name == "/quit":
            self.is_over = True
        else:
            raise unknown_name("command", name, ["/effort", "/image", "/reset", "/help", "/quit"], "/help lists all")

    def _show_image(self, file: str) -> None:
        from openbook.tokenizer.images import image_part

        if not file.strip():
            raise UserError("/image needs the name of a file: /image cat.png")
        self._image_parts.append(image_part(Path(file.strip()).expanduser()))
        _say(f"({len(self._image_parts)} with the next question)")

    def _ask(self, question: str) -> None:
        from openbook.tokenizer.images import user_message

        messages: list[Message] = [*self.messages, user_message(question, self._image_parts)]
        self._image_parts = []
        try:
            stream = self._model.stream_with(messages, self._effort, self._params)
        except UserError as error:
            raise UserError(f"{error}, or /reset the conversation" if self.messages else str(error)) from error
        try:
            self._view.show(stream)
        except KeyboardInterrupt:
            _say("(stopped)")
        answer = stream.answer
        if answer.finish_reason == "length":
            _say(f"(cut off after {answer.usage.completion_tokens:,} tokens)")
        if answer.text:
            self.messages = [*messages, {"role": "assistant", "content": answer.text}]


def introduction(model: Model) -> str:
    """What a user should know before the first question."""
    if tasks := model.tasks:
        trained = (
            f"{model.name} was trained on {len(tasks)} kinds of problems: {', '.join(tasks)}.\n"
            f"Asked for anything else, it may be wrong. `openbook tasks {tasks[0]}` shows how a problem is put."
        )
    else:
        trained = f"{model.name} is not one of ours: what it was trained on is not recorded, and it may be wrong."
    return f"{trained}\n/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves."


def talk(conversation: Conversation) -> None:
    """Read lines until the end of the input or /quit."""
    while not conversation.is_over:
        notice = "\n(Ctrl-D or /quit leaves)"
        try:
            line = _read_line()
            if line is None:
                return
            notice = "(stopped)"  # an answer that has not begun: the first question takes a moment of preparation
            conversation.handle(line)
        except UserError as error:
            _say(f"openbook: {error}")
        except KeyboardInterrupt:
            _say(notice)


def _read_line() -> str | None:
    """The next line, or None at the end of the input."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        if sys.stdin.isatty():  # the answers go to a file, where input() would put its prompt too
            click.echo(PROMPT, nl=False, err=True)
        return sys.stdin.readline() or None
    try:
        return input(PROMPT)
    except EOFError:
        _say("")
        return None


def _say(text: str) -> None:
    """Everything but answers goes to stderr, so that a pipe gets the answers alone."""
    click.echo(text, err=True)


def _state_dir() -> Path:
    """Where the lines typed are kept (XDG base directory specification)."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "openbook"


@contextlib.contextmanager
def _line_history() -> Iterator[None]:
    """Line editing, with the lines of earlier chats; a history that cannot be kept disturbs no chat."""
    import readline

    path = _state_dir() / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        readline.set_history_length(MAX_HISTORY_LINES)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
