"""Measures the table of ``calibration.py``: every kernel on a grid of shapes and densities, and the machine's rates.

A sample is a single call as in the middle of a network: the input has just been written, the weights have left the caches
since the last run. Those of fully connected layers have left all of them: with warm weights such layers would look dense
that are bound by memory in every network which does not fit the cache as a whole (AlexNet's last layer: 9% of the network).
Those of convolutions, few beside their work, have left the second level, as when the tuner measures. Layers of interleaved
images run band after band instead (``relay_passes/bands.py``): there, a sample is a call that follows another one of the
same kernel.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..bench.machine import cpu_model, peak_gflops, read_gbs, versions
from ..calibration import Calibration, Point, family, host_cpuid
from ..errors import OutputExists, SkimError
from ..kernels import Kernel, applicable
from ..layout import Halo, Space, interleaved, plane
from ..schedules import conv2d
from ..schedules.pointwise import Instr, Program, Slot
from ..schedules.sites import ConvSite, FcSite, Site, WinogradSite, version
from ..target import CpuTarget, resolve
from ..tvm_runtime import import_compiler, with_threads
from ..workload import ConvWorkload, DenseWorkload, WinogradWorkload
from .log import now
from .worker import Bench, Candidate, Here, Options

Workload = ConvWorkload | DenseWorkload
BIAS_RELU = Program((Instr("add", ("t0", "c0")), Instr("nn.relu", ("v0",))), 1, 1)
DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 1.0)
EVICTED = 64 << 20  # bytes read between two calls of fully connected layers
SIZES = (1 << 18, 1 << 22, 1 << 24, 1 << 26, 1 << 28)  # bytes that are read


def _conv(
    c: int, k: int, size: int, taps: int, rows: int = 0, *, stride: int = 1, dilation: int = 1, groups: int = 1
) -> ConvWorkload:
    """``rows``: of the image, if it is not square."""
    pad = taps // 2 * dilation
    return ConvWorkload(
        1, c, rows or size, size, k, taps, taps, (stride,) * 2, (pad,) * 4, dilation=(dilation,) * 2, groups=groups
    )


@dataclass(frozen=True)
class Grid:
    """``shapes`` at ``densities`` (the fraction of R x 1 blocks for block kernels); a kernel gives ``rounds`` samples.
    ``interleaved``: shapes, but for the batch, of layers with images in the lanes of a vector, at ``coarse`` densities."""

    shapes: tuple[Workload, ...]
    densities: tuple[float, ...] = DENSITIES
    sizes: tuple[int, ...] = SIZES
    rounds: int = 21
    interleaved: tuple[ConvWorkload, ...] = ()
    coarse: tuple[float, ...] = (0.05, 0.2, 0.6)


FULL = Grid(
    (
        *(_conv(c, c, size, 3) for c, size in ((64, 56), (128, 28), (256, 14), (512, 7), (16, 28))),
        *(_conv(c, k, size, 1) for c, k, size in ((64, 256, 56), (256, 64, 56), (128, 512, 28), (256, 1024, 14))),
        *(_conv(c, k, size, 1) for c, k, size in ((1024, 256, 14), (512, 2048, 7), (2048, 512, 7), (32, 64, 14))),
        *(_conv(c, k, size, 5) for c, k, size in ((48, 128, 27), (32, 96, 14), (48, 128, 7))),
        *(_conv(c, c, size, 3, stride=2) for c, size in ((128, 56), (512, 14))),
        *(_conv(c, k, size, 1, stride=2) for c, k, size in ((256, 512, 56), (1024, 2048, 14))),
        _conv(3, 64, 224, 7, stride=2),
        *(_conv(c, c, size, 3, dilation=2) for c, size in ((128, 28), (256, 14))),
        *(_conv(c, c, size, 3, groups=c) for c, size in ((96, 56), (512, 14))),
        _conv(144, 144, 56, 3, stride=2, groups=144),
        *(DenseWorkload(1, k, n) for k, n in ((256, 128), (512, 512), (1024, 1000), (2048, 1000), (4096, 4096))),
        *(DenseWorkload(m, 1024, 1000) for m in (2, 4, 16)),
    ),
    # As many rows as a band may have: layers take turns band by band, so that larger images are in cache, too.
    interleaved=(
        *(_conv(c, c, size, 3, rows) for c, size, rows in ((64, 56, 8), (128, 28, 12), (256, 14, 14), (512, 7, 7))),
        *(_conv(c, k, size, 1, rows) for c, k, size, rows in ((64, 256, 56, 4), (256, 64, 56, 4), (256, 1024, 14, 14))),
        *(_conv(c, k, size, 1) for c, k, size in ((1024, 256, 14), (512, 2048, 7))),
        _conv(32, 96, 14, 5),
        ConvWorkload(1, 3, 32, 224, 64, 7, 7, (2, 2), (3, 3, 3, 3)),
    ),
)
# Enough for every kernel to be known, in seconds: for a look, and for tests.
QUICK = Grid(
    (_conv(16, 16, 14, 3), _conv(32, 32, 14, 1), DenseWorkload(1, 256, 128)),
    (0.1, 0.5), (1 << 18, 1 << 24), 5, (_conv(16, 16, 8, 3),), (0.1, 0.5),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """``kernel`` on ``workload`` at ``density`` of its blocks (1 for dense kernels); ``interleave``: images in a vector."""

    kernel: Kernel
    workload: Workload
    density: float
    interleave: int = 1


def cases(workload: Workload, densities: Sequence[float], interleave: int = 1) -> Iterator[Case]:
    """Every kernel that can run a layer of this shape, the direct dense one first. A convolution stands for the native
    Winograd layer of its shape, too."""
    direct = applicable(workload)
    if isinstance(workload, ConvWorkload) and workload.dilation != (1, 1):  # there, the others run between two copies
        direct = tuple(k for k in direct if not k.winograd)
    for kernel in direct:
        for density in densities if kernel.rows else (1.0,):
            yield Case(kernel, workload, density, interleave)
    for kernel in direct:
        if kernel.winograd and isinstance(workload, ConvWorkload) and workload.strides == (1, 1):
            native = WinogradWorkload(**asdict(workload), m=kernel.winograd)
            sparse = next(k for k in applicable(native) if k.rows)
            for density in densities:
                yield Case(sparse, native, density, interleave)


def site(case: Case) -> tuple[Site, float]:
    """The layer with random weights, bias and ReLU, and its density."""
    kernel, wl, rng = case.kernel, case.workload, np.random.default_rng(0)

    def weights(shape: tuple[int, ...], rows: int) -> np.ndarray:
        """f32 whose first axis is that of output channels."""
        keep = rng.random((-(-shape[0] // rows), *shape[1:]), np.float32) < case.density
        keep.flat[0] = True
        values = rng.standard_normal(shape, np.float32)
        return values * np.repeat(keep, rows, axis=0)[: shape[0]]

    rows = max(1, kernel.rows)
    common: dict[str, Any] = {"kernel": kernel.name, "stored": case.density, "epilogue": BIAS_RELU}
    if isinstance(wl, DenseWorkload) and kernel.op == "fc":
        weight = np.ascontiguousarray(weights((wl.n, wl.k), 1).T)
        return FcSite(workload=wl, weight=weight, **common), _density(weight)
    # A dense layer of many rows runs as a 1x1 convolution over its rows.
    conv = ConvWorkload(1, wl.k, 1, wl.m, wl.n, 1, 1) if isinstance(wl, DenseWorkload) else wl
    halo = conv2d.halo(conv, interleaved=case.interleave > 1)
    if case.interleave > 1:
        src = interleaved(conv.n, conv.c, conv.h, conv.w, halo, case.interleave)
        dst = interleaved(*conv.out_shape, Halo(), case.interleave)
    else:
        phases = conv2d.phases(conv)
        h, w = phases.shape(conv.h, conv.w) if phases else (conv.h, conv.w)
        space = Space(max(w, conv.out_w) + max(halo.left, halo.right), max(h, conv.out_h) + max(halo.top, halo.bottom))
        src = plane(conv.n, conv.c * (len(phases.index) if phases else 1), h, w, space, halo)
        dst = plane(conv.n, conv.k, conv.out_h, conv.out_w, space, halo)
    common |= {"workload": conv, "src": Slot(src, src.size), "dst": Slot(dst, dst.size)}
    m = wl.m if isinstance(wl, WinogradWorkload) else kernel.winograd
    if m:
        view = conv.phase_view
        t = m + view.kh - 1
        weight = weights((conv.k, view.c // view.groups, t, t), rows)
        common["kernel"] = "csr" if kernel.rows else "dense"
        return WinogradSite(m=m, weight=weight, **common), _density(weight)
    weight = weights(conv.weight_shape, rows)
    return ConvSite(rows=rows, weight=weight, **common), _density(weight)


def _density(weight: np.ndarray) -> float:
    return max(float(np.count_nonzero(weight)), 1.0) / weight.size


def calibrate(
    grid: Grid,
    options: Options,
    report: Callable[[str, float], None] = lambda phase, fraction: None,
    kept: Path | None = None,
) -> Calibration:
    """Time the grid on this machine, on one thread. ``options``: as for tuning, without RPC; ``kept``: a file that takes
    each shape as soon as it is measured, and gives back those of an earlier run that was interrupted."""
    tvm, target = import_compiler(), resolve()
    runner = Here(tvm, options, 1)
    names = sorted({family(c.kernel, c.workload) for shape in grid.shapes for c in cases(shape, grid.densities)})
    kernels = {name: version(name, target) for name in names}
    done = Kept(kept, {"cpuid": host_cpuid(), "kernels": kernels, "grid": [*grid.densities, *grid.coarse, grid.rounds]})

    def run() -> tuple[float, list[list[float]], list[Point]]:
        if done.rates is None:
            report("rates of the machine", 0.0)
            with runner.alone():
                peak = 1e9 * peak_gflops(1)
                done.add_rates(peak, [[float(size), 1e9 * read_gbs(1, size)] for size in grid.sizes])
        assert done.rates is not None
        points: list[Point] = []
        batches = [replace(wl, n=target.lanes) for wl in grid.interleaved]
        whole: list[tuple[Workload, int]] = [(wl, 1) for wl in grid.shapes] + [(wl, target.lanes) for wl in batches]
        for i, (workload, interleave) in enumerate(whole):
            if workload not in done.shapes:
                found = list(cases(workload, grid.coarse if interleave > 1 else grid.densities, interleave))
                at = partial(_at, report, i / len(whole))
                done.add(workload, _shape(found, grid.rounds, target, runner, at))
            points += done.shapes[workload]
        return *done.rates, points

    peak, rates, points = with_threads(1, run)
    report("done", 1.0)
    return Calibration(
        target.mcpu, target.isa, cpu_model(), host_cpuid(), peak, tuple((size, rate) for size, rate in rates),
        tuple(points), kernels, {k: v for k, v in versions().items() if k in ("skimtvm", "apache-tvm")}, now(),
    )  # fmt: skip


class Kept:
    """What an unfinished calibration has measured: JSON, a line for what it belongs to (``head``), one for the machine's
    rates, one a shape. A file of another machine, grid or version of the kernels is begun anew; a line that was cut off is
    measured again. Raises OutputExists where the file cannot be written."""

    def __init__(self, path: Path | None, head: dict[str, Any]) -> None:
        self.path = path
        self.rates: tuple[float, list[list[float]]] | None = None
        self.shapes: dict[Workload, list[Point]] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path is not None and path.is_file() else []
        good = 0
        for number, line in enumerate(lines):
            try:
                value = json.loads(line)
                if number == 0 and value != head:
                    break
                if number == 1:
                    self.rates = float(value[0]), [[float(a), float(b)] for a, b in value[1]]
                elif number:
                    points = [Point.from_json(p) for p in value]
                    self.shapes[_shape_of(points)] = points
            except (ValueError, KeyError, TypeError, IndexError, SkimError):
                break
            good = number + 1
        self._write("".join(f"{line}\n" for line in lines[:good] or [json.dumps(head)]), "w")

    def add_rates(self, peak: float, rates: list[list[float]]) -> None:
        self.rates = peak, rates
        self._write(json.dumps([peak, rates]) + "\n", "a")

    def add(self, workload: Workload, points: list[Point]) -> None:
        self.shapes[workload] = points
        self._write(json.dumps([p.to_json() for p in points]) + "\n", "a")

    def _write(self, text: str, mode: str) -> None:
        if self.path is None:
            return
        try:
            with self.path.open(mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as e:
            raise OutputExists(f"'{self.path}' cannot be written: {e.strerror}; choose another --output") from None


def _shape_of(points: Sequence[Point]) -> Workload:
    """The shape that ``points`` were measured on: that of the first one, a direct kernel."""
    workload = points[0].workload
    assert not isinstance(workload, WinogradWorkload)
    return workload


def _samples(runner: Here, kernels: Sequence[Candidate], rounds: int, cold: Any) -> list[list[float]]:
    """Seconds of one call of each kernel in each of ``rounds``, the input in the cache. ``cold``: an array that is read
    after another call of the same kernel; None: what that used is there."""
    samples: list[list[float]] = [[] for _ in kernels]
    with runner.alone():
        for kernel in kernels:
            runner.sample(kernel, warm=True)
        for _ in range(rounds):
            for mine, kernel in zip(samples, kernels, strict=True):
                runner.sample(kernel, warm=True)
                if cold is not None:
                    cold.sum()
                    kernel.calls[0][0][0].numpy()
                mine.append(runner.sample(kernel, warm=True))
    return samples


def _at(report: Callable[[str, float], None], done: float, phase: str) -> None:
    report(phase, done)


def _shape(
    all_cases: Sequence[Case], rounds: int, target: CpuTarget, runner: Here, step: Callable[[str], None]
) -> list[Point]:
    """All kernels on one shape: built first, then timed in the same rounds."""
    compiled: dict[Any, Any] = {}
    found: list[tuple[Case, float, str, Bench]] = []
    workload = all_cases[0].workload
    for case in all_cases:
        step(f"{workload}: {case.kernel.name} {case.density:g}")
        layer, density = site(case)
        bench = Bench(layer, target, 1, runner.options, compiled)
        bench.build(0, layer.default(target))
        found.append((case, density, bench.kernels[0].name, bench))
    step(f"{workload}: measure")
    streams = isinstance(workload, DenseWorkload)
    cold = np.ones(EVICTED // 4, np.float32) if streams else runner.cold if all_cases[0].interleave == 1 else None
    samples = _samples(runner, [bench.kernels[0] for *_, bench in found], rounds, cold)
    medians = [statistics.median(s) for s in samples]
    points = []
    for i, (case, density, name, _) in enumerate(found):
        low, high = (float(p) for p in np.percentile(samples[i], (10, 90)))
        point = Point(case.kernel.name, case.kernel.op, case.workload, density, density if case.kernel.rows else 1.0,
                      medians[i], (low, high), len(samples[i]), code=name, interleave=case.interleave)  # fmt: skip
        points.append(replace(point, alpha=medians[i] / density / medians[0]) if case.kernel.rows else point)
    return points
