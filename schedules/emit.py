"""Small vocabulary for writing kernels with the IRBuilder: vectors, masks, pixels of a layout, function attributes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as B

from ..layout import LINE, Layout, round_up
from ..target import CpuTarget

Expr = Any


def kernel_attrs() -> None:
    """Attributes of every hand-written kernel: arguments do not alias, nothing fuses into it, it is scheduled."""
    B.func_name("main")
    B.func_attr({"tirx.noalias": True, "op_pattern": 8, "tirx.is_scheduled": True})


def finish(builder: IRBuilder) -> Any:
    """The PrimFunc, private (its name comes from the module that it is added to)."""
    return builder.get().without_attr("global_symbol")


def broadcast(value: Expr, lanes: int) -> Expr:
    return B.Broadcast(value, lanes) if lanes > 1 else value


def vector(buffer: Expr, at: Expr, lanes: int, mask: Expr | None = None) -> Expr:
    """``lanes`` floats from ``buffer[at]``; lanes that ``mask`` switches off are not touched in memory."""
    index = B.Ramp(at, 1, lanes)
    if mask is None:
        return buffer[index]
    return B.masked_load(f"float32x{lanes}", buffer, index, mask)


def store(buffer: Expr, value: Expr, at: Expr, lanes: int, mask: Expr | None = None) -> None:
    index = B.Ramp(at, 1, lanes)
    if mask is None:
        B.buffer_store(buffer, value, [index])
    else:
        B.evaluate(B.masked_store(buffer, value, index, mask))


def fetch(buffer: Expr, at: Expr, *, l1: bool = True) -> None:
    """Prefetch the cache line of ``buffer[at]`` into L1 or L2; any address is allowed, also behind the end."""
    flags = (B.int32(0), B.int32(3 if l1 else 2), B.int32(1))  # for reading, how near, data
    B.evaluate(B.call_llvm_intrin("void", "llvm.prefetch", B.address_of(buffer[at]), *flags))


# TVM has no name for stores that leave the caches alone; LLVM inlines this function as one.
STREAM = """
define linkonce_odr void @skimtvm_stream(ptr %to, <16 x float> %value) alwaysinline nounwind {
  store <16 x float> %value, ptr %to, align 64, !nontemporal !0
  ret void
}
!0 = !{i32 1}
"""


def streams(layout: Layout) -> bool:
    """Whether stores to ``layout`` go past the caches: they must be whole aligned lines, which only the vectors of 16
    interleaved images are."""
    return layout.streamed and layout.interleave == LINE


@contextmanager
def parallel(extent: Expr, layout: Layout) -> Iterator[Expr]:
    """A parallel loop in which ``write`` stores to ``layout``; what an iteration streams, other threads see when it ends."""
    if not streams(layout):
        with B.parallel(0, extent) as i:
            yield i
        return
    with B.attr(B.int32(0), "pragma_import_llvm", STREAM), B.parallel(0, extent) as i:
        yield i
        B.evaluate(B.call_llvm_intrin("void", "llvm.x86.sse.sfence"))


def write(buffer: Expr, value: Expr, at: Expr, layout: Layout, lanes: int) -> None:
    """Store ``lanes`` floats to ``layout``, past the caches if it ``streams``: the line is not read into them first, as it
    is for ordinary stores, which halves the traffic."""
    if streams(layout):
        B.evaluate(B.call_extern("void", "skimtvm_stream", B.address_of(buffer[at]), value))
    else:
        store(buffer, value, at, lanes)


def zeros(buffer: Expr, at: Expr, count: int, lanes: int) -> None:
    """Write ``count`` zeros (a constant of Python) from ``buffer[at]``."""
    zero = broadcast(B.float32(0), lanes)
    full, rest = divmod(count, lanes)
    if full > 4:
        with B.serial(0, full) as i:
            store(buffer, zero, at + i * lanes, lanes)
    else:
        for i in range(full):
            store(buffer, zero, at + i * lanes, lanes)
    if rest:
        store(buffer, zero, at + full * lanes, lanes, lane_mask(lanes, rest))


def lane_mask(lanes: int, active: int) -> Expr:
    """The first ``active`` lanes."""
    return B.get_active_lane_mask(f"uint1x{lanes}", 0, active)


def transpose(columns: list[Expr], width: int, lanes: int) -> list[Expr]:
    """``width`` vectors of ``lanes`` from at most ``lanes`` vectors of ``width``, a power of two: element j of result i is
    element i of ``columns[j]``; elements that no column gives are undefined. log2(lanes) rounds swap halves of pairs."""
    zero = broadcast(B.float32(0), lanes)
    rows = [_widen(c, width, lanes) for c in columns] + [zero] * (lanes - len(columns))
    rows = [B.bind(r) for r in rows]
    half = lanes // 2
    while half:
        low = [B.int32(j if not j & half else lanes + (j ^ half)) for j in range(lanes)]
        high = [B.int32(j ^ half if not j & half else lanes + j) for j in range(lanes)]
        for i in range(lanes):
            if not i & half:
                pair = [rows[i], rows[i | half]]
                rows[i], rows[i | half] = B.bind(B.Shuffle(pair, low)), B.bind(B.Shuffle(pair, high))
        half //= 2
    return rows[:width]


def _widen(value: Expr, width: int, lanes: int) -> Expr:
    if width == lanes:
        return value
    if width == 1:
        return B.Broadcast(value, lanes)
    return B.Shuffle([value] * -(-lanes // width), [B.int32(i) for i in range(lanes)])


def allocation(size: int) -> Any:
    """PrimFunc that leaves its output f32[size] as it is: a buffer for several kernels to fill."""
    with IRBuilder() as ib, B.prim_func(s_tir=True):
        kernel_attrs()
        B.arg("out", B.Buffer((size,), "float32"))
        B.evaluate(0)
    return finish(ib)


def loop(extent: int) -> Any:
    """A serial loop over ``extent``."""
    return B.serial(0, extent)


class Pixels:
    """Visits the pixels of one channel of a layout in vectors, and writes results there.

    Rows are visited one by one where the gaps must become zero; otherwise a plane is one run of vectors, and of a plane
    layout all images together. The last vector is masked where the layout has no room behind it (natural).
    """

    def __init__(
        self, layout: Layout, base: int, out: Expr, target: CpuTarget, others: tuple[Layout, ...] = ()
    ) -> None:
        self.layout, self.base, self.out, self.lanes = layout, base, out, target.lanes
        everything = (layout, *others)
        self.one_pitch = len({o.row_pitch for o in everything}) == 1
        self.one_run = self.one_pitch and all(o.n == 1 or (o.plane and o.n_pitch == layout.n_pitch) for o in everything)
        self.by_row = layout.zero_halo or not self.one_pitch

    def zero_outside(self, c: Expr) -> None:
        """Front margin and everything behind the last row of channel ``c``."""
        lay = self.layout
        if not lay.zero_halo:
            return
        origin = self.base + c * lay.c_pitch
        zeros(self.out, origin - lay.front, lay.front, self.lanes)
        end = (lay.n - 1) * lay.n_pitch + lay.h * lay.row_pitch
        zeros(self.out, origin + end, lay.c_pitch - lay.front - end, self.lanes)
        if lay.n > 1:
            with loop(lay.n - 1) as n:
                gap = lay.n_pitch - lay.h * lay.row_pitch
                zeros(self.out, origin + n * lay.n_pitch + lay.h * lay.row_pitch, gap, self.lanes)

    def vectors(self, c: Expr, *, per_image: bool = False) -> Iterator[tuple[Expr, Expr, Expr, Expr | None]]:
        """Yield (image, row, column, mask); the body's code goes into the loops. A run over a whole plane, or over all
        images of a channel, has row (and image) 0 and counts positions in the column."""
        lay, lanes = self.layout, self.lanes
        if self.by_row:
            with loop(lay.n) as n, loop(lay.h) as y:
                for x, mask in self._run(lay.w, lay.w):
                    yield n, y, x, mask
                gap = lay.row_pitch - lay.w
                if lay.zero_halo and gap:
                    at = self.base + c * lay.c_pitch + n * lay.n_pitch + y * lay.row_pitch + lay.w
                    zeros(self.out, at, gap, lanes)
        elif self.one_run and not per_image:
            room = (lay.c_pitch - lay.front) if lay.tail else lay.positions
            for x, mask in self._run(lay.positions, room):
                yield 0, 0, x, mask
        else:
            plane = (lay.h - 1) * lay.row_pitch + lay.w
            # Images of a channel are visited in order: what spills into the next one is overwritten by it.
            room = round_up(plane, lanes) if lay.plane and lay.tail else plane
            with loop(lay.n) as n:
                for x, mask in self._run(plane, room):
                    yield n, 0, x, mask

    def _run(self, count: int, room: int) -> Iterator[tuple[Expr, Expr | None]]:
        lanes = self.lanes
        if round_up(count, lanes) <= room:
            full, rest = round_up(count, lanes) // lanes, 0
        else:
            full, rest = divmod(count, lanes)
        if full > 1:
            with loop(full) as i:
                yield i * lanes, None
        elif full:
            yield 0, None
        if rest:
            yield full * lanes, lane_mask(lanes, rest)
