"""Max and average pooling of interleaved images, for a band of rows; taps outside of the image do not count.

A vector is one pixel of one channel of as many images as fill it, so that no tap is misaligned and no lane is lost; what
costs is reading lines. Columns of pixels are combined first and shared by windows that are neighbours in a row. A block of
channels is computed for all rows of the band before the next one, and is so small that what neighbouring windows share
stays in L1 and what neighbouring rows share in L2.

Measured on Zen 4, one thread, in bands, batch 16: 3x3 stride 2 of ResNet-50 on 64x112x112 takes 1.4 ms, 45 GB/s read and
written, 0.6 of what the last-level cache gives (80 GB/s read, 54 written); 3x3 stride 1 of GoogLeNet on 512x13x13 0.36 ms,
31 GB/s, 0.48 of it, since each line is read for three rows, from L2 at best.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

from tvm.script.ir_builder import tirx as B

from ..errors import InternalError
from ..layout import Layout
from ..workload import PoolWorkload
from .emit import Expr, broadcast, fetch, parallel, vector, write
from .interleaved import Band, kernel
from .pointwise import Slot

TAPS = 64  # a window is straight-line code
TOGETHER = 4  # windows of stride 1, whose columns are combined once for all of them
SHARED = 24 << 10  # bytes of the source that windows which are neighbours share: of a block of channels, in L1

Tap = tuple[Expr, Expr]  # inside of the image (None: certainly, or it changes nothing), and where


def can_pool(workload: PoolWorkload) -> bool:
    """Whether ``emit_pool`` has a kernel."""
    return workload.kernel[0] * workload.kernel[1] <= TAPS


def emit_pool(workload: PoolWorkload, src: Slot, dst: Slot) -> Any:
    """PrimFunc(src f32[src.size], band, dst f32[dst.size]); the band as in ``interleaved.Band``.

    Raises InternalError for windows that are too large, or for tensors of different images or channels.
    """
    s, d = src.layout, dst.layout
    if not can_pool(workload) or s.interleave != d.interleave or (s.n, s.c) != (d.n, d.c):
        raise InternalError(f"no interleaved kernel for {workload} from {s} to {d}")

    def body(source: Expr, out: Expr, band: Band) -> None:
        _Pool(workload, src, dst, source, out, band).emit()

    return kernel((("src", src.size), ("dst", dst.size)), body, banded=(src, dst))


def _touch_all(workload: PoolWorkload, s: Layout, d: Layout) -> bool:
    """Whether every window has a tap inside of the image."""
    (top, left, _, _), (sy, sx), (kh, kw) = workload.padding, workload.strides, workload.kernel
    return kh > top and kw > left and (d.h - 1) * sy - top < s.h and (d.w - 1) * sx - left < s.w


class _Pool:
    """Emits one kernel; ``source`` and ``out`` are its buffers."""

    def __init__(self, workload: PoolWorkload, src: Slot, dst: Slot, source: Expr, out: Expr, band: Band) -> None:
        self.workload, self.src, self.dst, self.source, self.out, self.band = workload, src, dst, source, out, band
        self.lanes = dst.layout.interleave
        self.largest = workload.kind == "max"
        # Without gaps between taps, the pixel inside that is nearest to a tap outside is another tap: it changes no maximum.
        self.repeat = self.largest and workload.dilation == (1, 1) and _touch_all(workload, src.layout, dst.layout)
        self.together = TOGETHER if workload.strides[1] == 1 else 1
        reach = workload.kernel[0] * (self.together + workload.kernel[1] - 1)
        self.block = max(1, SHARED // (4 * self.lanes * reach))

    def emit(self) -> None:
        c, d, band = self.src.layout.c, self.dst.layout, self.band
        blocks = -(-c // self.block)
        with parallel(band.rows * blocks, d) as i:
            self.n, self.y = band.row(B.floormod(i, band.rows))
            self.first = B.bind(B.floordiv(i, band.rows) * self.block)
            self.count = B.bind(B.min(c - self.first, self.block)) if blocks > 1 else c
            self.rows, self.high = self.axis(self.y, 0)
            self._row()

    def _row(self) -> None:
        """Columns from ``begin`` to ``end`` have windows whose columns are all inside of the image."""
        workload, width, together = self.workload, self.dst.layout.w, self.together
        left, stride = workload.padding[1], workload.strides[1]
        last = self.src.layout.w - 1 - (workload.kernel[1] - 1) * workload.dilation[1] + left
        begin = min(-(-left // stride), width)
        end = max(begin, min(width, last // stride + 1))
        for low, high in ((0, begin), (end, width)):
            if low < high:
                with B.serial(0, high - low) as x:
                    self._border(B.bind(low + x))
        if end - begin >= together:
            with B.serial(0, (end - begin) // together) as x:
                self._interior(B.bind(begin + x * together), together)
        if rest := (end - begin) % together:
            self._interior(B.int32(end - rest), rest)

    def axis(self, o: Expr, k: int) -> tuple[list[Tap], Expr]:
        """The taps of window ``o`` along axis ``k``, moved inside of the image, and how many count in a mean."""
        workload, size = self.workload, (self.src.layout.h, self.src.layout.w)[k]
        before, after = workload.padding[k], workload.padding[k + 2]
        at = [B.bind(o * workload.strides[k] + (t * workload.dilation[k] - before)) for t in range(workload.kernel[k])]
        inside = [B.bind(B.And(p >= 0, p < size)) for p in at]
        low, high = (-before, size + after) if workload.count_include_pad else (0, size)
        count: Any = B.int32(0)
        for p in at:
            count = count + B.Select(B.And(p >= low, p < high), B.int32(1), B.int32(0))
        return [(i, B.max(B.min(p, size - 1), 0)) for i, p in zip(inside, at, strict=True)], B.max(count, 1)

    def _at(self, y: Expr, x: Expr) -> Expr:
        return B.bind(self.src.at(self.first, self.n, y, x) + self.band.shift(0))

    def _border(self, x: Expr) -> None:
        columns, wide = self.axis(x, 1)
        taps = [
            [(None if self.repeat else B.bind(B.And(i, j)), self._at(ty, tx)) for i, ty in self.rows]
            for j, tx in columns
        ]
        self._windows(x, taps, [range(len(columns))], wide)

    def _interior(self, x: Expr, pixels: int) -> None:
        """A row needs one address: the columns lie at constant distances from it."""
        workload = self.workload
        stride, dilation, kernel = workload.strides[1], workload.dilation[1], range(workload.kernel[1])
        origin = x * stride - workload.padding[1]
        rows = [(None if self.repeat else i, self._at(ty, origin)) for i, ty in self.rows]
        reached = sorted({k * stride + t * dilation for k in range(pixels) for t in kernel})
        columns = [[(i, at + column * self.src.layout.x_pitch) for i, at in rows] for column in reached]
        mine = [[reached.index(k * stride + t * dilation) for t in kernel] for k in range(pixels)]
        self._windows(x, columns, mine, len(kernel))

    def _combine(self, values: Sequence[Expr]) -> Expr:
        return functools.reduce(B.max if self.largest else operator.add, values)

    def _windows(self, x: Expr, columns: Sequence[Sequence[Tap]], windows: Sequence[Sequence[int]], wide: Expr) -> None:
        """The pixels from column ``x`` on; ``columns``: their taps, row by row; ``windows``: of each pixel, which columns.
        The last columns, which the windows after these read first, are fetched for them."""
        s, lanes = self.src.layout, self.lanes
        nothing = broadcast(B.float32(float("-inf") if self.largest else 0), lanes)
        scale = None if self.largest else B.bind(B.float32(1) / B.Cast("float32", self.high * wide))
        step = len(windows) * self.workload.strides[1]
        with B.serial(0, self.count) as c:
            made = []
            for k, column in enumerate(columns):
                values = []
                for inside, at in column:
                    if k >= len(columns) - step:
                        fetch(self.source, at + (c * s.c_pitch + step * s.x_pitch))
                    value = vector(self.source, at + c * s.c_pitch, lanes)
                    values.append(value if inside is None else B.Select(inside, value, nothing))
                made.append(B.bind(self._combine(values)))
            for k, mine in enumerate(windows):
                total = self._combine([made[t] for t in mine])
                mean = total if self.largest else total * broadcast(scale, lanes)
                to = self.dst.at(self.first + c, self.n, self.y, x + k) + self.band.shift(-1)
                write(self.out, mean, to, self.dst.layout, lanes)
