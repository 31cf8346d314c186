"""Magnitude pruning of weights: single ones, or blocks of output channels."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from ..errors import InvalidOption


def parse_pattern(pattern: str) -> int:
    """Rows R of a block pattern ``Rx1``: R output channels share each column that stays."""
    match = re.fullmatch(r"(\d+)x1", pattern)
    if match is None or not 1 <= int(match[1]) <= 64:
        raise InvalidOption(f"pattern '{pattern}' is unknown; give Rx1 with R from 1 to 64, e.g. 4x1")
    return int(match[1])


def prune(weight: np.ndarray, sparsity: float, *, rows: int = 1, groups: int = 1) -> np.ndarray:
    """Copy of ``weight`` (float32, output channels first) with the smallest magnitudes set to zero.

    ``rows`` > 1 prunes blocks of so many consecutive output channels of one group, by the L2 norm of the block; the
    last block of a group may have fewer. Exactly round(sparsity * number of blocks) blocks become zero.
    """
    if rows == 1:
        flat = weight.copy().reshape(-1)
        flat[_smallest(np.abs(flat), sparsity)] = 0
        return flat.reshape(weight.shape)
    out = weight.shape[0] // groups
    blocks = -(-out // rows)
    padded = np.zeros((groups, blocks * rows, weight[0].size), np.float32)
    padded[:, :out] = weight.reshape(groups, out, -1)
    view = padded.reshape(groups, blocks, rows, -1)
    drop = _smallest(np.sqrt((view * view).sum(axis=2)).reshape(-1), sparsity).reshape(groups, blocks, 1, -1)
    view *= ~drop
    return np.ascontiguousarray(padded[:, :out]).reshape(weight.shape)


def _smallest(magnitude: np.ndarray, sparsity: float) -> np.ndarray:
    """Mask of exactly round(sparsity * size) of the smallest entries; the first ones win ties."""
    count = round(sparsity * magnitude.size)
    if count == 0:
        return np.zeros(magnitude.shape, bool)
    limit = _kth_smallest(magnitude, count - 1)
    mask: np.ndarray = magnitude < limit
    ties = np.flatnonzero(magnitude == limit)[: count - int(np.count_nonzero(mask))]
    mask[ties] = True
    return mask


def _kth_smallest(values: np.ndarray, k: int) -> Any:
    """Entry k of the sorted ``values`` (1-D); a sample brackets it first, which is much faster than partition."""
    if values.size > 1 << 20:
        sample = np.sort(values[:: values.size >> 18])
        at = k * sample.size // values.size
        low, high = sample[max(at - 2000, 0)], sample[min(at + 2000, sample.size - 1)]
        below = int(np.count_nonzero(values < low))
        middle = values[(values >= low) & (values <= high)]
        if below <= k < below + middle.size:
            return np.partition(middle, k - below)[k - below]
    return np.partition(values, k)[k]
