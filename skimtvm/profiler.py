"""Where the time goes: the one timing protocol, and the per-layer profile of a compiled module.

The protocol (``measure``): every function is warmed up, then the functions take turns (A B A B ...) so that a change
of clock rate or load meets all of them, and the result is the median with the 10th and 90th percentile.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import InputMismatch, InternalError, InvalidOption
from .report import LayerRecord, Manifest, TensorSpec
from .runtime import Module, as_tensor, describe, load
from .tvm_runtime import check_threads, with_threads

AGREEMENT = 0.10  # the layers' times must add up to the time of an unprofiled run within this


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median and percentiles over ``samples``, each of which is the mean of ``calls`` calls."""

    median: float
    p10: float
    p90: float
    samples: tuple[float, ...]
    calls: int = 1

    @staticmethod
    def of(samples: Sequence[float], calls: int = 1) -> Timing:
        p10, p90 = (float(p) for p in np.percentile(samples, (10, 90)))
        return Timing(statistics.median(samples), p10, p90, tuple(samples), calls)

    def __str__(self) -> str:
        return f"{self.median * 1e3:.3f} ms ({self.p10 * 1e3:.3f}-{self.p90 * 1e3:.3f})"


def measure(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeat: int = 20,
    warmup: int = 3,
    min_time: float = 0.0,
    settle: float = 0.0,
) -> dict[str, Timing]:
    """Time each of ``functions`` by the protocol above: ``repeat`` rounds after ``warmup`` calls of each. A sample
    takes at least ``min_time`` seconds, for which it calls a short function several times.

    ``settle``: when functions of different runtimes take turns, the idle threads of one go on spinning for
    milliseconds and take the CPUs from the other. Then each sample waits so many seconds for them to sleep, and makes
    one call that does not count.
    """
    if repeat < 1 or min(warmup, min_time, settle) < 0:
        raise InvalidOption(f"repeat={repeat}, warmup={warmup}, min_time={min_time}: repeat >= 1, the others >= 0")
    calls = {name: _warm_up(function, warmup, min_time) for name, function in functions.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(repeat):
            for name, function in functions.items():
                n = calls[name]
                if settle:
                    time.sleep(settle)
                    function()
                begin = time.perf_counter()
                for _ in range(n):
                    function()
                samples[name].append((time.perf_counter() - begin) / n)
    finally:
        if collecting:
            gc.enable()
    return {name: Timing.of(samples[name], calls[name]) for name in functions}


def _warm_up(function: Callable[[], object], warmup: int, min_time: float) -> int:
    """Calls per sample."""
    for _ in range(warmup):
        function()
    if not min_time:
        return 1
    begin = time.perf_counter()
    function()
    once = time.perf_counter() - begin
    return max(1, int(np.ceil(min_time / max(once, 1e-7))))


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer in a run (all its kernel calls together), and its rates in GFLOP/s: ``gflops`` counts the
    multiply-adds with nonzero weights, ``dense_gflops`` those of the dense layer. 0 for a layer without weights."""

    layer: LayerRecord
    time: Timing
    calls: int

    @property
    def gflops(self) -> float:
        return self.dense_gflops * self.layer.density

    @property
    def dense_gflops(self) -> float:
        return 2e-9 * self.layer.macs / self.time.median if self.time.median else 0.0


@dataclass(frozen=True)
class Profile:
    """``total``: a run without instrument; ``layers``: per-layer times in execution order of their first kernel."""

    model: str
    target: str
    threads: int
    total: Timing
    layers: tuple[LayerTime, ...]
    callback_overhead: float  # seconds a kernel call, already subtracted from the layers

    @property
    def layers_total(self) -> float:
        """Seconds that the layers take together."""
        return sum(t.time.median for t in self.layers)

    @property
    def agrees(self) -> bool:
        """Whether the layers add up to the run. If not, the machine was busy, or the network is so small that the
        virtual machine itself dominates."""
        return abs(self.layers_total - self.total.median) <= AGREEMENT * self.total.median

    @property
    def gflops(self) -> float:
        return sum(2e-9 * t.layer.macs * t.layer.density for t in self.layers) / self.total.median

    @property
    def dense_gflops(self) -> float:
        return sum(2e-9 * t.layer.macs for t in self.layers) / self.total.median

    def to_json(self) -> str:
        """One JSON object; times in milliseconds."""
        return json.dumps(
            {
                "model": self.model,
                "target": self.target,
                "threads": self.threads,
                "total": _milliseconds(self.total),
                "layers_total_ms": self.layers_total * 1e3,
                "agrees": self.agrees,
                "callback_overhead_us": self.callback_overhead * 1e6,
                "gflops": self.gflops,
                "dense_gflops": self.dense_gflops,
                "layers": [
                    dataclasses.asdict(t.layer)
                    | {"density": t.layer.density, "calls": t.calls}
                    | _milliseconds(t.time)
                    | {"gflops": t.gflops, "dense_gflops": t.dense_gflops}
                    for t in self.layers
                ],
            },
            ensure_ascii=False,
        )


def _milliseconds(t: Timing) -> dict[str, float | int]:
    return {"median_ms": t.median * 1e3, "p10_ms": t.p10 * 1e3, "p90_ms": t.p90 * 1e3, "samples": len(t.samples)}


def random_feeds(inputs: Sequence[TensorSpec], seed: int = 0) -> dict[str, np.ndarray]:
    """Seeded arrays for ``inputs``: standard normal for floats, 0 for integers (indices stay valid)."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for spec in inputs:
        dtype = np.dtype(spec.dtype)
        normal = rng.standard_normal(spec.shape)
        feeds[spec.name] = normal.astype(dtype) if dtype.kind == "f" else np.zeros(spec.shape, dtype)
    return feeds


def profile(
    module: Module | str | os.PathLike[str],
    feeds: Any = None,
    *,
    repeat: int = 20,
    warmup: int = 3,
    threads: int | None = None,
    batch: int | None = None,
) -> Profile:
    """Time every layer of ``module`` (``feeds`` as for ``Module.run``; None: seeded random input).

    ``batch``: which of the module's ``batches`` (None: the largest); ``feeds`` hold exactly that many images.

    Instrumented runs alternate with plain ones. Raises InternalError if the module does not execute the kernel calls
    that its manifest lists.
    """
    if not isinstance(module, Module):
        module = load(module)
    count = check_threads(module.threads if threads is None else threads)
    manifest = _manifest(module, batch)
    arrays = module.bind(random_feeds(manifest.inputs) if feeds is None else feeds)
    if any(a.shape != s.shape for a, s in zip(arrays, manifest.inputs, strict=True)):
        raise InputMismatch(f"a profile needs exactly {describe(manifest.inputs)}; feed such arrays or none")
    tensors = [as_tensor(a) for a in arrays]
    _, main = module.new_vm(batch)
    instrumented, main_timed = module.new_vm(batch)
    runs: list[_Run] = []

    def timed_run() -> None:
        runs.append(_Run([], [], []))
        main_timed(*tensors)

    def work() -> tuple[float, Timing]:
        overhead = _callback_overhead(instrumented, lambda: main_timed(*tensors))
        instrumented.set_instrument(_recorder(runs))
        functions = {"plain": lambda: main(*tensors), "timed": timed_run}
        return overhead, measure(functions, repeat=repeat, warmup=warmup)["plain"]

    overhead, total = with_threads(count, work)
    layers = _layers(module, manifest, runs[warmup:], overhead)
    return Profile(module.manifest.model_name, module.manifest.target, count, total, layers, overhead)


@dataclass(frozen=True)
class _Run:
    """Nanosecond clock at start and end of each kernel call of one run, and the kernels' names."""

    starts: list[int]
    ends: list[int]
    names: list[str]


def _recorder(runs: list[_Run]) -> Callable[..., int]:
    """The VM's instrument that fills ``runs[-1]``. It is part of what it measures: keep it short."""
    clock = time.perf_counter_ns

    def callback(function: object, name: str, before: bool, result: object, *args: object) -> int:
        now = clock()
        if name.startswith("vm."):
            return 0
        run = runs[-1]
        if before:
            run.names.append(name)
            run.starts.append(clock())
        else:
            run.ends.append(now)
        return 0  # go on with the call

    return callback


def _callback_overhead(vm: Any, run: Callable[[], object]) -> float:
    """Seconds between the two clock readings around a call that does nothing: some built-ins of the VM come close."""
    clock = time.perf_counter_ns
    intervals: dict[str, list[int]] = {}
    start = 0

    def callback(function: object, name: str, before: bool, result: object, *args: object) -> int:
        nonlocal start
        now = clock()
        if before:
            start = clock()
        elif name.startswith("vm.builtin."):
            intervals.setdefault(name, []).append(now - start)
        return 0

    vm.set_instrument(callback)
    for _ in range(3):
        run()
    return min((statistics.median(t) for t in intervals.values()), default=0) * 1e-9


def _manifest(module: Module, batch: int | None) -> Manifest:
    if batch is None:
        return module.manifest
    if batch not in (module.batches or {s.shape[0] for s in module.inputs if s.shape}):
        sizes = ", ".join(map(str, module.batches)) or f"only the shapes {describe(module.inputs)}"
        raise InvalidOption(f"module '{module.path}' does not hold batch {batch}; it holds {sizes}")
    return module.manifest.at(batch)


def _layers(module: Module, manifest: Manifest, runs: Sequence[_Run], overhead: float) -> tuple[LayerTime, ...]:
    for run in runs:
        if len(run.starts) != len(manifest.calls) or len(run.ends) != len(manifest.calls):
            raise InternalError(
                f"module '{module.path}' made {len(run.starts)} kernel calls ({', '.join(run.names[:8])} ...), its "
                f"manifest lists {len(manifest.calls)}"
            )
    calls = np.array(manifest.calls, dtype=np.int64)
    times = np.array([run.ends for run in runs], np.float64) - np.array([run.starts for run in runs], np.float64)
    times = np.maximum(times * 1e-9 - overhead, 0)
    result = []
    for k in dict.fromkeys(manifest.calls):
        mine = calls == k
        result.append(LayerTime(manifest.layers[k], Timing.of(times[:, mine].sum(axis=1).tolist()), int(mine.sum())))
    return tuple(result)
