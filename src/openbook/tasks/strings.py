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


class StringInsertion(Task):
    """Copy the string; behind four letters in alphabetical order (E is followed by A), none of which was used before,
    put the inserted letter in brackets: it is the first of the four.

    BABCDEE: BABCD(A)EE
    """

    name = "string_insertion"
    group = "strings"
    summary = "insert a letter behind every pattern of four"
    hard: ClassVar[Mapping[str, Any]] = {"min_string_length": 50, "max_string_length": 100}

    def work(self, problem: Problem) -> Work:
        string: str = problem.entry["metadata"]["string"]
        copied: list[str] = []
        counted: list[str] = []
        run = 0  # how many letters up to here are in order; an insertion starts the count anew
        for index, letter in enumerate(string):
            run = run + 1 if run and letter == _after(string[index - 1]) else 1
            copied.append(letter)
            counted.append(f"{letter}{run}")
            if run == 4:
                copied.append(f"({string[index - 3]})")
                counted.append(string[index - 3])
                run = 0
        steps = "".join(copied)
        # Once more by counting: each letter with the length of its run; at 4 the letter that goes in.
        return Work(steps=steps, check="".join(counted), answer=steps.replace("(", "").replace(")", ""))


def _after(letter: str) -> str:
    """The next letter of the circle A B C D E."""
    return "ABCDE"[("ABCDE".index(letter) + 1) % 5]


# Cribs: words to look for in a cipher text, those that settle most first. Short ones come late: BE and OR differ by one
# rotation, as do BY and HE, so fitting is not enough for them: what they give must read as English too.
_CRIB_TEXT = (
    "the and you for of is at that his was are not all an to mr in it he by as be or we on my me with "
    "your have this from will one her has our had they which"
)
_CRIBS = _CRIB_TEXT.split()
_COMMON_LETTERS = frozenset("etaoinshrdlu")
_RARE_LETTERS = frozenset("jqxz")
_ABBREVIATIONS = ("mr", "mrs", "dr", "www")
# The text has AËRIAL once, and the generator enciphers Ë as if it were I.
_SPELLINGS = {"AIRIAL": "AËRIAL"}


class CaesarCipher(Task):
    """Lay common words over words of the same length. Each pair of letters gives a key: the cipher letter that stands
    for a. A word that fits gives the same key all along, and with it every letter is read, cipher and plain in turn.

    ESP NLE: EtL ShL PeL / L EtShPe NcLaEt, "THE CAT".
    """

    name = "caesar_cipher"
    group = "strings"
    summary = "decrypt a sentence whose letters were all rotated alike"
    hard: ClassVar[Mapping[str, Any]] = {"min_rotation": 15, "max_rotation": 25, "min_words": 15, "max_words": 25}

    def work(self, problem: Problem) -> Work:
        words = str(problem.entry["metadata"]["cipher_text"]).split()
        key, trials = _find_key(words)
        plain = [_shift(word, key) for word in words]
        read = [_interleave(word, text) for word, text in zip(words, plain, strict=True)]
        # Encrypt the longest word again: the cipher text has it.
        longest = max(range(len(words)), key=lambda index: len(words[index]))
        check = f"{_interleave(plain[longest].lower(), words[longest].upper(), '')} {words[longest]}"
        answer = " ".join(_SPELLINGS.get(word, word) for word in (text.upper() for text in plain))
        return Work(steps=f"{trials}\n{key} {' '.join(read)}", check=check, answer=answer)


def _find_key(words: Sequence[str]) -> tuple[str, str]:
    """The key (the cipher letter that stands for a), and the trials that lead to it."""
    trials: list[str] = []
    for crib in _CRIBS:
        for word in dict.fromkeys(word for word in words if len(word) == len(crib)):
            keys = [_key(cipher, letter) for cipher, letter in zip(word, crib, strict=True)]
            agreeing = next((i for i, key in enumerate(keys) if key != keys[0]), len(keys))
            shown = min(agreeing + 1, len(keys))
            trials.append(" ".join(f"{word[i]}{crib[i]}{keys[i]}" for i in range(shown)))
            if agreeing == len(keys):
                if _reads_as_english([_shift(cipher, keys[0]) for cipher in words]):
                    return keys[0], " ".join(trials)
                trials.append("no")
    # No crib fits: the key whose text has the most common letters.
    letters = "".join(words)
    key = max(map(chr, range(ord("B"), ord("Z") + 1)), key=lambda key: _weight(_shift(letters, key)))
    return key, " ".join([*trials, key])


def _key(cipher: str, letter: str) -> str:
    return chr((ord(cipher) - ord("A") - (ord(letter) - ord("a"))) % 26 + ord("A"))


def _shift(word: str, key: str) -> str:
    """Decrypt a word of capitals to small letters."""
    return "".join(chr((ord(cipher) - ord(key)) % 26 + ord("a")) for cipher in word)


def _interleave(first: str, second: str, between: str = "") -> str:
    return between.join(a + b for a, b in zip(first, second, strict=True))


def _weight(text: str) -> int:
    """Common letters count one, rare ones minus two."""
    return sum((letter in _COMMON_LETTERS) - 2 * (letter in _RARE_LETTERS) for letter in text)


def _reads_as_english(words: Sequence[str]) -> bool:
    """Nearly every word has a vowel, and the letters weigh more than half their number."""
    odd = sum(not set(word) & set("aeiouy") or (len(word) == 1 and word not in "aio") for word in words)
    odd -= sum(word in _ABBREVIATIONS for word in words)
    text = "".join(words)
    return odd <= len(words) // 6 and 100 * _weight(text) >= 55 * len(text)


TASKS: list[Task] = [
    SpellBackward(),
    LetterCounting(),
    PalindromeGeneration(),
    IsomorphicStrings(),
    StringInsertion(),
    CaesarCipher(),
]
