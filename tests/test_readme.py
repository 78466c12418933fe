"""Every block of README.md runs and prints what the page shows; its links resolve and its `make` targets exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from _pytest.mark import ParameterSet

from openbook.tasks.registry import all_tasks
from readme_commands import (
    FACTS,
    MICRO,
    README,
    ROOT,
    Block,
    agrees,
    blocks,
    commands,
    facts,
    lines_of_build,
    run_build,
    run_command,
    run_python,
    without_times,
    workplace,
)

PAGE = README.read_text()
BLOCKS = blocks(PAGE)
HOW_TO_RENEW = "run `python tests/readme_commands.py --write`"


@pytest.fixture(autouse=True)
def in_a_workplace(tmp_path: Path) -> Iterator[None]:
    """Each block runs in a folder of its own, so that they may run in any order."""
    num_threads = torch.get_num_threads()  # a build sets its own
    with workplace(tmp_path):
        yield
    torch.set_num_threads(num_threads)


def console(*, is_long: bool) -> list[ParameterSet]:
    found = [block for block in BLOCKS if block.language == "console" and block.is_long == is_long]
    return [pytest.param(block, id=commands(block)[0].line[:50]) for block in found]


def require_agreement(shown: str, printed: str) -> None:
    if not agrees(shown, printed):
        # This comparison of lists shows where they differ.
        assert without_times(shown) == without_times(printed), HOW_TO_RENEW


@pytest.mark.parametrize("block", console(is_long=False))
def test_commands_print_what_the_page_shows(block: Block) -> None:
    for command in commands(block):
        status, printed = run_command(command)
        assert status == 0, printed
        require_agreement(command.shown, printed)


@pytest.mark.parametrize("block", console(is_long=True))
def test_a_long_build_goes_as_the_page_shows(block: Block) -> None:
    """Run with a recipe of seconds, so times, losses and names of stages are not compared."""
    for command in commands(block):
        status, printed = run_build(command)
        assert status == 0, printed
        assert lines_of_build(command.shown, command.recipe) == lines_of_build(printed, MICRO)


@pytest.mark.parametrize("index", [index for index, block in enumerate(BLOCKS) if block.language == "python"])
def test_python_prints_what_the_page_shows(index: int) -> None:
    expected = BLOCKS[index + 1]
    assert expected.language == "text"
    require_agreement(expected.text, run_python(BLOCKS[index].text))


def test_facts_are_those_of_the_bundled_release() -> None:
    assert FACTS.findall(PAGE) == [facts()], HOW_TO_RENEW
    assert f"| {len(all_tasks())} tasks with worked solutions" in PAGE


def test_every_block_is_run() -> None:
    """Only `bash` blocks are not: they hold `make` targets."""
    assert {block.language for block in BLOCKS} == {"console", "python", "text", "bash"}
    assert PAGE.count("```") == 2 * len(BLOCKS)
    lines = [line for block in BLOCKS if block.language == "bash" for line in block.text.splitlines()]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    made = [line.split()[1] for line in lines if line.startswith("make ")]
    assert len(made) == len(lines)
    assert {"demo", "test"} <= set(made) <= targets


def test_images_and_links_resolve() -> None:
    paths = [path.split("#")[0] for path in re.findall(r"\]\(([^)\s]+)\)", PAGE) if "://" not in path]
    assert "docs/picture.svg" in paths
    for path in paths:
        assert (ROOT / path).exists(), f"README.md links to {path}"


def test_no_path_of_the_machine_it_was_written_on() -> None:
    assert str(ROOT) not in PAGE
    assert f"{Path.home()}/" not in PAGE


@pytest.mark.parametrize(
    ("shown", "printed", "is_same"),
    [
        ("a\nin 0:12\n", "a\nin 1:02:03\n", True),
        ("a\nb\n", "a\nc\n", False),
        ("a\n", "a\nb\n", False),
        ("a\n...\nz\n", "a\nb\nc\nz\n", True),
        ("a\n...\nz\n", "a\nb\nc\ny\n", False),
        ("eval  done in 0:01\n", "eval    12%  0:09 left  50.0% correct\neval  done in 0:02\n", True),
    ],
)
def test_times_are_all_that_may_differ(shown: str, printed: str, is_same: bool) -> None:
    assert agrees(shown, printed) == is_same
