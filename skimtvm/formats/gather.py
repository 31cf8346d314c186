"""Weights as the gather-GEMM kernels read them: groups of R output channels that share a list of columns. NumPy only.

A column is one tap of one input channel, numbered ``(c * kh + r) * kw + s`` with ``c`` counted over all input channels
of the convolution (so that grouped convolutions need no special case). R = 1 is CSR with the columns of a row in blocks of
input channels; R = 4 or 8 with some columns is block sparsity; with all of them it is a dense layer.

Entries are ordered by (channel block, row group, column). ``ip[b * groups + g]`` is the first entry of row group g in
channel block b. Row groups that are wholly zero in a block have no entries there; they still have their place in ``ip``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class GatherMatrix:
    """One run of row groups of equal height.

    ``first``: first output channel; ``groups``: row groups; ``rows``: R; ``blocks``: channel blocks;
    ``ip``: int32[blocks * groups + 1]; ``column``: int32[entries]; ``data``: f32[entries, rows].
    For dense matrices ``column`` holds the columns of one row group of each convolution group only, ``ip`` is empty and
    ``data`` is [groups, columns of a group, rows] flattened to two dimensions.
    """

    first: int
    groups: int
    rows: int
    blocks: int
    ip: I32
    column: I32
    data: F32
    dense: bool = False

    @property
    def nbytes(self) -> int:
        return self.ip.nbytes + self.column.nbytes + self.data.nbytes


def cut(work: npt.NDArray[np.int64], chunks: int) -> I32:
    """int32[chunks + 1]: the first of each chunk of row groups, so that chunks hold as equal ``work`` as they can."""
    total = np.concatenate([[0], np.cumsum(work)])
    ideal = total[-1] * np.arange(1, chunks) / chunks
    above = np.searchsorted(total, ideal)
    inner = above - (ideal - total[np.maximum(above - 1, 0)] < total[above] - ideal)
    return np.concatenate([[0], inner, [work.size]]).astype(np.int32)


def encode(weight: F32, *, conv_groups: int, rows: int, channel_block: int, dense: bool) -> tuple[GatherMatrix, ...]:
    """f32[K, C / conv_groups, kh, kw] -> one GatherMatrix, or two when ``rows`` does not divide K.

    ``channel_block``: input channels (of a convolution group) in a block. ``rows`` must divide K / conv_groups when
    conv_groups > 1, unless it is 1. Values are copied exactly; zeros inside a stored R x 1 block are stored.
    """
    k = weight.shape[0]
    if conv_groups > 1 and k // conv_groups % rows:
        raise ValueError(f"rows {rows} straddle the {conv_groups} groups of {k} output channels")
    main, rest = divmod(k, rows)
    parts = []
    if main:
        parts.append(_encode(weight, 0, main, rows, conv_groups, channel_block, dense))
    if rest:
        parts.append(_encode(weight, main * rows, 1, rest, conv_groups, channel_block, dense))
    return tuple(parts)


def _encode(weight: F32, first: int, groups: int, rows: int, conv_groups: int, block: int, dense: bool) -> GatherMatrix:
    k, cg, kh, kw = weight.shape
    taps = kh * kw
    blocks = max(1, -(-cg // block))
    part = weight[first : first + groups * rows].reshape(groups, rows, cg * taps)
    data = np.ascontiguousarray(part.transpose(0, 2, 1))  # [groups, columns, rows]
    if dense:
        column = np.arange(cg * taps, dtype=np.int32)
        empty = np.zeros(1, np.int32)
        return GatherMatrix(first, groups, rows, blocks, empty, column, data.reshape(-1, rows), dense=True)
    keep = data.any(axis=2)  # [groups, columns]
    block_of = np.arange(cg * taps) // (block * taps)
    group_id, col_id = np.nonzero(keep)
    order = np.lexsort((col_id, group_id, block_of[col_id]))
    group_id, col_id = group_id[order], col_id[order]
    counts = np.zeros(blocks * groups, np.int64)
    np.add.at(counts, block_of[col_id] * groups + group_id, 1)
    ip = np.zeros(blocks * groups + 1, np.int32)
    np.cumsum(counts, out=ip[1:])
    conv_group = (first + group_id * rows) // (k // conv_groups)
    column = (col_id + conv_group * cg * taps).astype(np.int32)
    return GatherMatrix(first, groups, rows, blocks, ip, column, np.ascontiguousarray(data[group_id, col_id]))


def decode(parts: tuple[GatherMatrix, ...], shape: tuple[int, int, int, int], conv_groups: int) -> F32:
    """The dense f32[K, C / conv_groups, kh, kw] that ``encode`` was given."""
    k, cg, kh, kw = shape
    out = np.zeros((k, cg * kh * kw), np.float32)
    for m in parts:
        for g in range(m.groups):
            row = m.first + g * m.rows
            if m.dense:
                n = m.column.size
                out[row : row + m.rows] = m.data[g * n : (g + 1) * n].T
                continue
            base = row // (k // conv_groups) * cg * kh * kw
            for b in range(m.blocks):
                span = slice(m.ip[b * m.groups + g], m.ip[b * m.groups + g + 1])
                out[row : row + m.rows, m.column[span] - base] = m.data[span].T
    return out.reshape(shape)
