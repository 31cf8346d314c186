"""Kernels with one source and one destination, addressed by slots: copies between layouts, phases, pooling, LRN."""

from __future__ import annotations

from typing import Any

from ..layout import Phases
from ..target import CpuTarget
from ..workload import LRNWorkload, NormWorkload, PoolWorkload
from . import (
    channel_norm,
    convert,
    depth_to_space,
    interleaved,
    interleaved_pooling,
    lrn,
    pooling,
    reduce,
    resize,
)
from .pointwise import Slot


def _where(src: Slot, dst: Slot) -> dict[str, Any]:
    return {"src_size": src.size, "dst_size": dst.size, "src_channel": src.channel, "dst_channel": dst.channel}


def emit_copy(src: Slot, dst: Slot, target: CpuTarget) -> Any:
    """The same tensor in another layout or slice."""
    if max(src.layout.interleave, dst.layout.interleave) > 1:
        return interleaved.emit_copy(src, dst)
    return convert.emit_convert(src.layout, dst.layout, target=target, **_where(src, dst))


def emit_select(channels: tuple[int, ...], src: Slot, dst: Slot, target: CpuTarget) -> Any:
    """Channel i of ``dst`` is channel ``channels[i]`` of ``src``."""
    if max(src.layout.interleave, dst.layout.interleave) > 1:
        return interleaved.emit_copy(src, dst, channels)
    return convert.emit_gather_channels(channels, src.layout, dst.layout, target=target, **_where(src, dst))


def emit_phases(phases: Phases, src: Slot, dst: Slot, target: CpuTarget) -> Any:
    """The phase planes of ``src`` that a strided convolution reads."""
    return convert.emit_split_phases(phases, src.layout, dst.layout, target=target, **_where(src, dst))


def emit_pool(workload: PoolWorkload, src: Slot, dst: Slot, target: CpuTarget) -> Any:
    if dst.layout.interleave > 1:
        return interleaved_pooling.emit_pool(workload, src, dst)
    return pooling.emit_pool(workload, src.layout, dst.layout, target=target, **_where(src, dst))


def emit_resize(workload: resize.ResizeWorkload, src: Slot, dst: Slot, target: CpuTarget) -> Any:
    return resize.emit_resize(workload, src.layout, dst.layout, target=target, **_where(src, dst))


def emit_depth_to_space(workload: depth_to_space.DepthToSpaceWorkload, src: Slot, dst: Slot, target: CpuTarget) -> Any:
    return depth_to_space.emit_depth_to_space(workload, src.layout, dst.layout, target=target, **_where(src, dst))


def emit_lrn(workload: LRNWorkload, src: Slot, dst: Slot, target: CpuTarget) -> Any:
    return lrn.emit_lrn(workload, src.layout, dst.layout, target=target, **_where(src, dst))


def emit_norm(workload: NormWorkload, src: Slot, dst: Slot, target: CpuTarget) -> Any:
    return channel_norm.emit_norm(workload, src, dst, target)


def emit_global_avg_pool(src: Slot, dst: Slot, target: CpuTarget) -> Any:
    """Mean over the pixels of each channel; ``dst`` is f32[N, C, 1, 1]."""
    if src.layout.interleave > 1:
        return interleaved.emit_global_avg_pool(src, dst)
    return reduce.emit_global_pool("avg", src.layout, dst.layout, target=target, **_where(src, dst))
