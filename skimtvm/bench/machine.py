"""What this machine can do: the rates that layers are compared with, measured by kernels that TVM compiles, and the
names under which a measurement goes on record."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ..target import CpuTarget, resolve
from ..tvm_runtime import import_compiler, import_tvm, with_threads
from .records import Terms
from .timing import timed

PACKAGES = ("skimtvm", "apache-tvm", "apache-tvm-ffi", "numpy", "onnx", "onnxruntime", "openvino")
STREAM_BYTES = 256 << 20  # far beyond the last-level cache
_STREAMS = 8  # vectors read and summed in turn: more than the latency of an addition hides
_STEPS = 20000


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of the packages that may take part and are installed."""
    from .. import __version__

    found = {"skimtvm": __version__, "python": platform.python_version()}
    for package in PACKAGES[1:]:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def terms(arguments: Sequence[str]) -> Terms:
    """Date, machine and versions; ``arguments`` of ``skimtvm bench``. Of an absolute path the command keeps the last
    name: folders of one machine mean nothing on another."""
    kept = [Path(a).name if os.path.isabs(a) else a for a in arguments]
    return Terms(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=shlex.join(["skimtvm", *kept]),
        cpu=f"{cpu_model()} ({resolve().mcpu})",
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        system=f"{platform.system()} {platform.release()}, {platform.machine()}, {sys.implementation.name}",
        versions=versions(),
    )


# ---- kernels -----------------------------------------------------------------------------------------------------


def _function(target: CpuTarget, emit: Any) -> Any:
    """The packed function of the kernel whose body ``emit(B)`` writes."""
    tvm = import_compiler()
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as B

    with IRBuilder() as builder, B.prim_func(s_tir=True):
        B.func_name("main")
        B.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        emit(B)
    return tvm.compile(tvm.IRModule({"main": builder.get()}), target=target.tvm())["main"]


def _multiply_add(target: CpuTarget, threads: int) -> Any:
    """X f32[accumulators * lanes], Y f32[threads * lanes]: ``_STEPS`` rounds of independent acc = acc * m + a on
    registers. Two registers hold m and a, two more are left to the compiler."""
    lanes, count = target.lanes, target.registers - 4

    def emit(B: Any) -> None:
        X = B.arg("X", B.Buffer((count * lanes,), "float32"))
        Y = B.arg("Y", B.Buffer((threads * lanes,), "float32"))
        with B.parallel(0, threads) as t:
            acc = B.alloc_buffer((count * lanes,), "float32")
            spans = [B.Ramp(i * lanes, 1, lanes) for i in range(count)]
            for s in spans:  # different values: equal accumulators would become one
                B.buffer_store(acc, X[s], [s])
            m, a = B.bind(X[spans[0]]), B.bind(X[spans[1]])
            with B.serial(0, _STEPS) as _:
                for s in spans:
                    B.buffer_store(acc, acc[s] * m + a, [s])
            total = acc[spans[0]]
            for s in spans[1:]:
                total = total + acc[s]
            B.buffer_store(Y, total, [B.Ramp(t * lanes, 1, lanes)])

    return _function(target, emit)


def _stream(target: CpuTarget, threads: int, floats: int) -> Any:
    """X f32[floats], Y f32[threads * lanes]: each thread sums its part of X; ``floats`` divides evenly."""
    lanes = target.lanes
    step = _STREAMS * lanes

    def emit(B: Any) -> None:
        X = B.arg("X", B.Buffer((floats,), "float32"))
        Y = B.arg("Y", B.Buffer((threads * lanes,), "float32"))
        part = floats // threads
        with B.parallel(0, threads) as t:
            acc = B.alloc_buffer((step,), "float32")
            spans = [B.Ramp(i * lanes, 1, lanes) for i in range(_STREAMS)]
            for s in spans:
                B.buffer_store(acc, B.Broadcast(B.float32(0), lanes), [s])
            with B.serial(0, part // step) as k:
                for i, s in enumerate(spans):
                    x = X[B.Ramp(t * part + k * step + i * lanes, 1, lanes)]
                    B.buffer_store(acc, acc[s] + x, [s])
            total = acc[spans[0]]
            for s in spans[1:]:
                total = total + acc[s]
            B.buffer_store(Y, total, [B.Ramp(t * lanes, 1, lanes)])

    return _function(target, emit)


def peak_gflops(threads: int, *, repeat: int = 60) -> float:
    """The practical peak: fused multiply-adds on registers, GFLOP/s of ``threads`` threads, best of ``repeat``."""
    target = resolve()
    kernel = _multiply_add(target, threads)
    count = target.registers - 4
    rng = np.random.default_rng(0)
    x = (0.5 + 0.25 * rng.random(count * target.lanes)).astype(np.float32)  # converges: neither overflow nor denormals
    flops = 2 * count * target.lanes * _STEPS * threads
    return flops / _best(kernel, [x, np.zeros(threads * target.lanes, np.float32)], threads, repeat) * 1e-9


def read_gbs(threads: int, size: int = STREAM_BYTES, *, repeat: int = 7) -> float:
    """Bandwidth of reading about ``size`` bytes from end to end, again and again: GB/s, best of ``repeat``. Sizes that
    fit a cache show the cache's bandwidth."""
    target = resolve()
    grain = _STREAMS * target.lanes * threads
    floats = max(size // 4 // grain, 1) * grain
    kernel = _stream(target, threads, floats)
    arrays = [np.ones(floats, np.float32), np.zeros(threads * target.lanes, np.float32)]
    return floats * 4 / _best(kernel, arrays, threads, repeat) * 1e-9


def _best(kernel: Any, arrays: Sequence[np.ndarray], threads: int, repeat: int) -> float:
    """Seconds of the fastest of ``repeat`` samples: other work on the machine can only take from a rate."""
    tensors = [import_tvm().runtime.tensor(a) for a in arrays]

    def work() -> float:
        timed(lambda: kernel(*tensors), 3)
        calls = max(1, int(0.002 / max(timed(lambda: kernel(*tensors), 1), 1e-7)))
        return min(timed(lambda: kernel(*tensors), calls) for _ in range(repeat))

    return with_threads(threads, work)


@dataclass(frozen=True)
class Rates:
    """What one measurement of the machine gave."""

    peak_gflops: float
    bandwidth_gbs: float

    @staticmethod
    def measure(threads: int) -> Rates:
        return Rates(peak_gflops(threads), read_gbs(threads))
