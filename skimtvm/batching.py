"""How a module that holds several batch sizes runs a number of images: which sizes, and the padding of the last.

The C library of a bundle follows the same rule (``plan`` in ``skimtvm_c.cc``), so that both give the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from .report import LayerRecord

FLOPS = 100e9  # multiply-adds count twice
BANDWIDTH = 25e9  # bytes of weights a second
CALL = 1e-6  # of the VM and the start of a kernel
LARGER = 0.03  # of the time that the largest batch saves against image by image, beyond what the model counts


def estimate(layers: Sequence[LayerRecord], calls: int) -> float:
    """Seconds of one run by a coarse model: each layer takes the longer of its arithmetic and the read of its weights.
    Only the ratios between batch sizes matter."""
    seconds = CALL * calls
    for layer in layers:
        seconds += max(2 * layer.macs * layer.density / FLOPS, layer.stored_bytes / BANDWIDTH)
    return seconds


def estimates(batches: Sequence[int], reports: Sequence[tuple[Sequence[LayerRecord], int]]) -> tuple[float, ...]:
    """``estimate`` for each batch size, of (layers, calls) in ``reports``. Larger batches count a little less: they may
    interleave images, and keep weights in cache."""
    most = max(math.log(batches[-1]), 1.0)
    return tuple(
        estimate(layers, calls) * (1 - LARGER * math.log(n) / most)
        for n, (layers, calls) in zip(batches, reports, strict=True)
    )


@lru_cache(maxsize=256)
def plan(images: int, batches: tuple[int, ...], seconds: tuple[float, ...]) -> tuple[int, ...]:
    """The batch sizes to run one after another for ``images`` images (at least 1), largest first.

    Their sum is at least ``images``; the last run is padded. Of all such lists it is the one with the least sum of
    ``seconds``, and where two are equal the one with the larger sizes.
    """
    bulk, cost = batches[-1], seconds[-1]  # the size that is cheapest for an image, the larger one of two equal ones
    for size, each in zip(reversed(batches), reversed(seconds), strict=True):
        if each * bulk < cost * size:
            bulk, cost = size, each
    # Among any ``bulk`` runs of other sizes are some whose images runs of ``bulk`` take exactly, at no greater cost: fewer
    # than that are weighed.
    full = max(0, (images - bulk * batches[-1]) // bulk)
    rest = images - full * bulk
    best = [0.0] + [math.inf] * rest
    first = [0] * (rest + 1)
    for n in range(1, rest + 1):
        for size, cost in zip(reversed(batches), reversed(seconds), strict=True):
            total = best[max(0, n - size)] + cost
            if total < best[n]:
                best[n], first[n] = total, size
    sizes = []
    while rest > 0:
        sizes.append(first[rest])
        rest -= first[rest]
    return tuple(sorted([bulk] * full + sizes, reverse=True))


def pieces(arrays: Sequence[np.ndarray], sizes: Sequence[int]) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(batch size, inputs of exactly that many images) of each run; images that are missing at the end are zeros."""
    start, images = 0, arrays[0].shape[0]
    for size in sizes:
        some = [a[start : start + size] for a in arrays]
        if start + size > images:
            some = [np.concatenate([a, np.zeros((size - a.shape[0], *a.shape[1:]), a.dtype)]) for a in some]
        yield size, some
        start += size
