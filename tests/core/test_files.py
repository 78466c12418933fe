"""Files are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from openbook.core.errors import UserError
from openbook.core.files import (
    atomic_directory,
    atomic_path,
    read_bytes,
    read_json,
    require_absent,
    sha256_bytes,
    sha256_file,
    write_bytes,
    write_json,
    write_text,
)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    write_bytes(path, b"one")
    with atomic_path(path) as partial:
        partial.write_bytes(b"two")
        assert path.read_bytes() == b"one"
    assert path.read_bytes() == b"two"
    assert _names(path.parent) == ["file"]


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), atomic_path(path) as partial:
        partial.write_bytes(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert _names(tmp_path) == ["file"]


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("openbook.core.files.os.fsync", full)
    with pytest.raises(UserError) as caught:
        write_bytes(path, b"new")
    assert str(caught.value) == (
        f"cannot write {path}: No space left on device; free some space and run the command again "
        "(a build with --resume); what was saved before is intact"
    )
    assert path.read_bytes() == b"old"
    assert _names(tmp_path) == ["file"]


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=rf"^cannot write {tmp_path}/file/inside: .*; check the disk and the path$"):
        write_text(tmp_path / "file" / "inside", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=rf"^cannot write {tmp_path}/folder: Is a directory; "):
        write_text(tmp_path / "folder", "x")
    assert _names(tmp_path) == ["file", "folder"]


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    (tmp_path / "new.partial").mkdir()  # what a killed process left
    (tmp_path / "new.partial" / "stale").write_bytes(b"")
    with atomic_directory(tmp_path / "new") as partial:
        (partial / "inside").mkdir()
        (partial / "inside" / "file").write_bytes(b"1")
        assert not (tmp_path / "new").exists()
    assert _names(tmp_path) == ["new"]
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
        "new",
        "new/inside",
        "new/inside/file",
    ]


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt(), UserError("wrong")])
def test_a_failure_in_the_middle_leaves_no_directory(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), atomic_directory(tmp_path / "new") as partial:
        (partial / "file").write_bytes(b"half")
        raise error
    assert _names(tmp_path) == []


def test_a_directory_on_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught, atomic_directory(tmp_path / "new") as partial:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(partial))
    assert str(caught.value).startswith(f"cannot write {tmp_path}/new: No space left on device; free some space")
    assert _names(tmp_path) == []


def test_a_directory_is_never_put_over_another(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious").write_bytes(b"mine")
    message = rf"^cannot write {tmp_path}/there: Directory not empty; "
    with pytest.raises(UserError, match=message), atomic_directory(tmp_path / "there") as partial:
        (partial / "file").write_bytes(b"1")
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["precious"]
    assert _names(tmp_path) == ["there"]


def test_json_comes_back(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None], "a": "ä"}
    write_json(tmp_path / "file.json", value)
    assert read_json(tmp_path / "file.json") == value
    assert (tmp_path / "file.json").read_text().startswith('{\n  "b": [')


@pytest.mark.parametrize("data", [b"", b"{", b'{"a": 1} x', b"\xff\xfe", b'"\xff"', b"[" * 100_000])
def test_what_is_not_json_is_one_line(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file.json").write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_json(tmp_path / "file.json", "data manifest")
    line = str(caught.value)
    assert line.startswith(f"the data manifest {tmp_path}/file.json is not valid JSON: ")
    assert line.endswith("; restore the file from its source")
    assert "\n" not in line


def test_reading_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_bytes(tmp_path / "none", "recipe")
    assert str(caught.value) == f"cannot read the recipe {tmp_path}/none: No such file or directory; check the path"
    with pytest.raises(UserError, match=f"^cannot read the file {tmp_path}: Is a directory; "):
        read_bytes(tmp_path)
    with pytest.raises(UserError, match=f"^cannot read the file {tmp_path}/none: No such file or directory; "):
        sha256_file(tmp_path / "none")


def test_what_exists_is_refused_by_the_option_that_names_it(tmp_path: Path) -> None:
    require_absent(tmp_path / "none")
    for target in (tmp_path, tmp_path / "dangling"):
        if target != tmp_path:
            target.symlink_to(tmp_path / "none")
        with pytest.raises(UserError) as caught:
            require_absent(target, "--report")
        assert str(caught.value) == (
            f"--report {target} exists already and nothing is overwritten: give a new path, or remove it first"
        )


def test_digests_of_bytes_and_files_agree(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(data)
    assert sha256_file(tmp_path / "file") == sha256_bytes(data) == hashlib.sha256(data).hexdigest()
