"""From a model's name to several running engines behind one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from openbook.checkpoint.locate import locate, model_name
from openbook.core.errors import UserError
from openbook.engine.choices import Profile
from openbook.engine.engine import EngineSettings
from openbook.engine.process_engine import ProcessEngine, ProcessLink
from openbook.engine.receipt import ReceiptMaker
from openbook.engine.remote_engine import LinkLostError, RemoteEngine
from openbook.engine.router import RoutedEngine
from openbook.engine.start import LoadOptions
from openbook.engine.wire import Launch
from openbook.tokenizer.chat import Chat
from openbook.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class StartedEngines:
    """As `StartedEngine`, with several engines behind `engine`."""

    name: str
    folder: Path
    chat: Chat | Tokenizer
    profile: Profile
    engine: RoutedEngine
    receipts: ReceiptMaker


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def divide(count: int, num_parts: int) -> list[int]:
    """Parts that differ by one at most; none is less than 1."""
    return [max(1, (count + index) // num_parts) for index in range(num_parts)]


def start_engines(
    model: str, options: LoadOptions, settings: EngineSettings, num_workers: int, num_threads: int | None = None
) -> StartedEngines:
    """Load a model, by name, path or hub id, into several processes of this machine.

    Each process has an engine with these settings, so that the cache takes its memory once per process. So do weights,
    unless the runner computes on them where they are mapped from their file.

    Args:
        num_workers: processes.
        num_threads: to divide among them; None: as many as there are cores.

    Raises:
        UserError: see `start_engine`; or a number is too small, or a process was ended while it loaded the model.
    """
    if num_workers < 1:
        raise UserError(f"the number of workers is {num_workers}: expected 1 or more; correct it")
    if num_threads is not None and num_threads < 1:
        raise UserError(f"the number of threads is {num_threads}: expected 1 or more; correct it")
    path = locate(model)
    links: list[ProcessLink] = []
    engines: list[ProcessEngine] = []
    try:
        launches = [
            Launch(str(path), options, settings, threads) for threads in divide(num_threads or num_cores(), num_workers)
        ]
        for launch in launches:  # they load at the same time
            links.append(ProcessLink(launch))
        for number, (launch, link) in enumerate(zip(launches, links, strict=True), 1):
            name = f"engine process {number}"
            try:
                link.wait_ready()
            except LinkLostError as error:
                raise UserError(
                    f"{name} {error} while it loaded {model}: look at what it said before, and whether there is enough "
                    f"memory for {num_workers}"
                ) from error
            engines.append(ProcessEngine(name, launch, link))
        return gather_engines(model, path, options, engines)
    except BaseException:  # Ctrl-C too
        for link in links:
            link.cut()
        raise


def gather_engines(model: str, path: Path, options: LoadOptions, replicas: Sequence[RemoteEngine]) -> StartedEngines:
    """Engines that have loaded the model at `path`, as one, with what speaks and signs for it."""
    from openbook.checkpoint.model_source import open_model

    source = open_model(path)
    chat = source.chat() if source.chat_template() is not None else source.tokenizer()
    name, profile = model_name(model, path), replicas[0].profile
    receipts = ReceiptMaker(path=path, model=name, profile=profile, cache=options.cache, dtype=options.dtype)
    return StartedEngines(name, path, chat, profile, RoutedEngine(replicas), receipts)
