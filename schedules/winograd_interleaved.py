"""Winograd convolution of interleaved images: a vector is one pixel of a tile of 16 images, so that nothing is shuffled.

The stages are those of ``winograd.py``. A block is a run of tiles, row after row of tiles of a band; a tile is t x t aligned
vectors, its outputs are m x m of them. Strided convolutions read the pixels of a phase where they lie.

The products leave memory idle while the transforms would wait for it, so that they fetch what the next block reads and
what this one writes (one line a row group; bursts of prefetches are dropped).

F(4x4,3x3) on Zen 4, one thread, source and result in cache, against the direct interleaved kernel with as many zeros: at 90%
zeros 1.7 times as fast for 64x56x56, 1.8 for 128x28x28 and 256x14x14, 1.6 for 512x7x7; dense 3.3, 3.4, 2.7 and 2.6 times.
From memory at 90% zeros 1.6, 1.8, 1.7 and 1.5 times. A channel of a tile takes 185 cycles to transform (150 to 216 by the
lines that pass between L1 and L2: 36 each way), the sparse products 1.5 to 1.8 cycles a multiply-add (1 by loads from L1),
the dense ones 1.1 to 1.2.
"""

from __future__ import annotations

import math
from typing import Any

from tvm.script.ir_builder import tirx as B

from ..layout import LINE, Layout
from .emit import broadcast, loop, parallel, store, streams, vector, write
from .interleaved import Band
from .pointwise import Slot
from .winograd import Ahead, Body
from .winograd_math import transform

PIECES = 4  # of the channels of a tile, whose transforms may run in parallel


class InterleavedBody(Body):
    """Emits the loops of one kernel for a band of rows, which begins with a row of tiles and ends with one or with the
    image."""

    def _place(self) -> None:
        gemm = self.gemm
        self.slots = (gemm.src, *gemm.tensors, gemm.dst)
        self.band = Band(self.slots)

    def emit(self) -> None:
        gemm, knobs, lay = self.gemm, self.knobs, self.gemm.dst.layout
        self.band.start(self.out)
        self.down, self.across = -(-lay.h // gemm.m), -(-lay.w // gemm.m)
        begin, end = self._tile_row(self.band.first), self._tile_row(self.band.first + self.band.rows - 1)
        first = B.bind(begin * self.across)
        total = B.bind((end - begin + 1) * self.across)
        assert gemm.taps is not None
        phases = gemm.taps.strides[0] * gemm.taps.strides[1]
        channels = gemm.groups * gemm.c // phases
        piece = -(-channels // PIECES)
        pieces = -(-channels // piece)
        with B.serial(0, B.floordiv(total + (knobs.vectors - 1), knobs.vectors)) as block:
            start = B.bind(first + block * knobs.vectors)
            count = B.bind(B.min(first + total - start, knobs.vectors))
            steps = B.bind(B.floordiv(count + (knobs.together - 1), knobs.together))
            with B.parallel(0, steps * (knobs.together * phases * pieces)) as i:
                v = B.bind(B.floordiv(i, phases * pieces))
                phase = B.bind(B.floormod(B.floordiv(i, pieces), phases)) if phases > 1 else 0
                low = B.bind(B.floormod(i, pieces) * piece)
                # Surplus vectors repeat the last tile.
                tile = B.bind(start + B.min(v, count - 1))
                self._tile_input(tile, v, phase, low, B.bind(B.min(channels - low, piece)))
            self.start, self.following = start, B.bind(B.min(start + knobs.vectors, first + total - 1))
            with parallel(gemm.groups * gemm.channel_blocks, lay) as b:
                part = B.bind(gemm.positions * gemm.position_pitch + b * gemm.product_size)
                with loop(gemm.positions) as p:
                    self._product(b, p, part, steps)
                low = B.bind(B.floormod(b, gemm.channel_blocks) * knobs.channel_block)
                k = B.bind(self._first(b))
                with B.serial(0, count) as v:
                    self._tile_output(
                        start + v, k, B.bind(B.min(gemm.k - low, knobs.channel_block)), part + v * self.lanes
                    )

    def _ahead(self, b: Any, p: Any, groups: int) -> list[Ahead]:
        """The pixels that the next block is the first to read, spread over all products of this one, and those that this
        block of output channels is about to write: the products leave memory idle, the transforms would wait for it."""
        gemm, knobs, taps = self.gemm, self.knobs, self.gemm.taps
        assert taps is not None
        src, dst, (sy, sx) = gemm.src.layout, gemm.dst.layout, taps.strides
        n, y, x = self._at(self.following)
        row, column = (y - taps.above[0]) * sy, (x - taps.above[1] + gemm.r - 1) * sx
        new = B.bind(gemm.src.base + self.band.shift(0) + n * src.n_pitch + row * src.row_pitch + column * src.x_pitch)
        turns = gemm.positions * gemm.groups * gemm.channel_blocks
        channels = gemm.groups * gemm.c // (sy * sx)
        shape = gemm.tile * sy, gemm.m * knobs.vectors * sx
        found = self._share(self.src, new, src, shape, channels, b * gemm.positions + p, turns, groups)
        if streams(dst):
            return found
        n, y, x = self._at(self.start)
        own = B.bind(gemm.dst.base + self.band.shift(-1) + n * dst.n_pitch + y * dst.row_pitch + x * dst.x_pitch)
        shape = gemm.m, gemm.m * knobs.vectors
        k = self._first(b) * self.lanes
        found += self._share(self.out, own + k, dst, shape, knobs.channel_block, p, gemm.positions, groups)
        return found

    def _share(
        self,
        buffer: Any,
        at: Any,
        lay: Layout,
        shape: tuple[int, int],
        channels: int,
        turn: Any,
        turns: int,
        groups: int,
    ) -> list[Ahead]:
        """What turn ``turn`` of ``turns`` fetches of ``channels`` of the rows x columns pixels from ``at``: some pixels, or
        a part of one."""
        pixels, found = math.prod(shape), []
        each, parts = -(-pixels // turns), max(1, turns // pixels)
        piece = -(-channels // parts)
        for i in range(each):
            pixel = B.bind(B.min(B.floordiv(turn, parts) * each + i, pixels - 1))
            place = B.floordiv(pixel, shape[1]) * lay.row_pitch + B.floormod(pixel, shape[1]) * lay.x_pitch
            lines = -(-piece * self.lanes // (LINE * groups))
            found.append(Ahead(buffer, B.bind(at + place + B.floormod(turn, parts) * (piece * self.lanes)), lines))
        return found

    def _first(self, b: Any) -> Any:
        """First output channel of block ``b``, counted over all groups."""
        gemm = self.gemm
        low = B.floormod(b, gemm.channel_blocks) * self.knobs.channel_block
        return B.floordiv(b, gemm.channel_blocks) * gemm.k + low

    def _tile_row(self, row: Any) -> Any:
        """Row of tiles, counted over all vectors of images, that ``row`` lies in."""
        height = self.gemm.dst.layout.h
        return B.bind(B.floordiv(row, height) * self.down + B.floordiv(B.floormod(row, height), self.gemm.m))

    def _at(self, tile: Any) -> tuple[Any, Any, Any]:
        """Vector of images, row and column of the first output pixel of ``tile``."""
        y = B.bind(B.floordiv(tile, self.across))
        x = B.bind(B.floormod(tile, self.across) * self.gemm.m)
        return B.bind(B.floordiv(y, self.down)), B.bind(B.floormod(y, self.down) * self.gemm.m), x

    def _input_lines(self, tile: Any, phase: tuple[Any, Any]) -> tuple[list[tuple[Any, Any]], list[tuple[Any, Any]]]:
        """Addresses of the rows of a tile of a phase in the source, and of its columns relative to them; with each, how many
        lanes to load where it may lie outside of the padding (else None). What lies outside is led to the last row or
        column inside, which is padding if there is any; so is what only phases of fewer taps reach."""
        gemm, lay = self.gemm, self.gemm.src.layout
        n, y, x = self._at(tile)
        base = B.bind(gemm.src.base + n * lay.n_pitch + self.band.shift(0))
        d = gemm.dst.layout
        rows = self._axis(0, y, d.h, lay.h, phase[0])
        columns = self._axis(1, x, d.w, lay.w, phase[1])
        return (
            [(B.bind(base + at * lay.row_pitch), count) for at, count in rows],
            [(B.bind(at * lay.x_pitch), count) for at, count in columns],
        )

    def _axis(self, axis: int, start: Any, out: int, size: int, phase: Any) -> list[tuple[Any, Any]]:
        """(row or column of the input, lanes to load or None) of each pixel of the tile whose first output is ``start``, of
        ``out``; the image has ``size``."""
        gemm, taps = self.gemm, self.gemm.taps
        assert taps is not None
        stride, before, end, found = taps.strides[axis], taps.before[axis], taps.ends[axis], []
        low, reach = start * stride - before, (gemm.m - 1) * stride + taps.kernel[axis]
        for i in range(gemm.tile):
            at, count = (start + (i - taps.above[axis])) * stride + phase, None
            if stride > 1:
                at = B.max(B.min(at, low + (reach - 1)), low)
            if out % gemm.m and i >= gemm.r:
                if end == size and stride == 1:
                    count = B.bind(B.Select(at < end, B.int32(self.lanes), B.int32(0)))
                at = B.min(at, end - 1)
            elif stride > 1:
                at = B.min(at, end - 1)
            found.append((at, count))
        return found

    def _pixel(self, row: tuple[Any, Any], column: tuple[Any, Any], skip: Any) -> Any:
        counts = [n for _, n in (row, column) if n is not None]
        mask = None
        if counts:
            count = counts[0] if len(counts) == 1 else B.min(*counts)
            mask = B.get_active_lane_mask(f"uint1x{self.lanes}", B.int32(0), count)
        return B.bind(vector(self.src, row[0] + column[0] + skip, self.lanes, mask))

    def _within(self, first: Any, i: int, size: int) -> Any:
        """Output row or column ``first`` + i, at most the last of ``size``."""
        return first + i if size % self.gemm.m == 0 else B.min(first + i, size - 1)

    def _tile_input(self, tile: Any, v: Any, phase: Any, low: Any, count: Any) -> None:
        """V[:, c, v] of a phase of ``count`` channels from ``low``."""
        gemm, t, lanes = self.gemm, self.gemm.tile, self.lanes
        assert gemm.taps is not None
        (sy, sx), place = gemm.taps.strides, (phase, 0)
        if sx > 1:
            place = B.bind(B.floordiv(phase, sx)), B.bind(B.floormod(phase, sx))
        rows, columns = self._input_lines(tile, place)
        with B.serial(0, count) as i:
            c = B.bind(low + i)
            lines = []
            for row in rows:
                pixels = [self._pixel(row, column, c * gemm.src.layout.c_pitch) for column in columns]
                lines.append(transform(self.f.bt, pixels, lanes))
            at = self._vector_of(c * (sy * sx) + phase, v)
            for j in range(t):
                for r, value in enumerate(transform(self.f.bt, [line[j] for line in lines], lanes)):
                    store(self.work, value, at + (r * t + j) * gemm.position_pitch, lanes)

    def _tile_output(self, tile: Any, first: Any, count: Any, at: Any) -> None:
        """Pixels of ``count`` output channels from ``first`` of a tile, whose M begins at ``at``."""
        gemm, t, m, lanes = self.gemm, self.gemm.tile, self.gemm.m, self.lanes
        n, y, x = self._at(tile)
        h, w = gemm.dst.layout.h, gemm.dst.layout.w

        def lines(slot: Slot, index: int) -> tuple[list[Any], list[Any]]:
            lay = slot.layout
            base = B.bind(slot.base + n * lay.n_pitch + self.band.shift(index))
            rows = [B.bind(base + self._within(y, i, h) * lay.row_pitch) for i in range(m)]
            return rows, [B.bind(self._within(x, j, w) * lay.x_pitch) for j in range(m)]

        places = [lines(slot, i) for i, slot in enumerate(self.slots)][1:]
        with B.serial(0, count) as i:
            k = B.bind(first + i)
            start = B.bind(at + i * gemm.channel_pitch)
            columns = []
            for j in range(t):
                column = [B.bind(vector(self.work, start + (i * t + j) * gemm.tiles, lanes)) for i in range(t)]
                columns.append(transform(self.f.at, column, lanes))
            consts = {name: broadcast(b[k], lanes) for name, b in self.consts.items()}
            # The last pixel first: those outside of the image lead to the last one inside, which then overwrites them.
            for r in reversed(range(m)):
                values = transform(self.f.at, [column[r] for column in columns], lanes)
                for q in reversed(range(m)):
                    operands = {"t0": values[q], **consts}
                    spots = [rows[r] + cols[q] + k * lanes for rows, cols in places]
                    for j, (_, buffer) in enumerate(self.tensors):
                        operands[f"t{j + 1}"] = vector(buffer, spots[j], lanes)
                    write(self.out, gemm.epilogue.evaluate(operands, lanes), spots[-1], gemm.dst.layout, lanes)
