"""The rows of a benchmark and their JSON form. A row carries all terms under which it was measured."""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InvalidOption, OutputExists
from ..profiler import Timing

SCHEMA = 1
OURS = "skimtvm"
OK = "ok"


@dataclass(frozen=True)
class Terms:
    """``versions``: of every package that took part; ``command``: what repeats the measurement."""

    date: str
    command: str
    cpu: str
    cpus: int
    system: str
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Spread:
    """Milliseconds of one call: median, 10th and 90th percentile over ``samples`` samples of ``calls`` calls each."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    samples: int
    calls: int = 1

    @staticmethod
    def of(t: Timing) -> Spread:
        return Spread(t.median * 1e3, t.p10 * 1e3, t.p90 * 1e3, len(t.samples), t.calls)


@dataclass(frozen=True)
class EngineTime:
    """One engine in one row. ``status``: "ok", or why there is no time; ``model``: which weights it ran, where they are
    not those of the row. ``gflops`` counts nonzero weights of the row, ``dense_gflops`` all; ``difference``: largest
    difference of an output from SkimTVM's, relative to the engine's largest output; ``kernel``: the layer alone by the
    engine's own profiler."""

    engine: str
    version: str = ""
    status: str = OK
    model: str = ""
    time: Spread | None = None
    kernel: Spread | None = None
    gflops: float | None = None
    dense_gflops: float | None = None
    difference: float | None = None

    @property
    def label(self) -> str:
        return f"{self.engine} ({self.model})" if self.model else self.engine


@dataclass(frozen=True)
class NetworkRow:
    """``macs``/``nnz_macs``: multiply-adds of the whole batch in layers with weights, all and with nonzero ones."""

    terms: Terms
    network: str
    sparsity: str
    source: str
    batch: int
    threads: int
    density: float
    macs: int
    nnz_macs: int
    module_bytes: int
    compile_s: float
    engines: tuple[EngineTime, ...]

    @property
    def key(self) -> tuple[object, ...]:
        return self.network, self.sparsity, self.batch, self.threads


@dataclass(frozen=True)
class LayerRow:
    """A layer alone. ``kernel``: its own calls; ``prepare``: calls before them (padding, phase planes), which a network
    leaves to the producer of the input; ``dense``: the same layer forced dense. ``alpha``: dense over sparse efficiency,
    each the share of the peak on the multiply-adds that are done. ``base``: the layer whose rate it is compared with.
    ``bandwidth_*``: streaming read, GB/s, of 256 MiB and of as many bytes as the weights take."""

    terms: Terms
    layer: str
    workload: str
    sparsity: str
    source: str
    batch: int
    threads: int
    density: float
    kernel_name: str
    reason: str
    macs: int
    stored_bytes: int
    kernel: Spread
    prepare: Spread | None
    dense: Spread | None
    peak_gflops: float
    gflops: float
    dense_gflops: float
    share_of_peak: float
    alpha: float | None
    bandwidth_gbs: float
    bandwidth_same_gbs: float | None
    weights_gbs: float
    base: str
    skimcaffe_share: float | None
    skimcaffe_speedup: float | None
    engines: tuple[EngineTime, ...]

    @property
    def key(self) -> tuple[object, ...]:
        return self.layer, self.sparsity, self.batch, self.threads


@dataclass(frozen=True)
class SweepRow:
    """One point of a sweep; ``engines`` are SkimTVM's automatic choice, all layers dense, all pruned layers sparse.
    ``size``: height and width of the image, or tokens of a transformer's input."""

    terms: Terms
    sweep: str
    value: float
    network: str
    sparsity: str
    source: str
    batch: int
    size: int
    threads: int
    engines: tuple[EngineTime, ...]

    @property
    def key(self) -> tuple[object, ...]:
        return self.sweep, self.network, self.sparsity, self.batch, self.size, self.threads


@dataclass(frozen=True)
class MemoryRow:
    """Peak resident set of a process that loads and runs the network once; ``imported_mib``: with the engine imported
    and nothing loaded. ``file_bytes``: the module, or the dense ONNX file."""

    terms: Terms
    network: str
    sparsity: str
    source: str
    batch: int
    threads: int
    engine: str
    version: str
    status: str
    peak_mib: float | None
    imported_mib: float | None
    file_bytes: int

    @property
    def key(self) -> tuple[object, ...]:
        return self.network, self.sparsity, self.batch, self.threads, self.engine


Row = NetworkRow | LayerRow | SweepRow | MemoryRow


@dataclass(frozen=True)
class Report:
    """A benchmark file."""

    schema: int = SCHEMA
    networks: tuple[NetworkRow, ...] = ()
    layers: tuple[LayerRow, ...] = ()
    sweeps: tuple[SweepRow, ...] = ()
    memory: tuple[MemoryRow, ...] = ()

    def with_row(self, row: Row) -> Report:
        """This report with ``row`` added, in the place of an earlier one with the same key."""
        part = _PARTS[type(row)]
        rows: list[Any] = list(getattr(self, part))
        at = next((i for i, old in enumerate(rows) if old.key == row.key), len(rows))
        rows[at : at + 1] = [row]
        changed: dict[str, Any] = {part: tuple(rows)}
        return dataclasses.replace(self, **changed)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Report:
        """Raises ValueError, KeyError or TypeError for what is no report of this version."""
        raw = json.loads(text)
        if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
            raise ValueError(f"not a benchmark of schema {SCHEMA}")
        return typing.cast(Report, _decode(Report, raw))


_PARTS: dict[type, str] = {NetworkRow: "networks", LayerRow: "layers", SweepRow: "sweeps", MemoryRow: "memory"}


def _decode(kind: Any, raw: Any) -> Any:
    """``raw`` JSON as ``kind``: a dataclass, tuple[X, ...], X | None, or what JSON gives anyway."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        return kind(**{name: _decode(hints[name], value) for name, value in raw.items()})
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return tuple(_decode(args[0], item) for item in raw)
    if origin is types.UnionType:
        return None if raw is None else _decode(args[0], raw)
    return raw


def read(path: Path) -> Report:
    """The report in ``path``. Raises InvalidOption."""
    try:
        return Report.from_json(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InvalidOption(f"benchmark '{path}' cannot be read: {e.strerror}; give a bench.json") from None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InvalidOption(f"'{path}' is not a benchmark of this version ({e}); run skimtvm bench again") from None


def write_text(path: Path, text: str) -> None:
    """Write ``path`` in one step. Raises OutputExists."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as e:
        raise OutputExists(f"'{path}' cannot be written: {e.strerror}; choose another --output") from None


def ours(row: NetworkRow | LayerRow) -> EngineTime:
    """SkimTVM's time in ``row``."""
    return next(e for e in row.engines if e.engine == OURS)


def speedup(row: NetworkRow) -> float | None:
    """How many times as fast as the fastest peer; None if none was measured."""
    mine, best = ours(row).time, best_peer(row.engines)
    return best[1] / mine.median_ms if mine and best else None


def best_peer(engines: Sequence[EngineTime], *, kernel: bool = False) -> tuple[EngineTime, float] | None:
    """The fastest of the other engines and its milliseconds: of a run or, with ``kernel``, of the layer alone where
    the engine can tell and that is less."""
    times = []
    for e in engines:
        if e.engine == OURS or e.status != OK or e.time is None:
            continue
        alone = e.kernel.median_ms if kernel and e.kernel else e.time.median_ms
        times.append((e, min(e.time.median_ms, alone)))
    return min(times, key=lambda pair: pair[1], default=None)
