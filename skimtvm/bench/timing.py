"""The timing protocol of ``skimtvm.profiler.measure`` for engines that time themselves: some run in another process,
and the pipe between must not count.

Every engine is warmed up; then they take turns (A B A B ...), each turn one sample. A turn starts with one call that
does not count, so that the caches hold what the engine itself left there, as in a program that runs nothing else; calls
so long that the caches cannot help skip it. With more than one thread, each turn first waits for the idle threads of the
engine before to fall asleep.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..profiler import Timing

SETTLE = 0.03  # seconds; TVM's idle threads spin for about 10 ms
LONG = 0.25  # seconds; a call that streams more than any cache holds


@dataclass(frozen=True)
class Rounds:
    """``repeat`` samples after ``warmup`` calls; a sample takes ``min_time`` seconds or more."""

    repeat: int = 20
    warmup: int = 3
    min_time: float = 0.0


class Timed(Protocol):
    def seconds(self, calls: int) -> float:
        """Mean seconds of ``calls`` calls."""


def timed(function: Callable[[], object], calls: int) -> float:
    """Mean seconds of ``calls`` calls of ``function``."""
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) / calls


def interleave(engines: Mapping[str, Timed], protocol: Rounds, *, threads: int = 1) -> dict[str, Timing]:
    """Time ``engines`` by the protocol above."""
    once, calls = {}, {}
    for name, engine in engines.items():
        if protocol.warmup:
            engine.seconds(protocol.warmup)
        once[name] = engine.seconds(1)
        calls[name] = max(1, int(np.ceil(protocol.min_time / max(once[name], 1e-7))))
    samples: dict[str, list[float]] = {name: [] for name in engines}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(protocol.repeat):
            for name, engine in engines.items():
                if threads > 1:
                    time.sleep(SETTLE)
                if once[name] < LONG:
                    engine.seconds(1)
                samples[name].append(engine.seconds(calls[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: Timing.of(samples[name], calls[name]) for name in engines}
