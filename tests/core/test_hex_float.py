"""Hex floats are those of C, and come back with every bit."""

from __future__ import annotations

import random
import struct

import pytest

from openbook.core.hex_float import hex_float


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0x0p+0"),
        (-0.0, "-0x0p+0"),
        (3.0, "0x1.8p+1"),
        (0.1, "0x1.999999999999ap-4"),
        (-1e300, "-0x1.7e43c8800759cp+996"),
        (float("inf"), "inf"),
        (float("nan"), "nan"),
        (5e-324, "0x0.0000000000001p-1022"),
    ],
)
def test_it_is_what_printf_writes(value: float, text: str) -> None:
    assert hex_float(value) == text


def test_every_bit_comes_back() -> None:
    draw = random.Random(0)
    for _ in range(1000):
        bits = draw.getrandbits(64) & ~(1 << 62)  # no infinity, no NaN
        (value,) = struct.unpack("<d", struct.pack("<Q", bits))
        assert struct.pack("<d", float.fromhex(hex_float(value))) == struct.pack("<d", value)
