"""Errors that a user can act on."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class UserError(Exception):
    """The user's input is wrong: one line that says what was given, what was expected and the fix.

    The command line prints it behind `openbook: ` and exits with status 2.
    """


class CheckError(Exception):
    """A check that was asked for failed (verify, an eval threshold): printed as one line, exit status 1."""


def unknown_name(kind: str, given: str, known: Iterable[str], fix: str) -> UserError:
    """The error for a name that is not known, with the nearest one that is.

    Args:
        kind: what the name stands for, as a noun: "task", "model".
        given: the name as the user wrote it.
        known: all names that would have been accepted.
        fix: how to find the right one, as an imperative clause without a full stop.
    """
    nearest = difflib.get_close_matches(given.lower(), list(known), n=1, cutoff=0.5)
    guess = f"did you mean '{nearest[0]}'? " if nearest else ""
    return UserError(f"unknown {kind} '{given}': {guess}{fix}")


def one_line(error: OSError, action: str) -> UserError:
    """Turn a failed system call into the line a user sees; `action` reads "write /path/file"."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        fix = "free some space and run the command again (a build with --resume); what was saved before is intact"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        fix = "check the permissions of that path"
    elif error.errno == errno.ENOENT:
        fix = "check the path"
    else:
        fix = "check the disk and the path"
    return UserError(f"cannot {action}: {error.strerror or error}; {fix}")
