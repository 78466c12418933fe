"""Writes docs/cli.md: the help of every command, as the command itself prints it (`make docs`)."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from openbook.cli.main import COMMANDS, cli
from openbook.core.files import write_text

HEADER = """\
# The command line

Written by `make docs` from the commands themselves; a test keeps it current.

Every command takes `--json` where it has a result: one JSON object on stdout, everything else on stderr. Exit status:
0 done, 1 a check that was asked for failed, 2 the input is wrong, 130 interrupted. An error is one line on stderr.
"""
WIDTH = 100  # columns, whatever the terminal


def render() -> str:
    """The whole page."""
    parts = [HEADER, _section("openbook", cli, [])]
    parts += [_section(f"openbook {name}", _command(name), [name]) for name in COMMANDS]
    return "\n".join(parts)


def _command(name: str) -> click.Command:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None, name
    return command


def _section(title: str, command: click.Command, path: list[str]) -> str:
    context = click.Context(cli, info_name="openbook", terminal_width=WIDTH)
    if path:
        context = click.Context(command, info_name=path[-1], parent=context, terminal_width=WIDTH)
    context.help_option_names = ["-h", "--help"]
    text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    return f"## {title}\n\n```text\n{text}\n```\n"


if __name__ == "__main__":
    write_text(Path(sys.argv[1]), render())
