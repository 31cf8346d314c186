"""Put together and run a server, until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from ..errors import EnvironmentProblem, InvalidOption
from ..tvm_runtime import check_threads, default_threads
from .app import App
from .batching import Scheduler
from .logs import configure, log
from .pool import WorkerPool
from .worker import Config

SLOTS = 2  # batches a worker holds: one that runs, one that is ready to follow
MAX_CONNECTIONS = 1024  # beyond that uvicorn itself answers 503
KEEP_ALIVE = 75  # seconds for which an idle connection stays open: longer than clients keep theirs
_DRAIN_MARGIN = 5.0  # seconds beyond a request's time limit that stopping may take


@dataclass(frozen=True)
class Settings:
    """How to serve one model. ``None``: derived from the model and the machine.

    ``queue``: requests that may wait beyond those that run; ``timeout``: seconds for a request; ``max_request_bytes``:
    of a request's body; ``max_batch_delay``: seconds that a request may wait for others to share its batch.
    """

    path: Path
    name: str | None = None
    engine: str = "skimtvm"
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    threads: int | None = None
    queue: int = 64
    timeout: float = 30.0
    max_request_bytes: int | None = None
    max_batch_delay: float = 0.002
    log_level: str = "info"
    access_log: bool = True

    def __post_init__(self) -> None:
        positive = {"workers": self.workers, "queue": self.queue, "timeout": self.timeout}
        for name, value in positive.items():
            if not value > 0:
                raise InvalidOption(f"{name}={value}: give a number above 0")
        if not 0 <= self.port <= 65535:
            raise InvalidOption(f"port={self.port}: give a number from 0 (any free port) to 65535")
        if self.max_batch_delay < 0 or (self.max_request_bytes is not None and self.max_request_bytes < 1):
            raise InvalidOption("the batch delay must not be negative, the request limit must be at least one byte")
        if self.name is not None and (not self.name or "/" in self.name):
            raise InvalidOption(
                f"name '{self.name}': a model's name is part of a URL; it has no slash and is not empty"
            )


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain and return. Raises a SkimError for what keeps the server from starting."""
    configure(settings.log_level)
    _raise_descriptor_limit()
    with _listener(settings.host, settings.port) as listener:
        asyncio.run(_run(settings, listener))


async def _run(settings: Settings, listener: socket.socket) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    # A batch that runs for twice the time limit has no request left that waits for it.
    pool = WorkerPool(worker_configs(settings), stuck=2 * settings.timeout)
    start = asyncio.create_task(pool.start())
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({start, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if start.done():
            await _serve(settings, pool, listener, start.result().seconds, stopped)
    finally:
        start.cancel()
        stopped.cancel()
        await asyncio.gather(start, stopped, return_exceptions=True)
        await pool.stop()
    log("stopped")


async def _serve(
    settings: Settings, pool: WorkerPool, listener: socket.socket, seconds: float, stopped: asyncio.Task[bool]
) -> None:
    if seconds > settings.timeout:
        raise InvalidOption(f"one run takes {seconds:.1f} s, longer than the time limit of {settings.timeout:g} s")
    hello = next(iter(pool.workers.values())).hello
    signature = hello.signature
    if hello.warning is not None:
        log("requests do not share batches", reason=hello.warning)
    places = settings.queue + settings.workers * signature.capacity
    if places >= MAX_CONNECTIONS:
        raise InvalidOption(f"queue and running batches make {places} places, there can be {MAX_CONNECTIONS - 1}")
    scheduler = Scheduler(pool, signature, limit=places, max_delay=settings.max_batch_delay)
    limit = settings.max_request_bytes or signature.default_request_limit()
    app = App(
        scheduler,
        timeout=settings.timeout,
        max_bytes=limit,
        access_log=settings.access_log,
        stopping=stopped.done,
    )
    config = uvicorn.Config(
        app.asgi(), http="h11", ws="none", loop="asyncio", lifespan="off", interface="asgi3",
        log_config=None, access_log=False, server_header=False, proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS, timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=int(settings.timeout + _DRAIN_MARGIN),
    )  # fmt: skip
    host, port = listener.getsockname()[:2]
    server = _Server(config)
    server.on_start = lambda: log(
        "listening",
        url=f"http://{f'[{host}]' if ':' in host else host}:{port}",
        pid=os.getpid(),
        model=signature.name,
        batches=signature.batches,
        places=places,
        max_request_bytes=limit,
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if not serving.done():
        log("draining", admitted=scheduler.admitted)
    server.should_exit = True
    await serving


class _Server(uvicorn.Server):
    """uvicorn's server that says when it listens, without its signal handlers: after draining they would end the process
    by the signal."""

    on_start: Callable[[], None]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_start()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        yield


def worker_configs(settings: Settings) -> list[Config]:
    """One Config a worker; each gets ``threads`` CPUs of its own as long as there are enough of them."""
    cpus = sorted(os.sched_getaffinity(0))
    threads = check_threads(settings.threads or max(1, default_threads() // settings.workers))
    if threads > len(cpus):
        raise InvalidOption(f"threads={threads}: this process may use {len(cpus)} CPUs only")
    if threads * settings.workers > len(cpus):
        log("workers share CPUs", workers=settings.workers, threads=threads, cpus=len(cpus))
    name = settings.name or settings.path.stem
    return [
        Config(
            engine=settings.engine,
            path=str(settings.path),
            name=name,
            threads=threads,
            cpus=tuple(cpus[(index * threads + k) % len(cpus)] for k in range(threads)),
            slots=SLOTS,
        )
        for index in range(settings.workers)
    ]


def _listener(host: str, port: int) -> socket.socket:
    """A socket that is bound but does not listen yet: a taken port is known before the model is loaded."""
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as e:
        if listener is not None:
            listener.close()
        reason = getattr(e, "strerror", None) or e
        raise EnvironmentProblem(
            f"cannot listen on {host} port {port}: {reason}; choose another --host or --port"
        ) from None
    return listener


def _raise_descriptor_limit() -> None:
    """Room for MAX_CONNECTIONS sockets beside the files of the process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    want = 2 * MAX_CONNECTIONS
    if soft < want:
        resource.setrlimit(resource.RLIMIT_NOFILE, (want if hard == resource.RLIM_INFINITY else min(want, hard), hard))
