"""Many clients at once for minutes: nothing lost, nothing mixed up, no answer changed, memory flat.

64 clients ask `openbook serve nano` for all kinds of answers: short and long prompts, greedy and sampled, free and by a
JSON schema, several samples, some given up halfway. Every answer is compared with the one that its request gets when it
is alone on the server, to the letter: that is what the exact profile promises. Exit 1 if anything is wrong.

    python benchmarks/serve_load.py [--clients 64] [--seconds 300] [--workers 1] [--write]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from http_load import Server, is_healthy
from performance_page import machine, write_section

from openbook.tasks.registry import get_task

OPENBOOK = str(Path(sys.executable).with_name("openbook"))
TASKS = ("gcd", "lcm", "chain_sum", "spell_backward", "leg_counting", "prime_factorization")
NUM_REQUESTS = 240
CANCEL_SHARE = 0.15
WARM_S = 60.0
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "integer"}, "sure": {"type": "boolean"}},
    "required": ["answer", "sure"],
    "additionalProperties": False,
}


@dataclass
class Reply:
    """What came back: whole lines of the stream, and when each came, in seconds from asking."""

    lines: list[bytes] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    status: int = 0
    is_complete: bool = False

    def content(self) -> list[tuple[str, str, str | None]]:
        """Of each choice: its thinking, its answer, why it ended."""
        texts: dict[int, list[Any]] = {}
        for line in self.lines:
            for choice in json.loads(line[6:]).get("choices", []):
                mine = texts.setdefault(choice["index"], ["", "", None])
                mine[0] += choice["delta"].get("reasoning_content") or ""
                mine[1] += choice["delta"].get("content") or ""
                mine[2] = choice["finish_reason"] or mine[2]
        return [tuple(texts[index]) for index in sorted(texts)]  # type: ignore[misc]


def make_requests() -> list[dict[str, Any]]:
    """Requests of all kinds, each unlike the others."""
    draw = random.Random(5)
    found = []
    for number in range(NUM_REQUESTS):
        task = get_task(TASKS[number % len(TASKS)])
        question = task.generate(number, "easy").question
        messages = [{"role": "user", "content": question}]
        if draw.random() < 0.3:  # a long prompt: a conversation of other problems before it
            for earlier in range(draw.randint(1, 4)):
                other = get_task(draw.choice(TASKS)).generate(1000 + earlier, "easy").question
                messages = [{"role": "user", "content": other}, {"role": "assistant", "content": "1"}, *messages]
        body: dict[str, Any] = {"model": "nano", "messages": messages, "stream": True, "max_tokens": 300}
        body["reasoning_effort"] = draw.choice(["low", "medium", "high"])
        body["seed"] = number
        body["temperature"] = draw.choice([0, 0, 0.7, 1.2])
        if draw.random() < 0.2:
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "sure", "schema": SCHEMA}}
        if draw.random() < 0.15:
            body["n"] = 3
        if draw.random() < 0.1:
            body |= {"logprobs": True, "top_logprobs": 3}
        if draw.random() < 0.1:
            body["frequency_penalty"] = 0.5
        found.append(body)
    return found


async def ask(port: int, body: dict[str, Any], leave_after: int | None = None) -> Reply:
    """One streamed chat completion; `leave_after`: hang up after so many events."""
    data = json.dumps(body).encode()
    reply = Reply()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        began_s = time.perf_counter()
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode()
            + data
        )
        reply.status = int((await reader.readline()).split()[1])
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                reply.lines.append(line)
                reply.times_s.append(time.perf_counter() - began_s)
                if leave_after is not None and len(reply.lines) >= leave_after:
                    return reply
            elif line.startswith(b"data: [DONE]"):
                reply.is_complete = True
    finally:
        writer.transport.abort()
    return reply


@dataclass
class Found:
    """What all clients together saw."""

    faults: Counter[str] = field(default_factory=Counter)
    num_complete: int = 0
    num_left: int = 0
    first_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)
    memory_mb: list[tuple[float, float]] = field(default_factory=list)  # seconds, MB


async def client(
    port: int, number: int, bodies: list[dict[str, Any]], alone: list[Any], end_s: float, found: Found
) -> None:
    """Ask for one thing after another, and compare."""
    draw = random.Random(number)
    while time.monotonic() < end_s:
        which = draw.randrange(len(bodies))
        leaves = draw.randint(1, 20) if draw.random() < CANCEL_SHARE else None
        try:
            reply = await ask(port, bodies[which], leaves)
        except OSError as error:
            found.faults[f"connection: {type(error).__name__}"] += 1
            continue
        if reply.status != 200:
            found.faults[f"status {reply.status}"] += 1
        elif leaves is not None and not reply.is_complete:
            found.num_left += 1
        elif not reply.is_complete:
            found.faults["an answer broke off"] += 1
        elif reply.content() != alone[which]:
            found.faults["an answer was changed"] += 1
        else:
            found.num_complete += 1
            found.first_s.append(reply.times_s[0])
            found.between_s += np.diff(reply.times_s).tolist()


def resident_mb(pid: int) -> float:
    """Resident memory of a process and its children."""
    pids, total = [pid], 0.0
    while pids:
        one = pids.pop()
        try:
            status = Path(f"/proc/{one}/status").read_text()
            children = Path(f"/proc/{one}/task/{one}/children").read_text().split()
        except OSError:
            continue
        total += next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024
        pids += map(int, children)
    return total


async def watch(pid: int, began_s: float, end_s: float, found: Found) -> None:
    """Take the server's memory every few seconds."""
    while time.monotonic() < end_s:
        found.memory_mb.append((time.monotonic() - began_s, resident_mb(pid)))
        await asyncio.sleep(2)


async def run(server: Server, num_clients: int, seconds: float) -> Found:
    """Each request alone first, then all clients at once."""
    bodies = make_requests()
    alone = []
    for body in bodies:
        reply = await ask(server.port, body)
        assert reply.is_complete, (reply.status, reply.lines)
        alone.append(reply.content())
    found = Found()
    began_s = time.monotonic()
    end_s = began_s + seconds
    await asyncio.gather(
        watch(server.pid, began_s, end_s, found),
        *(client(server.port, number, bodies, alone, end_s, found) for number in range(num_clients)),
    )
    return found


def main() -> int:
    """Measure, print, and with --write put it into docs/performance.md; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write the section of docs/performance.md")
    arguments = parser.parse_args()
    command = [OPENBOOK, "serve", "nano", "--port", "PORT", "--workers", str(arguments.workers)]
    with Server([*command, "--cache-memory", "64MB"], is_healthy) as server:
        found = asyncio.run(run(server, arguments.clients, arguments.seconds))
    warm = [mb for at_s, mb in found.memory_mb if at_s >= min(WARM_S, arguments.seconds / 2)]
    growth = max(warm[len(warm) // 2 :]) / max(warm[: len(warm) // 2]) - 1

    def percentiles(values: list[float]) -> str:
        return f"{1000 * statistics.median(values):.0f} and {1000 * float(np.percentile(values, 99)):.0f} ms"

    lines = [
        f"{arguments.clients} clients for {arguments.seconds:.0f} s on `openbook serve nano --workers "
        f"{arguments.workers}`, the clients on the same cores (`python benchmarks/serve_load.py --write`).",
        "",
        f"- {found.num_complete:,} answers complete, each the same as alone; {found.num_left:,} given up by the "
        f"client; faults: {dict(found.faults) or 'none'}.",
        f"- Time to the first token, median and 99th percentile: {percentiles(found.first_s)}; between two events "
        f"{percentiles(found.between_s)}.",
        f"- Memory {warm[0]:.0f} MB after the first minute, {warm[-1]:.0f} MB at the end; the highest of the second "
        f"half is {growth:+.1%} of the highest of the first.",
    ]
    print("\n".join(lines))
    if arguments.write:
        write_section("Serving under load", "\n".join([machine(), "", *lines]))
    return int(bool(found.faults) or growth > 0.03)


if __name__ == "__main__":
    sys.exit(main())
