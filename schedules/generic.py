"""Generic CPU schedule for any schedulable PrimFunc of TE blocks: threads outside, a long unit-stride loop inside.

LLVM vectorises the innermost loop, tails included (masked or scalar remainder), as soon as that loop is long, serial,
contiguous and free of calls; explicit ``vectorize`` is only better when the extent divides, and turns into scalar code
when it does not. So the schedule's work is to *shape* loops: collapse axes that are contiguous in every access, put a
unit-stride axis innermost, unroll a few reduction steps inside it (they then share one load and store of the
accumulator), and run the rest in parallel.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import s_tir, tirx

from ..target import CpuTarget
from .block_info import REDUCE, BlockInfo, Unschedulable, as_int, block_info, groups_of

MIN_PARALLEL = 16384  # element operations below which a thread launch costs more than it saves
CHUNK = 2048  # elements of a flat elementwise loop in one task
MIN_TASKS = 8  # parallel iterations that balance well over the threads
MAX_ROW = 1024  # floats of accumulators that an inner loop sweeps: 4 KiB, well inside L1
MAX_UNROLL = 16  # reduction steps inside the vector loop


def _fuse(sch: s_tir.Schedule, loops: list[Any]) -> Any:
    return sch.fuse(*loops) if len(loops) > 1 else loops[0]


def divisor(n: int, low: int, high: int, multiple: int = 1) -> int | None:
    """The largest divisor of ``n`` in [low, high], preferring multiples of ``multiple``."""
    found = [d for d in range(max(low, 1), min(high, n) + 1) if n % d == 0]
    return max(found, key=lambda d: (d % multiple == 0, d)) if found else None


def _cut(sch: s_tir.Schedule, loops: list[Any], extents: list[int], limit: int, lanes: int) -> tuple[list[Any], Any]:
    """Split one contiguous run of loops into (outer loops, one inner loop of about ``limit`` / 4 to ``limit`` steps).

    The cut follows axis boundaries. Fusing everything and cutting at an arbitrary multiple would leave addresses such
    as ``x // 9408 * 9408 + x % 9408 // 192 * 192 + ...`` that TVM cannot fold back, and LLVM then gathers.
    """
    if math.prod(extents) <= limit:
        return [], _fuse(sch, loops)
    at, size = len(extents), 1
    while at > 0 and size * extents[at - 1] <= limit:
        at -= 1
        size *= extents[at]
    # axis at - 1 does not fit as a whole: take a part of it, unless what fits is long enough
    head, tail = loops[:at], loops[at:]
    if size < limit // 4:
        high = max(limit // size, 1)
        part = divisor(extents[at - 1], -(-high // 8), high, max(lanes // size, 1) if lanes % size == 0 else 1)
        if part is None and size < lanes:
            part = high // lanes * lanes if size == 1 else high  # inexact: the bound becomes a mask
        if part is not None and part > 1:
            outer, inner = sch.split(head.pop(), [None, part])
            head.append(outer)
            tail.insert(0, inner)
    if not tail:
        tail.append(head.pop())
    return head, _fuse(sch, tail)


def schedule_spatial(sch: s_tir.Schedule, block: Any, target: CpuTarget) -> str:
    """An elementwise, broadcasting or data-moving block."""
    info = block_info(sch, block)
    loops = sch.get_loops(block)
    groups = groups_of(info, list(range(len(loops))))
    sizes = [math.prod(info.extents[i] for i in group) for group in groups]
    if info.work < MIN_PARALLEL:
        for group in groups:
            _fuse(sch, [loops[i] for i in group])
        return "serial+vector"
    # the inner loops must offer enough work for vectors: a loop of 3 elements alone stays scalar
    first, length = len(groups) - 1, sizes[-1]
    while first > 0 and length < 4 * target.lanes:
        first -= 1
        length *= sizes[first]
    outer = [loops[i] for group in groups[:first] for i in group]
    tasks = math.prod(sizes[:first])
    if tasks < MIN_TASKS or length > 4 * CHUNK:
        group = groups[first]
        rest = length // sizes[first]
        if first == len(groups) - 1 and not outer and len(group) == 1:
            return _cut_flat(sch, loops[group[0]], sizes[first], target)
        head, _ = _cut(
            sch, [loops[i] for i in group], [info.extents[i] for i in group], max(CHUNK // rest, 1), target.lanes
        )
        outer += head
    else:
        _fuse(sch, [loops[i] for i in groups[first]])
    for group in groups[first + 1 :]:
        _fuse(sch, [loops[i] for i in group])
    if not outer:
        return "serial+vector"
    sch.parallel(_fuse(sch, outer))
    return "parallel+vector"


def _cut_flat(sch: s_tir.Schedule, loop: Any, size: int, target: CpuTarget) -> str:
    """A single long axis: tasks of CHUNK; a tail that does not fill a task becomes a loop of its own."""
    task = divisor(size, CHUNK // 4, CHUNK, target.lanes)
    if task is None:
        loop, _tail = sch.loop_partition(loop, [size // CHUNK * CHUNK, None])
    head, _ = sch.split(loop, [None, task or CHUNK])
    sch.parallel(head)
    return "parallel+vector" if task else "parallel+vector+tail"


def _unit(info: BlockInfo, axis: int) -> tuple[bool, float]:
    """(every store moves by one element, fraction of loads that move by 0 or 1) along ``axis``."""
    stores = [a.strides[axis] for a in info.accesses if a.store]
    loads = [a.strides[axis] for a in info.accesses if not a.store]
    good = sum(1 for s in loads if s is not None and 0 <= s <= 1)
    return all(s == 1 for s in stores), good / max(len(loads), 1)


def schedule_reduction(sch: s_tir.Schedule, block: Any, target: CpuTarget) -> str:
    """A block with reduction axes: vectors along a contiguous spatial axis, or along the reduction."""
    info = block_info(sch, block)
    spatial = [i for i, r in enumerate(info.reduce) if not r]
    reduction = [i for i, r in enumerate(info.reduce) if r]
    if not reduction or spatial + reduction != list(range(len(info.extents))):
        raise Unschedulable("axes out of order")
    groups = groups_of(info, spatial)
    width = math.prod(info.extents[i] for i in groups[-1]) if groups else 1
    stores_unit, loads_unit = _unit(info, groups[-1][-1]) if groups else (False, 0.0)
    along_row = min(width, target.lanes) / target.lanes * (0.25 + 0.75 * loads_unit) * stores_unit
    steps = math.prod(info.extents[i] for i in reduction)
    reduce_groups = groups_of(info, reduction)
    depth = math.prod(info.extents[i] for i in reduce_groups[-1])
    contiguous = all(
        s is not None and 0 <= s <= 1 for s in (a.strides[reduce_groups[-1][-1]] for a in info.accesses if not a.store)
    )
    along_depth = min(depth / (2 * target.lanes), 1.0) * 0.8 if contiguous else 0.0
    if along_depth > along_row and steps >= 2 * target.lanes:
        return _vector_depth(sch, block, info, groups=groups, reduce_groups=reduce_groups, target=target)
    return _vector_row(sch, block, info, groups=groups, reduction=reduction, lanes=target.lanes)


def _vector_row(
    sch: s_tir.Schedule, block: Any, info: BlockInfo, *, groups: list[list[int]], reduction: list[int], lanes: int
) -> str:
    loops = sch.get_loops(block)
    steps = [loops[i] for i in reduction]
    lengths = [info.extents[i] for i in reduction]
    if not groups:
        sch.decompose_reduction(block, steps[0])
        return "serial"
    outer = [loops[i] for group in groups[:-1] for i in group]
    last = groups[-1]
    head, row = _cut(sch, [loops[i] for i in last], [info.extents[i] for i in last], MAX_ROW, lanes)
    outer += head
    # innermost reduction steps that fit the unroll limit go inside the row loop
    inside: list[Any] = []
    room = MAX_UNROLL
    while steps and lengths[-1] <= room:
        room //= max(lengths[-1], 1)
        inside.insert(0, steps.pop())
        lengths.pop()
    if steps and not inside:
        factor = divisor(lengths[-1], 2, 8)
        if factor is not None:
            head, tail = sch.split(steps[-1], [None, factor])
            steps[-1] = head
            inside = [tail]
    sch.reorder(*outer, *steps, row, *inside)
    parallel = bool(outer) and info.work >= MIN_PARALLEL
    if outer:
        first = _fuse(sch, outer)
        if parallel:
            sch.parallel(first)
    for loop in inside:
        sch.unroll(loop)
    first_reduction = steps[0] if steps else (inside[0] if inside else None)
    if first_reduction is not None:
        sch.decompose_reduction(block, first_reduction)
    return "parallel+vector" if parallel else "serial+vector"


def _vector_depth(
    sch: s_tir.Schedule,
    block: Any,
    info: BlockInfo,
    *,
    groups: list[list[int]],
    reduce_groups: list[list[int]],
    target: CpuTarget,
) -> str:
    """Partial accumulators, one a lane, along the contiguous reduction axis; then a short reduction over the lanes."""
    loops = sch.get_loops(block)
    axis = _fuse(sch, [loops[i] for i in reduce_groups[-1]])
    depth = math.prod(info.extents[i] for i in reduce_groups[-1])
    width = 4 * target.lanes if depth >= 16 * target.lanes and depth % (4 * target.lanes) == 0 else target.lanes
    exact = depth % width == 0
    _head, lane = sch.split(axis, [None, width])
    spatial = sum(len(g) for g in groups)
    partial = sch.rfactor(lane, spatial)
    parallel = info.work >= MIN_PARALLEL and spatial > 0
    inner = sch.get_loops(partial)
    if spatial and exact:
        task = _fuse(sch, sch.get_loops(block)[:spatial])
        sch.compute_at(partial, task)
        inner = sch.get_loops(partial)[1:]
        if parallel:
            sch.parallel(task)
    elif spatial:
        # compute_at would drop the bound of the inexact split and read beyond the axis: keep the two blocks apart
        task = _fuse(sch, inner[:spatial])
        inner = sch.get_loops(partial)[1:]
        if parallel:
            sch.parallel(task)
    # loops of the partial block below the task: reduction steps and the lane; put the lane innermost
    lanes_loop = next(loop for loop in inner if as_int(sch.get(loop).extent) == width)
    steps = [loop for loop in inner if not sch.get(loop).same_as(sch.get(lanes_loop))]
    if steps:
        sch.reorder(*steps, lanes_loop)
    if exact:
        sch.vectorize(lanes_loop)
    if steps:
        init = sch.decompose_reduction(partial, steps[0])
        if exact:
            sch.vectorize(sch.get_loops(init)[-1])
    sch.decompose_reduction(block, sch.get_loops(block)[-1])
    return ("parallel" if parallel else "serial") + "+rfactor"


def schedule_simple(sch: s_tir.Schedule, block: Any) -> str:
    """Last resort: the outermost spatial loop in parallel, nothing else."""
    loops = sch.get_loops(block)
    for loop in loops:
        if as_int(sch.get(loop).extent) > 1:
            sch.parallel(loop)
            return "parallel only"
    return "serial"


def _loads_of(info: BlockInfo, buffer: Any) -> int:
    return sum(1 for a in info.accesses if not a.store and a.buffer.same_as(buffer))


def inline_producers(sch: s_tir.Schedule) -> int:
    """Inline elementwise blocks into their consumers where that saves a pass and repeats no costly work."""
    count = 0
    root = sch.get_sblock("root")
    for block in list(sch.get_child_blocks(root)):
        try:
            info = block_info(sch, block)
            consumers = list(sch.get_consumers(block))
            if any(info.reduce) or not consumers:
                continue
            buffer = next(a.buffer for a in info.accesses if a.store)
            readers = [block_info(sch, c) for c in consumers]
            if not _worth_inlining(info, readers, buffer):
                continue
            sch.compute_inline(block)
            count += 1
        except (s_tir.ScheduleError, Unschedulable, StopIteration):
            continue
    return count


def _worth_inlining(info: BlockInfo, readers: list[BlockInfo], buffer: Any) -> bool:
    loads = sum(_loads_of(r, buffer) for r in readers)
    size = math.prod(info.extents)
    if any(any(r.reduce) for r in readers):
        # a reduction that visits each element once may compute it on the fly; padding stays outside of hot loops
        visits = sum(math.prod(r.extents) * _loads_of(r, buffer) for r in readers)
        return not info.guarded and visits <= size and not (info.costly and loads > 1)
    visits = sum(math.prod(r.extents) * _loads_of(r, buffer) for r in readers)
    return visits <= size or not (info.costly or info.guarded or info.indirect)


def schedule_function(func: tirx.PrimFunc, target: CpuTarget) -> tuple[tirx.PrimFunc, str]:
    """Schedule every block of ``func``; returns the new function and a summary such as ``parallel+vector``.

    Never fails: a block that resists keeps a simpler schedule, a function without blocks stays as it is ("opaque").
    """
    try:
        sch = s_tir.Schedule(func, error_render_level="none")
        root = sch.get_sblock("root")
        if not sch.get_child_blocks(root):
            return func, "opaque"
        inline_producers(sch)
    except Exception:  # TVM raises bare FFI errors for functions that are no block trees
        return func, "opaque"
    notes: list[str] = []
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        name = sch.get(block).name_hint
        sch, note = _schedule_block(sch, name, target)
        if note not in notes:
            notes.append(note)
    return sch.mod["main"], ", ".join(notes)


def _schedule_block(sch: s_tir.Schedule, name: str, target: CpuTarget) -> tuple[s_tir.Schedule, str]:
    def smart(s: s_tir.Schedule) -> str:
        block = s.get_sblock(name)
        reduces = any(int(v.iter_type) == REDUCE for v in s.get(block).iter_vars)
        return schedule_reduction(s, block, target) if reduces else schedule_spatial(s, block, target)

    def simple(s: s_tir.Schedule) -> str:
        return schedule_simple(s, s.get_sblock(name))

    for attempt in (smart, simple):
        trial = sch.copy()
        try:
            return trial, attempt(trial)
        except Exception:  # ScheduleError, Unschedulable, or TVM's InternalError (rfactor has such cases)
            continue
    return sch, "serial"
