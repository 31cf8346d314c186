"""The dense gather GEMM with output channels in the lanes: for small planes, whose rows would leave lanes without a pixel.

    acc[p][k .. k + 16] += data[e, k .. k + 16] * src[offset[e] + p]

An entry loads one or two vectors of weights and broadcasts each of the P pixels of a row segment from memory, so that no
lane is wasted whatever the width of the plane. Row groups are the outer loop: their weights stay in L2 while the pixels
pass. At the end squares of pixels and channels are transposed in registers, and the epilogue runs on rows of pixels.

Measured on Zen 4, one thread, batch 1, share of the practical peak of 118 GFLOP/s: 1x1 and 3x3 at 14x14 0.99, at 7x7 0.97
alone and 0.85-0.93 in ResNet-50, where the weights come from memory; other kernels of the family reach 0.85-0.95 there.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as B

from ..layout import LINE
from .emit import broadcast, fetch
from .gather_gemm import DENSE_AHEAD, Body, Run, Tile, span
from .rows import View, channels_of, load, zero_halo
from .rows import store as put


class AcrossBody(Body):
    """Loops: chunk of row groups in parallel, row group, row of pixels, segment of a row."""

    def emit(self) -> None:
        gemm, dst = self.gemm, self.gemm.dst
        if dst.layout.zero_halo:
            view = View(dst.layout, dst.size, dst.channel, self.out)
            with channels_of(dst.layout) as (c, n):
                zero_halo(view, n, c, self.lanes)
        tiles = sum(count for _, count, _ in gemm.tiles())
        self.segments = tiles * gemm.rows
        with B.parallel(0, gemm.knobs.chunks) as chunk:
            for r in self.runs:
                at = r.index * (gemm.knobs.chunks + 1) + chunk
                with span(self.cut[at], self.cut[at + 1]) as g, B.serial(0, gemm.rows) as row:
                    done = 0
                    for first, count, pixels in gemm.tiles():
                        with B.serial(0, count) as tile:
                            q = Tile(gemm, row, first + tile * pixels)
                            self._segment(r, B.bind(g), q, row * tiles + (done + tile), pixels)
                        done += count

    def _segment(self, r: Run, g: Any, q: Tile, number: Any, pixels: int) -> None:
        gemm, lanes, run = self.gemm, self.lanes, r.run
        row = B.bind(run.first + g * run.rows)
        # (first channel, channels) of each vector; a last group of fewer rows fills a part of one
        parts = [(k, min(lanes, run.rows - k)) for k in range(0, run.rows, lanes)]
        acc = [B.alloc_buffer((pixels * width,), "float32") for _, width in parts]
        for a, (k, width) in zip(acc, parts, strict=True):
            zero = broadcast(B.float32(0), width)
            first = load(self.consts[self.bias], row + k, width) if self.bias else zero
            for p in range(pixels):
                put(a, p * width, width, first)
        base = B.bind(gemm.src.base + q.at(0) + B.floordiv(row, gemm.group_rows) * gemm.group_step)
        skip = B.bind(g * run.columns)
        # This segment's share of the next row group's weights, which come from memory while these are in L2.
        ahead = B.bind((skip + run.columns) * run.rows + number * (run.columns * run.rows // self.segments))
        with B.serial(0, run.columns) as e:
            fetch(r.data, (skip + e) * run.rows + DENSE_AHEAD * LINE)
            fetch(r.data, ahead + B.floordiv(e * run.rows, self.segments), l1=False)
            at = B.bind(base + r.off[e])
            weights = [B.bind(load(r.data, (skip + e) * run.rows + k, width)) for k, width in parts]
            for p in range(pixels):
                x = B.bind(self.src[at + p])
                for a, w, (_, width) in zip(acc, weights, parts, strict=True):
                    put(a, p * width, width, load(a, p * width, width) + broadcast(x, width) * w)
        for a, (k, width) in zip(acc, parts, strict=True):
            self._store_square(row + k, q, [load(a, p * width, width) for p in range(pixels)], width)
