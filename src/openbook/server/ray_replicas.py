"""Engines on a Ray cluster, as deployments of Ray Serve: placed, watched and started again by it.

Each replica is a deployment of its own, so that `RoutedEngine` can choose among them by prefix. It speaks the messages
of `openbook.engine.wire`: one call carries a message there, one endless stream carries everything back, a step's events
together. Needs the extra `ray`, and openbook and the model's files at the same place on every node.

Serve keeps its applications when the process that made them dies. Replicas that have not heard of it for a while
therefore delete their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openbook.checkpoint.locate import PACKAGED, bundled_names, locate, model_name
from openbook.core.errors import UserError
from openbook.engine.engine import EngineSettings
from openbook.engine.remote_engine import LinkLostError, RemoteEngine
from openbook.engine.start import LoadOptions, StartedEngine
from openbook.engine.start_many import StartedEngines, gather_engines
from openbook.engine.wire import (
    Failed,
    Launch,
    Ready,
    as_error,
    as_failed,
    decode_from_worker,
    decode_to_worker,
    encode,
)
from openbook.engine.worker import MessageServer, launch, ready

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

_DEPLOYMENT = "engine"
_MANY = 1_000_000  # calls at a time: the engine itself says when it is full
_HEALTH_PERIOD_S = 2.0  # after which Serve notices that a replica has ended
_SHUTDOWN_S = 2.0  # for what is left of its calls when it is deleted; answers have ended by then
_POLL_S = 0.2
_PLACE_S = 300.0  # for replicas to find room, on nodes that may have to be started
_DELETE_S = 30.0  # for Serve to end a replica
_CONNECT_S = 10.0  # for a cluster to answer
_PULSE_S = 5.0  # between signs of life of the server
_PATIENCE_S = 60.0  # for which a replica goes without one


class EngineReplica:
    """Runs inside a Ray actor. All methods are called on one event loop.

    Args:
        message: a `Launch`.
        application: of Serve, which it is.
        patience_s: for so long it goes on without a sign of life of its server.
    """

    def __init__(self, message: bytes, application: str, patience_s: float) -> None:
        self._message, self._application, self._patience_s = message, application, patience_s
        self._heard_s = time.monotonic()
        self._watching: asyncio.Task[None] | None = None
        self._loading: asyncio.Task[StartedEngine] | None = None
        self._session = ""
        self._server: MessageServer | None = None
        self._outbox: asyncio.Queue[bytes] = asyncio.Queue()
        self._early: dict[int, bytes] = {}
        self._next = 0

    async def start(self) -> bytes:
        """Load the model, if that is not done: `Ready`, or why not."""
        if self._loading is None:
            request = decode_to_worker(self._message)
            assert isinstance(request, Launch)
            self._loading = asyncio.create_task(asyncio.to_thread(launch, request))
        try:
            said = encode(await ready(await self._loading))
        except Exception as error:
            self._loading = None  # the next call tries again
            return encode(as_failed(0, error))
        self._heard_s = time.monotonic()
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())
        return said

    async def beat(self) -> None:
        """The server is alive."""
        self._heard_s = time.monotonic()

    async def listen(self, session: str) -> AsyncIterator[list[bytes]]:
        """Messages for the client as they come, first none at all. What an earlier session asked for is cancelled."""
        if self._server is not None:
            self._server.cancel_all()
        assert self._loading is not None, "start comes first"
        self._session, self._early, self._next = session, {}, 0
        outbox = self._outbox = asyncio.Queue()
        server = self._server = MessageServer((await self._loading).engine, outbox.put_nowait)
        closed = asyncio.create_task(server.is_closed.wait())
        try:
            yield []
            while not (closed.done() and outbox.empty()):
                coming = asyncio.create_task(outbox.get())
                await asyncio.wait([coming, closed], return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    coming.cancel()
                    continue
                messages = [coming.result()]
                while not outbox.empty():
                    messages.append(outbox.get_nowait())
                yield messages
        finally:
            closed.cancel()
            server.cancel_all()

    async def deliver(self, session: str, number: int, message: bytes) -> None:
        """A message of the client; calls may overtake each other, the numbers of a session say how they were sent."""
        if session != self._session or self._server is None:
            return  # from a client that is gone
        self._early[number] = message
        while self._next in self._early:
            self._server.receive(decode_to_worker(self._early.pop(self._next)))
            self._next += 1

    async def _watch(self) -> None:
        while (left_s := self._heard_s + self._patience_s - time.monotonic()) > 0:
            await asyncio.sleep(left_s)
        from ray import serve

        await asyncio.to_thread(serve.delete, self._application, _blocking=False)


class RayLink:
    """A session with a replica; see `Link`."""

    def __init__(self, handle: DeploymentHandle[Any], said: bytes) -> None:
        message = decode_from_worker(said)
        if isinstance(message, Failed):
            raise as_error(message)
        assert isinstance(message, Ready)
        self.ready = message
        self._handle, self._session = handle, uuid.uuid4().hex
        self._stream: Any = None
        self._received: list[bytes] = []  # the latest first
        self._unsent: list[bytes] | None = []  # until there is a stream
        self._num_sent = 0
        self._calls: set[asyncio.Task[None]] = set()

    def send(self, data: bytes) -> None:
        """See `Link.send`."""
        if self._unsent is not None:
            self._unsent.append(data)
            return
        call = asyncio.create_task(self._deliver(self._num_sent, data))
        self._num_sent += 1
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    async def receive(self) -> bytes:
        """See `Link.receive`."""
        try:
            if self._stream is None:
                self._stream = self._handle.options(stream=True).listen.remote(self._session)
            while not self._received:
                self._received = (await anext(self._stream))[::-1]
                if self._unsent is not None:
                    unsent, self._unsent = self._unsent, None
                    for data in unsent:
                        self.send(data)
        except StopAsyncIteration:
            raise LinkLostError("has ended") from None
        except Exception as error:  # whatever Ray and Serve say of an actor or a node that is gone
            raise LinkLostError(f"was lost ({type(error).__name__})") from error
        return self._received.pop()

    def cut(self) -> None:
        """See `Link.cut`; the replica itself stays, for the next session."""
        if self._stream is not None:
            self._stream.cancel()

    async def _deliver(self, number: int, data: bytes) -> None:
        with contextlib.suppress(Exception):  # the stream says what has happened
            await self._handle.deliver.remote(self._session, number, data)


class RayEngine(RemoteEngine):
    """See `EngineClient`.

    Args:
        name: what log and errors call it.
        application: of Serve, which has the replica and is deleted with this.
        handle: to its one replica.
        link: a session with it.
    """

    def __init__(self, name: str, application: str, handle: DeploymentHandle[Any], link: RayLink) -> None:
        super().__init__(name, link)
        self._application, self._handle = application, handle
        self._is_over = threading.Event()
        # A thread, as there may be no event loop for a while: other models are loaded.
        threading.Thread(target=self._beat, name=application, daemon=True).start()

    def cut(self) -> None:
        """See `RemoteEngine.cut`."""
        self._is_over.set()
        super().cut()

    async def close(self, deadline_s: float) -> None:
        """See `EngineClient.close`."""
        await super().close(deadline_s)
        # A thread that nobody waits for in the end: without its controller, Serve would wait forever.
        deleting = threading.Thread(target=_delete, args=[self._application], daemon=True)
        deleting.start()
        await asyncio.to_thread(deleting.join, _DELETE_S)

    def _beat(self) -> None:
        while not self._is_over.wait(_PULSE_S):
            with contextlib.suppress(Exception):  # it is down, which the stream says too
                self._handle.beat.remote().result(timeout_s=_PULSE_S)

    async def _connect(self) -> RayLink:
        try:
            said = await self._handle.start.remote()  # waits until Serve has a replica again
        except Exception as error:
            raise LinkLostError(f"was lost ({type(error).__name__})") from error
        return RayLink(self._handle, said)


def start_ray_engines(
    model: str, options: LoadOptions, settings: EngineSettings, num_replicas: int, address: str = "auto"
) -> StartedEngines:
    """Load a model, by name, path or hub id, into several replicas on a Ray cluster.

    Each replica has an engine with these settings, and as many cores as fit so many times on the nodes; a model on
    CUDA one GPU.

    Args:
        address: of the cluster, as `ray.init` takes it; "auto" is the one that this machine belongs to.

    Raises:
        UserError: the extra `ray` is not installed, there is no such cluster, it is too small, or see `start_engine`.
    """
    if num_replicas < 1:
        raise UserError(f"the number of workers is {num_replicas}: expected 1 or more; correct it")
    path = locate(model)
    _join(address)
    from ray import serve

    num_cores = _cores_each(num_replicas, address)
    if settings.draft_model is not None:
        settings = replace(settings, draft_model=_absolute(settings.draft_model))
    message = encode(Launch(_absolute(model), options, settings, num_cores))
    name = model_name(model, path)
    label = f"openbook-{name.replace('/', '-')}-{uuid.uuid4().hex[:8]}"  # another server may have the same model there
    applications = [f"{label}-{number}" for number in range(1, num_replicas + 1)]
    resources = {"num_cpus": num_cores, "num_gpus": int(options.device.startswith("cuda"))}
    deployment = serve.deployment(EngineReplica).options(
        name=_DEPLOYMENT,
        num_replicas=1,
        max_ongoing_requests=_MANY,
        ray_actor_options=resources,
        health_check_period_s=_HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=_SHUTDOWN_S,
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    engines: list[RayEngine] = []
    try:
        serve.start(proxy_location="Disabled")  # clients come to our server
        handles = serve.run_many(
            [
                serve.RunTarget(deployment.bind(message, one, _PATIENCE_S), name=one, route_prefix=None)
                for one in applications
            ],
            wait_for_applications_running=False,
        )
        _wait_placed(applications, num_cores)
        starting = [handle.start.remote() for handle in handles]
        for number, (application, handle, start) in enumerate(zip(applications, handles, starting, strict=True), 1):
            link = RayLink(handle, start.result())
            engines.append(RayEngine(f"replica {number} on Ray", application, handle, link))
        return gather_engines(model, path, options, engines)
    except BaseException:  # Ctrl-C too
        for engine in engines:
            engine.cut()
        for application in applications:
            _delete(application)
        raise


def _wait_placed(applications: Sequence[str], num_cores: int) -> None:
    """Wait until every replica has its place; the model is loaded later.

    Raises:
        UserError: one fails, or there is no room for it.
    """
    from ray import serve

    end_s = time.monotonic() + _PLACE_S
    while True:
        known = serve.status().applications
        waiting = [known[one] for one in applications if known[one].status != "RUNNING"]
        if not waiting:
            return
        if any(one.status in ("DEPLOY_FAILED", "UNHEALTHY") for one in waiting) or time.monotonic() > end_s:
            said = " ".join(" ".join(one.message for one in waiting).split())[-300:]
            raise UserError(
                f"{len(waiting)} of {len(applications)} replicas of {num_cores} cores found no place on the cluster"
                f"{f' ({said})' if said else ''}: ask for fewer with --workers, or add nodes"
            )
        time.sleep(_POLL_S)


def _absolute(model: str) -> str:
    """A path that means the same in every folder; names and hub ids as they are, a bundled name wins over a path."""
    path = Path(model).expanduser()
    return str(path.absolute()) if path.exists() and model not in (*bundled_names(), *PACKAGED) else model


def _delete(application: str) -> None:
    from ray import serve

    with contextlib.suppress(Exception):  # it is gone, or the cluster is
        serve.delete(application)


def _join(address: str) -> None:
    """Connect this process with a cluster.

    Raises:
        UserError: Ray is not installed, or there is no cluster.
    """
    try:
        import ray
        import ray.serve
    except ImportError as error:
        raise UserError(f'Ray Serve is missing ({error}): pip install "openbook[ray]"') from error
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if ray.is_initialized():
        return
    host, mark, port = address.removeprefix("ray://").rpartition(":")
    try:
        if mark and port.isdecimal():  # Ray itself tries for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        line = " ".join(str(error).split())
        raise UserError(
            f"there is no Ray cluster at {address!r} ({line}): start one with `ray start --head`, or give its address"
        ) from error


def _cores_each(num_replicas: int, address: str) -> int:
    """The most cores that so many replicas can have each.

    Raises:
        UserError: the nodes have too few.
    """
    import ray

    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    if num_replicas > sum(nodes):
        raise UserError(
            f"{num_replicas} replicas need {num_replicas} cores and the Ray cluster at {address!r} has {sum(nodes)}: "
            "ask for fewer with --workers, or add nodes"
        )
    return largest_share(nodes, num_replicas)


def largest_share(nodes: Sequence[int], num_parts: int) -> int:
    """The largest whole number that is contained `num_parts` times in the numbers of `nodes`, none of it split."""
    share = max(nodes)
    while sum(cores // share for cores in nodes) < num_parts:
        share -= 1
    return share
