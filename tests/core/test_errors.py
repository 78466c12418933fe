"""The words of errors: what was given, what was expected, the fix."""

from __future__ import annotations

import errno
import os

import pytest

from openbook.core.errors import UserError, one_line, unknown_name


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("gdc", "unknown task 'gdc': did you mean 'gcd'? `openbook tasks` lists all"),
        ("GCD", "unknown task 'GCD': did you mean 'gcd'? `openbook tasks` lists all"),
        ("chess", "unknown task 'chess': `openbook tasks` lists all"),
        ("", "unknown task '': `openbook tasks` lists all"),
    ],
)
def test_an_unknown_name_comes_with_the_nearest_known_one(given: str, line: str) -> None:
    error = unknown_name("task", given, ["lcm", "gcd", "chain_sum"], "`openbook tasks` lists all")
    assert isinstance(error, UserError)
    assert str(error) == line


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "free some space and run the command again (a build with --resume)"),
        (errno.EDQUOT, "free some space and run the command again (a build with --resume)"),
        (errno.EFBIG, "free some space and run the command again (a build with --resume)"),
        (errno.EACCES, "check the permissions of that path"),
        (errno.EROFS, "check the permissions of that path"),
        (errno.ENOENT, "check the path"),
        (errno.EIO, "check the disk and the path"),
    ],
)
def test_a_failed_system_call_is_one_line_with_what_to_do(number: int, fix: str) -> None:
    line = str(one_line(OSError(number, os.strerror(number)), "write /x/y"))
    assert line.startswith(f"cannot write /x/y: {os.strerror(number)}; {fix}")
    assert "\n" not in line
