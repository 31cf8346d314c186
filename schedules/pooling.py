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
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
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
    pool = _Pool(workload, rows, columns)
    emitter = _Runs(pool, target.lanes, gap) if _Runs.serve(pool, lanes, gap) else _Rows(pool, lanes)

    def body(x_buffer: Any, y_buffer: Any) -> None:
        x, y = View(src, src_size, src_channel, x_buffer), View(dst, dst_size, dst_channel, y_buffer)
        with channels_of(dst) as (c, n):
            emitter.channel(x, y, n, c)
            zero_halo(y, n, c, lanes)

    return build((("src", src_size, "float32"), ("dst", dst_size, "float32")), body)


class _Pool:
    """Windows of both axes, and what is made of them."""

    def __init__(self, workload: PoolWorkload, rows: _Axis, columns: _Axis) -> None:
        self.workload, self.rows, self.columns = workload, rows, columns
        self.is_max = workload.kind == "max"
        self.identity = NEG_INF if self.is_max else 0.0
        counts = [columns.counted(j, workload.count_include_pad) for j in range(columns.out)]
        self.counts = counts if len(set(counts)) > 1 else counts[:1]

    def combine(self, a: Any, b: Any) -> Any:
        return B.max(a, b) if self.is_max else a + b

    def counted(self, i: int) -> int:
        """Rows that an average of row ``i`` counts; 1 for a maximum."""
        return 1 if self.is_max else self.rows.counted(i, self.workload.count_include_pad)

    def scaled(self, j: Index, width: int, value: Any, scale: Scale) -> Any:
        """The average of the window of column ``j`` and those behind it, from their sums; a maximum stays."""
        factors, counted = scale
        if self.is_max:
            return value
        if factors is not None:
            value = value * load(factors, j, width)
        total = counted if factors is not None else counted * self.counts[0]
        return value * splat(1 / total, width)


class _Rows:
    """Emits the body of one (channel, image), row by row in two steps."""

    def __init__(self, pool: _Pool, lanes: int) -> None:
        self.pool, self.rows, self.columns, self.lanes = pool, pool.rows, pool.columns, lanes
        columns = pool.columns
        reach = (columns.out - 1) * columns.stride + (columns.kernel - 1) * columns.dilation + 1
        # Shuffles load whole groups of vectors, of which the last lanes are not used.
        slack = columns.stride * width_of(columns.out, lanes) if columns.stride > 1 else 0
        self.pitch = round_up(max(columns.before + columns.size, reach) + slack, LINE)
        self.block = max(1, min(ROW_BLOCK, STACK // (4 * self.pitch), pool.rows.out))

    def channel(self, x: View, y: View, n: Index, c: Index) -> None:
        pool, columns = self.pool, self.columns
        scratch = self.scratch()
        factors = None
        if not pool.is_max and len(pool.counts) > 1:
            factors = B.alloc_buffer((columns.out,), "float32")
            common = max(set(pool.counts), key=pool.counts.count)
            fill(factors, 0, columns.out, self.lanes, 1 / common)
            for j, count in enumerate(pool.counts):
                if count != common:
                    store(factors, j, 1, B.float32(1 / count))

        def signature(i: int) -> tuple[int, int, int]:
            return (*self.rows.taps(i), pool.counted(i))

        for (first, taps, counted), group in groupby(range(self.rows.out), signature):
            ys = list(group)
            start = first * self.rows.dilation - self.rows.before

            if not taps:
                for i in ys:
                    fill(y.buffer, y.at(n, c, i, 0), columns.out, self.lanes, pool.identity)
                continue

            def block(i: Index, rows: int, start: int = start, taps: int = taps, counted: int = counted) -> None:
                with B.serial(0, rows) as r:
                    self.vertical(x, x.at(n, c, (i + r) * self.rows.stride + start, 0), taps, scratch, r * self.pitch)
                with B.serial(0, rows) as r:
                    self.horizontal(scratch, r * self.pitch, y, y.at(n, c, i + r, 0), (factors, counted))

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
            fill(scratch, start, self.columns.before, self.lanes, self.pool.identity)
            fill(scratch, start + pad, self.pitch - pad, self.lanes, self.pool.identity)
        return scratch

    def reduce(self, taps: int, width: int, value: Callable[[Index], Any]) -> Any:
        """``value(0)`` combined with ... ``value(taps - 1)``: straight-line code, or a loop for long windows."""
        if taps <= UNROLL_TAPS:
            return reduce(self.pool.combine, map(value, range(taps)))
        acc = B.alloc_buffer((width,), "float32")
        store(acc, 0, width, value(0))
        with B.serial(0, taps - 1) as t:
            store(acc, 0, width, self.pool.combine(load(acc, 0, width), value(t + 1)))
        return load(acc, 0, width)

    def vertical(self, x: View, at: Index, taps: int, scratch: Any, row: Index) -> None:
        """The first step: the taps from ``at`` in ``x`` on combined, into the scratch row."""
        pitch = self.rows.dilation * x.layout.row_pitch

        def piece(j: Index, width: int) -> None:
            total = self.reduce(taps, width, lambda t: load(x.buffer, at + (j + t * pitch), width))
            store(scratch, row + self.columns.before + j, width, total)

        pieces(self.columns.size, self.lanes, piece)

    def horizontal(self, scratch: Any, row: Index, y: View, at: Index, scale: Scale) -> None:
        """The second step: windows of the scratch row, to ``at`` in ``y``."""
        axis = self.columns

        def finish(j: Index, width: int, value: Any) -> None:
            store(y.buffer, at + j, width, self.pool.scaled(j, width, value, scale))

        def shuffled(j: Index, width: int) -> None:
            groups: dict[int, list[Any]] = {}

            def tap(t: int) -> Any:
                group, phase = divmod(t * axis.dilation, axis.stride)
                if group not in groups:
                    base = (j + group) * axis.stride
                    groups[group] = [load(scratch, row + (base + k * width), width) for k in range(axis.stride)]
                return pick(groups[group], width, axis.stride, phase)

            finish(j, width, reduce(self.pool.combine, map(tap, range(axis.kernel))))

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


class _Runs:
    """Emits the body of one (channel, image) for windows of stride 1 whose reach is not wider than the gap between
    rows: a block of rows is one run of positions, all of its code straight. A vector is reduced down the rows once; its
    neighbours to the left and right come out of registers, by shuffles, with the padding where gaps are. Loads stay
    between the first and the last pixel of the image. What lies in the gaps of the output is overwritten. ``gap``:
    floats between two rows, of input and output alike.
    """

    def __init__(self, pool: _Pool, lanes: int, gap: int) -> None:
        self.pool, self.rows, self.columns = pool, pool.rows, pool.columns
        self.pitch = pool.columns.size + gap
        self.lanes = width_of(self.extent(pool.rows.out), lanes)
        whole = max(RUN * self.lanes // self.pitch, 1)
        self.block = -(-pool.rows.out // -(-pool.rows.out // whole))

    @staticmethod
    def serve(pool: _Pool, lanes: int, gap: int) -> bool:
        """Whether they can: windows are short, and averages count as many pixels in each. ``gap``: 0 where rows of input and
        output lie apart differently."""
        rows, columns = pool.rows, pool.columns
        if (rows.stride, columns.stride) != (1, 1) or (rows.out, columns.out) != (rows.size, columns.size):
            return False
        if max(rows.kernel, columns.kernel) > UNROLL_TAPS:
            return False
        after = (columns.kernel - 1) * columns.dilation - columns.before
        whole = pool.is_max or len(pool.counts) == len({pool.counted(i) for i in range(rows.out)}) == 1
        reach = min(gap, width_of(columns.size, lanes))  # a shuffle finds what a window holds in the next vector
        return whole and 0 <= max(columns.before, after) <= reach and gap > 0

    def extent(self, rows: int) -> int:
        """Positions from the first to the last pixel of ``rows`` rows."""
        return (rows - 1) * self.pitch + self.columns.size

    def channel(self, x: View, y: View, n: Index, c: Index) -> None:
        total = self.rows.out
        reach = self.rows.before, (self.rows.kernel - 1) * self.rows.dilation - self.rows.before

        def signature(index: int) -> tuple[int, int, int]:
            """Rows of a block, and those of the image above and below it that its windows reach."""
            start, end = index * self.block, min((index + 1) * self.block, total)
            return end - start, min(start, reach[0]), min(total - end, reach[1])

        for (rows, *around), group in groupby(range(-(-total // self.block)), signature):
            first, *others = group
            with B.serial(0, 1 + len(others)) if others else nullcontext(0) as i:
                start = (i + first) * self.block
                self.run(x, y, (x.at(n, c, start, 0), y.at(n, c, start, 0)), rows, (around[0], around[1]))

    def run(self, x: View, y: View, at: tuple[Index, Index], rows: int, around: tuple[int, int]) -> None:
        """``rows`` rows that lie ``at`` in x and y, with as many rows of the image ``around`` them, above and below."""
        pool, (x_at, y_at) = self.pool, at
        extent = self.extent(rows)
        ends = -around[0] * self.pitch, extent + around[1] * self.pitch
        width = width_of(extent, self.lanes)  # less than of other blocks, if this is the last one and short
        blank = splat(pool.identity, width)

        def shuffled(a: Any, b: Any, picks: list[int]) -> Any:
            return B.Shuffle([a, b], [B.int32(i) for i in picks]) if width > 1 else (a, b)[picks[0]]

        def kept(value: Any, where: list[bool], shift: int = 0) -> Any:
            return shuffled(value, blank, [shift + i if mine else width + i for i, mine in enumerate(where)])

        def tap(j: int, row: int) -> Any:
            """Positions j ... of ``row`` rows further down; None outside of the image."""
            start = j + row * self.pitch
            inside = [ends[0] <= start + i < ends[1] for i in range(width)]
            if not any(inside):
                return None
            near = min(max(start, ends[0]), ends[1] - width)
            value = load(x.buffer, x_at + near, width)
            return value if near == start else kept(value, inside, start - near)

        def column(j: int) -> Any:
            """Positions j ... reduced down the rows; the identity where no pixels are."""
            taps = [tap(j, t * self.rows.dilation - self.rows.before) for t in range(self.rows.kernel)]
            there = [value for value in taps if value is not None]
            pixels = [(j + i) % self.pitch < self.columns.size and j + i < extent for i in range(width)]
            if not there or not any(pixels):
                return blank
            total = reduce(pool.combine, there)
            return B.bind(total if all(pixels) else kept(total, pixels))

        def result(left: Any, middle: Any, right: Any) -> Any:
            """The windows of ``middle``."""

            def shifted(t: int) -> Any:
                shift = t * self.columns.dilation - self.columns.before
                if shift < 0:
                    return shuffled(left, middle, [width + shift + i for i in range(width)])
                return shuffled(middle, right, [shift + i for i in range(width)]) if shift else middle

            total = reduce(pool.combine, map(shifted, range(self.columns.kernel)))
            return B.bind(pool.scaled(0, width, total, (None, pool.counted(0))))

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
