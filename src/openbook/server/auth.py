"""API keys: kept as salted hashes, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

from openbook.core.errors import UserError
from openbook.core.files import read_bytes

KEY_PREFIX = "ob-"
# A key made here has 256 bits, so that a fast hash is as safe as a slow one: nobody can try them all.
_HASHED = re.compile(r"sha256\$([0-9a-f]{32})\$([0-9a-f]{64})")
_MIN_LENGTH = 8


def new_key() -> str:
    """A fresh API key."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """What may be kept of a key, in a file for `--api-key-file` too: `sha256$SALT$DIGEST` in hexadecimal."""
    salt = secrets.token_bytes(16)
    return f"sha256${salt.hex()}${_digest(key, salt).hex()}"


def read_keys(path: Path) -> list[str]:
    """The keys in a file, one a line, plain or hashed; empty lines and those that begin with # are left out.

    Raises:
        UserError: the file cannot be read, or holds no key.
    """
    try:
        lines = read_bytes(path, "file of API keys").decode().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"the file of API keys {path} is not UTF-8 text: write one key a line") from error
    keys = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not keys:
        raise UserError(f"the file of API keys {path} holds none: write one key a line")
    return keys


class KeyRing:
    """The keys that open the API.

    Args:
        keys: each plain or as `hash_key` writes it.

    Raises:
        UserError: a key is too short to be one.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._hashed: list[tuple[bytes, bytes]] = []  # salt and digest
        for key in keys:
            if key.startswith("sha256$") and not _HASHED.fullmatch(key):
                raise UserError(
                    "an API key begins with sha256$ but is no hash: expected sha256$SALT$DIGEST; make a new one"
                )
            if len(key) < _MIN_LENGTH:
                raise UserError(
                    f"an API key has {len(key)} characters: expected at least {_MIN_LENGTH}; take a longer one"
                )
            match = _HASHED.fullmatch(key if key.startswith("sha256$") else hash_key(key))
            assert match is not None
            self._hashed.append((bytes.fromhex(match[1]), bytes.fromhex(match[2])))

    def __bool__(self) -> bool:
        return bool(self._hashed)

    def __len__(self) -> int:
        return len(self._hashed)

    def find(self, key: str) -> int | None:
        """Which key it is, counted from 0; None if it is none of them. All are compared, whichever fits."""
        found = None
        for index, (salt, digest) in enumerate(self._hashed):
            if hmac.compare_digest(_digest(key, salt), digest):
                found = index
        return found


def _digest(key: str, salt: bytes) -> bytes:
    return hmac.digest(salt, key.encode(errors="surrogatepass"), hashlib.sha256)
