"""Sparse rows as straight AVX-512 code: what ``schedules/unrolled.py`` runs in place of a list of offsets. NumPy only.

Output channels are cut into groups of as many rows as registers hold sums. The code of a group visits the columns in which
any of its rows has a nonzero, 16 KB of the source after the other: one load, then a multiply-add for each row that needs it,
whose weight is a broadcast memory operand. So a nonzero costs one multiply-add, 4 bytes of weights and 7 bytes
of code; a load, which CSR repeats for every nonzero, is shared by 2.4 rows of 24 at 90% zeros, and by 3.1 of 30. Groups are
full but for the last: 30 and 30 and 4 rows load less often than three times 21.

Registers: rdi = source, rsi = weights. Instructions (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2,
sections 2.7 and 5):

    vmovups zmm, [rdi + disp]                    7 bytes with a displacement of -128 .. 127 whole lines, else 10
    vfmadd231ps zmm, zmm, dword [rsi + d]{1to16} 7 bytes, d = -128 .. 127 floats
    add rdi, n                                   4 bytes with n = -128 .. 127, else 7
    add rsi, 1024                                7 bytes, after 256 weights
    prefetcht1 [rax + n]                         7 bytes

Displacements of one byte count lines from rdi. So the columns of 256 lines of the source are visited tap by tap, or rather
by the place in a line where their vectors begin, and rdi moves there once for all of them.

Code that is not in a cache arrives slowly: no prefetcher of instructions runs far ahead. So the code of a group fetches that
of the next one into L2, as data, a share of its lines with each of the vectors that it runs for: rax = where the share of
this vector begins (512 channels at 7x7, 90% zeros, from memory: 0.57 ms without it, 0.39 with it, 0.27 in L2 and L3).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .gather import cut

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

REGISTERS = 32
MOST_ROWS = 30  # of a group: two registers are left for the source, so that a load may pass the multiply-adds before it
WINDOW = 256  # weights, or lines of the source, that a displacement of one byte reaches
LINE = 64  # bytes
REACH = WINDOW * LINE  # bytes of the source
CODE = (7.1, 7.5)  # bytes of a multiply-add, and of a load
EDGES = 30  # bytes of a sum's start and store
REBASE = 3  # loads that a new base of theirs shortens by more than it costs
SUM_WORK = 3  # multiply-adds or loads that a sum's start and store are worth
LEAST_ROWS = 4  # of the last group, so that its sums hide the latency of a multiply-add


@dataclass(frozen=True, eq=False)
class RowCode:
    """``rows``: int32[groups + 1], first output channel of each group; ``code``: the instructions of each piece, which is a
    group on a block of columns, blocks outermost; ``starts``: int64[pieces], floats of ``data`` before its weights;
    ``data``: f32[nonzeros], in the order of the code; ``loads``: int64[pieces]; ``cut``: int32[chunks + 1], first group of
    each chunk, which hold equal work; ``following``: of each piece the next one, where chunks run one after the other;
    ``shares``: lines of that which each run fetches."""

    rows: npt.NDArray[np.int32]
    code: tuple[bytes, ...]
    starts: I64
    data: F32
    loads: I64
    cut: npt.NDArray[np.int32]
    following: tuple[int, ...]
    shares: tuple[int, ...]

    @property
    def groups(self) -> int:
        return self.rows.size - 1

    @property
    def blocks(self) -> int:
        return len(self.code) // self.groups


def cut_rows(k: int, most: int = MOST_ROWS, parts: int = 1) -> npt.NDArray[np.int32]:
    """int32[groups + 1]: groups of ``most`` of ``k`` rows; the last has what is left, or some more at the cost of the one
    before. ``parts``: as equal as possible, each of which is cut so."""
    ends = np.arange(parts + 1) * k // parts
    starts = [low + _groups(high - low, most) for low, high in itertools.pairwise(ends.tolist())]
    return np.append(np.concatenate(starts), k).astype(np.int32)


def _groups(k: int, most: int) -> I64:
    starts = np.arange(0, k, most)
    if starts.size > 1:
        starts[-1] = max(starts[-2] + 1, min(starts[-1], k - min(LEAST_ROWS, most)))
    return starts


def encode(
    weight: F32,
    address: npt.NDArray[np.int32],
    conv_groups: int = 1,
    starts: npt.NDArray[np.int32] | None = None,
    runs: int = 1,
    block: int = 0,
    chunks: int = 1,
) -> RowCode:
    """f32[K, columns of a convolution group] -> code. ``address``: int32[columns of all convolution groups], floats from
    the source to the tap of each column; ``starts``: of ``cut_rows``; ``runs``: of a piece, after which the next one's code
    has been fetched; ``block``: columns of a block, 0 for all; ``chunks``: of row groups, each of which runs all its blocks
    before the next."""
    k, columns = weight.shape
    starts = cut_rows(k) if starts is None else starts
    first = np.arange(k) // (k // conv_groups) * columns  # column 0 of each row
    entries, data, loads = [], [], []
    blocks = range(0, columns, block or columns)
    for begin, (low, high) in itertools.product(blocks, itertools.pairwise(starts.tolist())):
        row, column = np.nonzero(weight[low:high, begin : begin + (block or columns)])
        column += begin
        where = address[first[low + row] + column].astype(np.int64) * 4
        order = np.lexsort((row, where, where % LINE, where // REACH))
        row, where = row[order], where[order]
        entries.append((row, where, high - low))
        data.append(weight[low + row, column[order]])
        loads.append(np.unique(where).size)
    sizes = np.array([d.size for d in data], np.int64)
    lines = [
        math.ceil((CODE[0] * n + CODE[1] * m + EDGES * e[2]) / LINE)
        for n, m, e in zip(sizes, loads, entries, strict=True)
    ]
    height = np.diff(starts)
    work = (sizes + np.array(loads)).reshape(len(blocks), -1) + SUM_WORK * height
    pieces = cut(work.sum(axis=0), chunks)
    following = _following(pieces, len(blocks))
    shares = tuple(min(-(-lines[following[g]] // runs), int(n)) for g, n in enumerate(sizes))
    codes = tuple(_group(*e, share) for e, share in zip(entries, shares, strict=True))
    values = np.concatenate(data).astype(np.float32)
    return RowCode(
        rows=starts,
        code=codes,
        starts=np.cumsum(sizes) - sizes,
        data=values,
        loads=np.array(loads),
        cut=pieces,
        following=following,
        shares=shares,
    )


def _following(chunks: npt.NDArray[np.int32], blocks: int) -> tuple[int, ...]:
    """Of each piece the one that runs next: chunk by chunk, in each block by block. ``chunks``: of ``cut``."""
    piece = np.arange(blocks * chunks[-1]).reshape(blocks, -1)
    order = np.concatenate([piece[:, low:high].ravel() for low, high in itertools.pairwise(chunks.tolist())])
    following = np.empty_like(order)
    following[order] = np.roll(order, -1)
    return tuple(following.tolist())


def _group(row: I64, where: I64, rows: int, share: int) -> bytes:
    """Code of the entries (``row``, byte address) of ``rows`` sums, those of an address side by side, which fetches
    ``share`` lines. On entry rsi is 128 weights ahead."""
    if not row.size:
        return b""
    new = np.concatenate([[True], where[1:] != where[:-1]])
    load_of = np.cumsum(new) - 1
    address = where[new]
    register = rows + np.arange(address.size) % (REGISTERS - rows)
    base = _bases(address)
    moved = np.diff(base, prepend=0)
    displacement = address - base
    short = (displacement % LINE == 0) & (np.abs(displacement + LINE // 2) <= REACH // 2)
    entry = np.arange(row.size)
    step = (entry % WINDOW == 0) & (entry > 0)
    fetched = np.zeros(row.size, bool)
    fetched[np.arange(share) * row.size // share] = True
    far = np.abs(2 * moved + 1) > 255
    move_bytes = np.where(far, 7, 4) * (moved != 0)
    load_bytes = np.where(short, 7, 10) + move_bytes
    entry_bytes = 7 + 7 * step + 7 * fetched
    load_end, entry_end = np.cumsum(load_bytes), np.cumsum(entry_bytes)
    load_at = load_end - load_bytes + (entry_end - entry_bytes)[new]
    entry_at = entry_end - entry_bytes + load_end[load_of]
    code = np.zeros(int(load_end[-1] + entry_end[-1]), np.uint8)

    near = (moved != 0) & ~far
    _put(code, load_at[near], [0x48, 0x83, 0xC7, moved[near]])
    _put(code, load_at[far], [0x48, 0x81, 0xC7, *_bytes4(moved[far])])
    load_at = load_at + move_bytes
    for form, last in ((short, 0x40), (~short, 0x80)):
        to, disp = register[form], displacement[form]
        tail = [disp // LINE] if last == 0x40 else _bytes4(disp)
        _put(code, load_at[form], [0x62, 0x61 | _high(to), 0x7C, 0x48, 0x10, (last | 7) + (to & 7) * 8, *tail])

    _put(code, entry_at[fetched], [0x0F, 0x18, 0x90, *_bytes4(np.arange(share) * LINE)])
    entry_at = entry_at + 7 * fetched
    _put(code, entry_at[step], [0x48, 0x81, 0xC6, *_bytes4(np.full(int(step.sum()), 4 * WINDOW))])
    source = register[load_of]
    _put(
        code,
        entry_at + 7 * step,
        [
            0x62,
            0x62 | _high(row),
            0x05 | (~source & 15) << 3,
            0x50 | (~source >> 4 & 1) << 3,
            0xB8,
            0x46 + (row & 7) * 8,
            entry % WINDOW - WINDOW // 2,
        ],
    )
    return code.tobytes()


def _bases(address: I64) -> I64:
    """What rdi holds at each load, less its value on entry: the middle of the ``REACH`` bytes that hold the address, if
    enough other loads are whole lines from there, else what it was before."""
    place = address // REACH * LINE + address % LINE
    _, index, count = np.unique(place, return_inverse=True, return_counts=True)
    worth = count[index] >= REBASE
    base = np.where(worth, address // REACH * REACH + REACH // 2 + address % LINE, 0)
    last = np.maximum.accumulate(np.where(worth, np.arange(address.size), -1))
    return np.where(last >= 0, base[np.maximum(last, 0)], 0)


def _high(register: I64) -> I64:
    """The inverted bits R and R' of an EVEX prefix, beside the other bits of that byte that a caller gives."""
    return ((~register >> 3 & 1) << 7) | ((~register >> 4 & 1) << 4)


def _bytes4(value: I64) -> list[I64]:
    return [value >> shift & 0xFF for shift in (0, 8, 16, 24)]


def _put(code: npt.NDArray[np.uint8], at: I64, values: Sequence[int | I64]) -> None:
    """Write one instruction at each of ``at``, byte by byte."""
    for i, value in enumerate(values):
        code[at + i] = np.asarray(value) & 0xFF
