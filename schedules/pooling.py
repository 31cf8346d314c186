"""Max and average pooling of any kernel, stride, dilation and padding.

Each output row is made in two steps: the rows of its window are reduced into a scratch row with contiguous vectors,
then the scratch row, which carries the padding on both sides, is reduced along x with shifted vectors (stride 1) or
shuffles (stride 2 to 4). Border rows are separate code in which only the taps inside of the image exist, so nothing
ever relies on what the halo of the input holds. Where windows slide by one pixel over planes whose rows lie apart as far
as a window reaches, a block of rows is one run instead, gaps included, and short rows waste no lanes: a vector is reduced
down the rows, and its neighbours left and right come out of registers.

Measured on Zen 4, one thread: 3x3 stride 2 on 64x112x112 takes 0.07-0.08 ms, 50-60 GB/s read and written, of about 100
that one core reads at that size; 3x3 stride 1 as runs 0.012 ms on 512x13x13 and 0.0055 on 832x6x6, row by row 0.032 and
0.033. A copy of the first takes 0.009.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from tvm.script.ir_builder import tirx as B

from ..errors import InternalError
from ..layout import LINE, Layout, round_up
from ..target import CpuTarget
from ..workload import PoolWorkload
from .reduce import emit_global_avg_pool, emit_global_pool
from .rows import Index, View, build, channels_of, fill, load, pick, pieces, splat, store, width_of, zero_halo

__all__ = ["PoolWorkload", "emit_global_avg_pool", "emit_global_pool", "emit_pool"]

SHUFFLE_STEPS = 4
UNROLL_TAPS = 8  # longer windows loop over their taps
# A vector that is loaded across two stores still in flight waits for both. With several scratch rows the stores of a
# row are long done when it is read: twice as fast on 35x35.
ROW_BLOCK = 8
LANES = 8  # also on AVX-512: every unaligned zmm access crosses a cache line, of the ymm accesses only half
RUN = 96  # vectors of a block of a run
STACK = 1023  # bytes; TVM takes larger buffers from a workspace pool
NEG_INF = float("-inf")
Put = Callable[[Index, int, Any], None]  # takes the vector of so many lanes at a position
Scale = tuple[Any, int]  # 1 / counted columns as a buffer, where it varies along the row, and the counted rows


@dataclass(frozen=True)
class _Axis:
    """Windows of one axis: which taps are inside of the data, and how many positions the average counts."""

    size: int
    out: int
    kernel: int
    stride: int
    dilation: int
    before: int
    after: int

    def taps(self, o: int) -> tuple[int, int]:
        """First tap of window ``o`` inside of the data, and the number of them."""
        inside = [t for t in range(self.kernel) if 0 <= o * self.stride + t * self.dilation - self.before < self.size]
        return (inside[0], len(inside)) if inside else (0, 0)

    def counted(self, o: int, include_pad: bool) -> int:
        low, high = (-self.before, self.size + self.after) if include_pad else (0, self.size)
        start = o * self.stride - self.before
        return max(1, sum(low <= start + t * self.dilation < high for t in range(self.kernel)))


def emit_pool(
    workload: PoolWorkload,
    src: Layout,
    dst: Layout,
    *,
    src_size: int,
    dst_size: int,
    src_channel: int = 0,
    dst_channel: int = 0,
    target: CpuTarget,
) -> Any:
    """Pool every channel of ``src`` into ``dst``, whose extents are the output's (ceil mode shows only there).

    PrimFunc(src f32[src_size], dst f32[dst_size]). A window without any pixel gives -inf (max) or 0 (avg).
    Raises InternalError if the layouts differ in N or C or a slice does not fit its buffer.
    """
    if (src.n, src.c) != (dst.n, dst.c):
        raise InternalError(f"pooling cannot turn {src} into {dst}")
    (kh, kw), (sy, sx), (dy, dx) = workload.kernel, workload.strides, workload.dilation
    top, left, bottom, right = workload.padding
    rows = _Axis(src.h, dst.h, kh, sy, dy, top, bottom)
    columns = _Axis(src.w, dst.w, kw, sx, dx, left, right)
    lanes = min(target.lanes, LANES)
    gap = src.row_pitch - src.w if src.row_pitch == dst.row_pitch else 0
    pool = _Pool(workload, rows, columns, lanes)
    if _Runs.serve(pool, gap):
        pool = _Runs(workload, rows, columns, target.lanes, gap)

    def body(x_buffer: Any, y_buffer: Any) -> None:
        x, y = View(src, src_size, src_channel, x_buffer), View(dst, dst_size, dst_channel, y_buffer)
        with channels_of(dst) as (c, n):
            pool.channel(x, y, n, c)
            zero_halo(y, n, c, lanes)

    return build((("src", src_size, "float32"), ("dst", dst_size, "float32")), body)


class _Pool:
    """Emits the body of one (channel, image)."""

    def __init__(self, workload: PoolWorkload, rows: _Axis, columns: _Axis, lanes: int) -> None:
        self.workload, self.rows, self.columns, self.lanes = workload, rows, columns, lanes
        self.is_max = workload.kind == "max"
        self.identity = NEG_INF if self.is_max else 0.0
        reach = (columns.out - 1) * columns.stride + (columns.kernel - 1) * columns.dilation + 1
        # Shuffles load whole groups of vectors, of which the last lanes are not used.
        slack = columns.stride * width_of(columns.out, lanes) if columns.stride > 1 else 0
        self.pitch = round_up(max(columns.before + columns.size, reach) + slack, LINE)
        self.block = max(1, min(ROW_BLOCK, STACK // (4 * self.pitch), rows.out))
        counts = [columns.counted(j, workload.count_include_pad) for j in range(columns.out)]
        self.counts = counts if len(set(counts)) > 1 else counts[:1]

    def combine(self, a: Any, b: Any) -> Any:
        return B.max(a, b) if self.is_max else a + b

    def channel(self, x: View, y: View, n: Index, c: Index) -> None:
        scratch = self.scratch()
        factors = None
        if not self.is_max and len(self.counts) > 1:
            factors = B.alloc_buffer((self.columns.out,), "float32")
            common = max(set(self.counts), key=self.counts.count)
            fill(factors, 0, self.columns.out, self.lanes, 1 / common)
            for j, count in enumerate(self.counts):
                if count != common:
                    store(factors, j, 1, B.float32(1 / count))

        def signature(i: int) -> tuple[int, int, int]:
            counted = 1 if self.is_max else self.rows.counted(i, self.workload.count_include_pad)
            return (*self.rows.taps(i), counted)

        for (first, taps, counted), group in groupby(range(self.rows.out), signature):
            ys = list(group)
            start = first * self.rows.dilation - self.rows.before

            if not taps:
                for i in ys:
                    fill(y.buffer, y.at(n, c, i, 0), self.columns.out, self.lanes, self.identity)
                continue

            def block(i: Index, rows: int, start: int = start, taps: int = taps, counted: int = counted) -> None:
                def source(r: Index) -> Index:
                    return x.at(n, c, (i + r) * self.rows.stride + start, 0)

                self.reduce_rows(scratch, rows, x, source, taps)
                self.reduce_columns(scratch, rows, y, lambda r: y.at(n, c, i + r, 0), (factors, counted))

            whole = len(ys) // self.block
            if whole:
                with B.serial(0, whole) as b:
                    block(b * self.block + ys[0], self.block)
            if len(ys) % self.block:
                block(ys[0] + whole * self.block, len(ys) % self.block)

    def scratch(self) -> Any:
        """Rows with the padding on both sides of where the data goes."""
        scratch = B.alloc_buffer((self.block * self.pitch,), "float32")
        for slot in range(self.block):
            start, pad = slot * self.pitch, self.columns.before + self.columns.size
            fill(scratch, start, self.columns.before, self.lanes, self.identity)
            fill(scratch, start + pad, self.pitch - pad, self.lanes, self.identity)
        return scratch

    def reduce_rows(self, scratch: Any, rows: int, x: View, source: Callable[[Index], Index], taps: int) -> None:
        """The first step, for a block of ``rows``; ``source(r)``: where the highest tap of row r lies in ``x``."""
        with B.serial(0, rows) as r:
            at, to = source(r), r * self.pitch + self.columns.before
            self.vertical(x, at, taps, self.columns.size, lambda j, width, v: store(scratch, to + j, width, v))

    def reduce_columns(self, scratch: Any, rows: int, y: View, result: Callable[[Index], Index], scale: Scale) -> None:
        """The second step; ``result(r)``: where row r begins in ``y``."""
        with B.serial(0, rows) as r:
            self.horizontal(scratch, r * self.pitch, y, result(r), scale)

    def reduce(self, taps: int, width: int, value: Callable[[Index], Any]) -> Any:
        """``value(0)`` combined with ... ``value(taps - 1)``: straight-line code, or a loop for long windows."""
        if taps <= UNROLL_TAPS:
            total = value(0)
            for t in range(1, taps):
                total = self.combine(total, value(t))
            return total
        acc = B.alloc_buffer((width,), "float32")
        store(acc, 0, width, value(0))
        with B.serial(0, taps - 1) as t:
            store(acc, 0, width, self.combine(load(acc, 0, width), value(t + 1)))
        return load(acc, 0, width)

    def vertical(self, x: View, at: Index, taps: int, extent: int, put: Put) -> None:
        """``put`` the taps from ``at`` on combined, for ``extent`` positions."""
        pitch = self.rows.dilation * x.layout.row_pitch

        def piece(j: Index, width: int) -> None:
            put(j, width, self.reduce(taps, width, lambda t: load(x.buffer, at + (j + t * pitch), width)))

        pieces(extent, self.lanes, piece)

    def scaled(self, j: Index, width: int, value: Any, scale: Scale) -> Any:
        """The average of the window of column ``j`` and those behind it, from their sums; a maximum stays."""
        factors, counted = scale
        if self.is_max:
            return value
        if factors is not None:
            value = value * load(factors, j, width)
        total = counted if factors is not None else counted * self.counts[0]
        return value * splat(1 / total, width)

    def horizontal(self, scratch: Any, row: Index, y: View, at: Index, scale: Scale) -> None:
        axis = self.columns

        def finish(j: Index, width: int, value: Any) -> None:
            store(y.buffer, at + j, width, self.scaled(j, width, value, scale))

        def shuffled(j: Index, width: int) -> None:
            groups: dict[int, list[Any]] = {}
            total = None
            for t in range(axis.kernel):
                group, phase = divmod(t * axis.dilation, axis.stride)
                if group not in groups:
                    base = (j + group) * axis.stride
                    groups[group] = [load(scratch, row + (base + k * width), width) for k in range(axis.stride)]
                value = pick(groups[group], width, axis.stride, phase)
                total = value if total is None else self.combine(total, value)
            finish(j, width, total)

        def shifted(j: Index, width: int) -> None:
            def tap(t: Index) -> Any:
                return load(scratch, row + (j + t * axis.dilation), width)

            finish(j, width, self.reduce(axis.kernel, width, tap))

        if axis.stride == 1:
            pieces(axis.out, self.lanes, shifted)
        elif axis.stride <= SHUFFLE_STEPS and axis.kernel <= 2 * UNROLL_TAPS:
            pieces(axis.out, self.lanes, shuffled)
        else:
            with B.serial(0, axis.out) as j:
                start = row + j * axis.stride
                finish(j, 1, self.reduce(axis.kernel, 1, lambda t: scratch[start + t * axis.dilation]))


class _Runs(_Pool):
    """Windows of stride 1 whose reach is not wider than the gap between rows: a block of rows is one run of positions, all
    of its code straight. A vector is reduced down the rows once; its neighbours to the left and right come out of registers,
    by shuffles, with the padding where gaps are. Loads stay between the first and the last pixel of the image. What lies in
    the gaps of the output is overwritten. ``gap``: floats between two rows, of input and output alike.
    """

    def __init__(self, workload: PoolWorkload, rows: _Axis, columns: _Axis, lanes: int, gap: int) -> None:
        super().__init__(workload, rows, columns, lanes)
        self.pitch = columns.size + gap
        self.lanes = width_of((rows.out - 1) * self.pitch + columns.size, lanes)
        self.above, self.below = rows.before, (rows.kernel - 1) * rows.dilation - rows.before
        whole = max(RUN * self.lanes // self.pitch, 1)
        self.block = -(-rows.out // -(-rows.out // whole))

    @staticmethod
    def serve(pool: _Pool, gap: int) -> bool:
        """Whether they can, in place of ``pool``: windows are short, and averages count as many pixels in each. ``gap``: 0
        where rows of input and output lie apart differently."""
        rows, columns = pool.rows, pool.columns
        if (rows.stride, columns.stride) != (1, 1) or (rows.out, columns.out) != (rows.size, columns.size):
            return False
        if max(rows.kernel, columns.kernel) > UNROLL_TAPS:
            return False
        after = (columns.kernel - 1) * columns.dilation - columns.before
        counts = {rows.counted(i, pool.workload.count_include_pad) for i in range(rows.out)}
        whole = pool.is_max or len(pool.counts) == len(counts) == 1
        reach = min(gap, width_of(columns.size, pool.lanes))  # a shuffle finds what a window holds in the next vector
        return whole and 0 <= max(columns.before, after) <= reach and gap > 0

    def channel(self, x: View, y: View, n: Index, c: Index) -> None:
        blocks = -(-self.rows.out // self.block)
        last = self.rows.out - (blocks - 1) * self.block

        def block(index: Index, rows: int, above: int, below: int) -> None:
            at = x.at(n, c, index * self.block, 0), y.at(n, c, index * self.block, 0)
            self.run(x, y, at, rows, (min(above, self.above), min(below, self.below)))

        # Blocks that see both ends of the image, or neither, as far as their windows reach.
        first = 0
        while first < blocks:
            above, below = first * self.block, max(0, self.rows.out - (first + 1) * self.block)
            alike = first
            while alike + 1 < blocks and above >= self.above and self.rows.out - (alike + 2) * self.block >= self.below:
                alike += 1
            rows = last if first == blocks - 1 else self.block
            if alike > first:
                with B.serial(0, alike - first + 1) as i:
                    block(i + first, rows, above, self.below)
            else:
                block(first, rows, above, below)
            first = alike + 1

    def run(self, x: View, y: View, at: tuple[Index, Index], rows: int, around: tuple[int, int]) -> None:
        """``rows`` rows that lie ``at`` in x and y, with as many rows of the image ``around`` them, above and below."""
        lanes, (x_at, y_at) = self.lanes, at
        extent = (rows - 1) * self.pitch + self.columns.size
        ends = -around[0] * self.pitch, extent + around[1] * self.pitch
        width = min(lanes, width_of(extent, lanes))
        blank = splat(self.identity, width)

        def shuffled(a: Any, b: Any, picks: list[int]) -> Any:
            return B.Shuffle([a, b], [B.int32(i) for i in picks]) if width > 1 else (a, b)[picks[0]]

        def tap(j: int, row: int) -> Any:
            """Positions j ... of ``row`` rows further down; None outside of the image."""
            start = j + row * self.pitch
            inside = [ends[0] <= start + i < ends[1] for i in range(width)]
            if not any(inside):
                return None
            near = min(max(start, ends[0]), ends[1] - width)
            value = load(x.buffer, x_at + near, width)
            if near == start:
                return value
            return shuffled(value, blank, [start - near + i if inside[i] else width + i for i in range(width)])

        def column(j: int) -> Any:
            taps = [tap(j, t * self.rows.dilation - self.rows.before) for t in range(self.rows.kernel)]
            total = None
            for value in taps:
                if value is not None:
                    total = value if total is None else self.combine(total, value)
            pixels = [(j + i) % self.pitch < self.columns.size and j + i < extent for i in range(width)]
            if total is None or not any(pixels):
                return blank
            if not all(pixels):
                total = shuffled(total, blank, [i if pixels[i] else width + i for i in range(width)])
            return B.bind(total)

        def result(left: Any, middle: Any, right: Any) -> Any:
            total = None
            for t in range(self.columns.kernel):
                shift = t * self.columns.dilation - self.columns.before
                value = middle
                if shift < 0:
                    value = shuffled(left, middle, [width + shift + i for i in range(width)])
                elif shift > 0:
                    value = shuffled(middle, right, [shift + i for i in range(width)])
                total = value if total is None else self.combine(total, value)
            counted = self.rows.counted(0, self.workload.count_include_pad)
            return B.bind(self.scaled(0, width, total, (None, counted)))

        columns, before = [blank, column(0)], None
        for j in range(0, extent, width):
            columns = [*columns[-2:], column(j + width) if j + width < extent else blank]
            value = result(*columns)
            if j + width <= extent:
                store(y.buffer, y_at + j, width, value)
            else:
                over = j + width - extent
                value = shuffled(before, value, [width - over + i for i in range(width)])
                store(y.buffer, y_at + (extent - width), width, value)
            before = value
