"""What an operator decides about a server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from openbook.core.errors import UserError

MIB = 1 << 20
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How a server treats its clients.

    Args:
        host: the address that it is bound to.
        api_keys: any of them opens the API, as given or in the form of `openbook.server.auth.hash_key`; none: open to
            all who reach it.
        requests_per_minute: most requests of one key; None: no limit.
        tokens_per_minute: most tokens of one key, of prompts and answers; None: no limit.
        max_body_bytes: most bytes of one request.
        body_timeout_s: seconds within which a request's body must have come.
        header_timeout_s: seconds within which a request's headers must have come.
        stall_timeout_s: seconds for which a client may leave what is sent to it unread.
        drain_s: seconds that running answers get when the server is told to stop.
        cors_origins: origins of web pages elsewhere that may use the API; "*" is all.
        allowed_hosts: names by which clients may call the server, beside IP addresses and localhost.
        adapter_dir: the folder from which adapters may be loaded while serving; None: none may.
        response_store: the folder where responses are kept, so that others can go on from them; None: none are.
        response_store_bytes: most bytes of all that are kept; conversations not gone on with for the longest time go.
        response_store_days: for how long a conversation is kept that nobody goes on with.
    """

    host: str = "127.0.0.1"
    api_keys: tuple[str, ...] = ()
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_body_bytes: int = 32 * MIB
    body_timeout_s: float = 120.0
    header_timeout_s: float = 15.0
    stall_timeout_s: float = 60.0
    drain_s: float = 30.0
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    adapter_dir: Path | None = None
    response_store: Path | None = None
    response_store_bytes: int = 1 << 30
    response_store_days: float = 30.0

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute"):
            limit = getattr(self, name)
            if limit is not None and not self.api_keys:
                raise UserError(f"{name} is {limit}, but limits are kept per key and there is none: give --api-key")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        return self.host in LOOPBACK or self.host.startswith("127.")

    @property
    def checks_host(self) -> bool:
        """Whether a request must call the server by a known name.

        A page elsewhere can point a name of its own at this machine and let the browser ask in the user's stead (DNS
        rebinding); the name in the Host header gives it away. Where a key is asked for and others may come, any name
        is fine.
        """
        return self.is_loopback or not self.api_keys
