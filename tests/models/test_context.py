"""What contexts refuse and keep."""

from __future__ import annotations

import pytest
import torch
from tiny_model import CONFIG, make_model

from openbook.models.context import CachedContext, DenseContext


def test_dense_positions() -> None:
    assert DenseContext(2, 3).positions.tolist() == [[0, 1, 2]] * 2


def test_cache_asks_for_append_first() -> None:
    context = CachedContext(CONFIG, batch=1, capacity=4)
    with pytest.raises(ValueError, match=r"^call append\(\) before the forward"):
        make_model()(torch.tensor([[1]]), context)


def test_cache_refuses_what_does_not_fit() -> None:
    context = CachedContext(CONFIG, batch=2, capacity=4)
    with pytest.raises(ValueError, match=r"^got token counts \[1\] for 2 sequences"):
        context.append([1])
    with pytest.raises(ValueError, match="5 tokens"):
        context.append([1, 5])
    context.append([1, 4])
    assert context.lengths == [1, 4]


def test_cache_keeps_selected_rows_in_the_order_given() -> None:
    model, ids = make_model(), torch.randint(0, 61, (3, 6), generator=torch.Generator().manual_seed(0))
    context = CachedContext(CONFIG, batch=3, capacity=6)
    with torch.inference_mode():
        expected = model(ids, DenseContext(3, 6))
        context.append([5, 4, 2])
        model(ids[:, :5], context)
        context.select([2, 0])
        assert context.lengths == [2, 5]
        context.append([3, 1])
        logits = model(torch.stack([ids[2, 2:5], ids[0, 5:].expand(3)]), context)
    torch.testing.assert_close(logits[0], expected[2, 2:5], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[1, 0], expected[0, 5], atol=1e-5, rtol=0)
