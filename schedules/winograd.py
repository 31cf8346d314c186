"""Winograd convolution with dense or sparse position-wise weights: the schedule, one kernel a layer.

    V = B^T d B of every tile;   M[k, p] = sum_c U[k, c, p] V[c, p] at each of the t x t positions p;   Y = A^T M A

The products are the gather GEMM of the other kernels: rows are (position, output channel), columns are offsets into the
transformed input, a tile of the image is a lane. A *block* of tiles, V * lanes of them, goes through all three stages
before the next one, so that its V (t * t * C * tiles floats) and, a block of output channels at a time, its M stay in L2
and the slice of V of one position in L1::

    for block in tiles:
        for c in channels, in parallel:       # V[p][c][tile]: loads of whole lines, shuffles, adds and multiplies
            for v in vectors of the block: V[:, c, v] = B^T d B
        for b in blocks of output channels, in parallel:
            for p in positions:
                for g in row groups of b: M[k, p] = sum over the entries of (p, g)
            for k in b, v in vectors: y = epilogue(A^T M[k] A)

Lanes are filled from runs of ``segment`` tiles of an image row, so that rows of 14, 7 or 2 tiles (56, 28, 7 pixels) and
the images of a batch share vectors. Tables say where each run's rows begin. Pixels of a tile that lie outside of the padded
image are zero: rows are led to the last row of the padding or, where there is none below, not loaded, and columns are
replaced. (They count for discarded pixels only if the weights are those of a spatial filter.) Surplus lanes repeat the last
run, and write what it writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as B

from .. import winograd as matrices
from ..layout import LINE
from ..target import CpuTarget
from .emit import Pixels, broadcast, fetch, finish, kernel_attrs, loop, store, vector
from .pointwise import Program, Slot
from .winograd_math import concat, deinterleave, interleave, shuffle, transform

DENSE_AHEAD = 512  # floats of the weights that are fetched ahead; the hardware prefetcher stops at every 4 KB page
CSR_AHEAD = 256  # entries


@dataclass(frozen=True)
class WinogradKnobs:
    """``rows``: output channels a row group (1: CSR); ``dense``: every weight is stored; ``vectors``: V, vectors of tiles
    in a block; ``together``: how many of them a row group works on at once; ``unroll``: entries of a CSR row with
    accumulators of their own; ``channel_block``: output channels whose M is kept; ``lanes``: tiles in a vector;
    ``segment``: tiles of one image row that are loaded together."""

    rows: int
    dense: bool
    vectors: int
    together: int
    unroll: int
    channel_block: int
    lanes: int
    segment: int


@dataclass(frozen=True)
class InterleavedTaps:
    """Where tiles lie in interleaved images, along y and x: pixel i of the tile whose first output is o is input pixel
    (o + i - ``above``) * ``strides`` + phase; taps begin at o * ``strides`` - ``before``, are ``kernel`` in number, and do
    not reach beyond ``ends`` pixels, padding included."""

    strides: tuple[int, int]
    above: tuple[int, int]
    before: tuple[int, int]
    kernel: tuple[int, int]
    ends: tuple[int, int]


@dataclass(frozen=True)
class WinogradGemm:
    """One kernel: all that its code depends on. ``c``, ``k``: channels of one convolution group; ``blocks``: blocks of
    tiles; ``cut_columns``: some tiles reach beyond the padded image or the output at the right; ``cut_rows``: beyond an
    image without padding at the bottom. ``taps``: only of interleaved images, which have no tables."""

    m: int
    r: int
    src: Slot
    dst: Slot
    groups: int
    c: int
    k: int
    blocks: int
    cut_columns: bool
    knobs: WinogradKnobs
    epilogue: Program
    tensors: tuple[Slot, ...] = ()
    cut_rows: bool = False
    taps: InterleavedTaps | None = None

    @property
    def tile(self) -> int:
        return self.m + self.r - 1

    @property
    def interleaved(self) -> bool:
        return self.dst.layout.interleave > 1

    @property
    def width(self) -> int:
        """Floats of V between two channels: of the vectors that a row group works on at once."""
        return self.knobs.together * self.knobs.lanes

    @property
    def positions(self) -> int:
        return self.tile**2

    @property
    def tiles(self) -> int:
        """Tiles of a block."""
        return self.knobs.vectors * self.knobs.lanes

    @property
    def segments(self) -> int:
        """Runs of tiles that make a vector."""
        return self.knobs.lanes // self.knobs.segment

    @property
    def channel_blocks(self) -> int:
        """Blocks of output channels of a group."""
        return -(-self.k // self.knobs.channel_block)

    @property
    def position_pitch(self) -> int:
        """Floats between the positions of V: one line more than their data, so that they fall into different L1 sets."""
        return self.groups * self.c * self.tiles + LINE

    @property
    def channel_pitch(self) -> int:
        """Floats between the output channels of M."""
        return self.positions * self.tiles + LINE

    @property
    def product_size(self) -> int:
        """Floats of M of one block of output channels."""
        return self.knobs.channel_block * self.channel_pitch

    @property
    def workspace(self) -> int:
        """Floats of V, and of M for every block of output channels: blocks may run in parallel."""
        return self.positions * self.position_pitch + self.groups * self.channel_blocks * self.product_size


@dataclass(frozen=True)
class Ahead:
    """Lines of ``buffer`` that the row groups of a position fetch into L2, ``lines`` each, the first group from ``at``."""

    buffer: Any
    at: Any
    lines: int


class Body:
    """Emits the loops of one kernel; holds the buffers."""

    def __init__(self, gemm: WinogradGemm, target: CpuTarget) -> None:
        self.gemm, self.knobs, self.target = gemm, gemm.knobs, target
        self.lanes = gemm.knobs.lanes
        self.f = matrices.transform(gemm.m, gemm.r)
        self.src = B.arg("src", B.Buffer((gemm.src.size,), "float32"))
        rows = gemm.groups * gemm.channel_blocks * gemm.positions * gemm.knobs.channel_block
        if gemm.knobs.dense:
            self.data = B.arg("data", B.Buffer((rows * gemm.c,), "float32"))
        else:
            # The number of entries is symbolic: layers of one shape share a kernel whatever their sparsity.
            entries = B.int64()
            self.ip = B.arg("ip", B.Buffer((rows // gemm.knobs.rows + 1,), "int32"))
            self.off = B.match_buffer(B.arg("off_p", B.handle()), (entries,), "int32")
            self.data = B.match_buffer(B.arg("data_p", B.handle()), (entries * gemm.knobs.rows,), "float32")
        self._place()
        channels = range(gemm.epilogue.channels)
        self.consts = {f"c{i}": B.arg(f"c{i}", B.Buffer((gemm.groups * gemm.k,), "float32")) for i in channels}
        self.tensors = [(s, B.arg(f"t{i + 1}", B.Buffer((s.size,), "float32"))) for i, s in enumerate(gemm.tensors)]
        self.out = B.arg("out", B.Buffer((gemm.dst.size,), "float32"))
        self.work = B.arg("work", B.Buffer((gemm.workspace,), "float32"))

    def _place(self) -> None:
        """The arguments that say where tiles lie."""
        gemm = self.gemm
        total = gemm.blocks * gemm.knobs.vectors
        runs = total * gemm.segments
        self.rows_in = B.arg("rows_in", B.Buffer((runs * gemm.tile,), "int32"))
        self.rows_out = B.arg("rows_out", B.Buffer((runs * gemm.m,), "int32"))
        self.cut = self.width = self.live = None
        if gemm.cut_rows:
            self.live = B.arg("live", B.Buffer((runs * gemm.tile,), "int32"))
        if gemm.cut_columns:
            self.cut = B.arg("cut", B.Buffer((total * (gemm.m - 1) * self.lanes,), "int32"))
            self.width = B.arg("width", B.Buffer((runs,), "int32"))

    def emit(self) -> None:
        gemm = self.gemm
        steps = self.knobs.vectors // self.knobs.together
        with B.serial(0, gemm.blocks) as block:
            with B.parallel(0, gemm.groups * gemm.c) as c, loop(self.knobs.vectors) as v:
                self._input(block, c, v)
            with B.parallel(0, gemm.groups * gemm.channel_blocks) as b:
                part = B.bind(gemm.positions * gemm.position_pitch + b * gemm.product_size)
                with loop(gemm.positions) as p:
                    self._product(b, p, part, steps)
                first = B.bind(B.floormod(b, gemm.channel_blocks) * self.knobs.channel_block)
                count = B.bind(B.min(gemm.k - first, self.knobs.channel_block))
                with B.serial(0, count) as i:
                    k = B.bind(B.floordiv(b, gemm.channel_blocks) * gemm.k + first + i)
                    if gemm.dst.layout.zero_halo:
                        with B.If(block == 0), B.Then():
                            self._zero_gaps(k)
                    with loop(self.knobs.vectors) as v:
                        self._output(block, k, v, B.bind(part + i * gemm.channel_pitch))

    # -- input -----------------------------------------------------------------------------------------------------
    def _chunks(self, buffer: Any, table: Any, first: Any, step: int, base: Any) -> list[Any]:
        """m vectors of consecutive pixels, tile after tile, of the runs from ``first`` on, at ``base`` + their address."""
        gemm = self.gemm
        width = self.knobs.segment * gemm.m
        per_chunk = self.lanes // width
        loads = []
        for i in range(gemm.segments):
            at = first + i * step
            mask = None
            if self.live is not None:
                mask = B.get_active_lane_mask(f"uint1x{width}", B.int32(0), self.live[at])
            loads.append(vector(buffer, base + table[at], width, mask))
        return [concat(loads[i : i + per_chunk], self.lanes) for i in range(0, gemm.segments, per_chunk)]

    def _input(self, block: Any, c: Any, v: Any) -> None:
        """V[:, c, v] of a block."""
        gemm, t, m, lanes = self.gemm, self.gemm.tile, self.gemm.m, self.lanes
        group = B.bind(block * self.knobs.vectors + v)
        base = B.bind(gemm.src.base + c * gemm.src.layout.c_pitch)
        inside = {}
        if self.cut is not None:
            for j in range(gemm.r, t):
                mask = vector(self.cut, (group * (m - 1) + j - gemm.r) * lanes, lanes)
                inside[j] = mask != B.Broadcast(B.int32(0), lanes)
        lines = []
        for i in range(t):
            pixels: list[Any] = []
            for shift in range(0, t, m):
                first = group * gemm.segments * t + i
                pixels += deinterleave(self._chunks(self.src, self.rows_in, first, t, base + shift), lanes)
            zero = broadcast(B.float32(0), lanes)
            pixels = [B.bind(B.Select(inside[j], x, zero)) if j in inside else x for j, x in enumerate(pixels[:t])]
            lines.append(transform(self.f.bt, pixels, lanes))
        at = self._vector_of(c, v)
        for j in range(t):
            for i, value in enumerate(transform(self.f.bt, [line[j] for line in lines], lanes)):
                store(self.work, value, at + (i * t + j) * gemm.position_pitch, lanes)

    def _vector_of(self, c: Any, v: Any) -> Any:
        """Where V of channel ``c`` and vector ``v`` of a block lies, from the beginning of a position."""
        gemm, together = self.gemm, self.knobs.together
        step, rest = (0, v) if together == self.knobs.vectors else (B.floordiv(v, together), B.floormod(v, together))
        return B.bind((step * gemm.groups * gemm.c + c) * gemm.width + rest * self.lanes)

    # -- products --------------------------------------------------------------------------------------------------
    def _product(self, b: Any, p: Any, part: Any, steps: Any) -> None:
        """M of all output channels of block ``b`` at position ``p``, of the first ``steps`` * together vectors."""
        gemm, knobs, lanes = self.gemm, self.knobs, self.lanes
        position = B.bind(p * gemm.position_pitch + B.floordiv(b, gemm.channel_blocks) * gemm.c * gemm.width)
        groups = knobs.channel_block // knobs.rows
        first = B.bind((b * gemm.positions + p) * groups)
        ahead = self._ahead(b, p, groups)
        with loop(steps) as step, loop(groups) as g:
            own = B.bind(position + step * (gemm.groups * gemm.c * gemm.width))
            count = knobs.together * knobs.unroll
            acc = [B.alloc_buffer((count * lanes,), "float32") for _ in range(knobs.rows)]
            for i in range(knobs.rows):
                for v in range(count):
                    store(acc[i], broadcast(B.float32(0), lanes), v * lanes, lanes)

            def step_entry(u: int, weight: Any, at: Any, acc: Any = acc) -> None:
                """Multiply-adds of one entry: ``weight`` of row 0 in the data, ``at`` in V."""
                weights = [B.bind(self.data[weight + i]) for i in range(knobs.rows)]
                for v in range(knobs.together):
                    x = B.bind(vector(self.work, at + v * lanes, lanes))
                    for i in range(knobs.rows):
                        where = (u * knobs.together + v) * lanes
                        total = vector(acc[i], where, lanes) + broadcast(weights[i], lanes) * x
                        store(acc[i], total, where, lanes)

            if knobs.dense:
                start = B.bind((first + g) * (gemm.c * knobs.rows))
                with loop(gemm.c) as c:
                    fetch(self.data, start + c * knobs.rows + DENSE_AHEAD)
                    for a in ahead:
                        line = g * a.lines + B.floordiv(c * a.lines, gemm.c)
                        fetch(a.buffer, a.at + line * LINE, l1=False)
                    step_entry(0, start + c * knobs.rows, own + c * gemm.width)
            else:
                low = B.bind(self.ip[first + g])
                turns = B.bind(B.floordiv(self.ip[first + g + 1] - low, knobs.unroll))
                for a in ahead:
                    for i in range(a.lines):
                        fetch(a.buffer, a.at + (g * a.lines + i) * LINE, l1=False)
                fetch(self.off, low + CSR_AHEAD)
                fetch(self.data, (low + CSR_AHEAD) * knobs.rows)
                with B.serial(0, turns) as s:
                    for u in range(knobs.unroll):
                        e = low + s * knobs.unroll + u
                        step_entry(u, e * knobs.rows, own + self.off[e])
            for i in range(knobs.rows):
                to = B.bind(part + (g * knobs.rows + i) * gemm.channel_pitch + p * gemm.tiles + step * gemm.width)
                for v in range(knobs.together):
                    sums = [vector(acc[i], (u * knobs.together + v) * lanes, lanes) for u in range(knobs.unroll)]
                    while len(sums) > 1:  # unroll is a power of two
                        sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
                    store(self.work, sums[0], to + v * lanes, lanes)

    def _ahead(self, b: Any, p: Any, groups: int) -> list[Ahead]:
        """What the products of block ``b`` of output channels at position ``p``, of ``groups`` row groups, fetch."""
        return []

    # -- output ----------------------------------------------------------------------------------------------------
    def _output(self, block: Any, k: Any, v: Any, at: Any) -> None:
        """Pixels of output channel ``k`` of a vector of tiles; its M begins at ``at``."""
        gemm, t, m, lanes = self.gemm, self.gemm.tile, self.gemm.m, self.lanes
        run = B.bind((block * self.knobs.vectors + v) * gemm.segments)
        lines = []
        for j in range(t):
            column = [B.bind(vector(self.work, at + (i * t + j) * gemm.tiles + v * lanes, lanes)) for i in range(t)]
            lines.append(transform(self.f.at, column, lanes))
        # The last row first: rows outside of the image lead to the last one inside, which then overwrites them.
        for r in reversed(range(m)):
            for q, value in enumerate(interleave(transform(self.f.at, [line[r] for line in lines], lanes), lanes)):
                self._store(run, k, r, q, value)

    def _store(self, run: Any, k: Any, r: int, q: int, value: Any) -> None:
        """Epilogue and store of chunk ``q`` (a vector of consecutive pixels) of row ``r`` of the tiles."""
        gemm, m, lanes = self.gemm, self.gemm.m, self.lanes
        width = self.knobs.segment * m
        per_chunk = lanes // width
        first = run + q * per_chunk
        at = [B.bind(self.rows_out[(first + i) * m + r]) for i in range(per_chunk)]
        operands = {"t0": value, **{name: broadcast(b[k], lanes) for name, b in self.consts.items()}}
        for i, (slot, buffer) in enumerate(self.tensors):
            base = slot.base + k * slot.layout.c_pitch
            operands[f"t{i + 1}"] = concat([vector(buffer, base + a, width) for a in at], lanes)
        result = gemm.epilogue.evaluate(operands, lanes)
        if per_chunk > 1:
            result = B.bind(result)
        origin = gemm.dst.base + k * gemm.dst.layout.c_pitch
        for i, a in enumerate(at):
            piece = result if per_chunk == 1 else shuffle([result], range(i * width, (i + 1) * width))
            mask = None
            if self.width is not None:
                mask = B.get_active_lane_mask(f"uint1x{width}", B.int32(0), self.width[first + i])
            store(self.out, piece, origin + a, width, mask)

    def _zero_gaps(self, k: Any) -> None:
        """Everything of output channel ``k`` that is not a pixel."""
        lay = self.gemm.dst.layout
        Pixels(lay, self.gemm.dst.base, self.out, self.target).zero_outside(k)
        gap = lay.row_pitch - lay.w
        if gap:
            with loop(lay.n) as n, loop(lay.h) as y:
                at = B.bind(self.gemm.dst.base + k * lay.c_pitch + n * lay.n_pitch + y * lay.row_pitch + lay.w)
                for i in range(gap):
                    B.buffer_store(self.out, B.float32(0), [at + i])


def emit(gemm: WinogradGemm, target: CpuTarget) -> Any:
    """PrimFunc: src, (ip, off unless dense,) data, rows_in, rows_out, (live,) (cut, width,) c0.., t1.., out, work; all flat.
    Interleaved layouts have a ``band`` (``interleaved.Band``) in place of the tables.

    ``rows_in`` int32[runs * t], ``rows_out`` int32[runs * m]: first pixel of each row of each run of tiles, relative to
    pixel 0 of a channel; ``live`` int32[runs * t]: pixels of such a row that are loaded; ``cut`` int32[vectors, m - 1,
    lanes]: nonzero where column r, r + 1, ... of a tile is inside of the padded image; ``width`` int32[runs]: pixels of a
    run that exist; ``work`` f32[workspace]: scratch.
    """
    from .winograd_interleaved import InterleavedBody

    with IRBuilder() as ib, B.prim_func(s_tir=True):
        kernel_attrs()
        (InterleavedBody if gemm.interleaved else Body)(gemm, target).emit()
    return finish(ib)
