"""Worked solutions on words and letters: they score 1.0, and another reading of the steps agrees with them."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from openbook.tasks import strings
from openbook.tasks.base import DIFFICULTIES, TRAIN_SEED_START, Difficulty, Problem, Task, Work
from openbook.tasks.strings import CaesarCipher

TASKS = {task.name: task for task in strings.TASKS}
SEEDS = [*range(31_000, 31_100), *range(TRAIN_SEED_START, TRAIN_SEED_START + 100)]


def cases(name: str, difficulty: Difficulty, num: int = 40) -> list[tuple[Problem, Work]]:
    problems = [TASKS[name].generate(seed, difficulty) for seed in SEEDS[:num]]
    return [(problem, TASKS[name].work(problem)) for problem in problems]


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("task", strings.TASKS, ids=lambda task: task.name)
def test_answers_score_one_and_work_is_the_same_each_time(task: Task, difficulty: Difficulty) -> None:
    for seed in SEEDS:
        problem = task.generate(seed, difficulty)
        work = task.work(problem)
        assert task.score(problem, work.answer) == 1.0, (seed, work)
        assert task.work(task.generate(seed, difficulty)) == work
        assert work.steps.strip() and work.check.strip()


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_spell_backward_numbers_up_and_down(difficulty: Difficulty) -> None:
    for problem, work in cases("spell_backward", difficulty):
        up, down = (re.findall(r"(\d+)(\D)", line) for line in work.steps.split("\n"))
        word = problem.question.rsplit(": ", 1)[1]
        assert "".join(letter for _, letter in up) == word
        assert [int(index) for index, _ in up] == list(range(len(word)))
        assert down == up[::-1]
        assert work.check.split() == [*word, "=", word]


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_letter_counting_counts_word_by_word(difficulty: Difficulty) -> None:
    for problem, work in cases("letter_counting", difficulty):
        match = re.fullmatch(r'.*letter "(.)" .*text: "(.*)"\?', problem.question)
        assert match is not None
        letter, words = match[1], match[2].split(" ")
        before = 0
        for word, step in zip(words, work.steps.split(" "), strict=True):
            assert step.startswith(word)
            count = int(step.removeprefix(word).lstrip(":"))
            assert count - before == Counter(word.lower())[letter]
            before = count
        terms, total = work.check.split("=")
        assert sum(int(re.split(r":|(?<=\D)(?=\d+$)", term)[-1]) for term in terms.split("+")) == int(total) == before


def test_letter_counting_keeps_a_number_apart_from_its_count() -> None:
    task = TASKS["letter_counting"]
    entry = {"question": "", "metadata": {"span": ["year", "2889"], "target_letter": "8"}}
    work = task.work(Problem(task=task.name, difficulty="easy", seed=0, question="", entry=entry))
    assert (work.steps, work.check, work.answer) == ("year0 2889:2", "2889:2=2", "2")


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_palindrome_pairs_close_and_the_middle_is_what_waits(difficulty: Difficulty) -> None:
    for problem, work in cases("palindrome_generation", difficulty):
        walk, final = work.steps.split("\n")
        letters = problem.question.rsplit(": ", 1)[1].strip().split(", ")
        steps = walk.split()
        assert [step[0] for step in steps] == letters
        closed = [step[0] for step in steps if step[1:] != "-"]
        assert [step[1:] for step in steps if step[1:] != "-"] == [str(index) for index in range(len(closed))]
        half = "".join(f"{index}{letter}" for index, letter in enumerate(closed))
        mirrored = "".join(f"{index}{letter}" for index, letter in reversed(list(enumerate(closed))))
        odd = [letter for letter, count in Counter(letters).items() if count % 2]
        assert final.split() == [part for part in [half, *odd, mirrored] if part]
        assert work.answer == work.answer[::-1]


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_isomorphic_marks_follow_from_the_pairs(difficulty: Difficulty) -> None:
    answers = Counter(work.answer for _, work in cases("isomorphic_strings", difficulty))
    assert min(answers["True"], answers["False"]) >= 10
    for problem, work in cases("isomorphic_strings", difficulty):
        first, second = problem.question.strip().rsplit("\n", 1)[1].split(" ")
        spelled, walk = work.steps.split("\n")
        assert spelled == "".join(f"{index}{letter}" for index, letter in enumerate(first))
        seen: list[tuple[str, str]] = []
        for index, left, right, mark in re.findall(r"(\d+)(\w) (\w)([+=!]|$)", walk):
            if not mark:  # the pair that is contradicted, named behind the mark
                assert seen[int(index)] == (left, right)
                break
            pair = (first[int(index)], second[int(index)])
            assert pair == (left, right) and int(index) == len(seen)
            known = [old for old in seen if left == old[0] or right == old[1]]
            assert mark == ("+" if not known else "=" if set(known) == {pair} else "!")
            seen.append(pair)
        assert (work.answer == "True") == ("!" not in walk) == (len(set(zip(first, second, strict=True)))
                == len(set(first)) == len(set(second)))  # fmt: skip


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_string_insertion_follows_the_five_rules(difficulty: Difficulty) -> None:
    inserted = 0
    for problem, work in cases("string_insertion", difficulty, num=200):
        string = problem.question.strip().rsplit(" ", 1)[1]
        # A regular expression finds, as the rules ask, the leftmost match and goes on behind it.
        expected = re.sub(r"ABCD|BCDE|CDEA|DEAB|EABC", lambda found: f"{found[0]}({found[0][0]})", string)
        assert work.steps == expected
        assert re.sub(r"\d", "", work.check) == work.answer
        inserted += work.steps.count("(")
    assert inserted >= 5


def test_string_insertion_does_not_use_a_letter_twice() -> None:
    task = TASKS["string_insertion"]
    entry = {"question": "", "metadata": {"string": "ABCDEABCDEE"}}
    work = task.work(Problem(task=task.name, difficulty="easy", seed=0, question="", entry=entry))
    assert work.steps == "ABCD(A)EABC(E)DEE"
    assert work.check == "A1B2C3D4AE1A2B3C4ED1E2E1"


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_caesar_cipher_reads_every_letter_with_the_key_it_found(difficulty: Difficulty) -> None:
    for problem, work in cases("caesar_cipher", difficulty):
        cipher = problem.question.removeprefix("Decrypt this Caesar cipher text: ").split(". Provide")[0]
        trials, reading = work.steps.split("\n")
        key, *words = reading.split(" ")
        assert [word[::2] for word in words] == cipher.split()
        for letter, plain in re.findall(r"(.)(.)", "".join(words)):
            assert (ord(letter) - ord(key)) % 26 == ord(plain) - ord("a")
        assert trials.split(" ")[-1][-1] == key
        for letter, plain, implied in re.findall(r"([A-Z])([a-z])([A-Z])", trials):
            assert (ord(letter) - ord(implied)) % 26 == ord(plain) - ord("a")


def test_caesar_cipher_finds_the_key_of_every_sentence_of_the_corpus() -> None:
    from reasoning_gym.factory import create_dataset

    configs = [{}, dict(CaesarCipher.hard)]
    sentences = sorted(
        {text for config in configs for text in create_dataset("caesar_cipher", **config).valid_sentences}
    )
    assert len(sentences) > 300
    task = TASKS["caesar_cipher"]
    for index, sentence in enumerate(sentences):
        rotation = 1 + index % 25
        cipher = "".join(
            chr((ord(letter) - ord("A") + rotation) % 26 + ord("A")) if letter.isalpha() else letter
            for letter in sentence
        )
        entry = {"metadata": {"cipher_text": cipher}}
        problem = Problem(task=task.name, difficulty="easy", seed=0, question="", entry=entry)
        assert task.work(problem).answer == sentence
