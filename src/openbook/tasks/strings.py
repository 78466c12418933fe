"""Worked solutions for tasks on words and letters.

Two habits make every step a look-up of something near: letters are numbered where they must be read in another order
(so "the letter before this one" is "the letter with the next smaller number"), and a running state is restated at
each step instead of being found again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from openbook.tasks.base import Difficulty, Problem, Task, Work


def _numbered(letters: Sequence[str], start: int = 0) -> list[str]:
    """["0s", "1u", "2n"]: counting starts at 0, so that ten letters need one digit each."""
    return [f"{index}{letter}" for index, letter in enumerate(letters, start)]


class SpellBackward(Task):
    """Number the letters going up, then read them going down.

    sun: 0s1u2n / 2n1u0s
    """

    name = "spell_backward"
    group = "strings"
    summary = "spell a word backward"
    hard: ClassVar[Mapping[str, Any]] = {"min_word_len": 5, "max_word_len": 20}

    def work(self, problem: Problem) -> Work:
        word: str = problem.entry["metadata"]["word"]
        forward = _numbered(word)
        answer = word[::-1]
        # Read the answer from its end: the word must come out.
        check = "".join(f" {letter}" for letter in reversed(answer)) + f" = {word}"
        return Work(steps=f"{''.join(forward)}\n{''.join(reversed(forward))}", check=check, answer=answer)


class LetterCounting(Task):
    """Copy the text word by word, each word followed by the count so far.

    e in "me As in the": me1 As1 in1 the2
    """

    name = "letter_counting"
    group = "strings"
    summary = "count a letter in a text"
    hard: ClassVar[Mapping[str, Any]] = {"min_words": 25, "max_words": 50}

    def work(self, problem: Problem) -> Work:
        words: list[str] = problem.entry["metadata"]["span"]
        letter: str = problem.entry["metadata"]["target_letter"]
        count = 0
        steps: list[str] = []
        found: list[str] = []
        for word in words:
            here = word.lower().count(letter)
            count += here
            steps.append(_labelled(word, count))
            if here:
                found.append(_labelled(word, here))
        # Count again by words: those that have the letter, each with its own number, then the sum.
        return Work(steps=" ".join(steps), check=f"{'+'.join(found)}={count}", answer=str(count))


def _labelled(word: str, number: int) -> str:
    """The word with its number behind it; a colon keeps "2889" and 1 apart."""
    return f"{word}:{number}" if word[-1].isdigit() else f"{word}{number}"


class PalindromeGeneration(Task):
    """Walk the letters: one without a partner waits (-), its partner closes a pair and numbers it. What still waits at
    the end is the middle. Then the pairs going up, the middle, the pairs going down.

    a b c b a: a- b- c- b0 a1 / 0b1a c 1a0b, so "bacab".
    """

    name = "palindrome_generation"
    group = "strings"
    summary = "arrange letters into a palindrome"
    hard: ClassVar[Mapping[str, Any]] = {"min_length": 50, "max_length": 100}

    def work(self, problem: Problem) -> Work:
        letters: list[str] = problem.entry["metadata"]["letters"]
        waiting: list[str] = []
        pairs: list[str] = []
        walk: list[str] = []
        for letter in letters:
            if letter in waiting:
                waiting.remove(letter)
                walk.append(f"{letter}{len(pairs)}")
                pairs.append(letter)
            else:
                waiting.append(letter)
                walk.append(f"{letter}-")
        half = _numbered(pairs)
        parts = ["".join(half), *waiting, "".join(reversed(half))]
        answer = "".join([*pairs, *waiting, *reversed(pairs)])
        # Every letter is used as often as it was given.
        tally = [f"{letter}{letters.count(letter)}={answer.count(letter)}" for letter in sorted(set(letters))]
        return Work(
            steps=f" {' '.join(walk)}\n{' '.join(part for part in parts if part)}", check=" ".join(tally), answer=answer
        )


class _SortedLetters(set[str]):
    """A set of letters that is walked in alphabetical order.

    The generator walks plain sets of strings, whose order changes with PYTHONHASHSEED: without this the problem of a
    seed would be another one in every process. For the same reason the published items cannot be regenerated.
    """

    def __iter__(self) -> Any:
        return iter(sorted(super().__iter__()))

    def __sub__(self, other: Any) -> _SortedLetters:
        return _SortedLetters(set.__sub__(self, other))


class IsomorphicStrings(Task):
    """Number the first string, then walk the second beside it, pair by pair: a new pair (+), a pair that agrees with
    an earlier one (=), or the first that contradicts one (!), followed by the one it contradicts.

    egg add: 0e1g2g / 0e a+1g d+2g d=    True
    egg adc: 0e1g2g / 0e a+1g d+2g c!1g d    False
    """

    name = "isomorphic_strings"
    group = "strings"
    summary = "tell whether letters of one string can be renamed to give another"
    hard: ClassVar[Mapping[str, Any]] = {"min_string_length": 50, "max_string_length": 100}

    def work(self, problem: Problem) -> Work:
        first, second = problem.entry["metadata"]["words"]
        image: dict[str, int] = {}  # letter of the first string: where it was first seen
        source: dict[str, int] = {}  # letter of the second string: likewise
        walk: list[str] = []
        clash: tuple[int, int] | None = None
        for index, (left, right) in enumerate(zip(first, second, strict=True)):
            pair = f"{index}{left} {right}"
            earlier = image.get(left, source.get(right))
            if earlier is None:
                walk.append(f"{pair}+")
                image[left] = source[right] = index
            elif (first[earlier], second[earlier]) == (left, right):
                walk.append(f"{pair}=")
            else:
                walk.append(f"{pair}!{earlier}{first[earlier]} {second[earlier]}")
                clash = (earlier, index)
                break
        if clash is None:
            # Sorted by their images: no image stands there twice, so no two letters share one.
            renamed = sorted((second[index], letter) for letter, index in image.items())
            check = ",".join(f" {letter} {to}" for to, letter in renamed)
        else:
            check = f" {' '.join(first[i] for i in clash)},{''.join(f' {second[i]}' for i in clash)}"
        return Work(steps=f"{''.join(_numbered(first))}\n{''.join(walk)}", check=check, answer=str(clash is None))

    def _dataset(self, difficulty: Difficulty, params: Mapping[str, Any]) -> Any:
        dataset = super()._dataset(difficulty, params)
        dataset.letters = _SortedLetters(dataset.letters)
        return dataset


TASKS: list[Task] = [SpellBackward(), LetterCounting(), PalindromeGeneration(), IsomorphicStrings()]
