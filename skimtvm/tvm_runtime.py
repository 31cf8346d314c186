"""TVM in this process: import the library that is needed, and say how many threads its kernels use."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from typing import Any, TypeVar

import numpy as np

from . import _torch
from .errors import EnvironmentProblem, InvalidOption

MAX_THREADS = 1024

R = TypeVar("R")


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """The variable for the duration of the block: child processes that compile must not inherit it."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def import_tvm() -> Any:
    """The ``tvm`` package: as it is where it has been imported already, otherwise without its compiler library.

    Raises EnvironmentProblem if it is missing, or the tvm-ffi beside it is one that crashes it.
    """
    if "tvm" in sys.modules:
        _set_pool_defaults()
        return sys.modules["tvm"]
    with _environment("TVM_USE_RUNTIME_LIB", "1"):
        return _import()


def import_compiler() -> Any:
    """The whole ``tvm`` package. Raises EnvironmentProblem if it cannot be imported, or this process has loaded it
    without the compiler."""
    tvm = sys.modules.get("tvm") or _import()
    if getattr(tvm, "_RUNTIME_ONLY", False):
        raise EnvironmentProblem(
            "TVM is loaded without its compiler library; compile in another process, before the first load(), and "
            "without TVM_USE_RUNTIME_LIB"
        )
    _set_pool_defaults()
    return tvm


def _import() -> Any:
    _set_pool_defaults()
    remedy = "pip install apache-tvm==0.27.0.post1 apache-tvm-ffi==0.1.14.post1"
    try:
        ffi = metadata.version("apache-tvm-ffi")
        if not ffi.startswith("0.1.14."):
            raise EnvironmentProblem(f"apache-tvm-ffi {ffi} is binary-incompatible with TVM 0.27; {remedy}")
        with _torch.as_needed():
            import tvm
    except (ImportError, OSError, RuntimeError) as e:
        raise EnvironmentProblem(f"cannot import TVM ({str(e).splitlines()[0]}); {remedy}") from None
    return tvm


def _set_pool_defaults() -> None:
    """What TVM reads when it starts a pool. Bound workers shrink the affinity mask of the caller, for good; spinning
    for the default 0.15 s after each run takes a core away from whatever runs next."""
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "20000")


# ---- threads -----------------------------------------------------------------------------------------------------
# Each calling thread has a TVM pool of its own, which is created with as many workers as its first use asks for; after
# that the number can fall and rise again, but not beyond the first. A call that wants more, or that runs in the child
# of a fork (the pool's workers are gone there, and waiting for them never ends), goes to a helper thread with its own
# pool: that costs some 20 us a call.


class _PoolState(threading.local):
    pid = 0  # process in which TVM's pool of this thread was started; 0 = not started
    helper: ThreadPoolExecutor | None = None
    helper_key = (0, 0)  # process, threads
    threads = 0  # what the pool was last configured for


_pool = _PoolState()


def default_threads() -> int:
    """Number of CPUs in the affinity mask of the calling thread."""
    return len(os.sched_getaffinity(0))


def check_threads(threads: int | None) -> int:
    """``threads``, or the default for None. Raises InvalidOption for what is no sensible count."""
    if threads is None:
        return default_threads()
    if isinstance(threads, bool) or not isinstance(threads, int | np.integer) or not 1 <= threads <= MAX_THREADS:
        raise InvalidOption(f"threads={threads!r}: give a whole number from 1 to {MAX_THREADS}, or None for all CPUs")
    return int(threads)


def with_threads(threads: int, call: Callable[[], R]) -> R:
    """``call()``, in which every TVM kernel uses exactly ``threads`` threads, the caller included."""
    pid = os.getpid()
    if _pool.pid in (0, pid) and _configure(threads):
        return call()
    if _pool.helper is None or _pool.helper_key[0] != pid or _pool.helper_key[1] < threads:
        _pool.helper = ThreadPoolExecutor(1, "skimtvm")
        _pool.helper_key = (pid, threads)
    return _pool.helper.submit(_in_helper, threads, call).result()


def _in_helper(threads: int, call: Callable[[], R]) -> R:
    if not _configure(threads):
        raise EnvironmentProblem(f"TVM starts fewer than {threads} threads here; pass a smaller number of threads")
    return call()


def _configure(threads: int) -> bool:
    """Give TVM's pool of this thread ``threads`` workers; False if it has been started with fewer."""
    tvm = import_tvm()
    count = tvm.get_global_func("runtime.NumThreads")
    if _pool.threads == threads and count() == threads:
        return True
    affinity = os.sched_getaffinity(0)
    cpus = sorted(affinity)
    # Mode -3 shares the CPUs among the workers; the length of the list is the number of workers.
    tvm.get_global_func("runtime.config_threadpool")(-3, threads, [str(cpus[i % len(cpus)]) for i in range(threads)])
    _pool.pid = os.getpid()
    if os.sched_getaffinity(0) != affinity:  # the user asked for TVM_BIND_THREADS=1; that is for workers only
        os.sched_setaffinity(0, affinity)
    _pool.threads = threads
    return bool(count() == threads)
