"""Give every activation its place: which layout, in which buffer, so that no pass over data only moves it.

Values that a kernel reads and writes at the same position share a *space* (row pitch, rows of an image): a stride-1
convolution and its input, residual operands, the parts of a concatenation. A space is as wide as its widest member plus
the padding that the widest kernel on it needs; a value has zeros around its pixels only if a consumer's taps reach there.
A strided convolution reads phase planes, which live in the space of its output. Spaces without a convolution are natural
NCHW. Batches that fill vectors may be interleaved instead, where there are no spaces or phases and only zeros around
pixels remain to be planned. The parts of a channel concatenation are written straight into slices of its buffer where
their producers can.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..layout import Halo, Layout, Phases, Space, interleaved, natural, plane
from ..schedules import conv2d as conv
from ..schedules.interleaved_pooling import can_pool
from .bands import BANDED
from .nodes import WRITERS, Node, nchw

Key = Any  # a relax.Var, or (relax.Var, Phases)


@dataclass(frozen=True)
class Place:
    """``root``: the value whose buffer holds this one; ``channel``: first channel in it (None: the channels are a
    selection, see ``channels``); ``layout``: of this value, addressed from channel ``channel`` of the buffer."""

    root: Key
    layout: Layout
    root_layout: Layout
    channel: int = 0
    channels: tuple[int, ...] | None = None


class _Union:
    def __init__(self) -> None:
        self.parent: dict[Key, Key] = {}
        self.names: dict[Key, Key] = {}

    def find(self, key: Key) -> Key:
        key = self.names.setdefault(key, key)  # the FFI makes a new Python object at each access: keep one of each
        self.parent.setdefault(key, key)
        while self.parent[key] is not key:
            self.parent[key] = self.parent[self.parent[key]]
            key = self.parent[key]
        return key

    def join(self, a: Key, b: Key) -> None:
        a, b = self.find(a), self.find(b)
        if a is not b:
            self.parent[b] = a


# Parts of images are opaque in interleaved layouts.
INTERLEAVABLE = frozenset(
    ("conv2d", "pointwise", "pool", "concat", "view", "mean", "fc", "skip", "opaque", "crop", "pad", "mosaic")
)


def may_interleave(nodes: list[Node], images: int) -> bool:
    """Whether every kernel that these nodes need exists for layouts that interleave ``images`` images."""
    convs = [n for n in nodes if n.kind == "conv2d"]
    gates = any(n.layer is not None and n.layer.gates for n in nodes)
    return (
        bool(convs)
        and all(n.workload.n % images == 0 for n in convs)
        and all(n.kind in INTERLEAVABLE and (n.kind != "pool" or can_pool(n.workload)) for n in nodes)
        and not gates
    )


class Plan:
    """Places of all flat values; ``place(key)`` is None for opaque values that nothing reads in flat form."""

    def __init__(
        self,
        nodes: list[Node],
        params: list[Any],
        interleave: int = 1,
        windows: Mapping[Key, int] | None = None,
        streamed: Collection[Key] = (),
    ) -> None:
        """``windows``: rows of the buffers of values that keep only some of theirs, in interleaved layouts; ``streamed``:
        values that are read when they have left the caches."""
        self.interleave, self.windows, self.streamed = interleave, windows or {}, streamed
        self.nodes = {n.var: n for n in nodes}
        self.params = params
        self.spaces = _Union()
        self.shapes: dict[Key, tuple[int, int, int, int]] = {}
        self.halos: dict[Key, Halo] = {}
        self.plane_spaces: set[Key] = set()
        self.slices: dict[Key, tuple[Key, int]] = {}  # part -> (concatenation, first channel)
        self.views: dict[Key, tuple[Key, tuple[int, ...]]] = {}
        self.phase_keys: dict[tuple[Any, Phases], Key] = {}
        for n in nodes:
            getattr(self, f"_visit_{n.kind}", lambda node: None)(n)
        for n in nodes:
            if n.kind == "conv2d":
                self.plane_spaces.add(self.spaces.find(n.var))
            elif n.kind in BANDED and interleave > 1:  # interleaved kernels have nothing else on either side
                self.plane_spaces |= {self.spaces.find(v) for v in (n.var, *n.inputs)}
        self.places = self._place()

    def place(self, key: Key) -> Place | None:
        return self.places.get(key)

    def phase_key(self, var: Any, phases: Phases) -> Key:
        return self.phase_keys.setdefault((var, phases), (var, phases))

    # -- constraints -------------------------------------------------------------------------------------------------
    def _add(self, key: Key, shape: tuple[int, int, int, int], halo: Halo | None = None) -> None:
        self.shapes[key] = shape
        self.halos[key] = self.halos.get(key, Halo()) | (halo or Halo())
        self.spaces.find(key)

    def _visit_conv2d(self, n: Node) -> None:
        wl, x = n.workload, n.inputs[0]
        self._add(n.var, nchw(n.var))
        phases = None if self.interleave > 1 else conv.phases(wl)
        if phases is None:
            self._add(x, nchw(x), conv.halo(wl, interleaved=self.interleave > 1))
            self.spaces.join(x, n.var)
        else:
            key = self.phase_key(x, phases)
            self._add(x, nchw(x))
            self._add(key, (wl.n, wl.c * len(phases.index), *phases.shape(wl.h, wl.w)), conv.halo(wl))
            self.spaces.join(key, n.var)
        for t in n.inputs[1:]:
            self._add(t, nchw(t))
            self.spaces.join(t, n.var)

    def _visit_pointwise(self, n: Node) -> None:
        self._add(n.var, nchw(n.var))
        for t in n.inputs:
            self._add(t, nchw(t))
            self.spaces.join(t, n.var)

    _visit_lrn = _visit_norm = _visit_pointwise

    def _visit_pool(self, n: Node) -> None:
        self._add(n.var, nchw(n.var))
        self._add(n.inputs[0], nchw(n.inputs[0]))

    _visit_resize = _visit_depth_to_space = _visit_relayout = _visit_crop = _visit_pad = _visit_pool
    _visit_to_images = _visit_from_images = _visit_pool

    def _visit_mosaic(self, n: Node) -> None:
        for part in n.inputs:
            self._add(part, nchw(part))

    def _visit_mean(self, n: Node) -> None:
        self._add(n.inputs[0], nchw(n.inputs[0]))

    def _visit_matmul(self, n: Node) -> None:
        for var in (*n.inputs, *([n.var] if n.workload.result.flat else [])):
            self._add(var, nchw(var))

    def _visit_concat(self, n: Node) -> None:
        self._visit_pointwise(n)
        first = 0
        for part in n.inputs:
            producer = self.nodes.get(part)
            free = part not in self.slices and part not in self.views and n.inputs.count(part) == 1
            if free and producer is not None and producer.kind in WRITERS:
                self.slices[part] = (n.var, first)
            first += nchw(part)[1]

    def _visit_view(self, n: Node) -> None:
        self._visit_pointwise(n)
        self.views[n.var] = (n.inputs[0], n.channels)

    # -- solution ------------------------------------------------------------------------------------------------------
    def _owner(self, key: Key) -> tuple[Key, tuple[int, ...] | range]:
        """The value whose buffer holds ``key``, and the channels of it."""
        channels: tuple[int, ...] | range = range(self.shapes[key][1])
        while True:
            if key in self.slices:
                key, first = self.slices[key]
                channels = tuple(c + first for c in channels)
            elif key in self.views:
                key, selection = self.views[key]
                channels = tuple(selection[c] for c in channels)
            else:
                return key, channels

    def _place(self) -> dict[Key, Place]:
        owners = {key: self._owner(key) for key in self.shapes}
        halos: dict[Key, Halo] = {}
        for key, (root, _) in owners.items():
            halos[root] = halos.get(root, Halo()) | self.halos[key]
        spaces: dict[Key, Space] = {}
        for key in self.shapes:
            n, _, h, w = self.shapes[key]
            halo = halos[owners[key][0]]
            pitch = w + max(halo.left, halo.right)
            rows = h + (max(halo.top, halo.bottom) if n > 1 else 0)
            old = spaces.get(self.spaces.find(key), Space(0, 0))
            spaces[self.spaces.find(key)] = Space(max(old.row_pitch, pitch), max(old.rows, rows))
        roots: dict[Key, Layout] = {}
        for root in dict.fromkeys(r for r, _ in owners.values()):
            space_key = self.spaces.find(root)
            if space_key in self.plane_spaces and self.interleave > 1:
                whole = interleaved(*self.shapes[root], halos[root], self.interleave)
                window, streamed = self.windows.get(root, 0), root in self.streamed
                roots[root] = dataclasses.replace(whole, window=window, streamed=streamed)
            elif space_key in self.plane_spaces:
                roots[root] = plane(*self.shapes[root], spaces[space_key], halos[root])
            else:
                roots[root] = natural(*self.shapes[root])
        places = {}
        for key, (root, channels) in owners.items():
            layout = dataclasses.replace(roots[root], c=len(channels))
            first = channels[0]
            if tuple(channels) == tuple(range(first, first + len(channels))):
                places[key] = Place(root, layout, roots[root], first)
            else:
                places[key] = Place(root, layout, roots[root], 0, tuple(channels))
        return places

    def describe(self) -> str:
        """One line a placed value, for IR dumps."""
        lines = []
        for key, place in self.places.items():
            name = f"{key[0].name}/{key[1].sy}x{key[1].sx} phases" if isinstance(key, tuple) else key.name
            root = place.root[0] if isinstance(place.root, tuple) else place.root
            at = f"{root.name}[{place.channel}:]" if place.channels is None else f"{root.name}{list(place.channels)}"
            lines.append(f"{name}: {at} {place.layout.to_json()}")
        return "\n".join(lines)
