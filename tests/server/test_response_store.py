"""The store of responses: whole or absent, one's own only, within its limits, and back after a full disk."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from openbook.core.errors import UserError
from openbook.server.response_store import FILE_NAME, ResponseStore, StoreError, Turn, default_folder

DAY_S = 86_400.0


class Clock:
    """Unix time that a test sets."""

    def __init__(self) -> None:
        self.now_s = 1e9

    def __call__(self) -> float:
        return self.now_s


def with_store(
    folder: Path, work: Callable[[ResponseStore], Awaitable[None]], max_bytes: int = 1 << 20, clock: Any = None
) -> None:
    """Run `await work(store)`, and close the store."""

    async def go() -> None:
        store = ResponseStore(folder, max_bytes, 30 * DAY_S, clock or Clock())
        try:
            await asyncio.wait_for(work(store), 30)
        finally:
            await store.close()

    asyncio.run(go())


def turn(name: str, previous: str | None = None, size: int = 10) -> Turn:
    return Turn(id=name, previous=previous, items=[{"text": name * size}], response={"id": name, "n": [1, None, 2.5]})


async def names(store: ResponseStore, last: str, key: str | None = None) -> list[str]:
    return [one.id for one in await store.conversation(key, last)]


def test_what_was_added_is_found_also_by_the_next_server(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"

    async def write(store: ResponseStore) -> None:
        await store.check()
        assert await store.get(None, "one") is None
        await store.add(None, turn("one"))
        await store.add(None, turn("two", "one"))
        await store.add(None, turn("three", "two"))
        await store.add(None, turn("other", "one"))
        await store.add(None, turn("alone"))

    async def read(store: ResponseStore) -> None:
        assert await store.get(None, "two") == turn("two", "one")
        assert await names(store, "three") == ["one", "two", "three"]
        assert await names(store, "other") == ["one", "other"]
        assert await names(store, "alone") == ["alone"]
        assert await names(store, "none") == []

    with_store(folder, write)
    with_store(folder, read)
    for path in (folder, *folder.iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_nobody_finds_what_another_key_made(tmp_path: Path) -> None:
    async def work(store: ResponseStore) -> None:
        await store.add("key of a", turn("one"))
        await store.add(None, turn("open"))
        assert await names(store, "one", "key of a") == ["one"]
        for key in ("key of b", "", None):
            assert await store.get(key, "one") is None
            assert not await store.delete(key, "one")
        assert await store.get("key of a", "open") is None
        # Nor does a response that claims to go on from it get hold of it.
        await store.add("key of b", turn("thief", "one"))
        assert await names(store, "thief", "key of b") == ["thief"]
        assert await store.delete("key of a", "one")
        assert await names(store, "thief", "key of b") == ["thief"]

    with_store(tmp_path, work)
    assert b"key of a" not in (tmp_path / FILE_NAME).read_bytes()


def test_deleting(tmp_path: Path) -> None:
    async def work(store: ResponseStore) -> None:
        for name, previous in (("one", None), ("two", "one"), ("three", "two")):
            await store.add(None, turn(name, previous))
        assert await store.delete(None, "one")
        assert not await store.delete(None, "one")
        left = await store.conversation(None, "three")
        assert [(one.id, one.previous) for one in left] == [("two", "one"), ("three", "two")]
        for name in ("two", "three"):
            assert await store.delete(None, name)

    with_store(tmp_path, work)
    db = sqlite3.connect(tmp_path / FILE_NAME)
    assert db.execute("SELECT count(*) FROM conversations").fetchone() == (0,)
    assert db.execute("SELECT value FROM facts WHERE name = 'num_bytes'").fetchone() == (0,)
    db.close()
    data = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"oneone" not in data and b"threethree" not in data  # overwritten, not only unlinked


def test_the_conversation_unused_for_the_longest_time_makes_room(tmp_path: Path) -> None:
    clock = Clock()

    async def work(store: ResponseStore) -> None:
        for number in range(8):
            clock.now_s += 1
            await store.add(None, turn(f"{number}", size=1000))
        clock.now_s += 1
        await store.add(None, turn("0b", "0", size=1000))  # the oldest one is used again
        for number in range(8, 12):
            clock.now_s += 1
            await store.add(None, turn(f"{number}", size=1000))
        kept = [number for number in range(12) if await store.get(None, f"{number}")]
        assert kept == [0, 8, 9, 10, 11] and await names(store, "0b") == ["0", "0b"]
        with pytest.raises(StoreError, match="the conversation alone has more than 13,000 bytes"):
            await store.add(None, turn("0c", "0b", size=5000))
        assert await names(store, "0b") == ["0", "0b"]  # nothing was lost for it
        assert [number for number in range(12) if await store.get(None, f"{number}")] == kept

    with_store(tmp_path, work, max_bytes=13_000, clock=clock)


def test_what_is_old_is_forgotten(tmp_path: Path) -> None:
    clock = Clock()

    async def work(store: ResponseStore) -> None:
        await store.add(None, turn("old"))
        await store.add(None, turn("used"))
        clock.now_s += 20 * DAY_S
        await store.add(None, turn("again", "used"))
        clock.now_s += 20 * DAY_S
        assert await store.get(None, "old") is None
        assert await names(store, "again") == ["used", "again"]
        await store.add(None, turn("new"))

    with_store(tmp_path, work, clock=clock)
    db = sqlite3.connect(tmp_path / FILE_NAME)
    assert db.execute("SELECT count(*) FROM responses WHERE id = 'old'").fetchone() == (0,)
    db.close()


def test_a_full_disk(tmp_path: Path) -> None:
    """SQLite may have no page more than it has: as on a full disk, it says SQLITE_FULL."""

    async def work(store: ResponseStore) -> None:
        await store.add(None, turn("one"))
        db = store._open()
        (pages,) = db.execute("PRAGMA page_count").fetchone()
        db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StoreError, match="the disk is full"):
            await store.add(None, turn("two", "one", size=100_000))
        assert await names(store, "one") == ["one"] and await store.get(None, "two") is None
        assert (
            db.execute("SELECT sum(num_bytes) FROM conversations").fetchone()
            == db.execute("SELECT value FROM facts WHERE name = 'num_bytes'").fetchone()
        )
        db.execute("PRAGMA max_page_count = 100000")  # somebody made room
        await store.add(None, turn("two", "one", size=100_000))
        assert await names(store, "two") == ["one", "two"]

    with_store(tmp_path, work)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_no_room_for_the_file_itself(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).symlink_to("/dev/full")

    async def work(store: ResponseStore) -> None:
        for attempt in (store.check(), store.add(None, turn("one")), store.get(None, "one")):
            with pytest.raises(StoreError):
                await attempt

    with_store(tmp_path, work)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "store"

    async def work(store: ResponseStore) -> None:
        with pytest.raises(StoreError, match="Not a directory"):
            await store.check()
        (tmp_path / "file").unlink()
        await store.check()  # it is looked for anew each time

    with_store(folder, work)


def test_a_file_that_cannot_be_written_can_be_read(tmp_path: Path) -> None:
    async def write(store: ResponseStore) -> None:
        await store.add(None, turn("one"))

    async def work(store: ResponseStore) -> None:
        await store.check()
        store._open().execute("PRAGMA query_only = ON")
        with pytest.raises(StoreError, match="its folder cannot be written to"):
            await store.add(None, turn("two"))
        assert await names(store, "one") == ["one"]

    with_store(tmp_path, write)
    with_store(tmp_path, work)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda path: path.write_bytes(b"no database" * 1000), "its file is damaged"),
        (lambda path: _set_version(path, 7), "its file has version 7, this program knows 1"),
    ],
)
def test_a_file_that_is_not_ours(tmp_path: Path, damage: Callable[[Path], None], text: str) -> None:
    path = tmp_path / FILE_NAME
    damage(path)
    before = path.read_bytes()

    async def work(store: ResponseStore) -> None:
        with pytest.raises(StoreError, match=text):
            await store.check()

    with_store(tmp_path, work)
    assert path.read_bytes() == before


def _set_version(path: Path, version: int) -> None:
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version = {version}")
    db.close()


def test_two_servers_share_a_file(tmp_path: Path) -> None:
    async def work(first: ResponseStore) -> None:
        second = ResponseStore(tmp_path, 1 << 20, DAY_S, Clock())
        stores = (first, second)
        await asyncio.gather(*(stores[n % 2].add("a", turn(f"{n}", f"{n - 1}" if n > 9 else None)) for n in range(40)))
        assert len([n for n in range(40) if await stores[n % 2 - 1].get("a", f"{n}")]) == 40
        await second.close()

    with_store(tmp_path, work)


def test_a_process_that_is_killed_leaves_whole_responses(tmp_path: Path) -> None:
    program = f"""
import asyncio, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_response_store import turn
from openbook.server.response_store import ResponseStore
async def main():
    store = ResponseStore(Path({str(tmp_path)!r}), 1 << 30, 1e9)
    for number in range(10_000):
        await store.add(None, turn(f"{{number}}", f"{{number - 1}}" if number else None, size=5_000))
        print(number, flush=True)
asyncio.run(main())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert process.stdout is not None
    said = -1
    while said < 30:
        said = int(process.stdout.readline())
    process.kill()
    said = max([said, *map(int, process.stdout.read().split())])
    process.wait()
    process.stdout.close()

    async def work(store: ResponseStore) -> None:
        last = said + 1 if await store.get(None, f"{said + 1}") else said  # written, and not yet said
        found = await store.conversation(None, f"{last}")
        assert found == [turn(f"{n}", f"{n - 1}" if n else None, size=5_000) for n in range(last + 1)]

    with_store(tmp_path, work, max_bytes=1 << 30)


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "openbook" / "responses"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_folder() == Path("/home/somebody/.local/state/openbook/responses")

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(UserError, match="there is no home folder to keep responses in: give --response-store a folder"):
        default_folder()
