"""Limits of each key: requests and tokens a minute, with the headers that clients know."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

from openbook.server.errors import ApiError

_WINDOW_S = 60.0


class Bucket:
    """An amount that is spent, and grows back to its limit within a minute (a token bucket).

    Args:
        limit: what may be spent at once, and in a minute.
        clock: seconds, never going back.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit, self._clock = limit, clock
        self._left, self._seen_s = float(limit), clock()

    @property
    def left(self) -> float:
        """What may be spent now; negative after work whose size was not known beforehand."""
        now_s = self._clock()
        self._left = min(self.limit, self._left + (now_s - self._seen_s) * self.limit / _WINDOW_S)
        self._seen_s = now_s
        return self._left

    def spend(self, amount: float) -> None:
        """Take an amount, whether or not it is there."""
        self._left = self.left - amount

    def wait_s(self, amount: float) -> float:
        """Seconds until so much is there."""
        return max(0.0, (amount - self.left) * _WINDOW_S / self.limit)

    def headers(self, what: str) -> Iterator[tuple[str, str]]:
        """The x-ratelimit headers for "requests" or "tokens"."""
        yield f"x-ratelimit-limit-{what}", str(self.limit)
        yield f"x-ratelimit-remaining-{what}", str(max(0, math.floor(self.left)))
        yield f"x-ratelimit-reset-{what}", duration(self.wait_s(self.limit))


def duration(seconds: float) -> str:
    """Seconds as the OpenAI API writes them: 20ms, 3.5s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < _WINDOW_S:
        return f"{math.ceil(seconds * 10) / 10:g}s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s"


class Account:
    """What one key has used.

    Args:
        requests_per_minute, tokens_per_minute: its limits; None: none.
    """

    def __init__(
        self,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._requests = Bucket(requests_per_minute, clock) if requests_per_minute else None
        self._tokens = Bucket(tokens_per_minute, clock) if tokens_per_minute else None

    def admit_request(self) -> None:
        """Count a request.

        Raises:
            ApiError: 429, there have been too many.
        """
        if self._requests is None:
            return
        if self._requests.left < 1:
            raise _too_many("requests", self._requests, 1)
        self._requests.spend(1)

    def admit_prompt(self, num_tokens: int) -> None:
        """Count a prompt's tokens. Those of the answer follow with `spend_tokens`; what they take beyond the limit is
        owed, and later requests wait for it.

        Raises:
            ApiError: 429, not so many are left.
        """
        if self._tokens is None:
            return
        if num_tokens > self._tokens.limit:
            raise ApiError(
                429,
                f"the prompt has {num_tokens:,} tokens and this key has {self._tokens.limit:,} a minute: shorten it",
                code="rate_limit_exceeded",
            )
        if self._tokens.left < num_tokens:
            raise _too_many("tokens", self._tokens, num_tokens)
        self._tokens.spend(num_tokens)

    def spend_tokens(self, num_tokens: int) -> None:
        """Count tokens of an answer."""
        if self._tokens is not None:
            self._tokens.spend(num_tokens)

    def headers(self) -> dict[str, str]:
        """What stands in every answer to this key."""
        headers: dict[str, str] = {}
        for what, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                headers |= bucket.headers(what)
        return headers


def _too_many(what: str, bucket: Bucket, amount: float) -> ApiError:
    wait_s = math.ceil(bucket.wait_s(amount))
    return ApiError(
        429,
        f"this key has used its {bucket.limit:,} {what} a minute: try again in {wait_s} s",
        code="rate_limit_exceeded",
        retry_after_s=wait_s,
    )
