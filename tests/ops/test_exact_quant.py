"""Quantised products: the specification in numpy, step by step, and the same bits on every path."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from exact_paths import paths
from openbook.core.errors import UserError
from openbook.ops import _native as native
from openbook.ops.exact_quant import KIND_BYTES, LAYOUT, QuantMatrix, packed_bytes
from openbook.ops.exact_rounded_attention import fma

Floats = NDArray[np.float32]
KINDS = list(KIND_BYTES)
# M, N, K: outputs that fill no panel, one block, tiles of every height.
SHAPES = [(1, 1, 32), (2, 33, 64), (3, 16, 96), (7, 95, 32), (13, 32, 160), (40, 47, 64)]


def half(x: Floats) -> Floats:
    return x.astype(np.float16).astype(np.float32)


def quantise(x: Floats) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Codes [M, B, 32], scales and scaled sums [M, B]."""
    blocks = x.reshape(len(x), -1, 32)
    largest = np.abs(blocks).max(2)
    is_finite = np.isfinite(largest)
    scale = largest / np.float32(127)
    inverse = np.float32(127) / largest
    inverse[~np.isfinite(inverse)] = 0
    codes = np.where(is_finite[:, :, None], np.rint(blocks * inverse[:, :, None]), 0).astype(np.int64)
    sums = half(scale * codes.sum(2).astype(np.float32))
    return codes, np.where(is_finite, half(scale), np.float32("nan")), np.where(is_finite, sums, np.float32("nan"))


def read(raw: NDArray[np.uint8], kind: str, K: int) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Codes [N, B, 32], scales and minima [N, B] from GGUF's bytes [N, bytes]."""
    blocks = raw.reshape(len(raw), K // 32, KIND_BYTES[kind])
    floats = blocks[:, :, : 4 if kind == "Q4_1" else 2].copy().view(np.float16).astype(np.float32)
    scales, least = floats[:, :, 0], floats[:, :, -1]
    if kind == "Q8_0":
        return blocks[:, :, 2:].view(np.int8).astype(np.int64), scales, least
    bytes_ = blocks[:, :, -16:].astype(np.int64)
    codes = np.concatenate((bytes_ & 15, bytes_ >> 4), 2)
    return codes - (8 if kind == "Q4_0" else 0), scales, least


@np.errstate(all="ignore")
def specified(x: Floats, raw: NDArray[np.uint8], kind: str, bias: Floats | None) -> Floats:
    x_codes, x_scales, x_sums = quantise(x)
    w_codes, w_scales, least = read(raw, kind, x.shape[1])
    acc = np.zeros((len(x), len(raw)), np.float32)
    for b in range(x.shape[1] // 32):
        whole = (x_codes[:, b] @ w_codes[:, b].T).astype(np.float32)
        acc = fma(whole, w_scales[:, b] * x_scales[:, b, None], acc)
        if kind == "Q4_1":
            acc = fma(np.broadcast_to(least[:, b], acc.shape), x_sums[:, b, None], acc)
    return acc if bias is None else acc + bias


def random_rows(kind: str, N: int, K: int, seed: int = 0) -> NDArray[np.uint8]:
    """Rows with every code; scales of both signs, one in ten zero and one subnormal."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (N, K // 32, KIND_BYTES[kind]), dtype=np.uint8)
    scales = rng.normal(size=(N, K // 32, 2)).astype(np.float16)
    scales[rng.random(scales.shape) < 0.1] = 0
    scales[rng.random(scales.shape) < 0.1] = 6e-8
    raw[:, :, :4] = np.concatenate((scales.view(np.uint8)[:, :, :2], raw[:, :, 2:4]), 2)
    if kind == "Q4_1":
        raw[:, :, :4] = scales.view(np.uint8)
    return raw.reshape(N, -1)


def normal(*shape: int, seed: int = 1) -> Floats:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * np.exp(rng.normal(size=(*shape[:-1], 1)))
    return x.astype(np.float32)


def bits(x: Floats) -> bytes:
    """The bytes, with every NaN as one."""
    return np.where(np.isnan(x), np.float32("nan"), x).tobytes()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_linear_is_as_specified_on_every_path(kind: str, shape: tuple[int, int, int]) -> None:
    M, N, K = shape
    raw, x, bias = random_rows(kind, N, K), normal(M, K), normal(N, seed=2)
    x[:, :32] *= np.float32(1e-7)  # scales below the least half float
    expected = specified(x, raw, kind, bias)
    matrix = QuantMatrix.from_gguf([raw], kind, K)
    for path in paths():
        assert bits(matrix.linear(x, bias)) == bits(expected), path
    assert bits(matrix.linear(x)) == bits(specified(x, raw, kind, None))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_batch(kind: str) -> None:
    matrix, x = QuantMatrix.from_gguf([random_rows(kind, 70, 96)], kind, 96), normal(40, 96)
    alone = np.concatenate([matrix.linear(row[None]) for row in x])
    for M in range(1, 41):
        assert bits(matrix.linear(x[:M])) == bits(alone[:M]), M


def test_the_largest_sums() -> None:
    """Codes of -128 by codes of 127 and -127: no step of any path saturates."""
    K = 64
    raw = np.zeros((40, K // 32, 34), np.uint8)
    raw[:, :, :2] = np.array([1], np.float16).view(np.uint8)
    raw[:, :, 2:] = 128
    raw[1::2, :, 2:] = 127
    x = np.full((9, K), 127, np.float32)
    x[1::3] = -127
    x[2::3, ::2] = -127
    whole = x.astype(np.int64) @ np.where(np.arange(40) % 2, 127, -128)[:, None].repeat(K, 1).T
    for path in paths():
        assert np.array_equal(QuantMatrix.from_gguf([raw], "Q8_0", K).linear(x), whole.astype(np.float32)), path


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_no_numbers(kind: str) -> None:
    """One infinity or NaN makes its row NaN and leaves the others; scales that overflow follow IEEE 754."""
    raw, x = random_rows(kind, 50, 96), normal(8, 96)
    x[1, 5], x[3, 40], x[4, 95], x[5] = np.inf, np.nan, -np.inf, 3e38
    x[6] = np.float32(1e-45)
    x[7] = 0
    expected = specified(x, raw, kind, None)
    assert np.isnan(expected[[1, 3, 4]]).all()
    assert np.isfinite(expected[[0, 2, 6, 7]]).all()
    matrix = QuantMatrix.from_gguf([raw], kind, 96)
    for path in paths():
        assert bits(matrix.linear(x)) == bits(expected), path


def test_quantised_activations_are_as_specified() -> None:
    x = normal(5, 128)
    x[0, :32], x[1, :32], x[2, 3] = 0, 1e-44, np.inf
    x[3, :32] = np.arange(32) + 0.5
    x[3, 31] = 127  # inverse 1: halves are rounded to even
    with np.errstate(all="ignore"):
        codes, scales, sums = quantise(x)
    for path in paths():
        found = np.empty(x.shape, np.int8), np.empty((5, 4), np.float32), np.empty((5, 4), np.float32)
        native.quantize_rows(x, *found)
        assert np.array_equal(found[0], codes.reshape(5, -1)), path
        assert bits(found[1]) == bits(scales), path
        assert bits(found[2]) == bits(sums), path


@pytest.mark.parametrize("kind", KINDS)
def test_error_against_exact_arithmetic(kind: str) -> None:
    """Half a step of 1/127 of a block's largest activation, and 2^-11 of the scale's rounding."""
    x, raw = normal(6, 256), random_rows(kind, 48, 256)
    codes, scales, least = read(raw, kind, 256)
    weights = (codes * scales[:, :, None] + (least[:, :, None] if kind == "Q4_1" else 0)).reshape(48, 256)
    found = QuantMatrix.from_gguf([raw], kind, 256).linear(x)
    largest = np.abs(x).reshape(6, 8, 32).max(2)
    bound = (0.5 / 127 + 2**-10) * largest @ np.abs(weights).reshape(48, 8, 32).sum(2).T
    assert (np.abs(found - x.astype(np.float64) @ weights.T) <= bound).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_what_gguf_defines(kind: str) -> None:
    raw = random_rows(kind, 77, 96)
    codes, scales, least = read(raw, kind, 96)
    expected = codes.astype(np.float32) * scales[:, :, None]
    if kind == "Q4_1":
        expected += least[:, :, None]
    ids = np.array([0, 76, 31, 32, 5, 5], np.int64)
    matrix = QuantMatrix.from_gguf([raw], kind, 96)
    for path in paths():
        assert bits(matrix.rows(ids)) == bits(expected.reshape(77, 96)[ids]), path


@pytest.mark.parametrize("kind", KINDS)
def test_parts_and_packed_bytes_make_the_same_matrix(kind: str) -> None:
    raw, x = random_rows(kind, 100, 64), normal(3, 64)
    whole = QuantMatrix.from_gguf([raw], kind, 64)
    parts = QuantMatrix.from_gguf([raw[:33], raw[33:37], raw[37:]], kind, 64)
    assert bytes(parts.packed) == bytes(whole.packed)
    assert whole.packed.shape == (packed_bytes(kind, (100, 64)),)
    assert LAYOUT == 1
    room = np.empty(len(whole.packed) + 64, np.uint8)
    start = -room.ctypes.data % 64
    room[start : start + len(whole.packed)] = whole.packed
    again = QuantMatrix.from_packed(room[start : start + len(whole.packed)], kind, (100, 64))
    del room
    assert bits(again.linear(x)) == bits(whole.linear(x))
    assert not whole.packed.flags.writeable


def test_no_rows_of_activations() -> None:
    matrix = QuantMatrix.from_gguf([random_rows("Q8_0", 5, 32)], "Q8_0", 32)
    assert matrix.linear(np.empty((0, 32), np.float32)).shape == (0, 5)
    assert matrix.rows(np.empty(0, np.int64)).shape == (0, 32)


def test_messages() -> None:
    raw = random_rows("Q8_0", 5, 64)
    matrix = QuantMatrix.from_gguf([raw], "Q8_0", 64)
    for given, message in (
        (lambda: QuantMatrix.from_gguf([raw], "Q5_0", 64), "'Q5_0' are not multiplied as they are, expected Q8_0"),
        (lambda: QuantMatrix.from_gguf([raw], "Q8_0", 48), "rows have 48 weights, expected a multiple of 32 for Q8_0"),
        (lambda: QuantMatrix.from_gguf([raw[:, :-1]], "Q8_0", 64), "335 values of uint8 are no rows of 64 weights in"),
        (lambda: QuantMatrix.from_gguf([], "Q8_0", 64), "no rows, expected at least one part"),
        (lambda: QuantMatrix.from_packed(raw[0], "Q8_0", (5, 64)), "has 2176 bytes, not [68] of uint8: pack"),
        (lambda: matrix.linear(np.zeros((2, 32), np.float32)), "float32 of shape [2, 32], expected float32 [M, 64]"),
        (
            lambda: matrix.linear(np.zeros((2, 64))),  # type: ignore[arg-type]
            "x is float64 of shape",
        ),
        (
            lambda: matrix.linear(np.zeros((2, 64), np.float32), np.zeros(4, np.float32)),
            "bias is float32 [4], expected",
        ),
        (lambda: matrix.rows(np.array([5])), "ids are from 5 to 5, expected 0 to 4; check the tokenizer"),
    ):
        with pytest.raises(UserError) as caught:
            given()
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    odd = np.empty(packed_bytes("Q8_0", (5, 64)) + 65, np.uint8)
    odd = odd[-odd.ctypes.data % 64 + 1 :][: packed_bytes("Q8_0", (5, 64))]
    with pytest.raises(UserError, match="starts within 64 bytes"):
        QuantMatrix.from_packed(odd, "Q8_0", (5, 64))
