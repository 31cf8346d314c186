"""The process that builds and times kernels, ``python -m skimtvm.tune.worker FD``: a candidate that crashes or hangs takes
this process along, and nothing else.

It speaks pickles over the inherited socket ``FD``. Requests and answers::

    ("task", bytes of a Task, options)  ->  ("ready",)
    ("build", number, knobs)            ->  ("built", error)      compiled, run once, compared with the first one built
    ("time", numbers, rounds, seconds)  ->  ("times", {number: [seconds of a call, ...]})
    ("drop",)                           ->  ("ready",)            forget all but the first

Samples of different kernels alternate, so that drift of the machine meets all alike.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from ..ops.packing import compile_kernel

TOLERANCE = 1e-4  # of the largest output: other sums in another order, nothing more
NAN = np.float32(np.nan)


@dataclass(frozen=True)
class Options:
    """How kernels are timed. ``lock``: a file that is locked (flock) while they are; ``realtime``: SCHED_FIFO priority
    meanwhile, 0 for none; ``tracker``, ``rpc_key``: run on a server of this TVM RPC tracker (host, port)."""

    lock: str = ""
    realtime: int = 0
    tracker: tuple[str, int] | None = None
    rpc_key: str = ""
    rpc_timeout: int = 60


class Here:
    """Runs kernels in this process."""

    def __init__(self, tvm: Any, options: Options, threads: int) -> None:
        self.tvm, self.options, self.threads = tvm, options, threads

    def array(self, values: Any) -> Any:
        return self.tvm.runtime.tensor(values)

    def load(self, executable: Any) -> Any:
        return executable["main"]

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock, with real-time priority if asked for."""
        with contextlib.ExitStack() as stack:
            if self.options.lock:
                lock = stack.enter_context(open(self.options.lock, "a"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            if self.options.realtime:
                os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(self.options.realtime))
                stack.callback(os.sched_setscheduler, 0, os.SCHED_OTHER, os.sched_param(0))
            yield

    def sample(self, function: Any, args: Any, calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            function(*args)
        return (time.perf_counter() - begin) / calls


class Remote(Here):
    """Runs kernels on a server that the tracker assigns, in one session for as long as this process has the task."""

    def __init__(self, tvm: Any, options: Options, threads: int) -> None:
        super().__init__(tvm, options, threads)
        from tvm import rpc

        assert options.tracker is not None
        self.folder = tempfile.TemporaryDirectory(prefix="skimtvm-rpc-")
        self.session = rpc.connect_tracker(*options.tracker).request(
            options.rpc_key, session_timeout=options.rpc_timeout
        )
        self.device, self.count = self.session.cpu(0), 0
        self.session.get_function("runtime.config_threadpool")(-2, threads)

    def array(self, values: Any) -> Any:
        return self.tvm.runtime.tensor(values, self.device)

    def load(self, executable: Any) -> Any:
        from ..artifact import link

        self.count += 1
        file = Path(self.folder.name) / f"k{os.getpid()}-{self.count}.so"
        executable.export_library(str(file), fcompile=link)
        self.session.upload(str(file))
        module = self.session.load_module(file.name)
        file.unlink()
        return module

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        yield

    def sample(self, function: Any, args: Any, calls: int) -> float:
        """The server's clock: the network is not part of it."""
        return float(function.time_evaluator("main", self.device, number=calls, repeat=1)(*args).mean)


class Bench:
    """The kernels of one task. ``compiled``: kernels by key, shared with other benches."""

    def __init__(
        self, site: Any, target: Any, threads: int, options: Options, compiled: dict[Any, Any] | None = None
    ) -> None:
        from ..tvm_runtime import import_compiler

        self.tvm = import_compiler()
        self.site, self.target, self.threads = site, target, threads
        self.runner: Here = (Remote if options.tracker else Here)(self.tvm, options, threads)
        rng = np.random.default_rng(0)
        source, residuals, self.out_size = site.sizes()
        make = lambda size: self.runner.array(rng.standard_normal(size, dtype=np.float32))
        self.source, self.residuals = make(source), [make(size) for size in residuals]
        rows = site.weight.shape[0] if site.weight.ndim == 4 else site.weight.shape[1]
        self.channels = [make(rows) for _ in range(site.epilogue.channels)]
        self.kernels: dict[int, tuple[Any, list[Any]]] = {}
        self.names: dict[int, str] = {}
        self.expected: Any = None
        self.compiled = {} if compiled is None else compiled

    def build(self, number: int, knobs: Any) -> str:
        """What is wrong with the kernel; empty if nothing is."""
        built = self.site.build(knobs, self.target)
        function = self.compiled.get(built.key)
        if function is None:
            executable = compile_kernel(built.emit(), self.target)
            function = self.compiled[built.key] = self.runner.load(executable)
        constants = [self.runner.array(a) for a in built.constants]
        out = self.runner.array(np.full(self.out_size, NAN))
        args = [self.source, *constants, *self.channels, *self.residuals, out]
        if built.workspace:
            args.append(self.runner.array(np.empty(built.workspace, np.float32)))
        function(*args)
        result = out.numpy()
        if self.expected is None:
            self.expected = result
        elif not self._agrees(result):
            return "the output differs from that of the default knobs"
        self.kernels[number], self.names[number] = (function, args), built.name
        return ""

    def _agrees(self, result: np.ndarray) -> bool:
        """Where one kernel writes a value and the other leaves the buffer alone (behind a channel), nothing is read."""
        both = ~(np.isnan(result) | np.isnan(self.expected))
        if not both.any():
            return False
        scale = float(np.abs(self.expected[both]).max())
        pixels = np.count_nonzero(both) >= self.pixels()
        return bool(pixels and (np.abs(result - self.expected)[both] <= TOLERANCE * scale).all())

    def pixels(self) -> int:
        """Values that a layer has to write."""
        wl = self.site.workload
        return int(np.prod(wl.out_shape)) if hasattr(wl, "out_shape") else wl.m * wl.n

    def time(self, numbers: list[int], rounds: int, seconds: float) -> dict[int, list[float]]:
        return interleave(self.runner, {n: self.kernels[n] for n in numbers}, rounds, seconds)


def interleave(
    runner: Here, kernels: dict[int, tuple[Any, list[Any]]], rounds: int, seconds: float
) -> dict[int, list[float]]:
    """Seconds of a call in each of ``rounds``, all kernels in each; a sample lasts about ``seconds``."""
    samples: dict[int, list[float]] = {n: [] for n in kernels}
    with runner.alone():
        calls = {}
        for n, kernel in kernels.items():
            once = runner.sample(*kernel, 1)
            calls[n] = max(1, min(int(np.ceil(seconds / max(once, 1e-7))), 10000))
        for _ in range(rounds):
            for n, kernel in kernels.items():
                runner.sample(*kernel, 1)  # caches hold what this kernel left there
                samples[n].append(runner.sample(*kernel, calls[n]))
    return samples


def serve(connection: Connection) -> None:
    bench: Bench | None = None
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        if request[0] == "task":
            site, target, threads = pickle.loads(request[1])
            bench = Bench(site, target, threads, request[2])
            answer: tuple[Any, ...] = ("ready",)
        elif bench is None:
            raise ValueError("no task")
        elif request[0] == "build":
            try:
                answer = ("built", bench.build(request[1], request[2]))
            except Exception as e:  # TVM raises many types; the search goes on
                if isinstance(bench.runner, Remote):
                    raise  # the session is lost
                lines = [line for line in str(e).splitlines() if line.strip()]
                answer = ("built", f"{type(e).__name__}: {lines[-1].strip()[:200] if lines else ''}")
        elif request[0] == "time":
            answer = ("times", bench.time(*request[1:]))
        else:
            bench.kernels = {n: k for n, k in bench.kernels.items() if n == 0}
            bench.compiled.clear()
            answer = ("ready",)
        connection.send(answer)


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    from .. import _torch
    from ..tvm_runtime import import_compiler, with_threads

    _torch.own_process()
    threads = int(sys.argv[2])
    import_compiler()
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        with_threads(threads, lambda: serve(connection))


if __name__ == "__main__":
    main()
