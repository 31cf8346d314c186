"""Parts of images: a window of a tensor, and a tensor as a window among zeros.

A convolution of wide dilation on few pixels is 1x1 convolutions over such windows (``relay_passes/dilated_conv.py``). The
kernels are copies, row by row.
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
    """The result is the window of the source that begins at pixel (``top``, ``left``)."""

    top: int
    left: int

    def __str__(self) -> str:
        return f"crop from {self.top},{self.left}"

    def shift(self, src: Layout) -> int:
        """Floats from the first pixel of a source channel to the window."""
        return self.top * src.row_pitch + self.left


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
    """PrimFunc(src f32[src_size], shift int32[1], dst f32[dst_size]), ``shift`` that of the workload, so that windows of one
    size share code. Raises InternalError if the window leaves the source or a slice does not fit."""
    inside = 0 <= workload.top <= src.h - dst.h and 0 <= workload.left <= src.w - dst.w
    if (src.n, src.c) != (dst.n, dst.c) or not inside:
        raise InternalError(f"{workload} of {src} is not {dst}")

    def body(x_buffer: Any, shift: Any, y_buffer: Any) -> None:
        x, y = View(src, src_size, src_channel, x_buffer), View(dst, dst_size, dst_channel, y_buffer)
        with channels_of(dst) as (c, n):
            with B.serial(0, dst.h) as row:
                begin, goal = B.bind(x.at(n, c, row, 0) + shift[0]), B.bind(y.at(n, c, row, 0))
                copied = lambda k, width: store(y_buffer, goal + k, width, load(x_buffer, begin + k, width))
                pieces(dst.w, target.lanes, copied)
            zero_halo(y, n, c, target.lanes)

    return build([("src", src_size, "float32"), ("shift", 1, "int32"), ("dst", dst_size, "float32")], body)


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
