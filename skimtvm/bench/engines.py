"""The engines that are measured, behind one interface. Peers are optional: one that is missing, or refuses a model, says
so in its row and nothing else happens."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from ..profiler import random_feeds
from ..runtime import ALIGNMENT, Module
from .records import EngineTime
from .timing import timed


class Unavailable(Exception):
    """An engine cannot take part; the message says why, for the row."""


@dataclass(frozen=True)
class Case:
    """What a peer gets: ONNX file, inputs in graph order by name, batch, threads."""

    model: Path
    feeds: Mapping[str, np.ndarray]
    batch: int
    threads: int


class Engine(Protocol):
    """``seconds``: mean of some calls; ``outputs``: in graph order; ``kernel_seconds``: of the layer (all nodes with
    weights) in each of some calls by the engine's own profiler, empty where it cannot tell."""

    version: str

    def seconds(self, calls: int) -> float: ...
    def outputs(self) -> list[np.ndarray]: ...
    def kernel_seconds(self, calls: int) -> list[float]: ...
    def close(self) -> None: ...


class SkimTVM:
    """A compiled module."""

    def __init__(self, module: Module, feeds: Mapping[str, np.ndarray], threads: int) -> None:
        from .. import __version__

        self.version = __version__
        self._run = lambda: module.run(feeds, threads=threads)

    def seconds(self, calls: int) -> float:
        return timed(self._run, calls)

    def outputs(self) -> list[np.ndarray]:
        return list(self._run().values())

    def kernel_seconds(self, calls: int) -> list[float]:
        return []

    def close(self) -> None:
        self._run = dict


class OnnxRuntime:
    """Default graph optimisation. Its threads may spin while a run lasts, as they do by default, and stop when it ends
    (session.force_spinning_stop), or they would take the CPUs from the next engine."""

    name: ClassVar[str] = "onnxruntime"

    def __init__(self, case: Case) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise Unavailable("not installed: pip install onnxruntime") from None
        self.version = onnxruntime.__version__
        self._case, self._folder = case, tempfile.TemporaryDirectory(prefix="skimtvm-ort-")
        self._session = self._open(onnxruntime)
        self._run: Callable[[], Any] = lambda: self._session.run(None, case.feeds)

    def _open(self, ort: Any, *, profiled: bool = False) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._case.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if profiled:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(self._folder.name) / "profile")
        return ort.InferenceSession(str(self._case.model), options, providers=["CPUExecutionProvider"])

    def seconds(self, calls: int) -> float:
        return timed(self._run, calls)

    def outputs(self) -> list[np.ndarray]:
        return list(self._run())

    def kernel_seconds(self, calls: int) -> list[float]:
        """From a session with the profiler on (microseconds, which it rounds)."""
        import onnxruntime

        session = self._open(onnxruntime, profiled=True)
        for _ in range(calls + 1):
            session.run(None, self._case.feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
        times = [e["dur"] for e in events if e.get("cat") == "Node" and _weighted(e["args"].get("op_name", ""))]
        nodes = len(times) // (calls + 1)
        return [sum(times[i : i + nodes]) * 1e-6 for i in range(nodes, len(times), nodes)] if nodes else []

    def close(self) -> None:
        self._session = None
        self._folder.cleanup()


class OpenVino:
    """Latency hint, float32 (bfloat16 is its default where the CPU has it), threads not pinned to CPUs: it computes on
    the calling thread too, which the other engines share."""

    name: ClassVar[str] = "openvino"

    def __init__(self, case: Case) -> None:
        try:
            import openvino
        except ImportError:
            raise Unavailable("not installed: pip install openvino") from None
        self.version = openvino.__version__.split("-")[0]
        self._ov, self._case = openvino, case
        self._core = openvino.Core()
        self._request = self._compile().create_infer_request()
        self._profiled: Any = None
        self._feeds = dict(case.feeds)
        # Neither input nor output is copied.
        self._run: Callable[[], Any] = lambda: self._request.infer(self._feeds, share_inputs=True, share_outputs=True)

    def _compile(self, *, profiled: bool = False) -> Any:
        config = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self._case.threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False,
            "PERF_COUNT": profiled,
        }
        return self._core.compile_model(str(self._case.model), "CPU", config)

    def seconds(self, calls: int) -> float:
        return timed(self._run, calls)

    def outputs(self) -> list[np.ndarray]:
        result = self._run()
        return [np.array(result[i]) for i in range(len(result))]

    def kernel_seconds(self, calls: int) -> list[float]:
        """From a request with performance counters (microseconds, which it rounds)."""
        if self._profiled is None:
            self._profiled = self._compile(profiled=True).create_infer_request()
        samples = []
        for k in range(calls + 1):
            self._profiled.infer(self._feeds, share_inputs=True, share_outputs=True)
            nodes = [n for n in self._profiled.get_profiling_info() if _weighted(n.node_type)]
            if k and nodes:
                samples.append(sum(n.real_time.total_seconds() for n in nodes))
        return samples

    def close(self) -> None:
        self._request = self._profiled = None


_WEIGHTED = ("conv", "gemm", "matmul", "fullyconnected")


def _weighted(op: str) -> bool:
    """Whether an engine's node of this kind is a convolution or a product."""
    return any(word in op.lower() for word in _WEIGHTED)


PEERS: dict[str, type[OnnxRuntime] | type[OpenVino]] = {"onnxruntime": OnnxRuntime, "openvino": OpenVino}
PEER_NAMES = (*PEERS, "deepsparse")


@dataclass(frozen=True)
class Peers:
    """Which peers take part, and the Python of the environment that has DeepSparse."""

    names: tuple[str, ...] = PEER_NAMES
    deepsparse_python: Path | None = None

    def open(self, name: str, case: Case) -> Engine:
        """Raises Unavailable, with a reason that fits a table, whatever goes wrong in the engine."""
        try:
            if name == "deepsparse":
                from .deepsparse_client import DeepSparse

                return DeepSparse(case, self.deepsparse_python)
            return PEERS[name](case)
        except Unavailable:
            raise
        except Exception as e:  # each engine has its own exceptions
            raise Unavailable(f"failed: {first_line(e)}") from e


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:160]


def unavailable(name: str, reason: object, model: str = "") -> EngineTime:
    """The row's entry for an engine without a time."""
    return EngineTime(name, status=str(reason), model=model)


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that starts on a cache line, which every engine can use in place."""
    raw = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    result = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    result[...] = array
    return result


def feeds_for(module: Module) -> dict[str, np.ndarray]:
    """Seeded inputs, the same for every engine."""
    return {name: aligned(a) for name, a in random_feeds(module.inputs).items()}


def difference(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float | None:
    """Largest difference over all outputs, each relative to the largest value that the other engine computed; None if
    the outputs do not correspond, the largest float if one holds what is no number."""
    if [a.shape for a in ours] != [b.shape for b in theirs]:
        return None
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        scale = max(float(np.abs(b).max(initial=0)), 1e-30)
        error = float(np.abs(a.astype(np.float64) - b).max(initial=0)) / scale
        worst = max(worst, error if np.isfinite(error) else sys.float_info.max)  # JSON has no NaN
    return worst


def save_model(model: Any, folder: Path, name: str) -> Path:
    """``model`` (onnx.ModelProto) as ``folder/name.onnx``."""
    path = folder / f"{name}.onnx"
    path.write_bytes(model.SerializeToString())
    return path
