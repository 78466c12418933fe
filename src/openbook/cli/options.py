"""Options that several commands share, so that one word means one thing everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
import msgspec

from openbook.core.seeding import TRAIN_SEED_START
from openbook.engine.choices import CACHE_KINDS, PROFILES

F = TypeVar("F", bound=Callable[..., Any])

# Repeated from openbook.tasks.base (a test keeps them equal): help must not wait for the imports behind it.
EFFORTS = ("low", "medium", "high")
# Likewise, from openbook.engine.model.
DTYPES = ("float32", "bfloat16")


def effort_option(default: str | None = "medium") -> Callable[[F], F]:
    """`--effort low|medium|high`, passed as `effort`."""
    return click.option(
        "--effort",
        type=click.Choice(EFFORTS),
        default=default,
        show_default=default is not None,
        help="How much the model may think: not at all, in steps, in steps with a check.",
    )


def seed_option(default: int | None, text: str, *, evaluation: bool = False) -> Callable[[F], F]:
    """`--seed N`, passed as `seed`; seeds of evaluation stay below the first one that training may use."""
    limit = TRAIN_SEED_START - 1 if evaluation else 2**63 - 1
    return click.option(
        "--seed", type=click.IntRange(0, limit), default=default, show_default=default is not None, help=text
    )


def dtype_option(function: F) -> F:
    """`--dtype float32|bfloat16`, passed as `dtype`."""
    return click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        help="Of weights and activations in the profile fast; bfloat16 takes half the memory.  [default: float32]",
    )(function)


def profile_option(function: F) -> F:
    """`--profile exact|fast`, passed as `profile`."""
    return click.option(
        "--profile",
        type=click.Choice(PROFILES),
        help="exact: the same bits on every CPU, in any batch; fast: as the hardware goes, on CUDA too.  "
        "[default: exact for dense models on a CPU, unless --dtype is given]",
    )(function)


def cache_option(function: F) -> F:
    """`--cache float32|int8`, passed as `cache`."""
    return click.option(
        "--cache",
        type=click.Choice(CACHE_KINDS),
        help="Of keys and values, for dense models in the profile exact; int8 takes a quarter of the memory, is faster "
        "and rounds.  [default: float32]",
    )(function)


def json_option(function: F) -> F:
    """`--json`, passed as `as_json`."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object on stdout, everything else on stderr."
    )(function)


def model_argument(default: str | None = None) -> Callable[[F], F]:
    """`MODEL`, a name, path or hub id, passed as `model`; optional if there is a default."""
    return click.argument("model", required=default is None, default=default)


def print_json(value: Any) -> None:
    """Print the one JSON object of a command; msgspec structs and dataclasses are allowed inside."""
    click.echo(msgspec.json.encode(value).decode())
