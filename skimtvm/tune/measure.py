"""Times candidates in worker processes, and survives whatever they do."""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from ..errors import EnvironmentProblem
from ..schedules.sites import AnyKnobs
from .tasks import Task
from .worker import Options

START = 120.0  # seconds for a worker to load TVM and the weights


@dataclass(frozen=True)
class Protocol:
    """``rounds`` samples of ``seconds`` each for every candidate; ``timeout``: seconds to build one."""

    rounds: int = 5
    seconds: float = 0.001
    timeout: float = 60.0


@dataclass(frozen=True)
class Outcome:
    """``median``, ``p10``, ``p90``: seconds of a call; ``reference``: median of the default knobs in the same rounds;
    ``wins``: share of the rounds in which it was faster than the default."""

    knobs: AnyKnobs
    median: float | None = None
    p10: float = 0.0
    p90: float = 0.0
    samples: int = 0
    reference: float | None = None
    wins: float = 0.0
    error: str = ""

    @property
    def gain(self) -> float:
        return self.reference / self.median if self.median and self.reference else 0.0


class WorkerGone(Exception):
    """The worker ended or did not answer in time."""


class _Worker:
    """One process and the task that it has loaded. Kernel 0 is the default, built first."""

    def __init__(self, options: Options, threads: int, cpus: Sequence[int] = ()) -> None:
        self.options, self.threads, self.cpus = options, threads, cpus
        self.task: Task | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.connection: Connection | None = None

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        root = str(Path(__file__).parent.parent.parent)
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "TVM_NUM_THREADS": str(self.threads), "TVM_BIND_THREADS": "0"}
        environment.pop("TVM_USE_RUNTIME_LIB", None)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "skimtvm.tune.worker", str(theirs.fileno()), str(self.threads)],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the tuner
            )
        if self.cpus:
            os.sched_setaffinity(self.process.pid, self.cpus)
        self.connection = Connection(ours.detach())

    def _ask(self, timeout: float, *request: Any) -> Any:
        assert self.connection is not None and self.process is not None
        try:
            self.connection.send(request)
            if not self.connection.poll(timeout):
                raise WorkerGone(f"no answer within {timeout:g} s")
            return self.connection.recv()
        except (EOFError, OSError):
            code = self._reap()
            reason = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            raise WorkerGone(f"the worker ended ({reason})") from None

    def _reap(self) -> int | None:
        assert self.process is not None
        try:
            return self.process.wait(5)
        except subprocess.TimeoutExpired:
            return None

    def load(self, task: Task, default: AnyKnobs, protocol: Protocol) -> None:
        """Raises WorkerGone, and EnvironmentProblem where not even the default knobs work."""
        if self.task is task and self.process is not None:
            self._ask(START, "drop")
            return
        self.close()
        self._start()
        self._ask(START, "task", task.to_bytes(), self.options)
        error = self._ask(START, "build", 0, default)[1]
        if error:
            raise EnvironmentProblem(f"{task}: the default knobs fail: {error}")
        self.task = task

    def build(self, number: int, knobs: AnyKnobs, timeout: float) -> str:
        return str(self._ask(timeout, "build", number, knobs)[1])

    def time(self, numbers: Sequence[int], rounds: int, seconds: float) -> dict[int, list[float]]:
        budget = 60 + 40 * rounds * len(numbers) * max(seconds, 0.05)
        samples: dict[int, list[float]] = self._ask(budget, "time", list(numbers), rounds, seconds)[1]
        return samples

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
        if self.process is not None:
            if self.options.tracker:  # TVM's server does not survive a session that breaks off
                self._reap()
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait()
        self.task = self.process = self.connection = None


class Measurer:
    """``workers`` processes: one here; as many as there are servers through RPC, which share out the candidates."""

    def __init__(
        self, options: Options, protocol: Protocol, *, threads: int = 1, workers: int = 1, cpus: Sequence[int] = ()
    ) -> None:
        self.protocol = protocol
        self.workers = [_Worker(options, threads, cpus) for _ in range(workers)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for worker in self.workers:
            worker.close()

    def measure(self, task: Task, candidates: Sequence[AnyKnobs], protocol: Protocol | None = None) -> list[Outcome]:
        """One outcome a candidate, each against the default knobs in the same rounds. A candidate that crashes or hangs
        fails alone."""
        protocol = protocol or self.protocol
        tracker, key = self.workers[0].options.tracker, self.workers[0].options.rpc_key
        if tracker is None:
            return _measure(self.workers[0], task, candidates, protocol)
        return self._share_out(task, candidates, protocol, lambda: servers(tracker, key))

    def _share_out(
        self, task: Task, candidates: Sequence[AnyKnobs], protocol: Protocol, known: Callable[[], int]
    ) -> list[Outcome]:
        """One candidate after the other to whichever worker is free: a server that goes away takes one trial along, and
        the others do the rest. ``known``: how many servers there are; raises EnvironmentProblem without any."""
        queue = deque(enumerate(candidates))
        found: dict[int, Outcome] = {}
        active = self.workers[: known()]
        for spare in self.workers[len(active) :]:
            spare.close()
        lock = threading.Lock()

        def work(worker: _Worker) -> None:
            while True:
                with lock:
                    if not queue:
                        return
                    i, knobs = queue.popleft()
                found[i] = _measure(worker, task, [knobs], protocol)[0]
                if found[i].error and worker.process is None:
                    with lock:
                        if known() < len(active):  # nobody is left to ask; the tracker would let this one wait
                            active.remove(worker)
                            return

        with ThreadPoolExecutor(len(active)) as pool:
            for done in [pool.submit(work, w) for w in list(active)]:
                done.result()
        return [found[i] for i in range(len(candidates))]


def _measure(worker: _Worker, task: Task, candidates: Sequence[AnyKnobs], protocol: Protocol) -> list[Outcome]:
    default = task.site.default(task.target)
    errors: dict[int, str] = {}
    alive: list[int] = []
    knobs = {0: default, **dict(enumerate(candidates, 1))}

    def restore() -> None:
        """A worker with the default and all candidates that built."""
        worker.load(task, default, protocol)
        for n in alive:
            worker.build(n, knobs[n], protocol.timeout)

    try:
        worker.load(task, default, protocol)
        for n in range(1, len(knobs)):
            try:
                errors[n] = worker.build(n, knobs[n], protocol.timeout)
            except WorkerGone as e:
                errors[n] = str(e)
                worker.close()
                if len(knobs) > 2:
                    restore()
            if not errors[n]:
                alive.append(n)
    except WorkerGone as e:  # even the default: no worker, or no server, at all
        worker.close()
        return [Outcome(k, error=errors.get(n) or str(e)) for n, k in enumerate(candidates, 1)]
    samples: dict[int, dict[int, list[float]]] = {}
    try:
        together = worker.time([0, *alive], protocol.rounds, protocol.seconds) if alive else {}
        samples = {n: {0: together[0], n: together[n]} for n in alive}
    except WorkerGone as e:
        if len(alive) == 1:
            errors[alive[0]] = str(e)
        for n in alive if len(alive) > 1 else ():  # who it was shows when each runs alone
            worker.close()
            try:
                worker.load(task, default, protocol)
                worker.build(n, knobs[n], protocol.timeout)
                samples[n] = worker.time([0, n], protocol.rounds, protocol.seconds)
            except WorkerGone as e:
                errors[n] = str(e)
        worker.close()
    return [
        _outcome(k, samples[n][n], samples[n][0]) if n in samples else Outcome(k, error=errors[n])
        for n, k in enumerate(candidates, 1)
    ]


def _outcome(knobs: AnyKnobs, samples: list[float], reference: list[float]) -> Outcome:
    p10, p90 = (float(p) for p in np.percentile(samples, (10, 90)))
    wins = sum(a < b for a, b in zip(samples, reference, strict=True)) / len(samples)
    return Outcome(knobs, statistics.median(samples), p10, p90, len(samples), statistics.median(reference), wins)


def servers(tracker: tuple[str, int], key: str) -> int:
    """How many servers with ``key`` the tracker (host, port) knows. Raises EnvironmentProblem."""
    from tvm import rpc

    host, port = tracker
    try:
        socket.create_connection(tracker, timeout=5).close()  # TVM's client would try again for a minute
        known = rpc.connect_tracker(host, port).summary()["server_info"]
    except Exception as e:
        raise EnvironmentProblem(
            f"RPC tracker {host}:{port} does not answer ({type(e).__name__}); start python -m tvm.exec.rpc_tracker"
        ) from None
    count = sum(server["key"] == f"server:{key}" for server in known)
    if not count:
        raise EnvironmentProblem(
            f"RPC tracker {host}:{port} has no server with key '{key}'; start python -m tvm.exec.rpc_server"
        )
    return count
