"""What a check finds."""

from __future__ import annotations

from typing import Literal

import msgspec

DIGITS = 12  # hex digits of a hash in a message

Kind = Literal["missing", "added", "changed", "invalid", "diverged", "undecided"]


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """One place where a release is not what it should be.

    kind: "missing", "added" and "changed" are about a file and the hash it should have; "invalid" is a file that does
    not fit the others; "diverged" is training that was run again and came out otherwise; "undecided" is the same where
    the numerics do not promise the same bits, so that it proves nothing.
    """

    path: str
    kind: Kind
    detail: str

    def __str__(self) -> str:
        return f"{self.kind:<8} {self.path}: {self.detail}"
