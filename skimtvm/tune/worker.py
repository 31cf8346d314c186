"""The process that builds and times kernels, ``python -m skimtvm.tune.worker FD``: a candidate that crashes or hangs takes
this process along, and nothing else.

It speaks pickles over the inherited socket ``FD``. Requests and answers::

    ("task", bytes of a Task, options)  ->  ("ready",)
    ("build", number, knobs)            ->  ("built", error)      compiled, run once, compared with the first one built
    ("time", numbers, rounds, seconds)  ->  ("times", {number: [seconds of the layer, ...]})
    ("drop",)                           ->  ("ready",)            forget all but the first

A layer is timed as it runs in the middle of a network, call by call (band by band, where it has bands): what the layer
before has just written is in the second-level cache, and all else, the weights among it, in the last level, since other
layers ran in between. Samples of different kernels alternate, so that drift of the machine meets all alike.
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
from ..target import resolve

TOLERANCE = 1e-4  # of the largest output: other sums in another order, nothing more
NAN = np.float32(np.nan)
MOST = 20  # runs of a layer in a sample


@dataclass(frozen=True)
class Candidate:
    """``calls``: the arguments of each call that computes the layer, and [begin, end) of its source that is in cache."""

    name: str
    function: Any
    calls: tuple[tuple[tuple[Any, ...], tuple[int, int]], ...]

    def run(self) -> None:
        for args, _ in self.calls:
            self.function(*args)


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
        self.cold = np.ones((2, resolve().l2_bytes // 4), np.float32)

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

    def sample(self, kernel: Candidate, runs: int = 1, warm: bool = False) -> float:
        """Mean seconds of running the layer; ``warm``: with the caches as they are."""
        total = 0.0
        for _ in range(runs):
            for args, (begin, end) in kernel.calls:
                if not warm:
                    np.copyto(self.cold[0], self.cold[1])
                    source = np.from_dlpack(args[0])[begin:end]
                    np.multiply(source, 1, out=source)  # written, as by the layer before
                start = time.perf_counter()
                kernel.function(*args)
                total += time.perf_counter() - start
        return total / runs


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

    def sample(self, kernel: Candidate, runs: int = 1, warm: bool = False) -> float:
        """By the server's clock: the network is not part of it. The source comes from the last-level cache, too."""
        flushed = 0 if warm else self.cold.nbytes
        timer = kernel.function.time_evaluator("main", self.device, number=1, repeat=runs, cache_flush_bytes=flushed)
        return sum(float(timer(*args).mean) for args, _ in kernel.calls)


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
        self.channels = [make(site.rows_first.shape[0]) for _ in range(site.epilogue.channels)]
        self.kernels: dict[int, Candidate] = {}
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
        rest = [*self.channels, *self.residuals, out]
        if built.workspace:
            rest.append(self.runner.array(np.zeros(built.workspace, np.float32)))
        calls = []
        for call in self.site.calls():
            own = constants
            if call.band is not None:  # the last constant
                own = [*constants[:-1], self.runner.array(np.array(call.band, np.int32))]
            calls.append(((self.source, *own, *rest), call.reads))
        kernel = Candidate(built.name, function, tuple(calls))
        kernel.run()
        result = out.numpy()
        if self.expected is None:
            self.expected = result
        elif not self._agrees(result):
            return "the output differs from that of the default knobs"
        self.kernels[number] = kernel
        return ""

    def _agrees(self, result: np.ndarray) -> bool:
        """Where one kernel writes a value and the other leaves the buffer alone (behind a channel), nothing is read."""
        both = ~(np.isnan(result) | np.isnan(self.expected))
        if not both.any():
            return False
        scale = float(np.abs(self.expected[both]).max())
        complete = np.count_nonzero(both) >= self.site.written()
        return bool(complete and (np.abs(result - self.expected)[both] <= TOLERANCE * scale).all())

    def time(self, numbers: list[int], rounds: int, seconds: float) -> dict[int, list[float]]:
        return interleave(self.runner, {n: self.kernels[n] for n in numbers}, rounds, seconds)


def interleave(runner: Here, kernels: dict[int, Candidate], rounds: int, seconds: float) -> dict[int, list[float]]:
    """Seconds of a layer in each of ``rounds``, all kernels in each; a sample is of about ``seconds``, or a run."""
    samples: dict[int, list[float]] = {n: [] for n in kernels}
    with runner.alone():
        runs = {}
        for n, kernel in kernels.items():
            once = runner.sample(kernel)
            runs[n] = max(1, min(int(np.ceil(seconds / max(once, 1e-7))), MOST))
        for _ in range(rounds):
            for n, kernel in kernels.items():
                samples[n].append(runner.sample(kernel, runs[n]))
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
