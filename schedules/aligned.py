"""Copies of a source tile in which every tap of a k x k kernel starts at a whole vector.

A vector of positions that a tap has shifted crosses a cache line, or half of them do where a vector is half a line: a load
costs 1.5 to 2 slots in place of one. Taps whose shifts are equal modulo the vector share a copy; a 3x3 kernel needs three
to nine of them, by the pitch of the rows. The tile of a block of input channels is copied once for all output channels, so
that it pays where many multiply-adds use a copied vector, and where the copies do not outgrow the cache by much.

Measured on Zen 4 over the sparse 3x3 and 5x5 layers of AlexNet, GoogLeNet and ResNet-50: 1.05 to 1.2 times as fast where an
input channel has more than about 100 nonzeros, up to 1.15 times as slow below 40. With all loads aligned and nothing else
changed they would be 1.25 to 1.5 times as fast; the rest is lost to the copying and to the larger footprint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm.script.ir_builder import tirx as B

from ..layout import Layout
from ..workload import ConvWorkload
from .emit import loop, store, vector


@dataclass(frozen=True)
class Copy:
    """``source``: floats from the first position of the tile to the first one that is copied; ``at``: where it goes in the
    copies of its channel; ``more``: vectors that are copied beyond those of the tile."""

    source: int
    at: int
    more: int


@dataclass(frozen=True)
class Copies:
    """``taps``: where each tap of the kernel begins in the copies of a channel; ``size``: floats of those; ``groups``,
    ``channels``: convolution groups, and input channels of one; ``step``: floats between two of these in the source."""

    copies: tuple[Copy, ...]
    taps: tuple[int, ...]
    size: int
    groups: int
    channels: int
    step: int

    def floats(self, channel_block: int) -> int:
        """Of all copies for a block of ``channel_block`` input channels of each group."""
        return self.groups * min(channel_block, self.channels) * self.size

    def offsets(self, channel_block: int) -> npt.NDArray[np.int32]:
        """int32[channels * taps]: where the tap of each column begins in the copies for its block of channels."""
        group, channel = np.divmod(np.arange(self.groups * self.channels), self.channels)
        slot = group * min(channel_block, self.channels) + channel % channel_block
        flat = slot[:, None] * self.size + np.array(self.taps)[None, :]
        return flat.reshape(-1).astype(np.int32)

    def emit(
        self, source: Any, first: Any, target: Any, block: Any, channel_block: int, vectors: int, lanes: int
    ) -> None:
        """Copy a tile of ``vectors`` vectors for the input channels of ``block`` of every convolution group. ``first``:
        where the tile begins in channel 0 of ``source``."""
        wide = min(channel_block, self.channels)
        count = B.bind(B.min(self.channels - block * wide, wide))
        with loop(self.groups) as group, B.serial(0, count) as c:
            origin = B.bind(first + (group * self.channels + block * wide + c) * self.step)
            place = B.bind((group * wide + c) * self.size)
            for copy in self.copies:
                with loop(vectors + copy.more) as v:
                    value = vector(source, origin + copy.source + v * lanes, lanes)
                    store(target, value, place + copy.at + v * lanes, lanes)


def plan(
    wl: ConvWorkload, taps: Sequence[tuple[int, int, int]], src: Layout, planes: int, vectors: int, lanes: int
) -> Copies:
    """Copies for tiles of up to ``vectors`` vectors; ``taps``: (phase, row, column) as in ``conv2d.taps``; ``planes``: phase
    planes of an input channel."""
    alike: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for i, (phase, y, x) in enumerate(taps):
        shift = y * src.row_pitch + x
        alike.setdefault((phase, shift % lanes), []).append((shift, i))
    copies: list[Copy] = []
    places = [0] * len(taps)
    size = 0
    for (phase, _), members in sorted(alike.items()):
        start = 0
        members.sort()
        for end in range(1, len(members) + 1):
            # A gap as wide as the tile is not worth copying.
            if end < len(members) and members[end][0] - members[end - 1][0] <= vectors * lanes:
                continue
            first, last = members[start][0], members[end - 1][0]
            more = (last - first) // lanes
            copies.append(Copy(phase * src.c_pitch + first, size, more))
            for shift, i in members[start:end]:
                places[i] = size + shift - first
            size += (vectors + more) * lanes
            start = end
    return Copies(tuple(copies), tuple(places), size, wl.groups, wl.c // wl.groups, planes * src.c_pitch)
