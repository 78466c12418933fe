"""The `openbook` command: finds the subcommand, keeps the contract of exit codes and one-line errors.

Exit 0: done. Exit 1: a check that was asked for failed. Exit 2: the user's input is wrong. Exit 130: interrupted.
Every failure is one line on stderr that starts with `openbook: `; only a bug shows a traceback.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from openbook.core.errors import CheckError, UserError, one_line, unknown_name

# Name of each subcommand (also its module in this package) and its line in `openbook --help`. The lines stand here too,
# so that help needs none of the modules behind them; a test keeps both equal.
COMMANDS = {
    "demo": "Check the bundled model, watch it solve five fresh problems, see its scores.",
    "chat": "Talk to a model in the terminal.",
    "run": "Give one prompt to a model and print its answer.",
    "serve": "Serve models: the OpenAI API, and a page to chat on.",
    "tasks": "List the tasks, or show a problem with its worked solution and its score.",
    "eval": "Score a model on tasks and write every item beside the summary.",
    "convert": "Write a model in another form, or work out what one takes of memory.",
    "build": "Make a model from nothing: tokenizer, data, training, evaluation, release.",
    "verify": "Check a release: its files, and if you ask for it, its training.",
}

EXIT_CHECK_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


class _InterruptedError(Exception):
    """Ctrl-C, with what the command has to say about it."""


class LazyGroup(click.Group):
    """A group whose subcommands are imported when they are called, never for the list of all."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names in the order in which a newcomer would want them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import `openbook.cli.<name>` and return its `command`; None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"openbook.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As in click, but an unknown name is answered with the nearest known one.

        Raises:
            UserError: there is no such command.
        """
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            raise unknown_name("command", args[0], COMMANDS, "`openbook --help` lists all")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand; click's own handling would print more than a line for these two."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _InterruptedError(str(error)) from error
        except BrokenPipeError:
            _silence_stdout()
            return EXIT_BROKEN_PIPE


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="openbook", message="openbook %(version)s")
def cli() -> None:
    """Openbook: a reasoning model that anyone can run, rebuild, measure and check.

    MODEL is a bundled name (nano), a folder, a GGUF file or a hub id (owner/name). `openbook COMMAND --help` says all
    about a command.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        arguments: what stands after `openbook` on the command line; None for the process's own.
    """
    _open_closed_streams()
    try:
        result = cli.main(arguments, prog_name="openbook", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        return _fail(_usage_line(error), EXIT_BAD_INPUT)
    except UserError as error:
        return _fail(str(error), EXIT_BAD_INPUT)
    except CheckError as error:
        return _fail(str(error), EXIT_CHECK_FAILED)
    except BrokenPipeError:
        _silence_stdout()
        return EXIT_BROKEN_PIPE
    except OSError as error:
        action = f"use {os.fspath(error.filename)!s}" if error.filename is not None else "go on"
        return _fail(str(one_line(error, action)), EXIT_BAD_INPUT)
    except _InterruptedError as error:
        return _fail(str(error) or "stopped", EXIT_INTERRUPTED)
    except (click.Abort, KeyboardInterrupt):
        return _fail("stopped", EXIT_INTERRUPTED)
    return result if isinstance(result, int) else 0


def _usage_line(error: click.ClickException) -> str:
    """Click's message as one line with the fix, in place of its block of usage."""
    message = error.format_message().rstrip(".")
    context = error.ctx if isinstance(error, click.UsageError) else None
    path = context.command_path if context else "openbook"
    joint = " see" if message.endswith("?") else "; see"
    return f"{message[:1].lower()}{message[1:]}{joint} `{path} --help`"


def _fail(message: str, status: int) -> int:
    line = " ".join(part.strip() for part in message.splitlines())
    print(f"openbook: {line}", file=sys.stderr, flush=True)
    return status


def _open_closed_streams() -> None:
    """Python sets a stream to None where the shell closed it (`<&-`): let it be empty, or go nowhere."""
    for name, flags in (("stdin", os.O_RDONLY), ("stdout", os.O_WRONLY), ("stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, flags), "r" if name == "stdin" else "w"))


def _silence_stdout() -> None:
    """The reader has gone (`openbook tasks | head`): let Python's flush at exit meet no error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
