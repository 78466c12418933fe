"""The blocks of README.md, what they print when they are run, and `--write`, which puts that into the page.

    python tests/readme_commands.py --write [LOG]

A console block holds commands behind `$ ` and what they print; lines typed into a chat stand behind `> `. A command
that ends with ` &` is a server: it runs, on a free port, while a Python block that names port 8000 does. What a Python
block prints stands in the text block behind it. A line `...` stands for any lines. `<!-- long -->` above a block
marks a build of minutes: the test runs it with a recipe of seconds; its times and losses come from LOG, the output of
that very build.
Between `<!-- facts -->` and `<!-- /facts -->` stands what the bundled release says of itself.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from openbook.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MICRO = "tests/release/micro.toml"
PORT = "8000"  # of servers, in the page
ELSEWHERE = "/home/you/openbook"  # in the page, for the folder of this checkout

BLOCK = re.compile(r"^(?P<long><!-- long -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
FACTS = re.compile(r"(?<=<!-- facts -->\n).*?(?=<!-- /facts -->)", re.DOTALL)
DURATION = re.compile(r"\b\d+:\d\d(:\d\d)?\b")
PERCENT_LINE = re.compile(r"^\w[\w ]* +\d+%  \S+ left\b.*$")  # of work that takes more than ten seconds


@dataclass(frozen=True)
class Block:
    """A fenced block; `start` and `end` are the places of its text in the page."""

    language: str
    text: str
    is_long: bool
    start: int
    end: int


@dataclass(frozen=True)
class Command:
    """One command of a console block and what the page shows under it."""

    line: str
    shown: str

    @property
    def is_server(self) -> bool:
        """Whether it goes on in the background."""
        return self.line.endswith(" &")

    @property
    def arguments(self) -> list[str]:
        """What stands behind `openbook`."""
        program, *arguments = shlex.split(self.line.removesuffix(" &"))
        assert program == "openbook", f"the console blocks of README.md run openbook only: {self.line}"
        return arguments

    @property
    def recipe(self) -> str:
        """The recipe of a build."""
        return next(argument for argument in self.arguments if argument.endswith(".toml"))

    @property
    def typed(self) -> list[str]:
        """The lines a user types into the chat."""
        return [line[2:] for line in self.shown.splitlines() if line.startswith("> ")]


def blocks(page: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    return [
        Block(match["language"], match["text"], bool(match["long"]), match.start("text"), match.end("text"))
        for match in BLOCK.finditer(page)
    ]


def commands(block: Block) -> list[Command]:
    """The commands of a console block."""
    parts = re.split(r"^\$ (.*)\n", block.text, flags=re.MULTILINE)
    assert not parts[0], f"a console block begins with a command: {parts[0]}"
    return [Command(line, shown) for line, shown in zip(parts[1::2], parts[2::2], strict=True)]


class Terminal(io.StringIO):
    """Standard output and error in one, as a user sees them."""

    def __init__(self, *, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


class Keyboard(io.StringIO):
    """Lines that are typed; each shows in the terminal when it is read."""

    def __init__(self, lines: list[str], terminal: Terminal) -> None:
        super().__init__("".join(f"{line}\n" for line in lines))
        self._terminal = terminal

    def isatty(self) -> bool:
        return True

    def readline(self, size: int | None = -1) -> str:
        line = super().readline(-1 if size is None else size)
        self._terminal.write(line)
        return line


def run(arguments: list[str], typed: list[str]) -> tuple[int, str]:
    """Exit status of a command and all that it prints."""
    terminal = Terminal(is_terminal=bool(typed))
    with (
        contextlib.redirect_stdout(terminal),
        contextlib.redirect_stderr(terminal),
        mock.patch.object(sys, "stdin", Keyboard(typed, terminal)),
    ):
        status = main(arguments)
    return status, terminal.getvalue().replace(str(ROOT), ELSEWHERE)


@contextlib.contextmanager
def serving(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """A server on a free port: the port, and what it printed, with the port of the page."""
    command = [sys.executable, "-m", "openbook.cli.main", *arguments, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            port = re.search(r"127\.0\.0\.1:(\d+)", line)
            assert port, f"the server did not start: {line}"
            yield port[1], line.replace(port[1], PORT)
        finally:
            process.terminate()


def run_python(code: str) -> str:
    """What a Python block prints, run by itself."""
    printed = io.StringIO()
    with contextlib.ExitStack() as stack:
        if f"127.0.0.1:{PORT}" in code:
            code = code.replace(PORT, stack.enter_context(serving(["serve", "nano"]))[0])
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "<README.md>", "exec"), {})
    return printed.getvalue().replace(str(ROOT), ELSEWHERE)


def run_command(command: Command) -> tuple[int, str]:
    """Exit status of a command and all that it prints; of a server, once it stands."""
    if not command.is_server:
        return run(command.arguments, command.typed)
    with serving(command.arguments) as (_, printed):
        return 0, printed


def run_build(command: Command) -> tuple[int, str]:
    """A long build, made with the micro recipe."""
    arguments = [MICRO if argument == command.recipe else argument for argument in command.arguments]
    return run([*arguments, "--no-compile", "--threads", "1", "--workers", "1"], [])


def lines_of_build(text: str, recipe: str) -> list[str]:
    """What a build of any recipe prints: each kind of line once, with recipe and stages unnamed."""
    from openbook.train.recipe import load_recipe

    for stage in load_recipe(ROOT / recipe).stages:
        text = re.sub(rf"^(data |train ){stage.name}\b", r"\1STAGE", text, flags=re.MULTILINE)
    return list(dict.fromkeys(without_times(text.replace(recipe, "RECIPE").replace("\n...\n", "\n"))))


def without_times(text: str) -> list[str]:
    """Lines to compare: times and widths are gone, and so are the lines of long work."""
    lines = [line for line in text.splitlines() if not PERCENT_LINE.match(line)]
    return [re.sub(r" +", " ", DURATION.sub("#:##", line)).rstrip() for line in lines]


def agrees(shown: str, printed: str) -> bool:
    """Whether a block shows what was printed, but for times; a line `...` in it stands for any lines."""
    have, want = without_times(printed), without_times(shown)
    if "..." not in want:
        return have == want
    place = want.index("...")
    head, tail = want[:place], want[place + 1 :]
    return len(have) >= len(head) + len(tail) and have[:place] == head and have[len(have) - len(tail) :] == tail


@contextlib.contextmanager
def workplace(folder: Path) -> Iterator[None]:
    """Work in `folder` as if it were the checkout; what a chat keeps and what a build writes stays in it."""
    for name in ("src", "recipes", "tests"):
        (folder / name).symlink_to(ROOT / name, target_is_directory=True)
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"}
    with (
        mock.patch.dict(os.environ, {"XDG_STATE_HOME": str(folder / "state"), "NO_COLOR": "1", **quiet}),
        contextlib.chdir(folder),
    ):
        yield


def facts() -> str:
    """The scores of the bundled release, and the command that gives them again; each figure is read from its files."""
    from openbook.checkpoint.locate import locate
    from openbook.core.files import read_json
    from openbook.core.progress import format_duration
    from openbook.release.facts import read_scores
    from openbook.train.recipe import load_recipe
    from openbook.verify.verification import verify

    release = locate("nano")
    scores = [score for score in read_scores(release / "provenance" / "evals") if score.effort == "medium"]
    run = read_json(release / "provenance" / "environment.json", "record of the run")
    max_tokens = load_recipe(release / "provenance" / "recipe.toml").eval.max_tokens
    flags = f"--threads {run['threads']} {'--compile' if run['is_compiled'] else '--no-compile'}"
    size = (release / "model.safetensors").stat().st_size
    lines = [
        f"nano has {verify(release).num_parameters:,} parameters, its weights {size / 1e6:.1f} MB. It was built by",
        f"`openbook build recipes/nano.toml {flags}` in {format_duration(run['seconds'])}",
        f"({run['machine']}). Its scores on {scores[0].samples} problems of each task, from seeds",
        "that training may not use:",
        "",
        "| task | accuracy | 95% interval |",
        "| --- | ---: | ---: |",
        *(f"| {s.task} | {s.accuracy:.1%} | {s.low:.1%} to {s.high:.1%} |" for s in scores),
        "",
        "The same table again:",
        f"`openbook eval nano nano --seed {scores[0].seed} --samples {scores[0].samples} --max-tokens {max_tokens}`.",
    ]
    return "\n".join(lines) + "\n"


def current(page: str, log: str | None = None) -> str:
    """The page with what its blocks print now, and with a long block from the log of its build, if there is one."""
    changes: list[tuple[int, int, str]] = []
    printed = ""
    for block in blocks(page):
        if block.language == "console":
            show = (lambda command: _from_log(command, log)) if block.is_long else _from_run
            changes.append((block.start, block.end, "".join(map(show, commands(block)))))
        elif block.language == "python":
            printed = run_python(block.text)
        elif block.language == "text":
            changes.append((block.start, block.end, printed))
    for start, end, text in reversed(changes):
        page = page[:start] + text + page[end:]
    return FACTS.sub(lambda _: facts(), page)


def _from_run(command: Command) -> str:
    status, printed = run_command(command)
    assert status == 0, f"{command.line} ends with {status}: {printed}"
    kept = agrees(command.shown, printed) or "\n...\n" in command.shown
    return f"$ {command.line}\n{command.shown if kept else printed}"


def _from_log(command: Command, log: str | None) -> str:
    """Of each step of a build the middle one of its lines, and its last; `...` for those left out."""
    if log is None:
        return f"$ {command.line}\n{command.shown}"
    lines: list[str] = []
    waiting: list[str] = []
    for line in log.splitlines():
        if PERCENT_LINE.match(line):
            waiting.append(line)
            continue
        if waiting:
            lines += [waiting[len(waiting) // 2], *["..."][: len(waiting) - 1]]
            waiting.clear()
        lines.append(line)
    # A build that was started elsewhere names its own folder.
    out = command.arguments[command.arguments.index("--out") + 1]
    return f"$ {command.line}\n" + re.sub(rf"\S*{out}\b", out, "\n".join(lines)) + "\n"


if __name__ == "__main__":
    assert sys.argv[1:2] == ["--write"] and len(sys.argv) <= 3, "usage: python tests/readme_commands.py --write [LOG]"
    log = Path(sys.argv[2]).read_text() if len(sys.argv) > 2 else None
    with tempfile.TemporaryDirectory() as folder, workplace(Path(folder)):
        README.write_text(current(README.read_text(), log))
