from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from openbook.core.errors import UserError
from openbook.data.loader import ShardLoader
from openbook.data.shards import map_shard, read_manifest

SHARD = "rows-00001.safetensors"


@pytest.fixture
def copy(data_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data_folder, tmp_path / "copy"))


def test_mapped_rows_equal_the_library_s(data_folder: Path) -> None:
    for file in read_manifest(data_folder).shards:
        ours, theirs = map_shard(data_folder / file.path), load_file(data_folder / file.path)
        for name, array in theirs.items():
            mapped = getattr(ours, name)
            assert mapped.dtype == array.dtype
            assert mapped.tolist() == array.tolist()


def test_a_truncated_shard_is_named(copy: Path) -> None:
    path = copy / SHARD
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError) as caught:
        ShardLoader(copy, 2, 1)
    assert str(caught.value) == (
        f"the data file {path} has {size - 10} bytes, its manifest says {size}: "
        "remove this data folder and build it again"
    )


def test_a_changed_byte_is_found(copy: Path) -> None:
    data = bytearray((copy / SHARD).read_bytes())
    data[-1] ^= 1
    (copy / SHARD).write_bytes(data)
    with pytest.raises(UserError, match=rf"^the data file .*{SHARD} is damaged \(SHA-256 \w{{16}}, its manifest says "):
        ShardLoader(copy, 2, 1)


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "records.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"^cannot read the data file .*records.jsonl: No such file .*; check the path$"
    ):
        ShardLoader(copy, 2, 1)
    (copy / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"^cannot read the data manifest .*manifest.json: No such file"):
        ShardLoader(copy, 2, 1)


def test_a_manifest_of_another_format_or_with_other_keys_is_refused(copy: Path) -> None:
    path = copy / "manifest.json"
    whole = path.read_text()
    path.write_text(whole.replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match=r"^the data manifest .* has format 2, expected 1: remove this data folder"):
        read_manifest(copy)
    path.write_text(whole.replace('"tokens":', '"tokns":', 1))
    with pytest.raises(UserError, match=r"^the data manifest .*unknown key 'tokns'"):
        read_manifest(copy)


@pytest.mark.parametrize("data", [b"", b"\x10", b"\xff" * 40, b"\x02" + b"\0" * 7 + b"{}"])
def test_what_is_no_shard_is_one_line(tmp_path: Path, data: bytes) -> None:
    (tmp_path / SHARD).write_bytes(data)
    with pytest.raises(UserError, match=rf"^the data file .*{SHARD} is not a shard of rows: remove this data folder"):
        map_shard(tmp_path / SHARD)
