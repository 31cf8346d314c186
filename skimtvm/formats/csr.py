"""CSR and R x 1 block encodings of weight matrices. NumPy only.

CSR keeps the nonzeros of each row. The block form lets groups of R consecutive rows share one list of columns: a column
is stored for the whole group as soon as one of its rows has a nonzero there, with explicit zeros for the others. R = 1
blocks are CSR. Negative zeros are zeros, and are not stored; every other value, NaN included, comes back bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import InternalError

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class BlockMatrix:
    """An f32[rows, columns] matrix in groups of ``height`` rows; the last group is padded with zero rows.

    ``indptr`` int32[groups + 1]: first entry of each group; ``indices`` int32[entries]: columns, ascending in a group;
    ``data`` f32[entries, height].
    """

    shape: tuple[int, int]
    height: int
    indptr: I32
    indices: I32
    data: F32

    @property
    def groups(self) -> int:
        return -(-self.shape[0] // self.height)

    @property
    def entries(self) -> int:
        return int(self.indices.size)

    @property
    def nnz(self) -> int:
        return int(np.count_nonzero(self.data))

    @property
    def fill(self) -> float:
        """Share of the stored values that are nonzero (1 for CSR and for an empty matrix)."""
        return self.nnz / self.data.size if self.data.size else 1.0

    @property
    def nbytes(self) -> int:
        return self.indptr.nbytes + self.indices.nbytes + self.data.nbytes


def encode(matrix: F32, height: int = 1) -> BlockMatrix:
    """f32[rows, columns] to groups of ``height`` rows (1: CSR). Raises InternalError for anything but f32 of rank 2."""
    if matrix.ndim != 2 or matrix.dtype != np.float32:
        raise InternalError(f"sparse encoding of {matrix.dtype}{list(matrix.shape)}: a float32 matrix is needed")
    if height < 1:
        raise InternalError(f"sparse encoding with groups of {height} rows: at least 1 is needed")
    rows, columns = matrix.shape
    groups = -(-rows // height)
    full = np.zeros((groups * height, columns), np.float32)
    full[:rows] = matrix
    blocks = full.reshape(groups, height, columns)
    group, column = np.nonzero((blocks != 0).any(axis=1))
    indptr = np.zeros(groups + 1, np.int32)
    np.cumsum(np.bincount(group, minlength=groups), out=indptr[1:])
    data = np.ascontiguousarray(blocks[group, :, column])
    return BlockMatrix((rows, columns), height, indptr, column.astype(np.int32), data)


def decode(encoded: BlockMatrix) -> F32:
    """The f32[rows, columns] matrix again. Raises InternalError for an invalid encoding."""
    validate(encoded)
    rows, columns = encoded.shape
    blocks = np.zeros((encoded.groups, encoded.height, columns), np.float32)
    group = np.repeat(np.arange(encoded.groups), np.diff(encoded.indptr))
    blocks[group, :, encoded.indices] = encoded.data
    return blocks.reshape(-1, columns)[:rows]


def validate(encoded: BlockMatrix) -> None:
    """Raise InternalError that names the first rule which ``encoded`` breaks."""
    name = f"sparse matrix {encoded.shape[0]}x{encoded.shape[1]} in groups of {encoded.height}"

    def demand(condition: bool, message: str) -> None:
        if not condition:
            raise InternalError(f"{name}: {message}")

    demand(encoded.height >= 1, "the group height must be at least 1")
    for field, dtype in (("indptr", np.int32), ("indices", np.int32), ("data", np.float32)):
        have = getattr(encoded, field).dtype
        demand(have == dtype, f"{field} is {have}, not {np.dtype(dtype)}")
    indptr, indices, data = encoded.indptr, encoded.indices, encoded.data
    demand(indptr.shape == (encoded.groups + 1,), f"indptr has shape {indptr.shape}, not ({encoded.groups + 1},)")
    demand(data.shape == (indices.size, encoded.height), f"data {data.shape} does not fit {indices.size} columns")
    demand(int(indptr[0]) == 0, f"indptr starts at {indptr[0]}, not 0")
    falling = np.flatnonzero(np.diff(indptr) < 0)
    demand(falling.size == 0, f"indptr decreases after group {falling[0] if falling.size else 0}")
    demand(int(indptr[-1]) == indices.size, f"indptr ends at {indptr[-1]}, but there are {indices.size} columns")
    outside = np.flatnonzero((indices < 0) | (indices >= encoded.shape[1]))
    demand(outside.size == 0, f"column {indices[outside[0]] if outside.size else 0} is outside of the matrix")
    if indices.size > 1:
        unsorted = np.diff(indices) <= 0
        starts = indptr[1:-1]
        unsorted[starts[(starts > 0) & (starts < indices.size)] - 1] = False  # a new group may start lower
        demand(not unsorted.any(), f"columns are not ascending at entry {int(np.argmax(unsorted)) + 1}")
    padding = encoded.groups * encoded.height - encoded.shape[0]
    if padding and indices.size:
        tail = data[indptr[-2] :, encoded.height - padding :]
        demand(not np.count_nonzero(tail), f"the {padding} rows behind the last one are not zero")
