from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from openbook.core.errors import UserError
from openbook.data.loader import Batch, ShardLoader, _make_batch
from openbook.data.pack import Rows
from openbook.data.shards import map_shard, read_manifest


def test_positions_restart_and_targets_stay_inside_a_document() -> None:
    rows = Rows(
        tokens=np.array([[10, 11, 12, 20, 21, 22, 0, 0]], np.uint16),
        loss_mask=np.array([[0, 1, 1, 1, 0, 1, 0, 0]], np.uint8),
        documents=np.array([[3, 3, 3, 5, 5, 5, -1, -1]], np.int32),
    )
    batch = _make_batch(rows)
    assert batch.ids.tolist() == [[10, 11, 12, 20, 21, 22, 0, 0]]
    # The target of 12 would be another document's first token; that of 20 has loss mask 0.
    assert batch.targets.tolist() == [[11, 12, -1, -1, 22, -1, -1, -1]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2, 0, 0]]
    assert batch.documents.tolist() == [[3, 3, 3, 5, 5, 5, -1, -1]]
    assert batch.first_document == 3
    for array in (batch.ids, batch.targets, batch.positions, batch.documents):
        assert array.dtype == np.int64


def digests(loader: ShardLoader, num: int) -> list[str]:
    return [loader.next_batch().digest for _ in range(num)]


def test_an_epoch_holds_each_row_once_and_the_next_has_another_order(data_folder: Path) -> None:
    loader = ShardLoader(data_folder, 1, seed=4)
    epochs = [[digests(loader, 1)[0] for _ in range(loader.num_rows)] for _ in range(2)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert len(set(epochs[0])) == loader.num_rows
    assert epochs[0] != digests(ShardLoader(data_folder, 1, seed=5), loader.num_rows)


def test_every_trained_token_is_a_target_once_an_epoch(data_folder: Path) -> None:
    loader = ShardLoader(data_folder, 1, seed=4)
    batches = [loader.next_batch() for _ in range(loader.num_rows)]
    manifest = read_manifest(data_folder)
    assert sum(int((batch.targets >= 0).sum()) for batch in batches) == manifest.trained_tokens
    assert sum(int((batch.documents >= 0).sum()) for batch in batches) == manifest.tokens


@pytest.mark.parametrize("num_before", [0, 1, 7, 60, 150])
def test_restore_gives_exactly_the_continuation(data_folder: Path, num_before: int) -> None:
    loader = ShardLoader(data_folder, 3, seed=4)
    for _ in range(num_before):
        loader.next_batch()
    state = loader.state()
    fresh = ShardLoader(data_folder, 3, seed=4)
    fresh.next_batch()
    fresh.restore(state)
    assert fresh.state() == state
    assert fresh.next_batch().first_document == state["document"]
    fresh.restore(state)
    assert digests(fresh, 40) == digests(loader, 40)


def test_an_empty_state_is_the_beginning(data_folder: Path) -> None:
    loader = ShardLoader(data_folder, 3, seed=4)
    first = digests(loader, 2)
    loader.restore({})
    assert digests(loader, 2) == first


def test_a_batch_may_be_larger_than_the_data(data_folder: Path) -> None:
    loader = ShardLoader(data_folder, 1, seed=4)
    large = ShardLoader(data_folder, loader.num_rows + 2, seed=4)
    batch = large.next_batch()
    assert batch.ids.shape == (loader.num_rows + 2, 256)
    assert large.state()["epoch"] == 1
    assert large.state()["row"] == 2


def test_a_state_of_other_data_is_refused(data_folder: Path) -> None:
    loader = ShardLoader(data_folder, 3, seed=4)
    loader.next_batch()
    state = loader.state()
    with pytest.raises(UserError, match=r"^the checkpoint stands at row 99999 and .* has \d+: the data is not what"):
        loader.restore({**state, "row": 99999})
    with pytest.raises(UserError, match=r"^the checkpoint stands at document 99999 and .* has document \d+ there: the"):
        loader.restore({**state, "document": 99999})


def test_the_digest_covers_every_array(data_folder: Path) -> None:
    rows = map_shard(data_folder / "rows-00000.safetensors")
    two = Rows(*(array[:2].copy() for array in rows))
    before: Batch = _make_batch(two)
    assert _make_batch(two).digest == before.digest
    two.loss_mask[0, 1:20] ^= 1  # changes targets only
    assert _make_batch(two).digest != before.digest
