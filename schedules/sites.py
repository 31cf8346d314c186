"""A layer about to become a kernel: everything that its code and constants depend on, except the knobs.

Lowering, the tuner and the lookup in a tuning log all see a layer as a site: they ask for its knob space, its default
knobs, and for the kernel under given knobs.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..layout import Halo, Space, interleaved, plane
from ..target import CpuTarget
from ..workload import ConvWorkload, DenseWorkload
from . import conv2d, dense, gather_gemm, winograd
from . import knobs as model
from . import winograd_conv2d as wino
from .aligned import Copies
from .dense import FcKnobs
from .gather_gemm import Knobs
from .knobs import ConvSpace, FcSpace
from .pointwise import Instr, Program, Slot
from .winograd import WinogradKnobs

F32 = npt.NDArray[np.float32]
AnyKnobs = Knobs | FcKnobs


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


@dataclass(frozen=True, eq=False)
class ConvSite:
    """``kernel``: a row of ``KERNELS`` (dense, csr, bsr4, ...), ``rows``: its R; ``stored``: fraction of the R x 1 blocks
    that hold a nonzero; ``channels``: where each input channel lies in ``src`` (None: in order)."""

    kernel: str
    rows: int
    stored: float
    workload: ConvWorkload
    weight: F32
    src: Slot
    dst: Slot
    epilogue: Program = field(default_factory=Program)
    tensors: tuple[Slot, ...] = ()
    channels: Sequence[int] | None = None
    op: str = "conv2d"
    layer: str = ""

    @property
    def name(self) -> str:
        """Of the kernel in tuning logs."""
        return f"{self.kernel}_conv2d"

    @property
    def layout(self) -> str:
        """What of the layouts the code depends on: pitches, gaps, residuals."""
        s, d = self.src.layout, self.dst.layout
        parts = [d.interleave, s.row_pitch, s.c_pitch, d.c_pitch, d.positions, int(d.zero_halo), len(self.tensors)]
        return "/".join(map(str, parts))

    def default(self, target: CpuTarget) -> Knobs:
        rows = 8 if self.kernel == "dense" else self.rows
        return conv2d.default_knobs(
            self.workload, rows, self.kernel == "dense", self.src, self.dst, target, self.stored
        )

    def space(self, target: CpuTarget, threads: int = 1) -> ConvSpace:
        """Legal knobs of this site; those of ``default`` are among them."""
        return model.conv_space(self.workload, self.dst, self.default(target), target, threads, self.copies)

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
        fmt = "dense" if knobs.dense else "csr" if knobs.rows == 1 else "bsr"
        name = f"f32_{fmt}_{self.op}_{knobs.rows}x{knobs.vectors * knobs.lanes}_{target.isa}"
        return Built(name, gemm, kernel.constants, kernel.stored_bytes, lambda: gather_gemm.emit(gemm))

    def alone(self) -> ConvSite:
        """The same layer on whole tensors, where it shared windows with others: what can be run by itself."""

        def whole(slot: Slot) -> Slot:
            lay = dataclasses.replace(slot.layout, window=0)
            return Slot(lay, lay.size, slot.channel) if slot.layout.window else slot

        tensors = tuple(whole(t) for t in self.tensors)
        return dataclasses.replace(self, src=whole(self.src), dst=whole(self.dst), tensors=tensors)

    def sizes(self) -> tuple[int, tuple[int, ...], int]:
        """Floats of source, residuals and output."""
        return self.src.size, tuple(t.size for t in self.tensors), self.dst.size


@dataclass(frozen=True, eq=False)
class FcSite:
    """A fully connected layer of few rows; ``weight`` f32[k, n]; ``residuals``: tensors that the epilogue adds."""

    kernel: str
    stored: float
    workload: DenseWorkload
    weight: F32
    epilogue: Program = field(default_factory=Program)
    residuals: int = 0
    layer: str = ""

    @property
    def name(self) -> str:
        return f"{self.kernel}_fc"

    @property
    def layout(self) -> str:
        return str(self.residuals)

    def default(self, target: CpuTarget) -> FcKnobs:
        return model.fc_default(self.workload, self.kernel == "dense", target)

    def space(self, target: CpuTarget, threads: int = 1) -> FcSpace:
        return model.fc_space(self.workload, self.default(target), self.kernel == "dense", target, threads)

    def build(self, knobs: AnyKnobs, target: CpuTarget) -> Built:
        assert isinstance(knobs, FcKnobs)
        kernel = dense.build(self.workload, self.weight, self.kernel, self.epilogue, self.residuals, target, knobs)
        return Built(kernel.name, kernel.key, kernel.constants, kernel.stored_bytes, kernel.emit)

    def alone(self) -> FcSite:
        return self

    def sizes(self) -> tuple[int, tuple[int, ...], int]:
        wl = self.workload
        return wl.m * wl.k, (wl.m * wl.n,) * self.residuals, wl.m * wl.n


@dataclass(frozen=True, eq=False)
class WinogradSite:
    """A convolution by F(m x m, r x r); ``weight`` f32[k, c / groups, t, t] of its positions, of which ``stored`` are not
    zero; ``dense``: store all of them."""

    m: int
    dense: bool
    stored: float
    workload: ConvWorkload
    weight: F32
    src: Slot
    dst: Slot
    epilogue: Program = field(default_factory=Program)
    tensors: tuple[Slot, ...] = ()

    @property
    def name(self) -> str:
        return f"{'dense' if self.dense else 'csr'}_winograd{self.m}"

    def default(self, target: CpuTarget) -> WinogradKnobs:
        images = self.dst.layout.interleave
        return wino.default_knobs(self.workload, self.m, self.dense, target, self.stored, images=images)

    def build(self, knobs: AnyKnobs | WinogradKnobs, target: CpuTarget) -> Built:
        assert isinstance(knobs, WinogradKnobs)
        kernel = wino.build(
            self.workload, self.weight, self.src, self.dst, self.m, knobs, epilogue=self.epilogue, tensors=self.tensors
        )
        gemm = kernel.gemm
        fmt = "dense" if knobs.dense else "csr" if knobs.rows == 1 else "bsr"
        name = f"f32_{fmt}_winograd{self.m}_conv2d_{knobs.rows}x{knobs.together * knobs.lanes}_{target.isa}"
        make = lambda: winograd.emit(gemm, target)
        return Built(name, gemm, kernel.constants, kernel.stored_bytes, make, gemm.workspace)

    def sizes(self) -> tuple[int, tuple[int, ...], int]:
        """Floats of source, residuals and output."""
        return self.src.size, tuple(t.size for t in self.tensors), self.dst.size


Site = ConvSite | FcSite  # what has knobs to tune
AnySite = Site | WinogradSite


# ---- versions ----------------------------------------------------------------------------------------------------

LATER = ("aligned",)  # knobs that came after records: those of kernels without them stay valid


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


def _samples(kernel: str, op: str, target: CpuTarget) -> list[tuple[AnySite, dict[str, int]]]:
    rng = np.random.default_rng(0)
    relu = Program((Instr("add", ("t0", "c0")), Instr("nn.relu", ("v0",))), 1, 1)
    if op == "fc":
        weight = (rng.standard_normal((40, 40)) * (rng.random((40, 40)) < 0.3)).astype(np.float32)
        fc = FcSite(kernel, 0.3, DenseWorkload(1, 40, 40), weight, relu)
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
        sizes = ((wl, slots), (batch, mixed))
        return [(WinogradSite(int(op[-1]), kernel == "dense", 0.3, w, u, *places, relu), {}) for w, places in sizes]
    conv = ConvSite(kernel, rows, 0.3, wl, weight, *slots, relu)
    samples: list[tuple[AnySite, dict[str, int]]] = [
        (conv, {}),
        (conv, {} if kernel == "dense" else {"channel_block": 2}),
    ]
    return samples + ([(conv, {"channel_block": 2, "aligned": True})] if kernel == "csr" else [])
