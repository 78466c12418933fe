"""Responses on disk, so that a request may go on from an earlier one; in SQLite, each whole or absent.

What belongs to a key is found with that key alone. Conversations that were not gone on with for long are forgotten, and
those that were not for the longest time when there is no more room.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from openbook.core.errors import UserError

FILE_NAME = "responses.sqlite3"
_VERSION = 1
_BUSY_S = 5.0  # to wait for another server that writes into the same file
_OVERHEAD_BYTES = 512  # what a response takes beside its texts, about
_MAX_TURNS = 10_000  # of a conversation
_SCHEMA = """
BEGIN IMMEDIATE;
CREATE TABLE facts (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE conversations (
  id TEXT PRIMARY KEY,
  used_s REAL NOT NULL,
  num_bytes INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX conversations_by_use ON conversations (used_s);
CREATE TABLE responses (
  id TEXT PRIMARY KEY,
  owner BLOB NOT NULL,
  conversation TEXT NOT NULL REFERENCES conversations ON DELETE CASCADE,
  previous TEXT,
  num_bytes INTEGER NOT NULL,
  items BLOB NOT NULL,
  response BLOB NOT NULL
);
CREATE INDEX responses_by_conversation ON responses (conversation);
INSERT INTO facts VALUES ('num_bytes', 0), ('num_checks', 0), ('salt', x'{salt}');
PRAGMA user_version = {version};
COMMIT;
"""
_REASONS = {
    sqlite3.SQLITE_FULL: "the disk is full",
    sqlite3.SQLITE_READONLY: "its folder cannot be written to",
    sqlite3.SQLITE_CANTOPEN: "its folder cannot be written to",
    sqlite3.SQLITE_PERM: "its folder cannot be written to",
    sqlite3.SQLITE_CORRUPT: "its file is damaged",
    sqlite3.SQLITE_NOTADB: "its file is damaged",
    sqlite3.SQLITE_BUSY: "another server is writing to it",
}
# After these the connection is as good as before.
_HARMLESS = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY)
_log = logging.getLogger("openbook.server")
T = TypeVar("T")


def default_folder() -> Path:
    """Where responses are kept if nothing else is said: the user's folder for what programs remember (XDG).

    Raises:
        UserError: the user has no home.
    """
    try:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    except RuntimeError as error:
        raise UserError(
            "there is no home folder to keep responses in: give --response-store a folder, or off to keep none"
        ) from error
    return Path(state) / "openbook" / "responses"


class StoreError(Exception):
    """The store cannot be used now; the text says why, without the names of files."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One response.

    Args:
        id: of the response.
        previous: the response that it went on from; None for a first one.
        items: what it was asked, in this turn.
        response: the object that the client got.
    """

    id: str
    previous: str | None
    items: list[dict[str, Any]]
    response: dict[str, Any]


class ResponseStore:
    """See above. All methods are called on one event loop; the work is done in a thread of its own.

    Nothing is opened before it is needed, so that a server starts whatever state its disk is in.

    Args:
        folder: where the file lies; it is made for this user alone if it is not there.
        max_bytes: most bytes of all responses; the file is a little larger.
        max_age_s: seconds after which a conversation that nobody went on with is forgotten.
        clock: Unix time.
    """

    def __init__(self, folder: Path, max_bytes: int, max_age_s: float, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._max_bytes, self._max_age_s, self._clock = folder, max_bytes, max_age_s, clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="openbook-responses")
        self._opened: sqlite3.Connection | None = None
        self._salt = b""

    async def check(self) -> None:
        """Make sure that something can be written, before it is worth while to compute it.

        Raises:
            StoreError: it cannot.
        """
        # A changed number, as SQLite writes nothing that stays the same.
        await self._do(
            lambda db: db.execute("UPDATE facts SET value = value + 1 WHERE name = 'num_checks'"), is_writing=True
        )

    async def add(self, api_key: str | None, turn: Turn) -> None:
        """Keep a response; what is too old goes, and if there is too little room what was not used for the longest.

        Args:
            api_key: the key of the request; None where none is asked for.

        Raises:
            StoreError: it cannot be kept, and then nothing of it is.
        """
        await self._do(lambda db: self._add(db, api_key, turn), is_writing=True)

    async def get(self, api_key: str | None, response_id: str) -> Turn | None:
        """The response of that id, if there is one that belongs to the key.

        Raises:
            StoreError: the store cannot be read.
        """
        turns = await self.conversation(api_key, response_id, most_turns=1)
        return turns[0] if turns else None

    async def conversation(self, api_key: str | None, response_id: str, most_turns: int = _MAX_TURNS) -> list[Turn]:
        """A response and all that it went on from, the first one first; empty if there is no such response.

        If one of them was deleted, the list begins behind it, with a turn that has a `previous`.

        Raises:
            StoreError: the store cannot be read.
        """
        return await self._do(lambda db: self._conversation(db, api_key, response_id, most_turns))

    async def delete(self, api_key: str | None, response_id: str) -> bool:
        """Forget a response; whether there was one of that id that belongs to the key.

        Raises:
            StoreError: it cannot be forgotten now.
        """
        return await self._do(lambda db: self._delete(db, api_key, response_id), is_writing=True)

    async def close(self) -> None:
        """Finish what was begun, and close the file."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown()

    async def _do(self, work: Callable[[sqlite3.Connection], T], is_writing: bool = False) -> T:
        def run() -> T:
            try:
                db = self._open()
                with _transaction(db, "IMMEDIATE" if is_writing else "DEFERRED"):
                    return work(db)
            except (sqlite3.Error, OSError) as error:
                code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest of it says where
                if code not in _HARMLESS:
                    self._close()
                _log.error("the response store in %s: %s", self._folder, error)
                reason = _REASONS.get(code) or (error.strerror if isinstance(error, OSError) else None) or str(error)
                raise StoreError(reason) from error

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    def _open(self) -> sqlite3.Connection:
        if self._opened is not None:
            return self._opened
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._folder / FILE_NAME
        with suppress(FileExistsError):  # for this user alone, and so are the files that SQLite puts beside it
            os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
        db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            _prepare(db)
            self._salt = _fact(db, "salt")
        except BaseException:
            db.close()
            raise
        self._opened = db
        return db

    def _close(self) -> None:
        if self._opened is not None:
            with suppress(sqlite3.Error):
                self._opened.close()
            self._opened = None

    def _owner(self, api_key: str | None) -> bytes:
        """What is kept of a key; the salt is this store's own."""
        return b"" if api_key is None else hmac.digest(self._salt, api_key.encode(errors="replace"), hashlib.sha256)

    def _add(self, db: sqlite3.Connection, api_key: str | None, turn: Turn) -> None:
        now_s, owner = self._clock(), self._owner(api_key)
        items, response = msgspec.json.encode(turn.items), msgspec.json.encode(turn.response)
        num_bytes = len(items) + len(response) + _OVERHEAD_BYTES
        for (old,) in db.execute(
            "SELECT id FROM conversations WHERE used_s < ?", (now_s - self._max_age_s,)
        ).fetchall():
            _forget(db, old)
        found = db.execute("SELECT conversation FROM responses WHERE id = ? AND owner = ?", (turn.previous, owner))
        conversation: str = (found.fetchone() or (turn.id,))[0]
        db.execute(
            "INSERT INTO conversations VALUES (?, ?, ?) "
            "ON CONFLICT (id) DO UPDATE SET used_s = excluded.used_s, num_bytes = num_bytes + excluded.num_bytes",
            (conversation, now_s, num_bytes),
        )
        db.execute(
            "INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, ?)",
            (turn.id, owner, conversation, turn.previous, num_bytes, items, response),
        )
        _count(db, num_bytes)
        while _fact(db, "num_bytes") > self._max_bytes:
            oldest = db.execute(
                "SELECT id FROM conversations WHERE id != ? ORDER BY used_s", (conversation,)
            ).fetchone()
            if oldest is None:
                raise sqlite3.OperationalError(f"the conversation alone has more than {self._max_bytes:,} bytes")
            _forget(db, oldest[0])

    def _conversation(
        self, db: sqlite3.Connection, api_key: str | None, response_id: str, most_turns: int
    ) -> list[Turn]:
        rows = db.execute(
            """
            WITH RECURSIVE chain (id, previous, items, response, depth) AS (
              SELECT responses.id, previous, items, response, 1
              FROM responses JOIN conversations ON conversations.id = conversation
              WHERE responses.id = :id AND owner = :owner AND used_s >= :oldest_s
              UNION ALL
              SELECT earlier.id, earlier.previous, earlier.items, earlier.response, depth + 1
              FROM chain JOIN responses AS earlier ON earlier.id = chain.previous
              WHERE earlier.owner = :owner AND depth < :most_turns
            )
            SELECT id, previous, items, response FROM chain ORDER BY depth DESC
            """,
            {
                "id": response_id,
                "owner": self._owner(api_key),
                "oldest_s": self._clock() - self._max_age_s,
                "most_turns": most_turns,
            },
        )
        return [
            Turn(id=name, previous=previous, items=msgspec.json.decode(items), response=msgspec.json.decode(response))
            for name, previous, items, response in rows
        ]

    def _delete(self, db: sqlite3.Connection, api_key: str | None, response_id: str) -> bool:
        found = db.execute(
            "SELECT conversation, num_bytes FROM responses WHERE id = ? AND owner = ?",
            (response_id, self._owner(api_key)),
        ).fetchone()
        if found is None:
            return False
        conversation, num_bytes = found
        db.execute("DELETE FROM responses WHERE id = ?", (response_id,))
        db.execute("UPDATE conversations SET num_bytes = num_bytes - ? WHERE id = ?", (num_bytes, conversation))
        db.execute("DELETE FROM conversations WHERE id = ? AND num_bytes = 0", (conversation,))
        _count(db, -num_bytes)
        return True


@contextmanager
def _transaction(db: sqlite3.Connection, kind: str) -> Iterator[None]:
    """All of what is done inside, or nothing."""
    db.execute(f"BEGIN {kind}")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # a full disk has ended it already
            db.execute("ROLLBACK")
        raise


def _prepare(db: sqlite3.Connection) -> None:
    """Set up a connection, and the tables of a new file."""
    version = _version(db)
    if version not in (0, _VERSION):
        raise sqlite3.DatabaseError(f"its file has version {version}, this program knows {_VERSION}")
    # Written ahead, and not flushed each time: a power cut may cost the latest responses, never a part of one.
    for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON", "secure_delete = ON"):
        db.execute(f"PRAGMA {pragma}").fetchall()
    if version == 0:
        try:
            db.executescript(_SCHEMA.format(salt=secrets.token_hex(16), version=_VERSION))
        except sqlite3.OperationalError:  # another server was faster, or it cannot be written to
            if db.in_transaction:
                db.execute("ROLLBACK")
            if _version(db) != _VERSION:
                raise


def _version(db: sqlite3.Connection) -> int:
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    return version


def _fact(db: sqlite3.Connection, name: str) -> Any:
    return db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()[0]


def _count(db: sqlite3.Connection, num_bytes: int) -> None:
    db.execute("UPDATE facts SET value = value + ? WHERE name = 'num_bytes'", (num_bytes,))


def _forget(db: sqlite3.Connection, conversation: str) -> None:
    """Delete a conversation with all of its responses."""
    (num_bytes,) = db.execute("SELECT num_bytes FROM conversations WHERE id = ?", (conversation,)).fetchone()
    db.execute("DELETE FROM conversations WHERE id = ?", (conversation,))
    _count(db, -num_bytes)
