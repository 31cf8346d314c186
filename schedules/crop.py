"""Parts of images: windows of a tensor, side by side as channels if there are several, and windows among zeros.

A convolution of wide dilation on few pixels is 1x1 convolutions over such windows (``relay_passes/dilated_conv.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as B

from ..errors import InternalError
from ..layout import Layout
from ..target import CpuTarget
from .rows import View, build, channels_of, fill, load, pieces, store, zero_halo


@dataclass(frozen=True)
class CropWorkload:
    """Channel t * C + c of the result is the window of source channel c (of C) that begins at pixel ``starts[t]``."""

    starts: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        return f"{len(self.starts)} window{'s' if len(self.starts) > 1 else ''} from " + ", ".join(
            f"{y},{x}" for y, x in self.starts[:4]
        ) + (", ..." if len(self.starts) > 4 else "")

    def shifts(self, src: Layout) -> list[int]:
        """Floats from the first pixel of a source channel to each window."""
        return [y * src.row_pitch + x for y, x in self.starts]


def emit_crop(
    workload: CropWorkload,
    src: Layout,
    dst: Layout,
    *,
    src_size: int,
    dst_size: int,
    src_channel: int = 0,
    dst_channel: int = 0,
    target: CpuTarget,
) -> Any:
    """PrimFunc(src f32[src_size], shift int32[windows], dst f32[dst_size]), ``shift`` as of ``CropWorkload.shifts``, so that
    windows of one size share code. Raises InternalError if a window leaves the source or a slice does not fit."""
    windows = len(workload.starts)
    inside = all(0 <= y <= src.h - dst.h and 0 <= x <= src.w - dst.w for y, x in workload.starts)
    if (src.n, src.c * windows) != (dst.n, dst.c) or not inside:
        raise InternalError(f"{workload} of {src} is not {dst}")

    def body(x_buffer: Any, shift: Any, y_buffer: Any) -> None:
        x, y = View(src, src_size, src_channel, x_buffer), View(dst, dst_size, dst_channel, y_buffer)
        with channels_of(dst) as (c, n):
            from_at = B.bind(x.at(n, B.floormod(c, src.c), 0, 0) + shift[B.floordiv(c, src.c)])
            to_at = B.bind(y.at(n, c, 0, 0))
            with B.serial(0, dst.h) as row:
                begin, goal = B.bind(from_at + row * src.row_pitch), B.bind(to_at + row * dst.row_pitch)
                copied = lambda k, width: store(y_buffer, goal + k, width, load(x_buffer, begin + k, width))
                pieces(dst.w, target.lanes, copied)
            zero_halo(y, n, c, target.lanes)

    args = [("src", src_size, "float32"), ("shift", windows, "int32"), ("dst", dst_size, "float32")]
    return build(args, body)


@dataclass(frozen=True)
class PadWorkload:
    """The source is the window of the result that begins at pixel (``top``, ``left``); zeros lie around it."""

    top: int
    left: int

    def __str__(self) -> str:
        return f"pad from {self.top},{self.left}"


def emit_pad(
    workload: PadWorkload,
    src: Layout,
    dst: Layout,
    *,
    src_size: int,
    dst_size: int,
    src_channel: int = 0,
    dst_channel: int = 0,
    target: CpuTarget,
) -> Any:
    """PrimFunc(src f32[src_size], dst f32[dst_size]). Raises InternalError if the source leaves the result or a slice does
    not fit."""
    top, left = workload.top, workload.left
    right = dst.w - left - src.w
    if (src.n, src.c) != (dst.n, dst.c) or top < 0 or left < 0 or right < 0 or top + src.h > dst.h:
        raise InternalError(f"{workload} of {src} is not {dst}")
    lanes = target.lanes

    def body(x_buffer: Any, y_buffer: Any) -> None:
        x, y = View(src, src_size, src_channel, x_buffer), View(dst, dst_size, dst_channel, y_buffer)

        def zero_rows(first: int, count: int, c: Any, n: Any) -> None:
            if count:
                with B.serial(0, count) as row:
                    fill(y_buffer, B.bind(y.at(n, c, first + row, 0)), dst.w, lanes)

        with channels_of(dst) as (c, n):
            zero_rows(0, top, c, n)
            with B.serial(0, src.h) as row:
                begin, goal = B.bind(x.at(n, c, row, 0)), B.bind(y.at(n, c, top + row, 0))
                fill(y_buffer, goal, left, lanes)
                copied = lambda k, width: store(y_buffer, goal + left + k, width, load(x_buffer, begin + k, width))
                pieces(src.w, lanes, copied)
                fill(y_buffer, goal + left + src.w, right, lanes)
            zero_rows(top + src.h, dst.h - top - src.h, c, n)
            zero_halo(y, n, c, lanes)

    return build([("src", src_size, "float32"), ("dst", dst_size, "float32")], body)
