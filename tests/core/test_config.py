"""Configuration: every wrong key and value is named where it stands; the hash follows the values and nothing else."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from openbook.core.config import Config, config_hash, convert, load_toml
from openbook.core.errors import UserError


class Inner(Config, frozen=True, kw_only=True):
    size: int
    name: str = "x"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}, expected 1 or more")


class Outer(Config, frozen=True, kw_only=True):
    seed: int
    rate: float = 0.5
    inner: Inner
    items: list[Inner] = msgspec.field(default_factory=list)
    maybe: Inner | None = None
    named: dict[str, Inner] = msgspec.field(default_factory=dict)


GOOD = "seed = 7\nrate = 0.25\n[inner]\nsize = 3\n[[items]]\nsize = 1\n[[items]]\nsize = 2\nname = 'y'\n"


def _load(tmp_path: Path, text: str) -> Outer:
    path = tmp_path / "file.toml"
    path.write_text(text)
    return load_toml(path, Outer, "recipe")


def test_toml_becomes_a_struct_that_cannot_be_changed(tmp_path: Path) -> None:
    config = _load(tmp_path, GOOD)
    assert config == Outer(
        seed=7, rate=0.25, inner=Inner(size=3), items=[Inner(size=1), Inner(size=2, name="y")], maybe=None
    )
    with pytest.raises(AttributeError):
        config.seed = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed = 7", "seed = 7\nsede = 8", "unknown key 'sede': did you mean 'seed'? known keys there: seed, rate, "),
        (
            "size = 3",
            "size = 3\nsise = 4",
            "unknown key 'sise': did you mean 'size'? known keys there: size, name (at in",
        ),
        (
            "size = 2",
            "size = 2\nnam = 4",
            "unknown key 'nam': did you mean 'name'? known keys there: size, name (at items[1].",
        ),
        (
            "seed = 7",
            "seed = 7\nmaybe = {size = 1, z = 2}",
            "unknown key 'z': known keys there: size, name (at maybe.z)",
        ),
        ("seed = 7", "seed = 7\nnamed.a = {size = 1, sise = 2}", "unknown key 'sise': "),
        ("seed = 7\n", "", "the key seed is missing: add it"),
        ("size = 3", "", "the key inner.size is missing: add it"),
        ("size = 2", "", "the key items[1].size is missing: add it"),
        ("seed = 7", "seed = '7'", "seed: expected `int`, got `str`; correct that value"),
        ("seed = 7", "seed = 7.5", "seed: expected `int`, got `float`; correct that value"),
        ("seed = 7", "seed = true", "seed: expected `int`, got `bool`; correct that value"),
        ("size = 2", "size = [2]", "items[1].size: expected `int`, got `array`; correct that value"),
        ("size = 2", "size = 0", "items[1]: size is 0, expected 1 or more; correct that value"),
        ("seed = 7", "seed = 7\nitems = 3", "is not valid TOML: "),
        ("[inner]", "[inner", "is not valid TOML: "),
        ("seed = 7", "seed = 7\nseed = 8", "is not valid TOML: "),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(UserError) as caught:
        _load(tmp_path, GOOD.replace(old, new, 1))
    line = str(caught.value)
    assert line.startswith(f"the recipe {tmp_path}/file.toml")
    assert message in line
    assert "\n" not in line


def test_a_file_that_is_missing_or_binary_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^cannot read the recipe {tmp_path}/none.toml: No such file or directory; "):
        load_toml(tmp_path / "none.toml", Outer, "recipe")
    (tmp_path / "bytes.toml").write_bytes(b"\x00\xff\xfe")
    with pytest.raises(UserError, match=f"^the recipe {tmp_path}/bytes.toml is not valid TOML: "):
        load_toml(tmp_path / "bytes.toml", Outer, "recipe")


@pytest.mark.parametrize("value", [None, 3, "text", [1, 2]])
def test_what_is_no_table_at_all_is_one_line(value: Any) -> None:
    with pytest.raises(UserError, match=r"^the test: expected `object`, got `\w+`; correct that value$"):
        convert(value, Outer, "the test")


def test_the_hash_does_not_depend_on_the_order_of_keys_nor_on_defaults_written_out(tmp_path: Path) -> None:
    plain = config_hash(_load(tmp_path, GOOD))
    assert len(plain) == 64
    assert config_hash(_load(tmp_path, GOOD.replace("seed = 7\nrate = 0.25", "rate = 0.25\nseed = 7"))) == plain
    assert config_hash(_load(tmp_path, GOOD.replace("size = 3", "size = 3\nname = 'x'"))) == plain
    named = "seed = 7\n{}rate = 0.25\n[inner]\nsize = 3\n"
    first = _load(tmp_path, named.format("named.a.size = 1\nnamed.b.size = 2\n"))
    second = _load(tmp_path, named.format("named.b.size = 2\nnamed.a.size = 1\n"))
    assert config_hash(first) == config_hash(second)


def test_any_value_changes_the_hash() -> None:
    values = tomllib.loads(GOOD)
    changes: list[tuple[tuple[str | int, ...], Any]] = [
        (("seed",), 8),
        (("rate",), 0.2500000000000001),
        (("inner", "size"), 4),
        (("inner", "name"), "z"),
        (("items", 0, "size"), 2),
        (("items", 1, "name"), "Y"),
        (("maybe",), {"size": 1}),
        (("items",), values["items"][::-1]),
        (("named",), {"a": {"size": 1}}),
    ]
    hashes = {config_hash(convert(values, Outer, "the test"))}
    for path, value in changes:
        changed: Any = tomllib.loads(GOOD)
        owner = changed
        for part in path[:-1]:
            owner = owner[part]
        owner[path[-1]] = value
        hashes.add(config_hash(convert(changed, Outer, "the test")))
    assert len(hashes) == len(changes) + 1
