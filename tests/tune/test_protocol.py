"""What is timed: the calls of a layer as its network makes them, with the caches as they are there."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import tvm

from skimtvm.compiler import CompileOptions
from skimtvm.schedules.sites import Call, PlacedSite
from skimtvm.target import resolve
from skimtvm.tune.tasks import extract
from skimtvm.tune.worker import Bench, Candidate, Here, Options

from .samples import model

TARGET = resolve()
SIZE = 56


@pytest.fixture(scope="module")
def banded() -> PlacedSite:
    """The second of two 3x3 layers, whose input is a window of rows that slides."""
    source = model(size=SIZE, batch=TARGET.lanes)
    force = (("first", "csr"), ("second", "csr"))
    tasks = extract(source, CompileOptions(force=force, calibration="none"))
    site = next(t.site for t in tasks if t.layers == ("second",))
    assert isinstance(site, PlacedSite)
    return site


def test_a_layer_has_the_calls_of_its_network(banded: PlacedSite) -> None:
    calls, lay = banded.calls(), banded.src.layout
    assert lay.window and len(calls) > 4 and f"rows{calls[0].band[1]}" in banded.layout  # type: ignore[index]
    row = 0
    for call in calls:
        assert call.band is not None and call.band[0] == row and len(call.band) == 3, "one window, the source"
        first, rows, shift = call.band
        begin, end = call.reads
        top = lay.front + (first + shift - 1) * lay.row_pitch
        assert begin == max(0, top) and end == min(banded.src.size, top + (rows + 2) * lay.row_pitch)
        row += rows
    assert row == SIZE


def test_a_candidate_that_leaves_out_rows_is_wrong(banded: PlacedSite) -> None:
    bench = Bench(banded, TARGET, 1, Options())
    one, other = list(banded.space(TARGET))[:2]
    assert (bench.build(0, one), bench.build(1, other)) == ("", "")
    bench.site = dataclasses.replace(banded, bands=banded.bands[:-1])
    assert "differs" in bench.build(2, other)


def test_the_rows_of_a_window_that_are_written(banded: PlacedSite) -> None:
    window = dataclasses.replace(banded, dst=banded.src, bands=tuple(Call((y, 2, 0, -y), (0, 0)) for y in (0, 2, 4)))
    row = banded.workload.k * SIZE * TARGET.lanes
    assert window.written() == 2 * row and banded.written() == SIZE * row


@pytest.mark.parametrize("bands", [(), (Call((0, 2), (4, 12)), Call((2, 2), (8, 16)))])
def test_caches_are_as_in_the_middle_of_a_network(bands: tuple[Call, ...]) -> None:
    """Before each timed call something as large as the second level is read and written; warm calls follow each other."""
    runner = Here(tvm, Options(), 1)
    seen = []

    def kernel(source: Any, *rest: Any) -> None:
        seen.append(bool(runner.cold[0].all()))
        runner.cold[0] = 0

    source = runner.array(np.arange(16, dtype=np.float32))
    candidate = Candidate("k", kernel, tuple(((source,), c.reads) for c in bands or (Call(None, (0, 16)),)))
    runner.cold[0] = 0
    assert runner.sample(candidate, 3) > 0
    assert seen == [True] * 3 * max(1, len(bands)) and runner.cold.nbytes == 2 * TARGET.l2_bytes
    seen.clear()
    runner.sample(candidate, 3, warm=True)
    assert not any(seen) and len(seen) == 3 * max(1, len(bands))
    assert (source.numpy() == np.arange(16)).all(), "the source is as it was"
