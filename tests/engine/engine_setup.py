"""Engines for tests: a small model behind the engine, and what it says to each request."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from openbook.checkpoint.model_source import open_model
from openbook.engine.engine import Engine, EngineSettings
from openbook.engine.events import SequenceEvent
from openbook.engine.native_load import load_native
from openbook.engine.native_runner import NativeRunner
from openbook.engine.request import Request
from openbook.engine.sequence_factory import SequenceFactory


def make_engine(folder: Path, *, num_blocks: int = 64, **changes: object) -> Engine:
    """An engine on the native runner; `num_blocks` of cache, other settings as given."""
    source = open_model(folder)
    runner = load_native(source)
    settings = EngineSettings(**{"cache_bytes": num_blocks * runner.block_bytes, **changes})  # type: ignore[arg-type]
    return Engine(runner, SequenceFactory(source.chat(), runner.vocab_size), settings)


def runner_of(engine: Engine) -> NativeRunner:
    """The runner that an engine of `make_engine` computes with."""
    assert isinstance(engine._runner, NativeRunner)
    return engine._runner


def run(engine: Engine, requests: Iterable[Request]) -> dict[tuple[str, int], list[SequenceEvent]]:
    """All events of all sequences, by request and sample."""
    for request in requests:
        engine.add(engine.prepare(request))
    found: dict[tuple[str, int], list[SequenceEvent]] = {}
    while engine.has_work:
        for event in engine.step():
            found.setdefault((event.request_id, event.index), []).append(event)
    return found


def tokens(events: Iterable[SequenceEvent]) -> list[int]:
    """The tokens of one sequence."""
    return [token_id for event in events for token_id in event.token_ids]
