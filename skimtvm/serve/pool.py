"""The worker processes, seen from the front: started, watched, replaced."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import EnvironmentProblem, InternalError, SkimError
from .logs import log
from .signature import Slot, slot_bytes
from .worker import MAX_MESSAGE, RESULT, TASK, Config, Hello, read_hello, receive_hello

HUGE_PAGES = "glibc.malloc.hugetlb"
START_LIMIT = 300.0  # seconds for a worker to load and warm up
STOP_LIMIT = 5.0  # seconds for a worker to end after its socket is closed
_BACKOFF = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)  # seconds before the n-th start in a row that did not last
_LASTS = 30.0  # seconds after which a worker counts as one that lasted


class Worker:
    """One process and its slots. ``busy``: what was given to ``start``, by slot, oldest first."""

    def __init__(
        self, process: asyncio.subprocess.Process, connection: socket.socket, hello: Hello, memory: int, slots: int
    ):
        self.process, self.hello = process, hello
        self._connection = connection
        size = slot_bytes(hello.signature)
        view = memoryview(mmap.mmap(memory, size * slots))
        os.close(memory)
        self.slots = [Slot(hello.signature, view[k * size : (k + 1) * size]) for k in range(slots)]
        self.busy: dict[int, Any] = {}
        self.closed = asyncio.Event()
        self.since = time.monotonic()

    @property
    def pid(self) -> int:
        return self.process.pid

    def free_slot(self) -> int | None:
        return next((k for k in range(len(self.slots)) if k not in self.busy), None)

    def start(self, slot: int, batch: int, work: Any) -> None:
        """Run ``slots[slot]``, filled, with ``batch`` rows; ``work`` comes back with the result."""
        self.busy[slot] = work
        with contextlib.suppress(OSError):  # a dead worker: its end of file is about to be seen
            self._connection.send(TASK.pack(slot, batch))

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    def close(self) -> None:
        if not self.closed.is_set():
            asyncio.get_running_loop().remove_reader(self._connection)
            self._connection.close()
            self.closed.set()

    def receive(self) -> bytes | None:
        """One message; b"" at the end, None if there is none yet."""
        try:
            return self._connection.recv(MAX_MESSAGE)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def watch(self, callback: Callable[[], None]) -> None:
        asyncio.get_running_loop().add_reader(self._connection, callback)


class WorkerPool:
    """``count`` workers that are replaced when they die.

    ``on_result(work, slot, failure, seconds)`` is called for each batch that ended, before its slot is free again;
    ``on_lost(works)`` for what a worker had when it died, oldest first; ``on_free()`` whenever there may be room for
    more.
    ``stuck``: seconds without a result after which a busy worker is killed; None: never.
    """

    def __init__(self, configs: list[Config], *, stuck: float | None) -> None:
        self.configs, self.stuck = configs, stuck
        self.workers: dict[int, Worker] = {}  # those that are ready, by index
        self.restarts = 0
        self.on_result: Callable[[Any, Slot, str | None, float], None] = lambda *_: None
        self.on_lost: Callable[[list[Any]], None] = lambda _: None
        self.on_free: Callable[[], None] = lambda: None
        self._keepers: list[asyncio.Task[None]] = []
        self._processes: set[asyncio.subprocess.Process] = set()
        self._alarms: dict[Worker, asyncio.TimerHandle] = {}

    async def start(self) -> Hello:
        """Start all workers and wait for them. Raises what the first one that fails reports."""
        tasks = [asyncio.create_task(self._spawn(config)) for config in self.configs]
        try:
            workers = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.stop()
            raise
        for index, worker in enumerate(workers):
            self._ready(index, worker)
            self._keepers.append(asyncio.create_task(self._keep(index, worker)))
        return workers[0].hello

    def idle(self) -> Worker | None:
        """A worker with nothing to do, or None."""
        return next((w for w in self.workers.values() if not w.busy), None)

    def with_room(self) -> Worker | None:
        """The worker with the least to do that has a free slot, or None."""
        best = min(self.workers.values(), key=lambda w: len(w.busy), default=None)
        return best if best is not None and best.free_slot() is not None else None

    async def stop(self) -> None:
        """End all workers: those that do not end when asked are killed."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for worker in list(self.workers.values()):
            self._disarm(worker)
            worker.close()
        self.workers.clear()
        await asyncio.gather(*(self._bury(p) for p in list(self._processes)))

    # ---- life of a worker ----------------------------------------------------------------------------------------

    async def _spawn(self, config: Config) -> Worker:
        """Start a worker and wait until it has loaded the model. Raises what it reports; leaves no process then."""
        front, back = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        front.setblocking(False)
        process: asyncio.subprocess.Process | None = None
        try:
            with back:
                process = await _launch(back)
            self._processes.add(process)
            front.send(config.to_json())
            async with asyncio.timeout(START_LIMIT):
                await _readable(front)
            message, memory = receive_hello(front)
            if not message:
                raise InternalError(f"a worker ended while it loaded the model ({_ending(await process.wait())})")
            hello = read_hello(message)
            if memory is None:
                raise InternalError("a worker sent no shared memory")
            return Worker(process, front, hello, memory, config.slots)
        except BaseException as e:
            front.close()
            if process is not None:
                await self._bury(process, kill=not isinstance(e, SkimError))
            if isinstance(e, TimeoutError):
                raise EnvironmentProblem(f"a worker did not load the model within {START_LIMIT:.0f} s") from None
            if isinstance(e, OSError):
                raise EnvironmentProblem(f"a worker cannot be started: {e.strerror or e}") from None
            raise

    async def _keep(self, index: int, worker: Worker) -> None:
        """Replace the worker ``index`` whenever it has died."""
        failures = 0
        while True:
            await worker.closed.wait()
            code = await self._bury(worker.process)
            log("worker died", level=logging.ERROR, worker=index, pid=worker.pid, ending=_ending(code))
            failures = 0 if time.monotonic() - worker.since > _LASTS else failures
            signature, replacement = worker.hello.signature, None
            while replacement is None:
                await asyncio.sleep(_BACKOFF[min(failures, len(_BACKOFF) - 1)])
                failures += 1
                self.restarts += 1
                try:
                    replacement = await self._spawn(self.configs[index])
                except SkimError as e:
                    log("worker cannot be replaced", level=logging.ERROR, worker=index, reason=str(e))
                    continue
                if replacement.hello.signature != signature:
                    reason = "the file of the model has changed; restart the server"
                    log("worker cannot be replaced", level=logging.ERROR, worker=index, reason=reason)
                    replacement.close()
                    await self._bury(replacement.process)
                    replacement = None
            worker = replacement
            self._ready(index, worker)
            self.on_free()

    async def _bury(self, process: asyncio.subprocess.Process, *, kill: bool = False) -> int:
        """Wait for ``process``, whose socket is closed; it is killed if that takes too long. Returns its exit code."""
        if kill:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        try:
            code = await asyncio.wait_for(process.wait(), STOP_LIMIT)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            code = await process.wait()
        self._processes.discard(process)
        return code

    def _ready(self, index: int, worker: Worker) -> None:
        self.workers[index] = worker
        worker.watch(lambda: self._read(index, worker))
        log(
            "worker ready",
            worker=index,
            pid=worker.pid,
            cpus=self.configs[index].cpus,
            run_ms=_ms(worker.hello.seconds),
        )

    def _read(self, index: int, worker: Worker) -> None:
        while (message := worker.receive()) is not None:
            if not message:
                self._disarm(worker)
                worker.close()
                self.workers.pop(index, None)
                lost, worker.busy = list(worker.busy.values()), {}
                self.on_lost(lost)
                return
            slot, failed, seconds = RESULT.unpack_from(message)
            text = message[RESULT.size :].decode(errors="replace") if failed else None
            self._disarm(worker)
            self.on_result(worker.busy[slot], worker.slots[slot], text, seconds)
            del worker.busy[slot]
            if worker.busy:
                self.arm(worker)
        self.on_free()

    def arm(self, worker: Worker) -> None:
        """Kill ``worker`` unless it reports a result in time."""
        if self.stuck is not None and worker not in self._alarms:
            self._alarms[worker] = asyncio.get_running_loop().call_later(self.stuck, self._alarm, worker)

    def _alarm(self, worker: Worker) -> None:
        log("worker is stuck and is killed", level=logging.ERROR, pid=worker.pid, seconds=self.stuck)
        worker.kill()

    def _disarm(self, worker: Worker) -> None:
        if alarm := self._alarms.pop(worker, None):
            alarm.cancel()


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def readable() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(connection, readable)
    try:
        await ready
    finally:
        loop.remove_reader(connection)


def child_environment() -> dict[str, str]:
    """That of this process, with this package in the path."""
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}


def worker_environment() -> dict[str, str]:
    """The same with huge pages for what a worker allocates (glibc 2.35 and newer, where Linux gives them on request)
    unless the user has said otherwise: docs/deploy.md says what they bring."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if HUGE_PAGES not in tunables:
        tunables = ":".join(filter(None, [tunables, f"{HUGE_PAGES}=1"]))
    return child_environment() | {"GLIBC_TUNABLES": tunables}


async def _launch(back: socket.socket) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", f"{__package__}.worker", str(back.fileno()),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
        pass_fds=[back.fileno()], env=worker_environment(),
        start_new_session=True,  # Ctrl-C is for the front only
    )  # fmt: skip


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 2)
