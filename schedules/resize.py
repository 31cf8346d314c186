"""Nearest and bilinear resizing over H and W.

All of ONNX's coordinate and rounding modes are resolved here, in Python, into tables of source rows and columns (and
weights); the kernels read them as constant arguments. Whole-number enlargement, by far the most frequent use, needs
no column table: its columns are repeated by shuffles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as B

from ..errors import InternalError, UnsupportedWorkload
from ..layout import LINE, Layout, round_up
from ..target import CpuTarget
from .rows import Index, View, build, channels_of, load, pieces, splat, store, zero_halo

COORDINATES = ("half_pixel", "pytorch_half_pixel", "half_pixel_symmetric", "align_corners", "asymmetric")
NEAREST = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")


@dataclass(frozen=True)
class AxisTable:
    """Source positions of one output axis. Nearest: ``low`` alone; linear: low + weight * (high - low)."""

    low: tuple[int, ...]
    high: tuple[int, ...] = ()
    weight: tuple[float, ...] = ()


@dataclass(frozen=True)
class ResizeWorkload:
    """``rows`` and ``columns`` are both nearest or both linear tables."""

    rows: AxisTable
    columns: AxisTable

    @property
    def linear(self) -> bool:
        return bool(self.rows.weight)

    def constants(self) -> list[np.ndarray]:
        """The arguments between source and destination: rows' low (, high, weight), then the same for columns."""
        arrays: list[np.ndarray] = []
        for axis in (self.rows, self.columns):
            arrays.append(np.asarray(axis.low, np.int32))
            if self.linear:
                arrays += [np.asarray(axis.high, np.int32), np.asarray(axis.weight, np.float32)]
        return arrays

    def __str__(self) -> str:
        kind = "linear" if self.linear else "nearest"
        return f"resize {kind} to {len(self.rows.low)}x{len(self.columns.low)}"


def axis_table(
    size: int,
    out: int,
    scale: float | None = None,
    *,
    coordinates: str = "half_pixel",
    linear: bool = False,
    nearest: str = "round_prefer_floor",
) -> AxisTable:
    """Table of one axis of ``size`` pixels resized to ``out``; ``scale`` is ONNX's, by default out / size.

    Raises UnsupportedWorkload for modes that are not in COORDINATES and NEAREST.
    """
    if coordinates not in COORDINATES or nearest not in NEAREST:
        raise UnsupportedWorkload(f"Resize with coordinates '{coordinates}' and rounding '{nearest}' is not supported")
    f = np.float32  # as other runtimes: exact ties must fall to the same side, whatever their true value
    ratio = f(out) / f(size) if scale is None else f(scale)

    def source(i: int) -> float:
        if coordinates == "asymmetric":
            return float(f(i) / ratio)
        if coordinates == "align_corners":
            return float(f(i) * f(size - 1) / f(out - 1)) if out > 1 else 0.0
        if coordinates == "pytorch_half_pixel" and out == 1:
            return 0.0
        offset = f(0)
        if coordinates == "half_pixel_symmetric":
            offset = f(size) / f(2) * (f(1) - f(out) / (ratio * f(size)))
        return float(offset + (f(i) + f(0.5)) / ratio - f(0.5))

    def clamp(value: int) -> int:
        return min(max(value, 0), size - 1)

    positions = [source(i) for i in range(out)]
    if linear:
        inside = [min(max(p, 0.0), size - 1.0) for p in positions]
        low = tuple(clamp(math.floor(p)) for p in inside)
        return AxisTable(low, tuple(clamp(i + 1) for i in low), tuple(p - i for p, i in zip(inside, low, strict=True)))
    rounded = {
        "floor": math.floor,
        "ceil": math.ceil,
        "round_prefer_floor": lambda p: math.ceil(p - 0.5),
        "round_prefer_ceil": lambda p: math.floor(p + 0.5),
    }[nearest]
    return AxisTable(tuple(clamp(rounded(p)) for p in positions))


def emit_resize(
    workload: ResizeWorkload,
    src: Layout,
    dst: Layout,
    *,
    src_size: int,
    dst_size: int,
    src_channel: int = 0,
    dst_channel: int = 0,
    target: CpuTarget,
) -> Any:
    """Resize ``src`` to the extents of ``dst``.

    PrimFunc(src f32[src_size], *workload.constants(), dst f32[dst_size]). Raises InternalError if the tables do not fit
    the layouts, or a slice does not fit its buffer.
    """
    rows, columns = workload.rows, workload.columns
    extents = (len(rows.low), len(columns.low))
    if (src.n, src.c) != (dst.n, dst.c) or extents != (dst.h, dst.w):
        raise InternalError(f"{workload} does not turn {src} into {dst}")
    for axis, size in ((rows, src.h), (columns, src.w)):
        if not all(0 <= i < size for i in (*axis.low, *axis.high)):
            raise InternalError(f"{workload} reads outside of {src}")
    lanes = target.lanes

    def nearest(x_buffer: Any, row_low: Any, column_low: Any, y_buffer: Any) -> None:
        x, y = View(src, src_size, src_channel, x_buffer), View(dst, dst_size, dst_channel, y_buffer)
        factor = _repeats(columns.low, src.w)
        with channels_of(dst) as (c, n):
            with B.serial(0, dst.h) as i:
                from_at, to_at = x.at(n, c, row_low[i], 0), y.at(n, c, i, 0)
                if factor:
                    _repeat_row((x, from_at), (y, to_at), factor, lanes)
                else:
                    with B.serial(0, dst.w) as j:
                        store(y_buffer, to_at + j, 1, x_buffer[from_at + column_low[j]])
            zero_halo(y, n, c, lanes)

    def linear(x_buffer: Any, *rest: Any) -> None:
        row_low, row_high, row_weight, column_low, column_high, column_weight, y_buffer = rest
        x, y = View(src, src_size, src_channel, x_buffer), View(dst, dst_size, dst_channel, y_buffer)
        with channels_of(dst) as (c, n):
            row = B.alloc_buffer((round_up(src.w, LINE),), "float32")
            with B.serial(0, dst.h) as i:
                low_at, high_at = x.at(n, c, row_low[i], 0), x.at(n, c, row_high[i], 0)

                def blend(j: Index, width: int) -> None:
                    low = load(x_buffer, low_at + j, width)
                    high = load(x_buffer, high_at + j, width)
                    store(row, j, width, low + (high - low) * splat(row_weight[i], width))

                pieces(src.w, lanes, blend)
                to_at = y.at(n, c, i, 0)
                with B.serial(0, dst.w) as j:
                    low, high = row[column_low[j]], row[column_high[j]]
                    store(y_buffer, to_at + j, 1, low + (high - low) * column_weight[j])
            zero_halo(y, n, c, lanes)

    arguments = [("src", src_size, "float32")]
    for name, extent in zip(("row", "column"), extents, strict=True):
        arguments.append((f"{name}_low", extent, "int32"))
        if workload.linear:
            arguments += [(f"{name}_high", extent, "int32"), (f"{name}_weight", extent, "float32")]
    return build([*arguments, ("dst", dst_size, "float32")], linear if workload.linear else nearest)


def _repeats(columns: tuple[int, ...], w: int) -> int:
    """f if every source column is repeated f times in order (f up to 4), else 0."""
    factor = len(columns) // w
    exact = 0 < factor <= 4 and columns == tuple(j // factor for j in range(factor * w))
    return factor if exact else 0


def _repeat_row(source: tuple[View, Index], result: tuple[View, Index], factor: int, lanes: int) -> None:
    """One row with every pixel repeated ``factor`` times."""
    (x, from_at), (y, to_at) = source, result

    def piece(j: Index, width: int) -> None:
        value = load(x.buffer, from_at + j, width)
        for part in range(factor):
            lane = [B.int32((part * width + k) // factor) for k in range(width)]
            repeated = value if width == 1 or factor == 1 else B.Shuffle([value], lane)
            store(y.buffer, to_at + (j * factor + part * width), width, repeated)

    pieces(x.layout.w, lanes, piece)
