"""A layer about to become a kernel: everything that its code and constants depend on, except the knobs.

Lowering, the tuner and the lookup in a tuning log all see a layer as a site: they ask for its knob space, its default
knobs, and for the kernel under given knobs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..layout import Halo, Space, interleaved, plane
from ..target import CpuTarget
from ..workload import ConvWorkload, DenseWorkload
from . import conv2d, dense, fc_knobs, gather_gemm, sell, unrolled, unrolled_knobs, winograd
from . import knobs as model
from . import winograd_conv2d as wino
from .aligned import Copies
from .fc_knobs import FcKnobs, FcSpace
from .gather_gemm import Knobs
from .knobs import ConvSpace
from .pointwise import Instr, Program, Slot
from .winograd import WinogradKnobs

F32 = npt.NDArray[np.float32]
AnyKnobs = Knobs | FcKnobs | WinogradKnobs


@dataclass(frozen=True, eq=False)
class Built:
    """``emit`` makes the PrimFunc, whose parameters are the source, ``constants``, f32[k] for each channel operand of the
    epilogue, the residuals, the output, and scratch of ``workspace`` floats if that is not 0, all flat. ``key``: equal for
    kernels of equal code."""

    name: str
    key: Any
    constants: tuple[npt.NDArray[Any], ...]
    stored_bytes: int
    emit: Callable[[], Any]
    workspace: int = 0


@dataclass(frozen=True)
class Call:
    """One of the calls that compute a layer. ``band``: the argument of ``interleaved.Band`` (None: as built, all rows);
    ``reads``: [begin, end) of the floats of the source that the layer before has just written."""

    band: tuple[int, ...] | None
    reads: tuple[int, int]


@dataclass(frozen=True, eq=False, kw_only=True)
class Site(ABC):
    """``kernel``: a row of ``KERNELS`` (dense, csr, bsr4, ...); ``stored``: fraction of the blocks of its R output channels
    that hold a nonzero; ``layer``: name of the layer."""

    kernel: str
    stored: float
    workload: ConvWorkload | DenseWorkload
    weight: F32
    epilogue: Program = field(default_factory=Program)
    layer: str = ""

    @property
    @abstractmethod
    def name(self) -> str:
        """Of the kernel in tuning logs."""

    @property
    @abstractmethod
    def layout(self) -> str:
        """What of the layouts the code depends on."""

    @property
    @abstractmethod
    def rows_first(self) -> F32:
        """The weight, output channels first."""

    @abstractmethod
    def default(self, target: CpuTarget) -> Any:
        """Knobs without a measurement."""

    @abstractmethod
    def space(self, target: CpuTarget, threads: int = 1) -> Iterable[Any]:
        """Legal knobs of this site, those of ``default`` first."""

    @abstractmethod
    def adapt(self, knobs: Any, target: CpuTarget, threads: int = 1) -> AnyKnobs | None:
        """``knobs`` of the right class, tuned for ``threads`` on a layer like this one, with the parallel pieces of this
        one; None where they are not legal for it."""

    @abstractmethod
    def build(self, knobs: AnyKnobs, target: CpuTarget) -> Built:
        """The kernel."""

    @abstractmethod
    def sizes(self) -> tuple[int, tuple[int, ...], int]:
        """Floats of source, residuals and output."""

    @abstractmethod
    def calls(self) -> tuple[Call, ...]:
        """The calls that compute the layer in a network, in order."""

    @abstractmethod
    def written(self) -> int:
        """Different floats of the output that ``calls`` write, not counting padding."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PlacedSite(Site):
    """A convolution between places in buffers. ``tensors``: residuals; ``bands``: its calls where it runs band by band."""

    workload: ConvWorkload
    src: Slot
    dst: Slot
    tensors: tuple[Slot, ...] = ()
    bands: tuple[Call, ...] = ()

    @property
    def layout(self) -> str:
        """Pitches, gaps, residuals, rows of a band, and whether the output goes past the caches."""
        s, d = self.src.layout, self.dst.layout
        parts = [d.interleave, s.row_pitch, s.c_pitch, d.c_pitch, d.positions, int(d.zero_halo), len(self.tensors)]
        rows = max((call.band[1] for call in self.bands if call.band), default=0)
        return "/".join(map(str, [*parts, *([f"rows{rows}"] if rows else []), *(["streamed"] if d.streamed else [])]))

    @property
    def rows_first(self) -> F32:
        return self.weight

    def sizes(self) -> tuple[int, tuple[int, ...], int]:
        return self.src.size, tuple(t.size for t in self.tensors), self.dst.size

    def calls(self) -> tuple[Call, ...]:
        return self.bands or (Call(None, (0, self.src.size)),)

    def written(self) -> int:
        lay, rows = self.dst.layout, set()
        for call in self.bands if lay.window else ():
            assert call.band is not None
            image, row = divmod(call.band[0], lay.h)
            at = image * (lay.n_pitch // lay.row_pitch) + row + call.band[-1]
            rows |= set(range(at, at + call.band[1]))
        return len(rows) * lay.w * self.workload.k * lay.interleave if rows else math.prod(self.workload.out_shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class ConvSite(PlacedSite):
    """``rows``: R of the kernel; ``channels``: where each input channel lies in ``src`` (None: in order)."""

    rows: int
    channels: Sequence[int] | None = None
    op: str = "conv2d"

    @property
    def name(self) -> str:
        return f"{self.kernel}_conv2d"

    def default(self, target: CpuTarget) -> Knobs:
        looped = self.looped(target)
        return unrolled_knobs.choose(looped, self.straight(target), lambda knobs: self.cycles(knobs, target))

    def cycles(self, knobs: Knobs, target: CpuTarget) -> float:
        """What the model expects of the layer."""
        wl, src, dst, stored, taps = self.workload, self.src, self.dst, self.stored, self.taps
        if knobs.unrolled:
            fused = unrolled.fused(self.epilogue) is not None
            return unrolled_knobs.cycles(wl, knobs, src, dst, target, taps, stored, len(self.calls()), fused)
        rows = model.rows_of(dst)
        copied = self.copies(knobs.vectors, knobs.lanes) if knobs.aligned else None
        loop = model.cycles(wl, knobs, src, dst, target, taps, stored, copies=copied) * wl.k / knobs.rows * rows
        weights = stored * wl.k * wl.c / wl.groups * len(taps) * (4 if knobs.dense else 4 + 4 / knobs.rows)
        touched = model.footprint(wl, knobs, src, taps, copied) * wl.groups
        runs = rows * unrolled_knobs.tiles(knobs, dst)
        return loop + unrolled_knobs.streaming(weights, touched, runs, len(self.calls()), target)

    def looped(self, target: CpuTarget) -> Knobs:
        """The default of kernels that loop over columns."""
        rows = 8 if self.kernel == "dense" else self.rows
        return conv2d.default_knobs(
            self.workload, rows, self.kernel == "dense", self.src, self.dst, target, self.stored
        )

    def space(self, target: CpuTarget, threads: int = 1) -> ConvSpace:
        loops = model.conv_space(self.workload, self.dst, self.looped(target), target, threads, self.copies)
        if self.kernel != "csr":
            return loops
        return dataclasses.replace(loops, start=self.default(target), unrolled=self.straight(target))

    def straight(self, target: CpuTarget) -> tuple[Knobs, ...]:
        """Legal knobs of straight code."""
        if self.kernel != "csr":
            return ()
        return unrolled_knobs.space(self.workload, self.src, self.dst, target, self.taps)

    @property
    def taps(self) -> list[model.Tap]:
        return conv2d.taps(self.workload, interleaved=self.dst.layout.interleave > 1)

    def adapt(self, knobs: Any, target: CpuTarget, threads: int = 1) -> Knobs | None:
        assert isinstance(knobs, Knobs)
        wl, default = self.workload, self.looped(target)
        if knobs.unrolled:
            return unrolled_knobs.fit(knobs, wl, self.src, self.dst, target) if self.kernel == "csr" else None
        knobs = dataclasses.replace(knobs, chunks=default.chunks)
        if (knobs.dense, knobs.across) != (default.dense, default.across):
            return None
        if knobs.across:
            return knobs if model.across_fits(knobs.rows, knobs.vectors, wl.k // wl.groups) else None
        if not model.fits(knobs.rows, knobs.vectors, knobs.lanes, target):
            return None
        if not knobs.dense and knobs.rows != default.rows:
            return None
        if knobs.aligned:
            if not model.copies_fit(knobs, self.copies(knobs.vectors, knobs.lanes), target):
                return None
            chunks = model.aligned_chunks(knobs, self.dst.layout.positions, wl.k // knobs.rows, threads)
            return dataclasses.replace(knobs, chunks=chunks)
        return None if self.dst.layout.interleave > 1 and knobs.lanes != default.lanes else knobs

    def copies(self, vectors: int, lanes: int) -> Copies | None:
        """What aligned knobs copy; None where taps are aligned anyway, or loads are few, or channels not in order."""
        wl = self.workload
        interleaved = self.dst.layout.interleave > 1
        if self.rows != 1 or self.kernel == "dense" or interleaved or self.channels is not None or wl.kh * wl.kw == 1:
            return None
        return conv2d.copies(wl, self.src, vectors, lanes)

    def build(self, knobs: AnyKnobs, target: CpuTarget) -> Built:
        assert isinstance(knobs, Knobs)
        kernel = conv2d.build(
            self.workload, self.weight, self.src, self.dst, knobs,
            epilogue=self.epilogue, tensors=self.tensors, channels=self.channels,
        )  # fmt: skip
        gemm = kernel.gemm
        fmt = "dense" if knobs.dense else "csr" if knobs.rows == 1 or knobs.unrolled else "bsr"
        form = "unrolled_" if knobs.unrolled else ""
        name = f"f32_{fmt}_{self.op}_{form}{knobs.rows}x{knobs.vectors * knobs.lanes}_{target.isa}"
        return Built(name, gemm, kernel.constants, kernel.stored_bytes, lambda: gather_gemm.emit(gemm))


@dataclass(frozen=True, eq=False, kw_only=True)
class FcSite(Site):
    """A fully connected layer of few rows; ``weight`` f32[k, n]; ``residuals``: tensors that the epilogue adds."""

    workload: DenseWorkload
    residuals: int = 0

    @property
    def name(self) -> str:
        return f"{self.kernel}_fc"

    @property
    def layout(self) -> str:
        return str(self.residuals)

    @property
    def rows_first(self) -> F32:
        return self.weight.T

    def default(self, target: CpuTarget) -> FcKnobs:
        return fc_knobs.default(self.workload, self.kernel, target, self.stored)

    def space(self, target: CpuTarget, threads: int = 1) -> FcSpace:
        return fc_knobs.space(self.workload, self.default(target), self.kernel, target, threads)

    def adapt(self, knobs: Any, target: CpuTarget, threads: int = 1) -> FcKnobs | None:
        assert isinstance(knobs, FcKnobs)
        if self.kernel == "sell" and knobs.window not in fc_knobs.windows(self.workload, target):
            return None
        return dataclasses.replace(knobs, chunks=self.default(target).chunks)

    def build(self, knobs: AnyKnobs, target: CpuTarget) -> Built:
        assert isinstance(knobs, FcKnobs)
        make = dense.build if self.kernel == "dense" else sell.build
        kernel = make(self.workload, self.weight, self.epilogue, self.residuals, target, knobs)
        return Built(kernel.name, kernel.key, kernel.constants, kernel.stored_bytes, kernel.emit)

    def sizes(self) -> tuple[int, tuple[int, ...], int]:
        wl = self.workload
        return wl.m * wl.k, (wl.m * wl.n,) * self.residuals, wl.m * wl.n

    def calls(self) -> tuple[Call, ...]:
        return (Call(None, (0, self.workload.m * self.workload.k)),)

    def written(self) -> int:
        return self.workload.m * self.workload.n


@dataclass(frozen=True, eq=False, kw_only=True)
class WinogradSite(PlacedSite):
    """A convolution by F(m x m, r x r); ``kernel``: dense or csr; ``weight`` f32[k, c / groups, t, t] of its positions, of
    which ``stored`` are not zero."""

    m: int

    @property
    def name(self) -> str:
        return f"{self.kernel}_winograd{self.m}"

    def default(self, target: CpuTarget) -> WinogradKnobs:
        images = self.dst.layout.interleave
        return wino.default_knobs(self.workload, self.m, self.kernel == "dense", target, self.stored, images=images)

    def space(self, target: CpuTarget, threads: int = 1) -> Sequence[WinogradKnobs]:
        return wino.space(self.workload, self.m, self.default(target), target, images=self.dst.layout.interleave)

    def adapt(self, knobs: Any, target: CpuTarget, threads: int = 1) -> WinogradKnobs | None:
        assert isinstance(knobs, WinogradKnobs)
        return knobs if knobs in self.space(target, threads) else None

    def build(self, knobs: AnyKnobs, target: CpuTarget) -> Built:
        assert isinstance(knobs, WinogradKnobs)
        kernel = wino.build(
            self.workload, self.weight, self.src, self.dst, self.m, knobs, epilogue=self.epilogue, tensors=self.tensors
        )
        gemm = kernel.gemm
        fmt = "dense" if knobs.dense else "csr" if knobs.rows == 1 else "bsr"
        name = f"f32_{fmt}_winograd{self.m}_conv2d_{knobs.rows}x{knobs.together * knobs.lanes}_{target.isa}"
        make = lambda: winograd.emit(gemm, target)
        return Built(name, gemm, kernel.constants, kernel.stored_bytes, make, gemm.workspace)


# ---- versions ----------------------------------------------------------------------------------------------------

LATER = ("aligned", "unrolled")  # knobs that came after records: those of kernels without them stay valid


@cache
def version(name: str, target: CpuTarget) -> str:
    """What tells records of one state of the kernel ``name`` (see ``Site.name``) from those of another: a hash of the
    code and encoding of a few small layers, and of the knobs' names. Refactoring does not change it."""
    kernel, _, op = name.rpartition("_")
    digest = hashlib.sha256()
    for site, changes in _samples(kernel, op, target):
        default: Any = site.default(target)
        knobs = dataclasses.replace(default, **changes)
        built = site.build(knobs, target)
        values = {name: v for name, v in dataclasses.asdict(knobs).items() if v or name not in LATER}
        digest.update(f"{type(knobs).__name__}{values}{built.emit().script()}".encode())
        for array in built.constants:
            digest.update(array.tobytes())
    return digest.hexdigest()[:12]


def _samples(kernel: str, op: str, target: CpuTarget) -> list[tuple[Site, dict[str, int]]]:
    rng = np.random.default_rng(0)
    relu = Program((Instr("add", ("t0", "c0")), Instr("nn.relu", ("v0",))), 1, 1)
    if op == "fc":
        weight = (rng.standard_normal((40, 40)) * (rng.random((40, 40)) < 0.3)).astype(np.float32)
        fc = FcSite(kernel=kernel, stored=0.3, workload=DenseWorkload(1, 40, 40), weight=weight, epilogue=relu)
        return [(fc, {}), (fc, {"ahead": 256})]
    wl = ConvWorkload(1, 4, 9, 9, 16, 3, 3, padding=(1, 1, 1, 1))
    rows = int(kernel.removeprefix("bsr")) if kernel.startswith("bsr") else 1
    keep = np.repeat(rng.random((wl.k // rows, 4, 3, 3)) < 0.3, rows, axis=0)
    weight = (rng.standard_normal(wl.weight_shape) * keep).astype(np.float32)
    halo, space = Halo(1, 1, 1, 1), Space(10, 10)
    src, dst = plane(1, wl.c, 9, 9, space, halo), plane(1, wl.k, 9, 9, space, halo)
    slots = Slot(src, src.size), Slot(dst, dst.size)
    if op.startswith("winograd"):
        shape = (wl.k, wl.c, int(op[-1]) + 2, int(op[-1]) + 2)
        u: F32 = (rng.standard_normal(shape) * (rng.random(shape) < 0.3)).astype(np.float32)
        batch = dataclasses.replace(wl, n=target.lanes)
        src, dst = (interleaved(target.lanes, c, 9, 9, halo, target.lanes) for c in (wl.c, wl.k))
        mixed = Slot(src, src.size), Slot(dst, dst.size)
        common: dict[str, Any] = {"kernel": kernel, "stored": 0.3, "weight": u, "epilogue": relu, "m": int(op[-1])}
        return [(WinogradSite(workload=w, src=s, dst=d, **common), {}) for w, (s, d) in ((wl, slots), (batch, mixed))]
    conv = ConvSite(
        kernel=kernel, rows=rows, stored=0.3, workload=wl, weight=weight, src=slots[0], dst=slots[1], epilogue=relu
    )
    looped = dataclasses.asdict(conv.looped(target))
    samples: list[tuple[Site, dict[str, int]]] = [
        (conv, looped),
        (conv, looped if kernel == "dense" else looped | {"channel_block": 2}),
    ]
    if kernel == "csr":
        samples.append((conv, looped | {"channel_block": 2, "aligned": True}))
        straight = [dataclasses.asdict(k) for k in conv.straight(target)[:1]]
        samples += [(conv, knobs | block) for knobs in straight for block in ({}, {"channel_block": 2})]
    return samples
