"""The measured table of a machine: how fast each kernel is on a grid of shapes and densities. Needs no TVM.

``skimtvm calibrate`` writes it, the chooser and guided pruning read it; tuning_logs/README.md documents the file. It holds
times. What they mean for other shapes is worked out here: the ratio of measured to modelled time (``cost_model``) varies
slowly, so it is interpolated - over density along a line between the measured ones, in logarithms, and over shapes by
Shepard's inverse distances, also in logarithms. Both are means of measured ratios, so that nothing runs away outside of the
grid, and on the grid the table is exact.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cost_model import Workload, cost, outputs
from .errors import InvalidOption, OutputExists, SkimError
from .kernels import KERNELS, Kernel, applicable
from .workload import ConvWorkload, DenseWorkload, WinogradWorkload

SCHEMA = 1
SHIPPED = Path(__file__).parent / "tuning_logs"
FILE = "calibration.json"
_TYPES: dict[str, Any] = {"conv2d": ConvWorkload, "winograd": WinogradWorkload, "dense": DenseWorkload}
_POWER = 4  # of the distance between shapes: the nearest counts most
_AGAIN = "make it again with skimtvm calibrate"
# Densities at which alpha of a layer is taken: where layers are pruned to.
ALPHA_DENSITIES = (0.05, 0.1, 0.2, 0.35)


@dataclass(frozen=True)
class Point:
    """One measurement: ``kernel`` and ``op`` name a row of ``KERNELS``; ``stored``: fraction of the weights that it stored
    (R x 1 blocks with a nonzero); ``density``: fraction of nonzeros; ``seconds``: median of a call over ``samples``,
    ``spread`` 10th and 90th percentile; ``alpha``: seconds over density, over the seconds of the direct dense kernel;
    ``code``: what was run; ``interleave``: images that shared a vector (``layout.py``)."""

    kernel: str
    op: str
    workload: Workload
    density: float
    stored: float
    seconds: float
    spread: tuple[float, float]
    samples: int
    alpha: float | None = None
    code: str = ""
    interleave: int = 1

    @property
    def row(self) -> Kernel:
        return next(k for k in KERNELS if (k.name, k.op) == (self.kernel, self.op))

    @property
    def family(self) -> str:
        return family(self.row, self.workload, self.interleave)

    def to_json(self) -> dict[str, Any]:
        kind = next(name for name, cls in _TYPES.items() if type(self.workload) is cls)
        plain = {f.name: f.default for f in dataclasses.fields(self.workload)}
        shape = {name: value for name in plain if (value := getattr(self.workload, name)) != plain[name]}
        raw = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        kept = {name: v for name, v in raw.items() if v is not None and (name, v) != ("interleave", 1)}
        return kept | {"workload": {"type": kind, **shape}}

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> Point:
        """Raises ValueError, KeyError, TypeError."""
        shape = dict(raw["workload"])
        known = {f.name for f in dataclasses.fields(Point)}
        values = {name: value for name, value in raw.items() if name in known}
        values["workload"] = _TYPES[shape.pop("type")](**shape)
        low, high = raw["spread"]
        values["spread"] = (float(low), float(high))
        point = Point(**values)
        numbers = (point.seconds, point.stored, point.density, point.interleave)
        if not all(isinstance(x, int | float) and math.isfinite(x) and x > 0 for x in numbers):
            raise ValueError("seconds, stored, density and interleave must be numbers above 0")
        row = next((k for k in KERNELS if (k.name, k.op) == (point.kernel, point.op)), None)
        if row is None or (why := row.rejects(point.workload)):
            raise ValueError(f"kernel '{point.kernel}' of {point.op}: {why if row else 'unknown'}")
        return point


@dataclass(frozen=True)
class Calibration:
    """``cpu``, ``isa``: LLVM's name and instruction set; ``cpuid``: of ``host_cpuid``; ``bandwidths``: (bytes read again and
    again, bytes a second), ascending; ``peak_flops``: multiply-adds on registers, counted twice; ``kernels``: version of
    each kernel's code (``sites.version``). One thread."""

    cpu: str
    isa: str
    cpu_model: str
    cpuid: str
    peak_flops: float
    bandwidths: tuple[tuple[float, float], ...]
    points: tuple[Point, ...]
    kernels: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    time: str = ""
    schema: int = SCHEMA

    # -- files -----------------------------------------------------------------------------------------------------
    def to_json(self) -> str:
        """One object, a point a line."""
        raw = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "points"}
        head = json.dumps({"schema": raw.pop("schema"), **raw}, indent=1)
        lines = ",\n  ".join(json.dumps(_rounded(p.to_json()), separators=(",", ":")) for p in self.points)
        return f'{head[:-2]},\n "points": [\n  {lines}\n ]\n}}\n'

    @staticmethod
    def from_json(raw: Any) -> Calibration:
        """Raises ValueError with what is wrong."""
        if not isinstance(raw, Mapping) or not isinstance(raw.get("points"), Sequence):
            raise ValueError("it is no object with points")
        if raw.get("schema") != SCHEMA:
            raise ValueError(f"its schema {raw.get('schema')!r} is not {SCHEMA}")
        known = {f.name for f in dataclasses.fields(Calibration)}
        try:
            values = {name: value for name, value in raw.items() if name in known}
            values["points"] = tuple(Point.from_json(p) for p in raw["points"])
            values["bandwidths"] = tuple(sorted((float(b), float(r)) for b, r in raw["bandwidths"]))
            table = Calibration(**values)
            rates = [table.peak_flops, *(x for pair in table.bandwidths for x in pair)]
            if not table.bandwidths or not all(math.isfinite(x) and x > 0 for x in rates):
                raise ValueError("rates must be numbers above 0")
        except (KeyError, TypeError, AttributeError, SkimError) as e:
            raise ValueError(f"a field is missing or has the wrong form ({type(e).__name__}: {e})") from None
        if not table.points:
            raise ValueError("it has no points")
        return table

    @staticmethod
    def load(path: Path) -> Calibration:
        """Raises InvalidOption."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except OSError as e:
            raise InvalidOption(f"calibration '{path}' cannot be read: {e.strerror}; {_AGAIN}") from None
        except ValueError as e:
            raise InvalidOption(f"calibration '{path}' is no JSON ({e}); {_AGAIN}") from None
        try:
            return Calibration.from_json(raw)
        except ValueError as e:
            raise InvalidOption(f"calibration '{path}' cannot be used: {e}; {_AGAIN}") from None

    def save(self, path: Path) -> None:
        """Write completely or not at all. Raises OutputExists."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_text(self.to_json(), encoding="utf-8")
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as e:
            raise OutputExists(f"'{path}' cannot be written: {e.strerror}; choose another --output") from None

    def __str__(self) -> str:
        digest = hashlib.sha256(self.to_json().encode()).hexdigest()[:8]
        return f"{len(self.points)} kernels measured on {self.cpu_model or self.cpu}, {self.time[:10]} ({digest})"

    # -- the fit ---------------------------------------------------------------------------------------------------
    def unit(self, kernel: Kernel, workload: Workload) -> float:
        """Seconds of the unit of ``cost_model.cost``."""
        if kernel.op == "fc":
            assert isinstance(workload, DenseWorkload)
            return 4 * workload.k * workload.n / self.bandwidths[-1][1]
        return 2 * workload.macs / self.peak_flops

    @functools.cached_property
    def _curves(self) -> dict[str, list[_Curve]]:
        found: dict[tuple[str, Workload], list[tuple[float, float]]] = {}
        for p in self.points:
            modelled = cost(p.row, p.stored, p.workload) * self.unit(p.row, p.workload)
            ratio = math.log(p.seconds / modelled)
            found.setdefault((p.family, _seen(p.row, p.workload)), []).append((math.log(p.stored), ratio))
        curves: dict[str, list[_Curve]] = {}
        for (name, workload), values in found.items():
            curves.setdefault(name, []).append(_Curve(_place(workload), tuple(sorted(values))))
        return curves

    def knows(self, kernel: Kernel, workload: Workload, interleave: int = 1) -> bool:
        """Whether the table has points of ``kernel``, with so many images in a vector."""
        return family(kernel, workload, interleave) in self._curves

    def factor(self, kernel: Kernel, stored: float, workload: Workload, interleave: int = 1) -> float:
        """Measured over modelled time; that of planes for a kernel that was not measured with ``interleave`` images in a
        vector, and 1 for one that was not measured at all."""
        curves = self._curves.get(family(kernel, workload, interleave)) or self._curves.get(family(kernel, workload))
        if not curves:
            return 1.0
        here, at = _place(_seen(kernel, workload)), math.log(max(stored, 1e-9))
        total = weights = 0.0
        for curve in curves:
            distance = math.dist(here, curve.place)
            if distance < 1e-9:
                return math.exp(curve.ratio(at))
            weight = distance**-_POWER
            total, weights = total + weight * curve.ratio(at), weights + weight
        return math.exp(total / weights)

    def seconds(self, kernel: Kernel, stored: float, workload: Workload) -> float:
        """Time of a call by the table."""
        return cost(kernel, stored, workload) * self.unit(kernel, workload) * self.factor(kernel, stored, workload)

    def bandwidth(self, size: float) -> float:
        """Bytes a second of reading ``size`` bytes, as on a machine that does nothing else between two reads."""
        return math.exp(
            _between([(math.log(b), math.log(rate)) for b, rate in self.bandwidths], math.log(max(size, 1)))
        )

    # -- for pruning -----------------------------------------------------------------------------------------------
    def dense_seconds(self, workload: Workload) -> tuple[float, float]:
        """(direct dense kernel, fastest dense kernel that was measured, Winograd included)."""
        options = [k for k in applicable(workload) if not k.rows]
        times = {k.name: self.seconds(k, 1.0, workload) for k in options if self.knows(k, workload)}
        direct = times.get("dense") or self.seconds(options[0], 1.0, workload)
        return direct, min([direct, *times.values()])

    def alpha(self, name: str, workload: Workload) -> float | None:
        """How much longer the sparse kernel ``name`` takes for a multiply-add than the direct dense one: geometric mean
        over ALPHA_DENSITIES. None where the kernel cannot run the layer or was not measured."""
        options = {k.name: k for k in applicable(workload)}
        single = next((k for k in options.values() if k.rows == 1), None)  # of layers that have no blocks, or no CSR
        kernel = options.get(name) or (single if name.startswith(("bsr", "csr")) else None)
        if kernel is None or not self.knows(kernel, workload) or not self.knows(options["dense"], workload):
            return None
        direct = self.dense_seconds(workload)[0]
        logs = [math.log(self.seconds(kernel, x, workload) / (x * direct)) for x in ALPHA_DENSITIES]
        return math.exp(sum(logs) / len(logs))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class _Curve:
    """A kernel on one shape. ``values``: logarithms of (stored, measured / modelled), ascending."""

    place: tuple[float, ...]
    values: tuple[tuple[float, float], ...]

    def ratio(self, at: float) -> float:
        return _between(self.values, at)


def _between(values: Sequence[tuple[float, float]], x: float) -> float:
    """Piecewise linear; beyond the ends the value of the end."""
    i = bisect.bisect_left(values, (x, -math.inf))
    if i == 0 or i == len(values):
        return values[min(i, len(values) - 1)][1]
    (a, y), (b, z) = values[i - 1], values[i]
    return y + (z - y) * (x - a) / (b - a)


def _seen(kernel: Kernel, workload: Workload) -> Workload:
    """The shape that counts: Winograd kernels see phase planes."""
    return workload.winograd_view if isinstance(workload, ConvWorkload) and outputs(kernel, workload) else workload


def _place(workload: Workload) -> tuple[float, ...]:
    """Where a shape lies: binary logarithms of output positions, input channels, output channels, taps, stride and dilation.
    Kernel size counts twice: 1x1 and 3x3 layers read their input in different ways."""
    if isinstance(workload, DenseWorkload):
        return math.log2(workload.m), math.log2(workload.k), math.log2(workload.n), 0.0, 0.0, 0.0
    w = workload
    positions = w.n * w.out_h * w.out_w
    taps = 2 * math.log2(w.kh * w.kw)
    shape = math.log2(positions), math.log2(w.c // w.groups), math.log2(w.k // w.groups)
    return *shape, taps, math.log2(w.strides[0] * w.strides[1]), math.log2(w.dilation[0] * w.dilation[1])


def family(kernel: Kernel, workload: Workload, interleave: int = 1) -> str:
    """What shares code: Winograd kernels are the same whether the weights came as pixels or as positions; kernels with
    images in the lanes of a vector are others."""
    m = outputs(kernel, workload)
    name = f"{'csr' if kernel.rows else 'dense'}_winograd{m}" if m else f"{kernel.name}_{kernel.op}"
    return f"{name}_interleaved" if interleave > 1 else name


# ---- which file ----------------------------------------------------------------------------------------------------


def host_cpuid() -> str:
    """Vendor, family and model of this machine's processor, ``AuthenticAMD-25-17``; empty where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    first = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    values = {name.strip(): value.strip() for name, value in first.items()}
    names = ("vendor_id", "cpu family", "model")
    return "-".join(values[n] for n in names) if all(values.get(n) for n in names) else ""


def for_target(given: str | None, folders: Sequence[Path], cpu: str) -> Calibration | None:
    """The table to compile for LLVM's ``cpu`` with: the file ``given``; ``none`` for the built-in model; by default that of
    the first of ``folders`` (tuning logs) that has one. Raises InvalidOption."""
    if given == "none":
        return None
    if given is not None:
        table = Calibration.load(Path(given))
        if table.cpu != cpu:
            raise InvalidOption(
                f"calibration '{given}' is of {table.cpu}, the target is {cpu}; leave it out or give none"
            )
        return table
    path = next((p for p in (folder / cpu / FILE for folder in folders) if p.is_file()), None)
    return Calibration.load(path) if path is not None else None


def for_host(folders: Sequence[Path] = (SHIPPED,)) -> Calibration | None:
    """The table of a machine with this one's processor. Raises InvalidOption."""
    mine = host_cpuid()
    for path in sorted(p for folder in folders for p in folder.glob(f"*/{FILE}")):
        table = Calibration.load(path)
        if mine and table.cpuid == mine:
            return table
    return None
