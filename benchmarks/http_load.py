"""A lean client for benchmarks of servers: one process, plain sockets, answers streamed as server-sent events.

It reads as little of an answer as it can: the machine's cores belong to the server that is measured.
"""

from __future__ import annotations

import asyncio
import json
import socket
import statistics
import subprocess
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answered:
    """One answer: seconds from asking to each of its events, the first being the first token's; the last bytes."""

    times_s: list[float] = field(default_factory=list)
    status: int = 0
    tail: bytes = b""

    @property
    def first_s(self) -> float:
        """Seconds to the first token."""
        return self.times_s[0]


async def ask(port: int, path: str, body: dict[str, Any]) -> Answered:
    """POST a streamed request and read its answer to the end."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began_s = time.perf_counter()
    writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
    answered = Answered(status=int((await reader.readline()).split()[1]))
    while (await reader.readline()).strip():
        pass
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            answered.times_s.append(time.perf_counter() - began_s)
            answered.tail = line
        elif answered.status != 200:
            answered.tail = line
    writer.close()
    if answered.status != 200:
        raise RuntimeError(f"status {answered.status}: {answered.tail[:500].decode(errors='replace')}")
    return answered


@dataclass(frozen=True)
class Load:
    """What a number of clients got who each asked one request after another."""

    answers: list[Answered]
    total_s: float

    @property
    def requests_per_minute(self) -> float:
        """Over all clients."""
        return 60 * len(self.answers) / self.total_s

    @property
    def first_s(self) -> float:
        """Median seconds to the first token."""
        return statistics.median(answer.first_s for answer in self.answers)


def load(port: int, path: str, num_clients: int, bodies: Sequence[dict[str, Any]]) -> Load:
    """Send all bodies, each client the next as soon as its last is answered."""

    async def go() -> Load:
        waiting = list(reversed(bodies))
        answers: list[Answered] = []

        async def client() -> None:
            while waiting:
                answers.append(await ask(port, path, waiting.pop()))

        began_s = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(num_clients)))
        return Load(answers, time.perf_counter() - began_s)

    return asyncio.run(go())


class Server:
    """A server process that is stopped at the end of a `with`.

    Args:
        command: starts it; gets its port in the place of "PORT".
        is_ready: of the port; asked until it holds.
    """

    def __init__(self, command: Sequence[str], is_ready: Callable[[int], bool], timeout_s: float = 120) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._process = subprocess.Popen(
            [part.replace("PORT", str(self.port)) for part in command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.pid: int = self._process.pid
        end_s = time.monotonic() + timeout_s
        while not is_ready(self.port):
            if self._process.poll() is not None or time.monotonic() > end_s:
                self._process.kill()
                raise RuntimeError(f"the server did not start: {' '.join(command)}")
            time.sleep(0.1)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()


def is_healthy(port: int) -> bool:
    """Whether GET /health answers 200."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def metric(port: int, name: str) -> float:
    """The sum of a counter over its labels, from GET /metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split(" ")[0] == name)
