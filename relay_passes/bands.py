"""The order of bands of rows of interleaved layers: what one layer writes is in cache when the next reads it.

A batch of interleaved images has rows of up to a megabyte, and tensors that leave the last-level cache before the next
layer comes to them. So no layer runs over a whole tensor at once: a band of rows of the last layer asks for the rows that
its taps reach of the layer before, which asks for those of its own inputs, and so on to the first, each layer computing
whole bands. Every row is computed once.

Rows that nobody will read again need no memory. A tensor that only such layers write and read keeps a *window* of its
rows (``layout.Layout.window``), so that the same lines of the cache are written over and over and never leave for memory:
a *ring* of bands where readers want one row for a row, and otherwise rows that slide to the front of the buffer when its
end is reached, so that the rows of a k x k window stay together.

Layers take turns in groups whose windows fit the cache together. What passes from one group to the next and does not fit is
stored past the caches (``layout.Layout.streamed``), for which smaller groups are better (GROUP 8 in place of 12): ResNet-50
with 4x1 blocks at 90%, batch 16, one thread of Zen 4, takes 162 ms in place of 173 (medians of one interleaved run).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .nodes import Node, nchw

BANDED = frozenset(("conv2d", "pointwise", "pool"))  # kinds whose kernels compute a band of rows
BAND = 1.0  # of the second-level cache: a row or more of the largest tensor among those of one size
GROUP = 8.0  # the same: what a core may expect to keep of the last level, such as windows of layers that take turns
WINDOW_BANDS = 3  # that a window holds, about
SLIDE = 2  # bands that a sliding window has room for, besides the rows that live on


@dataclass(frozen=True)
class Move:
    """``rows`` of the window of ``var`` slide from row ``source`` of the buffer to row ``goal``."""

    var: Any
    source: int
    goal: int
    rows: int


@dataclass
class Step:
    """Rows ``first`` to ``first + rows`` of ``node``, where rows of all vectors of images count on; after ``moves``.

    ``at``: for each value that is a window, the row of its buffer where the first of these rows is (of an input: the row
    that tap row 0 of the first output row would have).
    """

    node: Node
    first: int
    rows: int
    moves: list[Move] = field(default_factory=list)
    at: dict[Any, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Taps:
    """Which rows of an input an output row y reads: y * ``stride`` + ``low`` to y * ``stride`` + ``high``."""

    stride: int
    low: int
    high: int


def taps(n: Node, source: int) -> Taps:
    """Of input number ``source``; residuals are read where the output is written."""
    if n.kind == "pointwise" or source:
        return Taps(1, 0, 0)
    wl = n.workload
    height = wl.kh if n.kind == "conv2d" else wl.kernel[0]
    return Taps(wl.strides[0], -wl.padding[0], (height - 1) * wl.dilation[0] - wl.padding[0])


class BandOrder:
    """``order``: steps of the banded ones among ``nodes``, and the others whole, each after what it reads; ``windows``: rows
    of the buffer of each value that is a window; ``streamed``: values that will have left the caches when they are read.

    ``images`` share a vector; ``cache``: bytes of the second level; ``reads(n)``: all that a node reads; ``whole``: values
    that must be complete at the end and in ordinary buffers, such as results; ``least``: rows that a value's kernel computes
    together, a power of two (default: 1).
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        images: int,
        cache: int,
        reads: Callable[[Node], Iterable[Any]],
        whole: Iterable[Any],
        least: Mapping[Any, int] | None = None,
    ) -> None:
        self.images, self.cache = images, cache
        self.nodes = {n.var: n for n in nodes if n.kind in BANDED}
        self._done = dict.fromkeys(self.nodes, 0)
        largest: dict[tuple[int, int], int] = {}  # bytes of a row, by size of the plane
        for var in self.nodes:
            _, c, h, w = nchw(var)
            largest[h, w] = max(largest.get((h, w), 0), 4 * c * w * images)
        # Powers of two: bands of layers of different sizes then start at the same rows.
        self.rows = {
            v: max((least or {}).get(v, 1), 1 << int(math.log2(max(1.0, BAND * cache / largest[nchw(v)[2:]]))))
            for v in self.nodes
        }
        self.order: list[Step | Node] = []
        self._turns: dict[Any, int] = {}  # of each value: its group
        outside = {leaf: True for leaf in whole}
        for turn, group in enumerate(self._groups(nodes)):
            for n in group:
                self._turns[n.var] = turn
                if n.kind not in BANDED:
                    for leaf in dict.fromkeys(reads(n)):
                        self.order += self._complete(leaf)
                        outside[leaf] = outside[n.var] = True
                    self.order.append(n)
            for n in reversed(group):
                self.order += self._complete(n.var)
            inside = {n.var: True for n in group}
            for n in self.nodes.values():
                if n.var not in inside:
                    outside |= {source: True for source in n.inputs if source in inside}
        self.windows: dict[Any, int] = {}
        touching: dict[Any, list[Step]] = {var: [] for var in self.nodes}
        for step in self.order:
            if isinstance(step, Step):
                for var in dict.fromkeys([step.node.var, *step.node.inputs]):
                    if var in touching:
                        touching[var].append(step)
        for var, steps in touching.items():
            if var not in outside:
                self._plan_window(var, steps)
        # Read in the group that writes it, or a window: still in cache.
        kept = {leaf: True for n in nodes for leaf in reads(n) if self._turns.get(leaf) == self._turns[n.var]}
        kept |= dict.fromkeys(self.windows, True)
        self.streamed = {v for v in self.nodes if v not in kept and 4 * math.prod(nchw(v)) > GROUP * cache}

    def together(self, source: Any, reader: Any) -> bool:
        """Whether both are computed band by band, in turns, so that ``reader`` finds ``source`` in cache."""
        return source in self.nodes and reader in self.nodes and self._turns[source] == self._turns[reader]

    def _groups(self, nodes: Sequence[Node]) -> list[list[Node]]:
        """Runs of nodes whose windows fit the cache together, cut where the least passes from one to the next."""
        last = {source: i for i, n in enumerate(nodes) for source in n.inputs}  # who reads it last
        size = {v: 4 * math.prod(nchw(v)) for v in self.nodes}
        crossing = [0] * (len(nodes) + 1)  # bytes that pass over a cut before node i
        for i, n in enumerate(nodes):
            for k in range(i + 1, last.get(n.var, i) + 1):
                crossing[k] += size.get(n.var, 0)
        window = [0.0] * len(nodes)
        for i, n in enumerate(nodes):
            if n.var in self.nodes:
                _, c, _, w = nchw(n.var)
                window[i] = WINDOW_BANDS * self.rows[n.var] * 4 * c * w * self.images
        least = [0.0] + [math.inf] * len(nodes)  # bytes over all cuts in front of node i, and the cut before that
        cut = [0] * (len(nodes) + 1)
        for end in range(1, len(nodes) + 1):
            total = 0.0
            for start in range(end - 1, -1, -1):
                total += window[start]
                if total > GROUP * self.cache and start < end - 1:
                    break
                if least[start] + crossing[start] <= least[end]:
                    least[end], cut[end] = least[start] + crossing[start], start
        groups: list[list[Node]] = []
        end = len(nodes)
        while end:
            groups.insert(0, list(nodes[cut[end] : end]))
            end = cut[end]
        return groups

    def _complete(self, var: Any) -> Iterator[Step]:
        """The steps that are left until all of ``var`` is computed, depth first; none for values without bands."""
        if var not in self.nodes:
            return
        batch, _, height, _ = nchw(self.nodes[var].var)
        wanted = [(var, batch // self.images * height)]
        while wanted:
            var, rows = wanted[-1]
            if self._done[var] >= rows:
                wanted.pop()
                continue
            node, first = self.nodes[var], self._done[var]
            height = nchw(node.var)[2]
            image, row = divmod(first, height)
            last = min(row + self.rows[var], height) - 1
            missing = []
            for k, source in enumerate(node.inputs):
                if source in self.nodes:
                    t, below = taps(node, k), nchw(source)[2]
                    needed = image * below + min(max(last * t.stride + t.high, 0), below - 1) + 1
                    if self._done[source] < needed:
                        missing.append((source, needed))
            if missing:
                wanted += reversed(missing)
                continue
            self._done[var] = first + last + 1 - row
            yield Step(node, first, last + 1 - row)

    def _plan_window(self, var: Any, steps: list[Step]) -> None:
        """Make ``var``, which ``steps`` write and read, a window if that is smaller than all of its rows."""
        batch, _, height, _ = nchw(self.nodes[var].var)
        readers = {s.node.var: s.node for s in steps if s.node.var != var}.values()
        reads = [(n, taps(n, k)) for n in readers for k, source in enumerate(n.inputs) if source == var]
        above = max([0, *(-t.low for _, t in reads)])
        below = max([0, *((nchw(n.var)[2] - 1) * t.stride + t.high + 1 - height for n, t in reads)])
        ring = not below and all(t.low == t.high == 0 for _, t in reads)
        unit = math.lcm(self.rows[var], *(self.rows[n.var] * t.stride for n, t in reads))
        pitch = -(-height // unit) * unit if ring else height + max(above, below)  # rows of an image, counted on

        # What is read from each step on, backwards; rows count over images with the pitch.
        needed: dict[int, int] = {}  # by step: lowest row that it or a later one reads
        lowest: dict[Any, int] = {}  # by reader and its operand
        for s in reversed(steps):
            image, row = divmod(s.first, nchw(s.node.var)[2])
            for k, source in enumerate(s.node.inputs):
                if source == var:
                    t = taps(s.node, k)
                    lowest[s.node.var, k] = image * pitch + row * t.stride + t.low
            needed[id(s)] = min(lowest.values(), default=0)
        writes = [s for s in steps if s.node.var == var]

        def span(s: Step) -> tuple[int, int, int]:
            """First row that a step writes, the row behind its last, with padding, and the lowest that is still needed."""
            image, row = divmod(s.first, height)
            end = image * pitch + row + s.rows
            return image * pitch + row, end + (0 if row + s.rows < height else max(above, below)), needed[id(s)]

        if ring:
            size = max(-(-(end - low // unit * unit) // unit) * unit for _, end, low in map(span, writes))
        else:
            size = max(end - max(low, 0) for _, end, low in map(span, writes)) + SLIDE * self.rows[var]
        if size >= batch // self.images * pitch:
            return
        self.windows[var] = size
        origin = 0
        for s in steps:
            image, row = divmod(s.first, nchw(s.node.var)[2])
            if s.node.var == var:
                start, end, low = span(s)
                if not ring and end - origin > size:
                    low = max(low, 0)
                    s.moves.append(Move(var, low - origin, 0, start - low))
                    origin = low
                s.at[var] = start % size if ring else start - origin
            for k, source in enumerate(s.node.inputs):
                if source == var:
                    at = image * pitch + row * taps(s.node, k).stride
                    s.at[var] = at % size if ring else at - origin
