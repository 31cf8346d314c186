"""The one kernel family: dense, block-sparse and CSR convolutions and products as a gather GEMM.

    out[k, q] = epilogue(bias[k] + sum_e data[e, k] * src[offset[e] + q])

A group of R output channels shares a list of offsets into the flat source buffer; V vectors of positions stay in
registers (R * V accumulators); a tile of positions is the outermost loop, so that its slice of the source stays in L1
while all output channels use it; blocks of input channels keep that slice small enough. R = 8 with every column is a
dense layer, R = 4 or 8 with some columns is block sparsity, R = 1 is CSR. A k x k convolution differs from a 1x1 only in
its offsets, a strided one in that it reads phase planes, a grouped or depthwise one in that its columns come from its
own channels. The definitions of the operators are in ``skimtvm/ops/conv2d.py``; this file is their schedule, written as a
template because the accumulators, data-dependent bounds and fused epilogue have no form that TVM's schedule
primitives keep in registers.

In an interleaved layout (``layout.py``) a vector is one pixel of 16 images instead of 16 positions, and tiles are cut from
rows, so that source and destination need not agree on pitches and strides need no phase planes; a call computes a band
of rows (``relay_passes/bands.py``).

Loops (one code variant for each run of row groups and for full and last tiles)::

    for tile, chunk in parallel:              # tiles of V * lanes positions; chunks of row groups, cut by nonzeros
        for block in channel blocks:          # block of the source tile stays in L1 (or copies of it: aligned.py)
            for g in row groups of the chunk:
                acc[R][V] = bias | out        # out holds partial sums between blocks
                for e in ip[block, g] .. ip[block, g + 1]:
                    acc[r][v] += data[e, r] * src[offset[e] + q + v * lanes]
                out = acc | masked epilogue(acc)

Measured on Zen 4, one thread, share of the practical peak of 118 GFLOP/s on the multiply-adds done: dense 0.89-0.97 (small
planes go to ``across.py``), 4x1 blocks at 90% 0.75-0.95, CSR at 90% 0.38-0.52; interleaved dense 0.94-0.98, 4x1 blocks
0.85-0.95, CSR 0.45-0.60. CSR makes one load for each multiply-add: 3x3 taps cross cache lines unless images are interleaved,
which allows 0.55-0.67 of the peak, and the tile of a 1x1 with many channels comes from L2, which allows 0.45-0.48. So
unstructured layers are straight code on AVX-512 where that pays (``unrolled.py``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as B

from ..layout import LINE, Layout
from .aligned import Copies
from .emit import broadcast, fetch, finish, kernel_attrs, loop, parallel, store, vector
from .gemm_epilogue import Epilogue
from .interleaved import Band
from .pointwise import Program, Slot, split_bias

if TYPE_CHECKING:
    from .unrolled import Code

# Weights stream through once a tile. The hardware prefetcher stops at the end of every 4 KB page, so they are fetched
# ahead by hand: lines before their use in a dense stream, lines of the lists that the next row groups of a sparse one will
# need.
DENSE_AHEAD, CSR_AHEAD = 32, 4


@dataclass(frozen=True)
class Knobs:
    """``rows``: R; ``vectors``: V; ``channel_block``: input channels whose tile should fit L1; ``chunks``: parallel
    pieces that the row groups are cut into; ``dense``: every column is stored, without ``ip``; ``lanes``: floats in a
    vector, which may be half a register where whole ones would leave many lanes without a pixel; ``across``: lanes are
    output channels (``across.py``), R of them, and V counts pixels; ``ahead``: cache lines of weights that are fetched
    ahead of their use; ``aligned``: taps read copies of the source tile, a vector at a time (``aligned.py``); ``unrolled``:
    nonzeros are straight code (``unrolled.py``), R is the most output channels of a group, and V, which is no longer bounded
    by registers, how many vectors pass while the code of a group stays in a cache."""

    rows: int
    vectors: int
    channel_block: int
    chunks: int = 1
    dense: bool = False
    lanes: int = 16
    across: bool = False
    ahead: int = CSR_AHEAD
    aligned: bool = False
    unrolled: bool = False


@dataclass(frozen=True)
class RowRun:
    """Row groups of equal height: what the kernel needs to know of a ``GatherMatrix``. ``columns`` is the length of the
    offset list (dense: of one convolution group)."""

    first: int
    groups: int
    rows: int
    blocks: int
    columns: int


@dataclass(frozen=True)
class Gemm:
    """One kernel: all that its code depends on. ``group_rows``/``group_step``: output channels of a convolution group and
    the floats between the inputs of two groups (dense only; CSR offsets are absolute). ``masked``: the gaps of the
    output must be zero."""

    src: Slot
    dst: Slot
    runs: tuple[RowRun, ...]
    knobs: Knobs
    block_columns: int
    group_rows: int
    group_step: int
    epilogue: Program
    tensors: tuple[Slot, ...] = ()  # t1, t2, ...: residuals
    strides: tuple[int, int] = (1, 1)  # of source pixels, in interleaved layouts
    below: int = 0  # rows of the source that the taps reach below a pixel, in interleaved layouts
    fetch: int = 0  # cache lines of the next tiles' source to fetch in 256 entries; 0: some with each row group
    copies: Copies | None = None  # what is read in place of the source, with aligned knobs
    code: Code | None = None  # of unrolled knobs

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Source, residuals, output."""
        return self.src, *self.tensors, self.dst

    @property
    def interleaved(self) -> bool:
        return self.dst.layout.interleave > 1

    @property
    def stored(self) -> Layout:
        """The output's, not streamed where partial sums bring its lines into the caches anyway."""
        lay = self.dst.layout
        return dataclasses.replace(lay, streamed=lay.streamed and all(r.blocks == 1 for r in self.runs))

    @property
    def by_row(self) -> bool:
        """Tiles are segments of rows of pixels, not of the run of all positions."""
        return self.interleaved or self.knobs.across

    @property
    def masked(self) -> bool:
        return self.dst.layout.zero_halo and not self.by_row

    @property
    def vectors(self) -> int:
        """Vectors that cover the output positions of a channel; pixels of a row where tiles are cut from rows."""
        lay = self.dst.layout
        return lay.w if self.by_row else -(-lay.positions // self.knobs.lanes)

    @property
    def rows(self) -> int:
        """Rows of pixels that tiles are cut from; a plane layout is one."""
        lay = self.dst.layout
        return lay.n // lay.interleave * lay.h if self.by_row else 1

    def lines(self, vectors: int) -> int:
        """Cache lines between two tiles in the source, in interleaved layouts."""
        return -(-vectors * self.strides[1] * self.src.layout.x_pitch // LINE)

    def fetched_with(self, entries: int) -> int:
        """``fetch`` for so many entries a tile. Row groups fetch where each has few lines to: a longer burst is dropped."""
        lines = FETCH_TILES * self.lines(self.knobs.vectors)
        if not self.interleaved or lines <= FETCH_BURST * sum(r.groups * r.blocks for r in self.runs):
            return 0
        each = lines / max(1, entries)
        return math.ceil(256 * each) if each < 1 else 256 * min(math.ceil(each), FETCH_MOST)

    def tiles(self) -> tuple[tuple[int, int, int], ...]:
        """Of a row: (first vector, tiles, vectors a tile): at most two tile heights, as equal as possible."""
        total = self.vectors
        count = -(-total // self.knobs.vectors)
        low, extra = divmod(total, count)
        runs = ((0, extra, low + 1), (extra * (low + 1), count - extra, low))
        return tuple(r for r in runs if r[1])


def row_count(runs: tuple[RowRun, ...]) -> int:
    return sum(r.groups * r.rows for r in runs)


# The source of the next tiles of an interleaved layout is fetched, too: it follows in memory, but sparse rows read it in no
# order that the hardware would foresee, and dense ones a channel of some pixels at a time. From memory 4x1 blocks gain 1.6
# to 2.4 times, CSR 1.3, dense 1.05 to 1.15.
FETCH_BURST = 4  # lines that one row group fetches; further ones go to its entries
FETCH_MOST = 8  # lines that an entry fetches
FETCH_TILES = 1.5  # that are fetched while one is computed


class Run:
    """The arguments of one run of row groups, declared in order."""

    def __init__(self, index: int, run: RowRun, dense: bool) -> None:
        self.run, self.index = run, index
        if dense:
            self.ip = None
            self.off = B.arg(f"off{index}", B.Buffer((run.columns,), "int32"))
            self.data = B.arg(f"data{index}", B.Buffer((run.groups * run.columns * run.rows,), "float32"))
            return
        # The number of entries is symbolic: layers of one shape share a kernel whatever their sparsity.
        entries = B.int64()
        self.ip = B.arg(f"ip{index}", B.Buffer((run.blocks * run.groups + 1,), "int32"))
        self.off = B.match_buffer(B.arg(f"off{index}_p", B.handle()), (entries,), "int32")
        self.data = B.match_buffer(B.arg(f"data{index}_p", B.handle()), (entries * run.rows,), "float32")


@contextmanager
def span(low: Any, high: Any) -> Iterator[Any]:
    """Serial loop from ``low`` to ``high``, emitted from 0: TVM's simplifier forgets to shift the bounds of an inner loop
    when it moves an outer one that starts elsewhere."""
    if isinstance(low, int) and isinstance(high, int):
        with B.serial(low, high) as i:
            yield i
        return
    start = B.bind(low)
    with B.serial(0, high - start) as i:
        yield start + i


class Tile:
    """Where a tile of vectors lies in each tensor. ``first``: its first vector in row ``row``."""

    def __init__(self, gemm: Gemm, row: Any, first: Any, band: Band | None = None) -> None:
        self.gemm, self.row, self.first, self.band = gemm, row, first, band
        self.known: dict[tuple[Layout, tuple[int, int], int], Any] = {}

    def at(self, index: int, strides: tuple[int, int] = (1, 1)) -> Any:
        """Floats from the first pixel of a channel to the first vector, in the source (0), a residual or the output (-1)."""
        layout = self.gemm.slots[index].layout
        key = layout, strides, index if layout.window else 0
        if key not in self.known:
            shift = self.band.shift(index) if self.band is not None else 0
            self.known[key] = B.bind(self._at(layout, strides) + shift)
        return self.known[key]

    def _at(self, lay: Layout, strides: tuple[int, int]) -> Any:
        if not self.gemm.by_row:
            return self.first * self.gemm.knobs.lanes
        image, y = B.floordiv(self.row, self.gemm.dst.layout.h), B.floormod(self.row, self.gemm.dst.layout.h)
        return image * lay.n_pitch + y * (strides[0] * lay.row_pitch) + self.first * (strides[1] * lay.x_pitch)

    def step(self, slot: Slot, stride: int = 1) -> int:
        """Floats between two vectors."""
        return stride * slot.layout.x_pitch if self.gemm.interleaved else self.gemm.knobs.lanes


class Body(Epilogue):
    """Emits the loops of one kernel; holds the buffers."""

    def __init__(self, gemm: Gemm) -> None:
        self.gemm, self.lanes = gemm, gemm.knobs.lanes
        self.bias, self.epilogue = split_bias(gemm.epilogue)
        k = row_count(gemm.runs)
        self.src = B.arg("src", B.Buffer((gemm.src.size,), "float32"))
        self._declare_weights()
        self.cut = B.arg("cut", B.Buffer((len(gemm.runs) * (gemm.knobs.chunks + 1),), "int32"))
        self.band = Band(gemm.slots) if gemm.interleaved else None
        self.mask = None
        if gemm.masked:
            self.mask = self._declare_mask()
        channels = range(gemm.epilogue.channels)
        self.consts = {f"c{i}": B.arg(f"c{i}", B.Buffer((k,), "float32")) for i in channels}
        self.tensors = [(s, B.arg(f"t{i + 1}", B.Buffer((s.size,), "float32"))) for i, s in enumerate(gemm.tensors)]
        self.out = B.arg("out", B.Buffer((gemm.dst.size,), "float32"))

    def _declare_weights(self) -> None:
        self.runs = [Run(i, run, self.gemm.knobs.dense) for i, run in enumerate(self.gemm.runs)]

    def _declare_mask(self) -> Any:
        return B.arg("mask", B.Buffer((self.gemm.vectors * self.lanes,), "int32"))

    def emit(self) -> None:
        chunks, tile_runs = self.gemm.knobs.chunks, self.gemm.tiles()
        total = sum(count for _, count, _ in tile_runs)
        rows: Any = self.gemm.rows
        if self.band is not None:
            self.band.start(self.out)
            rows = self.band.rows
        with parallel(rows * total * chunks, self.gemm.stored) as i:
            chunk = B.bind(i % chunks)
            row = B.bind(self.band.first + i // (chunks * total)) if self.band is not None else 0
            tile = B.bind(i // chunks % total if self.gemm.interleaved else i // chunks)
            if len(tile_runs) == 1:
                self._tile(row, tile, chunk, tile_runs[0], 0, total)
                return
            with B.If(tile < tile_runs[0][1]):
                with B.Then():
                    self._tile(row, tile, chunk, tile_runs[0], 0, total)
                with B.Else():
                    self._tile(row, tile, chunk, tile_runs[1], tile_runs[0][1], total)

    def _tile(self, row: Any, tile: Any, chunk: Any, tiles: tuple[int, int, int], first_tile: int, total: int) -> None:
        """All row groups of ``chunk`` on one tile of positions."""
        first_vector, count, vectors = tiles
        q = Tile(self.gemm, row, B.bind(first_vector + (tile - first_tile) * vectors), self.band)
        edges = {"first": tile if first_tile == 0 else None, "last": tile if first_tile + count == total else None}
        copies = self.gemm.copies
        if copies is not None:
            self.copied = B.alloc_buffer((copies.floats(self.gemm.knobs.channel_block),), "float32")
        for r in self.runs:
            with loop(r.run.blocks) as block:
                if copies is not None:
                    first = B.bind(self.gemm.src.base + q.at(0))
                    copies.emit(self.src, first, self.copied, block, self.gemm.knobs.channel_block, vectors, self.lanes)
                at = r.index * (self.gemm.knobs.chunks + 1) + chunk
                with span(self.cut[at], self.cut[at + 1]) as g:
                    self._group(r, block, B.bind(g), q, vectors, edges, total)

    def _group(self, r: Run, block: Any, g: Any, q: Tile, vectors: int, edges: dict[str, Any], total: int) -> None:
        gemm, lanes, run = self.gemm, self.lanes, r.run
        dst, step = gemm.dst, q.step(gemm.dst)
        row = B.bind(run.first + g * run.rows)
        origin = B.bind(dst.base + row * dst.layout.c_pitch + q.at(-1))
        outs = [[origin + (i * dst.layout.c_pitch + v * step) for v in range(vectors)] for i in range(run.rows)]
        acc = [B.alloc_buffer((vectors * lanes,), "float32") for _ in range(run.rows)]

        def put(i: int, v: int, value: Any) -> None:
            store(acc[i], value, v * lanes, lanes)

        def get(i: int, v: int) -> Any:
            return vector(acc[i], v * lanes, lanes)

        def start() -> None:
            for i in range(run.rows):
                value = self.consts[self.bias][row + i] if self.bias else B.float32(0)
                for v in range(vectors):
                    put(i, v, broadcast(value, lanes))

        if run.blocks == 1:
            start()
        else:
            with B.If(block == 0):
                with B.Then():
                    start()
                with B.Else():
                    for i in range(run.rows):
                        for v in range(vectors):
                            put(i, v, vector(self.out, outs[i][v], lanes))
        self._multiply(r, block, g, row, q, vectors, put, get)
        if run.blocks == 1:
            self._finish(row, q, outs, get, run.rows, vectors, edges, total)
            return
        with B.If(block == run.blocks - 1):
            with B.Then():
                self._finish(row, q, outs, get, run.rows, vectors, edges, total)
            with B.Else():
                for i in range(run.rows):
                    for v in range(vectors):
                        store(self.out, get(i, v), outs[i][v], lanes)

    def _multiply(self, r: Run, block: Any, g: Any, row: Any, q: Tile, vectors: int, put: Any, get: Any) -> None:
        """acc += data * src over the entries of a row group in a block."""
        gemm, lanes, run = self.gemm, self.lanes, r.run
        start, step = q.at(0, gemm.strides), q.step(gemm.src, gemm.strides[1])
        if r.ip is None:
            low = block * gemm.block_columns
            high = B.min(low + gemm.block_columns, run.columns) if run.blocks > 1 else run.columns
            base = B.bind(gemm.src.base + start + B.floordiv(row, gemm.group_rows) * gemm.group_step)
            skip = B.bind(g * run.columns)
        else:
            low, high = r.ip[block * run.groups + g], r.ip[block * run.groups + g + 1]
            for line in range(gemm.knobs.ahead):  # what the next row groups will read
                fetch(r.off, high + line * LINE)
                for part in range(min(run.rows, 4)):
                    fetch(r.data, (high + line * LINE) * run.rows + part * LINE)
            base, skip = B.bind(gemm.src.base + start), 0
        if gemm.interleaved:  # rows above the lowest that the taps reach were read before
            ahead = gemm.below * gemm.src.layout.row_pitch + gemm.lines(vectors) * LINE
            following = B.bind(gemm.src.base + start + ahead)
            if not gemm.fetch:
                share = -(-gemm.lines(vectors) // (run.groups * run.blocks))
                for i in range(share):
                    fetch(self.src, following + ((block * run.groups + g) * share + i) * LINE)
        source = self.src
        if gemm.copies is not None:
            source, base = self.copied, 0
        with span(low, high) as e:
            if r.ip is None and gemm.knobs.ahead:
                fetch(r.data, (skip + e) * run.rows + gemm.knobs.ahead * LINE)
            for i in range(-(-gemm.fetch // 256)):
                fetch(self.src, following + B.floordiv((skip + e) * gemm.fetch, 256 // LINE) + i * LINE, l1=False)
            at = B.bind(base + r.off[e])
            weights = [B.bind(r.data[(skip + e) * run.rows + i]) for i in range(run.rows)]
            for v in range(vectors):
                x = B.bind(vector(source, at + v * step, lanes))
                for i in range(run.rows):
                    put(i, v, get(i, v) + broadcast(weights[i], lanes) * x)


def emit(gemm: Gemm) -> Any:
    """PrimFunc: src, then for each run (ip unless dense, offset, data), cut, band, mask, c0.., t1.., out; all flat.

    ``cut`` int32[chunks + 1 for each run]: first row group of each chunk; ``band`` int32[2] only in interleaved layouts
    (``interleaved.Band``); ``mask`` int32[vectors * lanes] (-1 where a position is a pixel) only in planes whose gaps
    must be zero.
    """
    from .across import AcrossBody
    from .unrolled import UnrolledBody

    body = UnrolledBody if gemm.knobs.unrolled else AcrossBody if gemm.knobs.across else Body
    with IRBuilder() as ib, B.prim_func(s_tir=True):
        kernel_attrs()
        body(gemm).emit()
    return finish(ib)
