"""What a check came to: what holds, what differs, what was left out."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from openbook.verify.difference import Difference


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Something that holds: the words for it, and what they cover."""

    words: str
    coverage: str

    def __str__(self) -> str:
        return f"{self.words}  {self.coverage}"


@dataclass(kw_only=True)
class Outcome:
    """The result of a replay or a rebuild; empty if none was asked for.

    notes: how it was done. not_checked: what one might think was checked. is_data_checked: whether all data came out of
    their generators again. is_training_checked: whether all segments were trained again.
    """

    verdicts: list[Verdict] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    is_data_checked: bool = False
    is_training_checked: bool = False

    def then(self, other: Outcome) -> Outcome:
        """Both results, this one first."""
        return Outcome(
            verdicts=[*self.verdicts, *(verdict for verdict in other.verdicts if verdict not in self.verdicts)],
            differences=self.differences + other.differences,
            notes=[*self.notes, *(note for note in other.notes if note not in self.notes)],
            not_checked=self.not_checked + other.not_checked,
            is_data_checked=self.is_data_checked or other.is_data_checked,
            is_training_checked=self.is_training_checked or other.is_training_checked,
        )
