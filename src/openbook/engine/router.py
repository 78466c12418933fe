"""Several engines as one: each request goes to where most of its prompt is cached, unless that one is too busy."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import aclosing
from functools import reduce
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from openbook.core.errors import UserError
from openbook.engine.block_manager import block_digest
from openbook.engine.client import EngineClient, EngineDownError, EngineFullError
from openbook.engine.events import EngineStats, SequenceEvent
from openbook.engine.paged import BLOCK_TOKENS
from openbook.engine.remote_engine import add_stats
from openbook.engine.request import Request

# Work is counted in tokens: those of a prompt that are cached save theirs, a running sequence is taken to have so many
# left. A replica with a cached prefix is passed over when it runs `MOST_AHEAD` sequences more than another, or fewer if
# the prefix saves less.
SEQUENCE_TOKENS = 128
MOST_AHEAD = 4
# Blocks of a prompt that are looked at; two longer prompts that differ only behind them count as equal.
_MOST_BLOCKS = 512


class Replica(EngineClient, Protocol):
    """An engine that may end and start again."""

    @property
    def is_up(self) -> bool:
        """Whether it takes requests now."""

    @property
    def num_starts(self) -> int:
        """How often it has been started; each time its cache is empty."""

    @property
    def num_blocks(self) -> int:
        """Of its cache."""

    @property
    def max_model_len(self) -> int:
        """Most tokens of one sequence, prompt and answer together."""


class _Place:
    """What is known of one replica: how many sequences it runs, and which prefixes it has computed lately."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.num_running = 0
        self.last_choice = 0  # number of the request that came here last
        self._prefixes: OrderedDict[bytes, None] = OrderedDict()  # digests of full blocks, the longest unused first
        self._num_starts = replica.num_starts

    def num_cached_tokens(self, digests: Sequence[bytes]) -> int:
        """How much of a prompt it should find in its cache."""
        if self._num_starts != self.replica.num_starts:
            self._num_starts = self.replica.num_starts
            self._prefixes.clear()
        num_blocks = next((i for i, digest in enumerate(digests) if digest not in self._prefixes), len(digests))
        return num_blocks * BLOCK_TOKENS

    def remember(self, digests: Sequence[bytes]) -> None:
        """It is given a prompt, of which others may reuse what they share."""
        for digest in reversed(digests):  # of a prefix, the beginning is the last to be forgotten
            self._prefixes[digest] = None
            self._prefixes.move_to_end(digest)
        while len(self._prefixes) > self.replica.num_blocks:
            self._prefixes.popitem(last=False)


class RoutedEngine:
    """See `EngineClient`; all replicas have the same model.

    Args:
        replicas: at least one; they are closed with this engine.
    """

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self._places = [_Place(replica) for replica in replicas]
        self.max_model_len = min(replica.max_model_len for replica in replicas)
        self._num_requests = 0
        self._adapter_lock = asyncio.Lock()

    @property
    def replicas(self) -> list[Replica]:
        """All of them."""
        return [place.replica for place in self._places]

    async def submit(self, request: Request) -> AsyncIterator[SequenceEvent]:
        """See `EngineClient.submit`.

        A request that a replica has no room for goes to the next one. So does, once, a request whose replica has ended
        before its first event: not more often, as it may be what ends them.

        Raises:
            EngineDownError: no replica is up, or two have ended with this request.
        """
        digests = _prompt_digests(request)
        refused: dict[_Place, EngineFullError] = {}
        while True:
            place = self._choose(digests, refused)
            self._num_requests += 1
            place.last_choice = self._num_requests
            place.num_running += request.num_samples
            place.remember(digests)
            try:
                events = cast(AsyncGenerator[SequenceEvent], place.replica.submit(request))
                async with aclosing(events):
                    async for event in events:
                        yield event
                return
            except EngineFullError as error:  # before the first event, as the protocol says
                refused[place] = error
                if sum(isinstance(one, EngineDownError) for one in refused.values()) > 1:
                    raise
            finally:
                place.num_running -= request.num_samples

    async def embed(self, prompts: Sequence[Sequence[int]], adapter: str | None = None) -> NDArray[np.float32]:
        """See `EngineClient.embed`. Replicas that refuse or end are passed over as in `submit`."""
        num_sequences = max(1, sum(map(len, prompts)) // SEQUENCE_TOKENS)
        refused: dict[_Place, EngineFullError] = {}
        while True:
            place = self._choose((), refused)
            place.num_running += num_sequences
            try:
                return await place.replica.embed(prompts, adapter)
            except EngineFullError as error:
                refused[place] = error
                if sum(isinstance(one, EngineDownError) for one in refused.values()) > 1:
                    raise
            finally:
                place.num_running -= num_sequences

    async def stats(self) -> EngineStats:
        """See `EngineClient.stats`: the sums over all replicas."""
        return reduce(add_stats, await asyncio.gather(*(replica.stats() for replica in self.replicas)))

    @property
    def adapters(self) -> list[str]:
        """See `EngineClient.adapters`: those that every replica has."""
        first, *others = [replica.adapters for replica in self.replicas]
        return [name for name in first if all(name in names for names in others)]

    async def load_adapter(self, name: str, path: str) -> None:
        """See `EngineClient.load_adapter`: on all replicas, or on none.

        Raises:
            EngineDownError: a replica is being started again.
        """
        async with self._adapter_lock:
            results = await _results(replica.load_adapter(name, path) for replica in self.replicas)
            error = next((result for result in results if result is not None), None)
            if error is None:
                return
            loaded = [place.replica for place, result in zip(self._places, results, strict=True) if result is None]
            await _results(replica.unload_adapter(name) for replica in loaded)
            raise error

    async def unload_adapter(self, name: str) -> None:
        """See `EngineClient.unload_adapter`: on all replicas.

        Raises:
            EngineDownError: a replica is being started again; it still has the adapter.
        """
        async with self._adapter_lock:
            having = [replica for replica in self.replicas if name in replica.adapters]
            if not having:
                known = ", ".join(self.adapters) or "none"
                raise UserError(f"the adapter {name!r} is not loaded: expected one of {known}")
            for error in await _results(replica.unload_adapter(name) for replica in having):
                if error is not None:
                    raise error

    async def close(self, deadline_s: float) -> None:
        """See `EngineClient.close`."""
        await asyncio.gather(*(replica.close(deadline_s) for replica in self.replicas))

    def _choose(self, digests: Sequence[bytes], refused: dict[_Place, EngineFullError]) -> _Place:
        """The replica that is least busy, where what it has of the prompt makes up for some sequences.

        Raises:
            EngineFullError: all that are up have refused the request; the one that asks for the shortest wait.
            EngineDownError: none is up.
        """
        places = [place for place in self._places if place.replica.is_up and place not in refused]
        if not places:
            if refused:
                raise min(refused.values(), key=lambda error: error.retry_after_s)
            raise EngineDownError("no engine is up", retry_after_s=1)

        def cost(place: _Place) -> tuple[int, int]:
            saved = min(place.num_cached_tokens(digests), MOST_AHEAD * SEQUENCE_TOKENS)
            return place.num_running * SEQUENCE_TOKENS - saved, place.last_choice  # of equals, the longest idle one

        return min(places, key=cost)


async def _results(work: Iterable[Coroutine[Any, Any, None]]) -> list[BaseException | None]:
    """Do all of it; None or the exception of each."""
    return list(await asyncio.gather(*work, return_exceptions=True))


def _prompt_digests(request: Request) -> list[bytes]:
    """Digests of the full blocks of a prompt but what its last token is in, each of all up to its end."""
    num_blocks = min((len(request.prompt_ids) - 1) // BLOCK_TOKENS, _MOST_BLOCKS)
    images = [hashlib.blake2b(image.patches.tobytes()).digest() for image in request.images]
    digest, digests = repr((request.adapter, images)).encode(), []
    for start in range(0, num_blocks * BLOCK_TOKENS, BLOCK_TOKENS):
        digest = block_digest(digest, request.prompt_ids[start : start + BLOCK_TOKENS])
        digests.append(digest)
    return digests
