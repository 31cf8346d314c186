"""Sliced ELLPACK (SELL-C-sigma) of weight matrices whose products look their inputs up in registers. NumPy only.

A slice is C rows, one a lane. Its nonzeros come in bundles of ``STEPS`` a lane, and all of a bundle lie in a window of
``window`` columns that starts at its base: a kernel loads the window of the input into registers once and finds each lane's
input there by a permutation, C nonzeros at a time, where CSR loads them one by one. A lane that has fewer than STEPS
nonzeros in the window gets zeros; it takes what it can reach ahead of the slowest lane, so that a window of several
times STEPS nonzeros a row leaves few of them. Within ``SIGMA`` rows, those of similar length share slices.

M. Kreutzer et al., "A unified sparse matrix data format for efficient general sparse matrix-vector multiplication on modern
processors with wide SIMD units", SIAM J. Sci. Comput. 36 (2014), for slices and sorting; windows and bundles are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import InternalError

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

STEPS = 4  # indices of a byte that an int32 holds
WIDEST = 256  # columns that a byte counts
SIGMA = 64  # rows that are sorted by length: results are put back in order before they leave L1


@dataclass(frozen=True, eq=False)
class SellMatrix:
    """An f32[rows, columns] matrix in slices of ``lanes`` rows.

    ``order`` int32[slices * lanes]: row of each lane, a permutation in runs of SIGMA that also counts the rows behind the
    last one; ``ip`` int32[slices + 1]: first bundle of each slice; ``base`` int32[bundles]: column where the window starts,
    at most columns - window (0 where there are fewer columns); ``index`` int32[bundles, lanes]: STEPS bytes, lowest first,
    columns from the base; ``data`` f32[bundles, STEPS, lanes].
    """

    shape: tuple[int, int]
    lanes: int
    window: int
    order: I32
    ip: I32
    base: I32
    index: I32
    data: F32

    @property
    def slices(self) -> int:
        return -(-self.shape[0] // self.lanes)

    @property
    def bundles(self) -> int:
        return int(self.base.size)


def encode(matrix: F32, lanes: int, window: int) -> SellMatrix:
    """f32[rows, columns] in slices of ``lanes`` rows (a divisor of SIGMA) and windows of at most WIDEST columns. Raises
    InternalError for other arguments."""
    if matrix.ndim != 2 or matrix.dtype != np.float32:
        raise InternalError(f"SELL encoding of {matrix.dtype}{list(matrix.shape)}: a float32 matrix is needed")
    if lanes < 1 or SIGMA % lanes or not 1 <= window <= WIDEST:
        raise InternalError(f"SELL encoding in slices of {lanes} rows and windows of {window} columns")
    rows, columns = matrix.shape
    slices = -(-rows // lanes)
    counts = np.zeros(slices * lanes, np.int64)
    counts[:rows] = np.count_nonzero(matrix, axis=1)
    order = np.lexsort((-counts, np.arange(counts.size) // SIGMA)).astype(np.int32)
    # Nonzeros of each lane, in order of columns, with STEPS columns behind the last one that no window reaches.
    length = int(counts.max(initial=0))
    column = np.full((counts.size, length + STEPS), columns + window, np.int64)
    value = np.zeros(column.shape, np.float32)
    row, at = np.nonzero(matrix)
    place = np.empty(order.size, np.int64)
    place[order] = np.arange(order.size)
    entry = np.arange(row.size) - (np.cumsum(counts) - counts)[row]
    column[place[row], entry], value[place[row], entry] = at, matrix[row, at]
    return _bundle(matrix.shape, lanes, window, order, column, value, counts[order])


def _bundle(
    shape: tuple[int, int],
    lanes: int,
    window: int,
    order: I32,
    column: npt.NDArray[np.int64],
    value: F32,
    counts: npt.NDArray[np.int64],
) -> SellMatrix:
    """Bundles of all slices at once, one of each slice that has nonzeros left at a time."""
    slices = order.size // lanes
    done = np.zeros((slices, lanes), np.int64)
    left = counts.reshape(slices, lanes)
    steps = np.arange(STEPS)
    found: list[tuple[npt.NDArray[np.int64], ...]] = []
    values: list[F32] = []
    while (active := np.flatnonzero((done < left).any(axis=1))).size:
        lane = active[:, None] * lanes + np.arange(lanes)
        entry = done[active][:, :, None] + steps
        here = column[lane[:, :, None], entry]  # [slices, lanes, STEPS]
        base = np.clip(here[:, :, 0].min(axis=1), 0, max(0, shape[1] - window))
        offset = here - base[:, None, None]
        inside = offset < window
        index = (np.where(inside, offset, 0) << (8 * steps)).sum(axis=2)
        found.append((active, base, index))
        values.append(np.where(inside, value[lane[:, :, None], entry], np.float32(0)).transpose(0, 2, 1))
        done[active] += inside.sum(axis=2)
    ip = np.zeros(slices + 1, np.int32)
    if not found:
        index = np.zeros((0, lanes), np.int32)
        return SellMatrix(shape, lanes, window, order, ip, ip[:0], index, np.zeros((0, STEPS, lanes), np.float32))
    active, base, index = (np.concatenate(parts) for parts in zip(*found, strict=True))
    np.cumsum(np.bincount(active, minlength=slices), out=ip[1:])
    by_slice = np.argsort(active, kind="stable")
    words = index[by_slice].astype(np.uint32).view(np.int32)
    data = np.concatenate(values)[by_slice]
    return SellMatrix(shape, lanes, window, order, ip, base[by_slice].astype(np.int32), words, data)


def decode(encoded: SellMatrix) -> F32:
    """The f32[rows, columns] matrix again."""
    rows, columns = encoded.shape
    matrix = np.zeros((encoded.slices * encoded.lanes, columns + encoded.window), np.float32)
    slice_of = np.repeat(np.arange(encoded.slices), np.diff(encoded.ip))
    row = encoded.order[slice_of[:, None] * encoded.lanes + np.arange(encoded.lanes)]
    words = encoded.index.view(np.uint32)
    for step in range(STEPS):
        at = encoded.base[:, None] + ((words >> np.uint32(8 * step)) & np.uint32(255)).astype(np.int64)
        np.add.at(matrix, (row, at), encoded.data[:, step])
    return matrix[:rows, :columns]


def stored_share(per_window: float) -> float:
    """Stored values a nonzero, zeros included, where a row has ``per_window`` nonzeros in a window at random places: a fit
    to slices of 16 rows (0.6 to 100 nonzeros; within 10%)."""
    x = max(per_window, 1e-6)
    return max(1 + 2.1 / x, 0.97 * STEPS / x)
