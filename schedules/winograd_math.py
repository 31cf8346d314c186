"""The straight-line parts of Winograd kernels, on vectors whose lanes are tiles: transforms, and pixels into lanes and back.

A transform by a small constant matrix becomes adds and multiply-adds on registers. Columns or rows of the matrices come in
pairs that differ in signs only (the points a and -a); their sums are computed once: F(4x4,3x3) takes 12 operations for 6
inputs instead of 36 multiply-adds, and 10 for 4 outputs instead of 24.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.script.ir_builder import tirx as B

from .emit import broadcast

Expr = Any
Matrix = npt.NDArray[np.float64]


def _scaled(value: Expr, factor: float, lanes: int) -> Expr:
    return value if factor == 1 else value * broadcast(B.float32(factor), lanes)


def _sum(terms: Sequence[tuple[float, Expr]], lanes: int) -> tuple[float, Expr]:
    """(factor, vector): the sum is factor * vector; a factor that all terms share is left to the reader."""
    sizes = {abs(c) for c, _ in terms}
    shared = sizes.pop() if len(sizes) == 1 else 1.0
    terms = sorted(((c / shared, x) for c, x in terms), key=lambda t: t[0] != 1)  # start with what needs no multiply
    factor, total = terms[0]
    total = _scaled(total, factor, lanes)
    for c, x in terms[1:]:
        total = total - _scaled(x, -c, lanes) if c < 0 else total + _scaled(x, c, lanes)
    return shared, B.bind(total)


def _pairs(matrix: Matrix) -> list[tuple[int, int]]:
    """Disjoint pairs of rows that are equal but for signs, and are so in a useful way: some signs agree, some do not."""
    found: list[tuple[int, int]] = []
    taken: set[int] = set()
    for a in range(len(matrix)):
        for b in range(a + 1, len(matrix)):
            p, q = matrix[a], matrix[b]
            used = p != 0
            if not {a, b} & taken and (np.abs(p) == np.abs(q)).all() and (p == q)[used].any() and (p != q)[used].any():
                found.append((a, b))
                taken |= {a, b}
    return found


def transform(matrix: Matrix, inputs: Sequence[Expr], lanes: int) -> list[Expr]:
    """``matrix`` @ ``inputs``, emitted; every result is bound to a variable."""
    values, columns = list(inputs), [matrix[:, j] for j in range(matrix.shape[1])]
    for a, b in _pairs(matrix.T):
        p, q = values[a], values[b]
        same, other = columns[a] == columns[b], columns[a] != columns[b]
        values[a], values[b] = B.bind(p + q), B.bind(p - q)
        columns[a], columns[b] = columns[a] * same, columns[a] * other
    reduced = np.stack(columns, axis=1)
    results: list[Expr] = [None] * len(reduced)

    def terms(row: Matrix, keep: Any) -> list[tuple[float, Expr]]:
        return [(float(c), x) for c, x, k in zip(row, values, keep, strict=True) if c and k]

    for a, b in _pairs(reduced):
        same = reduced[a] == reduced[b]
        unit, even = _sum(terms(reduced[a], same), lanes)
        factor, odd = _sum(terms(reduced[a], ~same), lanes)
        even = _scaled(even, unit, lanes)
        results[a] = B.bind(even + _scaled(odd, factor, lanes))
        results[b] = B.bind(even - _scaled(odd, factor, lanes))
    for i, row in enumerate(reduced):
        if results[i] is None:
            factor, total = _sum(terms(row, row != 0), lanes)
            results[i] = B.bind(_scaled(total, factor, lanes)) if factor != 1 else total
    return results


def shuffle(vectors: Sequence[Expr], lanes: Sequence[int]) -> Expr:
    """The chosen lanes of the concatenated ``vectors``, bound."""
    return B.bind(tirx.Shuffle(list(vectors), [B.int32(i) for i in lanes]))


def concat(parts: Sequence[Expr], lanes: int) -> Expr:
    """``parts`` side by side: ``lanes`` lanes together."""
    return B.bind(parts[0]) if len(parts) == 1 else shuffle(parts, range(lanes))


def deinterleave(chunks: Sequence[Expr], lanes: int) -> list[Expr]:
    """m vectors of consecutive pixels -> the pixels i, m + i, 2 m + i, ... for each i < m (m is 2 or 4)."""
    if len(chunks) == 2:
        return [shuffle(chunks, range(j, 2 * lanes, 2)) for j in (0, 1)]
    half = lanes // 2
    out = []
    for first in (0, 2):  # two of the four pixels at a time: [pixel j of two chunks, pixel j + 1 of two chunks]
        order = [*range(first, 2 * lanes, 4), *range(first + 1, 2 * lanes, 4)]
        pair = [shuffle(chunks[i : i + 2], order) for i in (0, 2)]
        out += [shuffle(pair, [*range(j, j + half), *range(lanes + j, lanes + j + half)]) for j in (0, half)]
    return out


def interleave(pixels: Sequence[Expr], lanes: int) -> list[Expr]:
    """The inverse of ``deinterleave``."""
    if len(pixels) == 2:
        order = [i + lanes * j for i in range(lanes) for j in (0, 1)]
        return [shuffle(pixels, order[q * lanes : (q + 1) * lanes]) for q in (0, 1)]
    half = lanes // 2
    out: list[Expr] = []
    for start in (0, half):
        pair = []
        for j in (0, 2):
            order = [*range(start, start + half), *range(lanes + start, lanes + start + half)]
            pair.append(shuffle(pixels[j : j + 2], order))
        for first in (0, half // 2):
            tiles = range(first, first + half // 2)
            out.append(shuffle(pair, [i + j for i in tiles for j in (0, half, lanes, lanes + half)]))
    return out
