"""Exact attention: against float64 spelled out, and the same bits however it is computed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from exact_paths import paths
from openbook.core.errors import UserError
from openbook.models.cache import NO_POSITION
from openbook.ops import _native
from openbook.ops.base import AttentionMask
from openbook.ops.exact_attention import exact_attention, prepare_exact_mask
from openbook.ops.torch_ops import visible_keys


def packed_mask(*rows: list[int], window: int | None = None) -> AttentionMask:
    """Rows of documents of these lengths; a negative length is padding."""
    documents, positions = [], []
    for lengths in rows:
        documents.append([i if n > 0 else -1 for i, n in enumerate(lengths) for _ in range(abs(n))])
        positions.append([place for n in lengths for place in range(abs(n))])
    documents_BT, positions_BT = torch.tensor(documents), torch.tensor(positions)
    return AttentionMask(positions_BT, positions_BT, documents_BT, documents_BT, window=window)


def causal_mask(batch: int, tokens: int, window: int | None = None) -> AttentionMask:
    positions = torch.arange(tokens).expand(batch, tokens)
    return AttentionMask(positions, positions, window=window, is_plain_causal=True)


def ring_mask(window: int, before: list[int], tokens: int) -> AttentionMask:
    """What a window cache gives: slots in the order of a ring, some of them empty, then the new tokens."""
    first = torch.tensor(before)[:, None]
    new = first + torch.arange(tokens)
    old = first - 1 - (first - 1 - torch.arange(window)) % window
    return AttentionMask(new, torch.cat([torch.where(old >= 0, old, NO_POSITION), new], 1), window=window)


MASKS = {
    "packed": packed_mask([70, 1, 33, 16], [5, 100, -15]),
    "packed window": packed_mask([70, 1, 33, 16], [5, 100, -15], window=9),
    "causal": causal_mask(2, 61),
    "causal window 1": causal_mask(1, 20, window=1),
    "cached": AttentionMask(torch.tensor([[39, 40, 41], [6, 7, 8]]), torch.arange(42).expand(2, 42)),
    "ring": ring_mask(19, [45, 7], 4),
    "one query": AttentionMask(torch.tensor([[30]]), torch.arange(31)[None]),
}


def make(
    mask: AttentionMask, N: int = 6, K: int = 2, H: int = 32, Hv: int | None = None, seed: int = 0
) -> list[Tensor]:
    """q, k, v, and a gradient."""
    B, T = mask.query_positions.shape
    S = mask.key_positions.shape[1]
    Hv = H if Hv is None else Hv
    shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, Hv), (B, T, N, Hv)]
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def reference(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, scale: float, sinks: Tensor | None = None
) -> Tensor:
    """The definition in float64; a query that sees no key gets zeros."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~visible_keys(mask)[:, None], -torch.inf)
    last = torch.full_like(scores[..., :1], -torch.inf)
    if sinks is not None:
        last = sinks.double()[None, :, None, None].expand_as(last)
    weights = torch.cat([scores, last], -1).softmax(-1)[..., :-1].nan_to_num(0.0)
    return (weights @ v).transpose(1, 2)


def run(
    mask: AttentionMask | None, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, sinks: Tensor | None
) -> list[Tensor]:
    """The result and all gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    leaves += [] if sinks is None else [sinks.detach().clone().requires_grad_()]
    out = exact_attention(leaves[0], leaves[1], leaves[2], mask, 0.3, None if sinks is None else leaves[3])
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def bits(tensors: list[Tensor]) -> list[Tensor]:
    """As integers; which NaN is left open."""
    return [torch.where(x.isnan(), torch.nan, x).contiguous().view(torch.int32) for x in tensors]


def assert_same_bits(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(bits(a), bits(b), strict=True):
        assert torch.equal(x, y)


def assert_close(mine: Tensor, theirs: Tensor) -> None:
    """Errors stay below 2^-18 of the largest value or of 1: 64 times the last place of float32."""
    error, size = float((mine.double() - theirs).abs().max()), float(theirs.abs().max())
    assert error <= 2.0**-18 * max(size, 1.0)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize(("N", "K", "H", "Hv"), [(6, 2, 32, 32), (3, 3, 20, 7), (9, 1, 16, 40)])
def test_result_and_gradients_are_those_of_float64(name: str, has_sinks: bool, N: int, K: int, H: int, Hv: int) -> None:
    mask = MASKS[name]
    q, k, v, grad = make(mask, N, K, H, Hv)
    sinks = torch.randn(N, generator=torch.Generator().manual_seed(1)) if has_sinks else None
    got = run(mask, q, k, v, grad, sinks)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    leaves += [] if sinks is None else [sinks.double().requires_grad_()]
    expected = reference(leaves[0], leaves[1], leaves[2], mask, 0.3, leaves[3] if has_sinks else None)
    gradients = torch.autograd.grad(expected, leaves, grad.double())
    for mine, theirs in zip(got, [expected.detach(), *gradients], strict=True):
        assert_close(mine, theirs)


def test_without_a_mask_every_query_sees_every_key() -> None:
    q, k, v, grad = make(MASKS["ring"], H=24)
    got = run(None, q, k, v, grad, None)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    expected = reference(leaves[0], leaves[1], leaves[2], None, 0.3)
    for mine, theirs in zip(
        got, [expected.detach(), *torch.autograd.grad(expected, leaves, grad.double())], strict=True
    ):
        assert_close(mine, theirs)


@pytest.mark.parametrize("name", ["packed", "packed window", "ring"])
@pytest.mark.parametrize("kind", ["usual", "huge", "tiny", "not finite"])
def test_bits_do_not_depend_on_instruction_set_or_threads(name: str, kind: str) -> None:
    mask = prepare_exact_mask(MASKS[name])
    q, k, v, grad = make(mask, N=4, K=2, H=40, Hv=24)
    sinks = torch.tensor([0.5, -3.0, torch.inf if kind == "not finite" else 9.0, 0.0])
    if kind == "huge":
        q, k = q * 1e19, k * 1e19
    elif kind == "tiny":
        q, k, v, grad = q * 1e-20, k * 1e-20, v * 1e-39, grad * 1e-39
    elif kind == "not finite":
        k[0, 3, 0, 2], k[-1, 9, 1, 0], v[0, 5, 1, 3], v[-1, 12, 0, 0] = torch.nan, torch.inf, torch.inf, torch.nan
        grad[0, 2, 1, 1], q[-1, 3, 3, 3] = torch.nan, -torch.inf
    expected = None
    for isa, threads in paths():
        if threads not in (1, 3) and isa != _native.available_isas()[-1]:
            continue
        got = run(mask, q, k, v, grad, sinks)
        expected = got if expected is None else expected
        assert_same_bits(got, expected)


def test_queries_of_a_long_document_are_shared_out_among_threads() -> None:
    mask = causal_mask(1, 300)
    q, k, v, grad = make(mask, N=1, K=1)
    _native.set_num_threads(1)
    expected = run(mask, q, k, v, grad, None)
    _native.set_num_threads(8)
    assert_same_bits(run(mask, q, k, v, grad, None), expected)


def test_a_document_has_the_same_bits_alone_and_packed() -> None:
    mask = packed_mask([37, 50, 13])
    q, k, v, grad = make(mask)
    packed = run(mask, q, k, v, grad, None)
    q, k, v, grad = (x[:, 37:87] for x in (q, k, v, grad))
    alone = run(causal_mask(1, 50), q, k, v, grad, None)
    assert_same_bits([x[:, 37:87] for x in packed], alone)


def test_a_cache_has_the_bits_of_whole_rows() -> None:
    whole = causal_mask(2, 64, window=19)
    q, k, v, _ = make(whole)
    expected = exact_attention(q, k, v, whole, 0.3)
    ring = ring_mask(19, [45, 7], 4)
    for row, before in enumerate([45, 7]):
        ring_row = AttentionMask(ring.query_positions[row : row + 1], ring.key_positions[row : row + 1], window=19)
        places = ring_row.key_positions.clamp(max=63)[0]
        out = exact_attention(
            q[row : row + 1, before : before + 4], k[row : row + 1, places], v[row : row + 1, places], ring_row, 0.3
        )
        assert_same_bits([out], [expected[row : row + 1, before : before + 4]])


def test_order_of_slots_and_of_queries_does_not_matter() -> None:
    mask = MASKS["packed window"]
    q, k, v, grad = make(mask)
    order, key_order = (torch.randperm(120, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    assert mask.query_documents is not None
    assert mask.key_documents is not None
    shuffled = replace(
        mask,
        query_positions=mask.query_positions[:, order],
        query_documents=mask.query_documents[:, order],
        key_positions=mask.key_positions[:, key_order],
        key_documents=mask.key_documents[:, key_order],
    )
    out, dq, dk, dv = run(mask, q, k, v, grad, None)
    got = run(shuffled, q[:, order], k[:, key_order], v[:, key_order], grad[:, order], None)
    assert_same_bits(got, [out[:, order], dq[:, order], dk[:, key_order], dv[:, key_order]])


def test_nothing_passes_from_what_is_hidden() -> None:
    mask = packed_mask([20, 30, -4])
    q, k, v, grad = make(mask)
    expected = run(mask, q, k, v, grad, None)
    for x in (q, k, v, grad):
        x[:, 19:22] = torch.nan  # the end of one document, the beginning of the other
    got = run(mask, q, k, v, grad, None)
    assert_same_bits([got[0][:, :19], got[1][:, :19]], [expected[0][:, :19], expected[1][:, :19]])
    for x in got:
        assert not x[:, 50:].any()
    k[:, 19:22], v[:, 19:22], q[:, 19:22] = 0.0, 0.0, 0.0
    grad[:, 19:22] = 0.0
    grad[:, 30] = torch.nan
    _, _, dk, dv = run(mask, q, k, v, grad, None)
    assert dk[:, 22:31].isnan().all()
    assert not dk[:, 31:].isnan().any()
    assert not dv[:, :20].isnan().any()


def test_parts_of_a_larger_array_are_read_in_place() -> None:
    mask = MASKS["packed"]
    qkv = torch.randn(2, 120, (4 + 2 + 2) * 16, requires_grad=True)
    q, k, v = (x.view(2, 120, -1, 16) for x in torch.split(qkv, [64, 32, 32], 2))
    out = exact_attention(q, k, v, mask, 0.3)
    assert_same_bits(
        [out.detach()], [exact_attention(q.contiguous(), k.contiguous(), v.contiguous(), mask, 0.3).detach()]
    )
    (dqkv,) = torch.autograd.grad(out.sum(), qkv, retain_graph=True)  # the gradient of a sum has no strides
    (expected,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert_same_bits([dqkv], [expected])


def test_errors_say_what_was_expected() -> None:
    mask = causal_mask(1, 8)
    q, k, v, _ = make(mask)
    with pytest.raises(
        UserError, match=r"^q is torch.float64 on cpu: the exact profile computes in torch.float32 on the"
    ):
        exact_attention(q.double(), k, v, mask, 1.0)
    with pytest.raises(UserError, match=r"^got q \[1, 8, 6, 32\], k \[1, 8, 2, 32\], v \[1, 7, 2, 32\]: expected"):
        exact_attention(q, k, v[:, :7], mask, 1.0)
    with pytest.raises(UserError, match=r"^sinks have shape \[2\], expected one a head: \[6\]; correct them$"):
        exact_attention(q, k, v, mask, 1.0, torch.zeros(2))
    with pytest.raises(
        UserError, match=r"^the mask is for queries \[1, 8\] and keys \[1, 8\], but got \[1, 8\] and \[1, 7\]"
    ):
        exact_attention(q, k[:, :7], v[:, :7], mask, 1.0)
    with pytest.raises(UserError, match=r"^the positions of a document's keys have gaps or repeat"):
        prepare_exact_mask(AttentionMask(torch.tensor([[3]]), torch.tensor([[0, 1, 3]])))
