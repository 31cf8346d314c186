"""Give convolutions that need wide padding rows of their own, where the others would compute too much of it.

Values that kernels read and write at the same position share a space (``plan_layouts.py``), whose gaps between rows are
computed like pixels. One 7x7 among 1x1 layers on 7x7 pixels, or a dilated 3x3, makes all of them as much as twice as
long. Here such convolutions get copies of their inputs, in a space with their result, and who reads the result at the
same position gets a copy of it in turn. Of each space the widest convolutions are separated, down to the gap with which
the modelled time of all its kernels and copies is least.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from tvm import relax

from ..chooser import Choice
from ..layout import round_up
from ..schedules import conv2d as conv
from ..schedules.knobs import across_serves
from ..target import CpuTarget
from .nodes import Node, nchw
from .plan_layouts import Key, Plan

JOINED = frozenset(("conv2d", "pointwise", "lrn", "norm", "concat", "view"))  # read and write at the same position
FLOPS = 1.1e11  # of a dense kernel on one thread; CSR runs at half of it
BANDWIDTH = 2e10  # bytes a second of element-wise kernels and copies, read and written, most of it from L2 or L3
CALL = 1e-6  # seconds of a call
LEAST_GAIN = 0.02  # of a space's modelled time


@dataclass
class _Group:
    """The nodes whose results lie in one space; ``gaps``: columns of padding that each convolution needs."""

    nodes: list[Node] = field(default_factory=list)
    gaps: dict[Key, int] = field(default_factory=dict)


def separate(nodes: list[Node], plan: Plan, choices: Mapping[str, Choice], target: CpuTarget) -> list[Node] | None:
    """``nodes`` with ``relayout`` nodes, copies that lie in another space; None where none is worth it. ``plan``: of
    ``nodes``."""
    groups: dict[Key, _Group] = {}
    for n in nodes:
        if n.kind in JOINED:
            group = groups.setdefault(plan.spaces.find(n.var), _Group())
            group.nodes.append(n)
            if n.kind == "conv2d":
                reach = conv.halo(n.workload)
                group.gaps[n.var] = max(reach.left, reach.right)
    readers: dict[Key, list[Node]] = {}
    for n in nodes:
        for var in dict.fromkeys(n.inputs):
            readers.setdefault(var, []).append(n)
    apart: set[Key] = set()
    for group in groups.values():
        apart |= _widest(group, nodes, readers, choices, target)
    return _with_copies(nodes, readers, apart) if apart else None


def _widest(
    group: _Group,
    nodes: list[Node],
    readers: Mapping[Key, list[Node]],
    choices: Mapping[str, Choice],
    target: CpuTarget,
) -> set[Key]:
    """Results of the convolutions of a space that are better apart."""
    gaps = sorted(set(group.gaps.values()))
    producers = {n.var: n for n in nodes}
    views = {n.var for n in group.nodes if n.kind == "view"}
    fixed = {n.var for n in group.nodes if n.kind == "conv2d" and any(v in views for v in n.inputs)}

    def seconds(most: int) -> tuple[float, set[Key]]:
        """Modelled time where convolutions with a gap above ``most`` are apart."""
        apart = {var for var, gap in group.gaps.items() if gap > most and var not in fixed}
        shared = max((gap for var, gap in group.gaps.items() if var not in apart), default=0)
        total = 0.0
        for n in group.nodes:
            total += _seconds(n, group.gaps[n.var] if n.var in apart else shared, choices, target)
        reads = {v: n for n in group.nodes if n.var in apart for v in _copied(n)}
        for var, n in reads.items():
            source = producers.get(var)
            if (source is not None and source.kind in JOINED) or len(readers[var]) > 1:
                total += _copy(var, group.gaps[n.var])
        for var in apart:
            if any(_needs_copy(r, var, apart) for r in readers.get(var, ())):
                total += _copy(var, group.gaps[var])
        return total, apart

    joined = seconds(gaps[-1])[0] if gaps else 0.0
    best, apart = min((seconds(gap) for gap in [0, *gaps]), key=lambda item: item[0]) if gaps else (0.0, set())
    return apart if best < (1 - LEAST_GAIN) * joined else set()


def _copied(n: Node) -> list[Key]:
    """Inputs that a convolution which is apart reads from copies: phase planes are copies already."""
    return list(dict.fromkeys(n.inputs if conv.phases(n.workload) is None else n.inputs[1:]))


def _needs_copy(reader: Node, var: Key, apart: set[Key]) -> bool:
    """Whether ``reader`` reads ``var`` at the same position, in the shared space."""
    if reader.kind not in JOINED or reader.var in apart:
        return False
    return reader.kind != "conv2d" or var in _copied(reader)


def _seconds(n: Node, gap: int, choices: Mapping[str, Choice], target: CpuTarget) -> float:
    """Modelled time of a kernel in a space with ``gap``."""
    images, c, h, w = nchw(n.var)
    positions = round_up(images * h * (w + gap), 8)
    if n.kind != "conv2d":
        return 0.0 if n.kind in ("concat", "view") else 4 * c * positions * (len(n.inputs) + 1) / BANDWIDTH + CALL
    assert n.layer is not None
    choice, wl = choices[n.layer.name], n.workload
    if choice.winograd:
        return 0.0
    computed = positions / (images * h * w)
    dense = choice.kernel == "dense"
    if dense and across_serves(wl, wl.h * (wl.w + gap), target):
        computed = min(computed, 1.02)
    return computed * 2 * wl.macs * choice.stored / FLOPS * (2 if choice.rows == 1 and not dense else 1)


def _copy(var: Key, gap: int) -> float:
    images, c, h, w = nchw(var)
    return 4 * images * c * h * (2 * w + gap) / BANDWIDTH + CALL


def _with_copies(nodes: list[Node], readers: Mapping[Key, list[Node]], apart: set[Key]) -> list[Node]:
    """``nodes`` where those of ``apart`` read and leave copies."""
    wide: dict[Key, Key] = {}  # value -> its copy for convolutions that are apart
    narrow: dict[Key, Key] = {}  # result of such a one -> its copy for the others
    result: list[Node] = []

    def copy(var: Key) -> Key:
        made = relax.Var(f"{var.name}_copy", var.ty)
        result.append(Node("relayout", made, [var]))
        return made

    for n in nodes:
        if n.var in apart:
            read = _copied(n)
            for var in read:
                if var not in wide:
                    wide[var] = copy(var)
            copies = {var: wide[var] for var in read}
        else:
            copies = {var: narrow[var] for var in n.inputs if var in narrow and _needs_copy(n, var, apart)}
        first = 1 if n.kind == "conv2d" and conv.phases(n.workload) is not None else 0  # read as phase planes
        inputs = [*n.inputs[:first], *(copies.get(var, var) for var in n.inputs[first:])]
        result.append(dataclasses.replace(n, inputs=inputs))
        if n.var in apart and any(_needs_copy(r, n.var, apart) for r in readers.get(n.var, ())):
            narrow[n.var] = copy(n.var)
    return result
