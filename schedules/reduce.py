"""Reductions over all pixels of a channel: global average and global maximum pooling."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as B

from ..errors import InternalError
from ..layout import Layout, natural
from ..target import CpuTarget
from .rows import Index, View, build, channels_of, flatten, load, splat, store, width_of, zero_halo

ACCUMULATORS = 4  # independent sums: an addition takes 3 to 4 cycles, and one vector a cycle can be loaded


def emit_global_pool(
    kind: str,
    src: Layout,
    dst: Layout,
    *,
    src_size: int,
    dst_size: int,
    src_channel: int = 0,
    dst_channel: int = 0,
    target: CpuTarget,
) -> Any:
    """Mean ("avg") or maximum ("max") over H and W; ``dst`` has one pixel (``natural(n, c, 1, 1)`` is f32[N, C]).

    PrimFunc(src f32[src_size], dst f32[dst_size]). Raises InternalError if the layouts do not fit together.
    """
    if (src.n, src.c, 1, 1) != (dst.n, dst.c, dst.h, dst.w) or kind not in ("avg", "max"):
        raise InternalError(f"global {kind} pooling cannot turn {src} into {dst}")
    View(src, src_size, src_channel)
    (flat,) = flatten(src)

    def body(x_buffer: Any, y_buffer: Any) -> None:
        x, y = View(flat, src_size, src_channel, x_buffer), View(dst, dst_size, dst_channel, y_buffer)
        with channels_of(dst) as (c, n):
            value = _channel(kind, x, n, c, target.lanes)
            store(y_buffer, y.at(n, c, 0, 0), 1, value)
            zero_halo(y, n, c, target.lanes)

    return build((("src", src_size, "float32"), ("dst", dst_size, "float32")), body)


def emit_global_avg_pool(src: Layout, *, src_size: int, dst_size: int, src_channel: int = 0, target: CpuTarget) -> Any:
    """Mean over H and W to natural f32[N, C]: PrimFunc(src f32[src_size], dst f32[dst_size])."""
    dst = natural(src.n, src.c, 1, 1)
    return emit_global_pool(
        "avg", src, dst, src_size=src_size, dst_size=dst_size, src_channel=src_channel, target=target
    )


def _channel(kind: str, x: View, n: Index, c: Index, lanes: int) -> Any:
    """Scalar mean or maximum of one (image, channel)."""
    lay = x.layout
    width = width_of(lay.w, lanes)
    identity = 0.0 if kind == "avg" else float("-inf")
    acc = B.alloc_buffer((ACCUMULATORS * width,), "float32")
    for a in range(ACCUMULATORS):
        store(acc, a * width, width, splat(identity, width))

    def combine(a: Any, b: Any) -> Any:
        return a + b if kind == "avg" else B.max(a, b)

    def add(slot: int, value: Any) -> None:
        at = slot % ACCUMULATORS * width
        store(acc, at, width, combine(load(acc, at, width), value))

    def row(at: Index, first: int) -> None:
        full, rest = divmod(lay.w, width)
        done = 0
        if full > 2 * ACCUMULATORS:
            done = full // ACCUMULATORS * ACCUMULATORS
            with B.serial(0, done // ACCUMULATORS) as block:
                for a in range(ACCUMULATORS):
                    add(a, load(x.buffer, at + (block * (ACCUMULATORS * width) + a * width), width))
        for i in range(done, full):
            add(i + first, load(x.buffer, at + i * width, width))
        if rest:  # the last vector overlaps: its first lanes were counted already
            value = load(x.buffer, at + (lay.w - width), width)
            keep = [B.int32(i if i >= width - rest else width + i) for i in range(width)]
            add(full + first, B.Shuffle([value, splat(identity, width)], keep) if width > 1 else value)

    if lay.h == 1:
        row(x.at(n, c, 0, 0), 0)
    else:  # two rows a round use different accumulators
        with B.serial(0, lay.h // 2) as pair:
            row(x.at(n, c, pair * 2, 0), 0)
            row(x.at(n, c, pair * 2 + 1, 0), 2)
        if lay.h % 2:
            row(x.at(n, c, lay.h - 1, 0), 1)
    total = load(acc, 0, width)
    for a in range(1, ACCUMULATORS):
        total = combine(total, load(acc, a * width, width))
    while width > 1:
        width //= 2
        half = [B.bind(total)] * 2
        low, high = (
            B.Shuffle([half[0]], [B.int32(i + off) for i in range(width)]) if width > 1 else _lane(half[0], off)
            for off in (0, width)
        )
        total = combine(low, high)
    return total if kind == "max" else total * B.float32(1 / (x.layout.h * x.layout.w))


def _lane(vector: Any, lane: int) -> Any:
    return B.Shuffle([vector], [B.int32(lane)])
