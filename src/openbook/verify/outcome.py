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
    """The result of a replay or a rebuild.

    notes: how it was done. data_left, training_left: what of the data and the training was not done again, in words;
    None if all of it was. not_checked: what else one might think was checked.
    """

    verdicts: list[Verdict] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    data_left: str | None = "that the data comes out of its generators again (--rebuild)"
    training_left: str | None = (
        "that the recipe leads to these weights (--replay K for K segments of the training, --rebuild for all)"
    )

    def then(self, later: Outcome) -> Outcome:
        """Both results; `later` is the one that goes further."""
        return Outcome(
            verdicts=[*self.verdicts, *(verdict for verdict in later.verdicts if verdict not in self.verdicts)],
            differences=self.differences + later.differences,
            notes=[*self.notes, *(note for note in later.notes if note not in self.notes)],
            not_checked=self.not_checked + later.not_checked,
            data_left=later.data_left,
            training_left=later.training_left,
        )
