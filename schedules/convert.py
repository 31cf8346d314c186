"""Kernels that move activations between layouts: copies, channel gathers, and phase planes.

They are bound by memory. Measured on one Zen 4 thread in ResNet-50: the phases of 3x224x224 0.06 ms (20 GB/s read and
written; rows are short vectors with shuffles), of 128x56x56 0.09 ms (36 GB/s).
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as B

from ..errors import InternalError
from ..layout import Layout, Phases
from ..target import CpuTarget
from .rows import Index, View, build, channels_of, fill, flatten, load, pick, pieces, same_pixels, store, zero_halo

SHUFFLE_STEPS = 4  # up to this stride a row is de-interleaved by shuffles; beyond it most loaded lanes are unused


def emit_convert(
    src: Layout,
    dst: Layout,
    *,
    src_size: int,
    dst_size: int,
    src_channel: int = 0,
    dst_channel: int = 0,
    target: CpuTarget,
) -> Any:
    """Copy a tensor from one layout to another of the same logical shape.

    PrimFunc(src f32[src_size], dst f32[dst_size]). Raises InternalError if the shapes differ or a slice does not fit.
    """
    return emit_gather_channels(
        tuple(range(dst.c)),
        src,
        dst,
        src_size=src_size,
        dst_size=dst_size,
        src_channel=src_channel,
        dst_channel=dst_channel,
        target=target,
        _whole=True,
    )


def _runs(channels: tuple[int, ...]) -> list[tuple[int, int, int, int, int]]:
    """Cut a channel list into (start, count, period, step, stride): channels[start + i] for i < count is
    first + (i % period) * step + (i // period) * stride. A slice, a stride and a shuffle of groups are one run each."""
    result = []
    start = 0
    while start < len(channels):
        rest = channels[start:]
        step = rest[1] - rest[0] if len(rest) > 1 else 0
        period = 1
        while period < len(rest) and rest[period] == rest[0] + period * step:
            period += 1
        stride = rest[period] - rest[0] if period < len(rest) else 0
        count = period
        while count < len(rest) and rest[count] == rest[0] + count % period * step + count // period * stride:
            count += 1
        result.append((start, count, period, step, stride))
        start += count
    return result


def emit_gather_channels(
    channels: tuple[int, ...],
    src: Layout,
    dst: Layout,
    *,
    src_size: int,
    dst_size: int,
    src_channel: int = 0,
    dst_channel: int = 0,
    target: CpuTarget,
    _whole: bool = False,
) -> Any:
    """Channel i of ``dst`` becomes channel ``channels[i]`` of ``src``; channels may repeat or be left out.

    PrimFunc(src f32[src_size], dst f32[dst_size]). Raises InternalError for a channel that ``src`` does not have.
    """
    same_pixels(src, dst, channels=_whole)
    if len(channels) != dst.c or not all(0 <= c < src.c for c in channels):
        raise InternalError(f"gather of channels {channels[:8]}... does not fit {src.c} -> {dst.c} channels")
    flat_src, flat_dst = flatten(src, dst)
    lanes = target.lanes

    def body(x_buffer: Any, y_buffer: Any) -> None:
        x = View(flat_src, src_size, src_channel, x_buffer)
        y = View(flat_dst, dst_size, dst_channel, y_buffer)
        for start, count, period, step, stride in _runs(channels):
            with channels_of(flat_dst.with_channels(count)) as (i, n):
                c = i * step if period == count else B.floormod(i, period) * step + B.floordiv(i, period) * stride
                _copy_rows(x, y, n, (c + channels[start], i + start), lanes)
                zero_halo(y, n, i + start, lanes)

    return build((("src", src_size, "float32"), ("dst", dst_size, "float32")), body)


def _copy_rows(x: View, y: View, n: Index, channels: tuple[Index, Index], lanes: int) -> None:
    with B.serial(0, y.layout.h) as row:
        from_at, to_at = x.at(n, channels[0], row, 0), y.at(n, channels[1], row, 0)

        def piece(j: Index, width: int) -> None:
            store(y.buffer, to_at + j, width, load(x.buffer, from_at + j, width))

        pieces(y.layout.w, lanes, piece)


def emit_split_phases(
    phases: Phases,
    src: Layout,
    dst: Layout,
    *,
    src_size: int,
    dst_size: int,
    src_channel: int = 0,
    dst_channel: int = 0,
    target: CpuTarget,
) -> Any:
    """Space to depth: pixel (i, j) of channel ``c * len(phases.index) + p`` of ``dst`` is pixel
    (i * sy + py, j * sx + px) of channel c of ``src``, and 0 where ``src`` has no such pixel.

    PrimFunc(src f32[src_size], dst f32[dst_size]). Raises InternalError if the channel counts do not fit.
    """
    count = len(phases.index)
    if dst.c != src.c * count or dst.n != src.n:
        raise InternalError(f"{count} phases of {src} do not make {dst}")
    lanes, sy, sx = target.lanes, phases.sy, phases.sx

    def body(x_buffer: Any, y_buffer: Any) -> None:
        x, y = View(src, src_size, src_channel, x_buffer), View(dst, dst_size, dst_channel, y_buffer)
        with channels_of(src) as (c, n):
            for py in sorted({row for row, _ in phases.index}):
                planes = [(px, c * count + p) for p, (row, px) in enumerate(phases.index) if row == py]
                rows = max(0, min(dst.h, -(-(src.h - py) // sy)))
                if rows:
                    with B.serial(0, rows) as i:
                        from_at = x.at(n, c, i * sy + py, 0)
                        split_row(x, from_at, y, [(px, y.at(n, p, i, 0)) for px, p in planes], sx=sx, lanes=lanes)
                for _, plane in planes:
                    for i in range(rows, dst.h):
                        fill(y_buffer, y.at(n, plane, i, 0), dst.w, lanes)
            for p in range(count):
                zero_halo(y, n, c * count + p, lanes)

    return build((("src", src_size, "float32"), ("dst", dst_size, "float32")), body)


def split_row(x: View, from_at: Index, y: View, planes: list[tuple[int, Index]], *, sx: int, lanes: int) -> None:
    """The row at ``from_at`` to rows of the phases ``planes``: (column phase, address)."""
    w, out_w = x.layout.w, y.layout.w
    whole = min(out_w, w // sx)  # columns for which every phase has a pixel: vector loads stay inside of the row
    if sx > SHUFFLE_STEPS:
        for px, to_at in planes:
            columns = max(0, min(out_w, -(-(w - px) // sx)))
            if columns:
                with B.serial(0, columns) as j:
                    store(y.buffer, to_at + j, 1, x.buffer[from_at + (j * sx + px)])
            fill(y.buffer, to_at + columns, out_w - columns, lanes)
        return

    def piece(j: Index, width: int) -> None:
        vectors = [load(x.buffer, from_at + (j * sx + k * width), width) for k in range(sx)]
        for px, to_at in planes:
            store(y.buffer, to_at + j, width, pick(vectors, width, sx, px) if sx > 1 else vectors[0])

    pieces(whole, lanes, piece)
    for px, to_at in planes:
        columns = max(0, min(out_w, -(-(w - px) // sx)))
        for j in range(whole, columns):
            store(y.buffer, to_at + j, 1, x.buffer[from_at + (j * sx + px)])
        fill(y.buffer, to_at + columns, out_w - columns, lanes)
