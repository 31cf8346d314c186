"""The measured table: fit, choice, guided pruning, bad files."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skimtvm.calibration import SHIPPED, Calibration, Point, for_host, for_target, host_cpuid
from skimtvm.chooser import choose
from skimtvm.cost_model import cost
from skimtvm.errors import InvalidOption, OutputExists
from skimtvm.formats.stats import SparsityStats
from skimtvm.kernels import Kernel, applicable
from skimtvm.prune.guide import Guide, Machine
from skimtvm.schedules.sites import version
from skimtvm.target import TARGETS
from skimtvm.tune.calibrate import DENSITIES, FULL, QUICK, Kept, cases, site
from skimtvm.workload import ConvWorkload, DenseWorkload, WinogradWorkload

SMALL = ConvWorkload(1, 64, 14, 14, 64, 3, 3, padding=(1, 1, 1, 1))
LARGE = ConvWorkload(1, 256, 56, 56, 256, 3, 3, padding=(1, 1, 1, 1))
BETWEEN = ConvWorkload(1, 128, 28, 28, 128, 3, 3, padding=(1, 1, 1, 1))
FC = DenseWorkload(1, 4096, 1000)
PEAK, BANDWIDTH = 1e11, 2e10

Ratio = Callable[[Kernel, Any, float], float]


def table(ratio: Ratio, shapes: tuple[Any, ...] = (SMALL, LARGE, FC)) -> Calibration:
    """As if every kernel took ``ratio`` of what the model says."""
    base = Calibration("znver4", "avx512", "test", "V-1-2", PEAK, ((1e6, 1e11), (1e8, BANDWIDTH)), ())
    points = []
    for shape in shapes:
        for case in cases(shape, DENSITIES):
            k, w, x = case.kernel, case.workload, case.density
            seconds = cost(k, x, w) * base.unit(k, w) * ratio(k, w, x)
            points.append(Point(k.name, k.op, w, x, x, seconds, (seconds, seconds), 5))
    return dataclasses.replace(base, points=tuple(points))


def kernel(name: str, workload: Any = SMALL) -> Kernel:
    return next(k for k in applicable(workload) if k.name == name)


def stats(density: float, blocks: float = 1.0) -> SparsityStats:
    weights = 64 * 64 * 9
    return SparsityStats(weights, round(weights * density), 576 * density, 576, ((4, blocks),), 0)


def test_the_fit_is_exact_on_the_grid_and_a_mean_elsewhere() -> None:
    ratios = {SMALL: 2.0, LARGE: 0.5}
    t = table(lambda k, w, x: ratios.get(w, 1.0) * (1 + x))
    csr = kernel("csr")
    for shape, r in ratios.items():
        for x in DENSITIES:
            assert t.factor(csr, x, shape) == pytest.approx(r * (1 + x))
            assert t.seconds(csr, x, shape) == pytest.approx(cost(csr, x, shape) * 2 * shape.macs / PEAK * r * (1 + x))
        assert t.factor(csr, 1e-4, shape) == pytest.approx(r * (1 + DENSITIES[0])), "beyond the end, its value"
        assert r * 1.1 < t.factor(csr, math.sqrt(0.1 * 0.2), shape) < r * 1.2
    assert t.factor(csr, 0.1, BETWEEN) == pytest.approx(1.1), "as far from both"
    near = dataclasses.replace(SMALL, c=72, k=72)
    assert 1.8 < t.factor(csr, 0.1, near) / 1.1 < 2
    odd = ConvWorkload(16, 3, 500, 500, 4096, 11, 11)
    assert 0.5 <= t.factor(csr, 0.1, odd) / 1.1 <= 2, "far outside, still between the measured ones"


def test_kernels_are_kept_apart_and_winograd_ones_joined() -> None:
    t = table(lambda k, w, x: 3.0 if k.name == "bsr4" else 0.5 if k.winograd or k.op == "winograd" else 1.0)
    assert t.factor(kernel("bsr4"), 0.1, BETWEEN) == pytest.approx(3)
    assert t.factor(kernel("csr"), 0.1, BETWEEN) == pytest.approx(1)
    native = WinogradWorkload(**dataclasses.asdict(BETWEEN), m=4)
    assert t.factor(kernel("dense", native), 1.0, native) == pytest.approx(0.5), "the code of winograd4"
    fewer = dataclasses.replace(t, points=tuple(p for p in t.points if p.kernel != "bsr4"))
    assert fewer.factor(kernel("bsr4"), 0.1, BETWEEN) == 1 and not fewer.knows(kernel("bsr4"), BETWEEN)


def test_interleaved_kernels_have_points_of_their_own() -> None:
    t = table(lambda k, w, x: 1.0)
    batch = dataclasses.replace(BETWEEN, n=16)
    winograd4, dense = kernel("winograd4"), kernel("dense")
    assert t.factor(winograd4, 1.0, batch, 16) == pytest.approx(t.factor(winograd4, 1.0, batch)), "the nearest there is"
    assert not t.knows(winograd4, batch, 16)
    more = []
    for case in cases(batch, (0.1, 0.5), 16):
        k, w, x = case.kernel, case.workload, case.density
        slow = 9.0 if k.winograd or k.op == "winograd" else 1.0
        seconds = cost(k, x, w) * t.unit(k, w) * slow
        more.append(Point(k.name, k.op, w, x, x, seconds, (seconds, seconds), 5, interleave=16))
    t = dataclasses.replace(t, points=(*t.points, *more))
    assert t.factor(winograd4, 1.0, batch, 16) == pytest.approx(9) and t.knows(dense, batch, 16)
    assert t.factor(winograd4, 1.0, batch) == pytest.approx(1)
    exact = lambda m: 0.0
    whole = stats(1.0, blocks=1.0)
    assert choose("a", batch, whole, winograd_error=exact, calibration=t).winograd == 4
    assert choose("a", batch, whole, winograd_error=exact, calibration=t, interleave=16).winograd == 0
    assert "measured interleaved" in choose("a", batch, stats(0.1), calibration=t, interleave=16).reason
    again = [Point.from_json(json.loads(json.dumps(p.to_json()))) for p in t.points]
    assert [p.interleave for p in again] == [p.interleave for p in t.points]


def test_the_choice_follows_the_table() -> None:
    fast_dense = table(lambda k, w, x: 1.0 if k.rows else 0.1)
    slow_dense = table(lambda k, w, x: 1.0 if k.rows else 10.0)
    for shape, name in ((BETWEEN, "csr"), (FC, "sell")):
        assert choose("a", shape, stats(0.2)).kernel == name
        dense = choose("a", shape, stats(0.2), calibration=fast_dense)
        assert dense.kernel == "dense" and "break-even" in dense.reason and "(measured)" in dense.reason
        sparse = choose("a", shape, stats(0.9), calibration=slow_dense)
        assert sparse.kernel != "dense" and "measured: " in sparse.reason and "model" not in sparse.reason
    blocks = stats(0.2, blocks=0.25)
    assert choose("a", BETWEEN, blocks).kernel == "bsr4"
    slow_blocks = table(lambda k, w, x: 4.0 if k.rows > 1 else 1.0)
    assert choose("a", BETWEEN, blocks, calibration=slow_blocks).kernel == "csr"


def test_winograd_or_direct_follows_the_table() -> None:
    exact = lambda m: 0.0
    whole = stats(1.0, blocks=1.0)
    assert choose("a", LARGE, whole, winograd_error=exact).kernel.startswith("winograd")
    slow = table(lambda k, w, x: 5.0 if k.winograd else 1.0)
    assert choose("a", LARGE, whole, winograd_error=exact, calibration=slow).kernel == "dense"
    only2 = table(lambda k, w, x: 5.0 if k.winograd == 4 else 0.5 if k.winograd else 1.0)
    chosen = choose("a", LARGE, whole, winograd_error=exact, calibration=only2)
    assert chosen.kernel == "winograd2" and "x dense (measured)" in chosen.reason
    assert choose("a", LARGE, stats(0.4), winograd_error=exact).kernel == "winograd4"
    assert choose("a", LARGE, stats(0.4), winograd_error=exact, calibration=slow).kernel == "csr"
    native = WinogradWorkload(**dataclasses.asdict(LARGE), m=4)
    assert choose("a", native, stats(0.2)).kernel == "csr"
    useless = table(lambda k, w, x: 50.0 if k.op == "winograd" and k.rows else 1.0)
    assert choose("a", native, stats(0.2), calibration=useless).kernel == "dense"


def test_a_kernel_that_was_not_measured_is_called_model() -> None:
    t = table(lambda k, w, x: 1.0)
    fewer = dataclasses.replace(t, points=tuple(p for p in t.points if p.kernel != "csr"))
    assert "; model: " in choose("a", BETWEEN, stats(0.1), calibration=fewer).reason


def test_guided_pruning_uses_the_table(tmp_path: Path) -> None:
    t = table(lambda k, w, x: 2.0 if k.rows else 1.0)
    csr, dense = kernel("csr"), kernel("dense")
    assert t.alpha("csr", BETWEEN) == pytest.approx(2 * dense.efficiency / csr.efficiency)
    few = DenseWorkload(1, 64, 64)
    assert t.alpha("bsr4", few) == t.alpha("csr", few) == t.alpha("sell", few) is not None
    path = tmp_path / "c.json"
    t.save(path)
    for source in (path, Machine(table=t).record()):
        p = Guide({"a": BETWEEN}, source).project("a", 0.1)
        direct, fastest = t.dense_seconds(BETWEEN)
        assert fastest < direct, "Winograd"
        assert p.dense_time == pytest.approx(fastest, rel=1e-3)
        assert p.sparse_time == pytest.approx(t.alpha("csr", BETWEEN) * 0.1 * direct, rel=1e-3)
        assert p.break_even == pytest.approx(fastest / direct / t.alpha("csr", BETWEEN), rel=1e-3)
    hopeless = Guide({"a": BETWEEN}, Machine(table=table(lambda k, w, x: 100.0 if k.rows else 1.0)))
    assert not hopeless.project("a").worth
    named = Machine({**Machine().alpha, "a": 1.0}, table=t)
    assert named.rates("a", "csr", BETWEEN)[0] == 1.0, "a layer's own alpha wins"


def test_which_table(tmp_path: Path) -> None:
    t = table(lambda k, w, x: 1.0)
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    t.save(theirs / "znver4" / "calibration.json")
    assert for_target(None, (mine, theirs), "znver4") is not None
    assert for_target(None, (mine, theirs), "haswell") is None and for_target("none", (theirs,), "znver4") is None
    with pytest.raises(InvalidOption, match="is of znver4, the target is haswell"):
        for_target(str(theirs / "znver4" / "calibration.json"), (), "haswell")
    assert for_host((theirs,)) is None
    dataclasses.replace(t, cpuid=host_cpuid()).save(mine / "znver4" / "calibration.json")
    assert (for_host((theirs, mine)) is not None) == bool(host_cpuid())


def test_files(tmp_path: Path) -> None:
    t = table(lambda k, w, x: 1.5)
    path = tmp_path / "c.json"
    t.save(path)
    again = Calibration.load(path)
    assert len(again.points) == len(t.points) and again.points[0].workload == SMALL
    assert again.factor(kernel("csr"), 0.1, BETWEEN) == pytest.approx(1.5, rel=1e-3)
    raw = json.loads(path.read_text())
    point = raw["points"][0]
    for change, message in [
        ({"schema": 2}, "schema 2 is not 1"),
        ({"points": []}, "no points"),
        ({"points": 3}, "no object with points"),
        ({"bandwidths": []}, "rates"),
        ({"peak_flops": "fast"}, "cannot be used"),
        ({"points": [point | {"seconds": -1}]}, "above 0"),
        ({"points": [point | {"kernel": "ell"}]}, "unknown"),
        ({"points": [point | {"op": "fc"}]}, "made for dense layers"),
        ({"points": [{k: v for k, v in point.items() if k != "workload"}]}, "workload"),
        ({"points": [point | {"workload": {"type": "conv2d", "n": 1}}]}, "missing"),
    ]:
        path.write_text(json.dumps(raw | change))
        with pytest.raises(InvalidOption, match="skimtvm calibrate") as e:
            Calibration.load(path)
        assert message in str(e.value) and str(path) in str(e.value)
    for text, message in (("{", "no JSON"), ("[]", "no object")):
        path.write_text(text)
        with pytest.raises(InvalidOption, match=message):
            Calibration.load(path)
    with pytest.raises(InvalidOption, match="alpha table"):
        Machine.load({"schema": 7, "points": [point]})
    with pytest.raises(InvalidOption, match="cannot be read"):
        Calibration.load(tmp_path / "none.json")


def test_every_kernel_is_in_both_grids() -> None:
    for grid in (FULL, QUICK):
        found = {(c.kernel.name, c.kernel.op) for shape in grid.shapes for c in cases(shape, grid.densities)}
        native = ("dense", "winograd")  # measured as winograd2 and winograd4
        from skimtvm.kernels import KERNELS

        assert found | {native} == {(k.name, k.op) for k in KERNELS}


@pytest.mark.parametrize("shape", [*QUICK.shapes, ConvWorkload(1, 16, 14, 14, 16, 5, 5, padding=(2,) * 4)], ids=str)
def test_layers_have_the_density_asked_for(shape: Any) -> None:
    for case in cases(shape, (0.3,)):
        layer, density = site(case)
        assert density == pytest.approx(case.density, abs=0.08)
        if case.kernel.rows > 1:
            w = layer.weight.reshape(-1, case.kernel.rows, layer.weight[0].size)
            assert (w.any(axis=1) == w.all(axis=1)).all(), "whole blocks"
        assert np.isfinite(layer.weight).all()


def test_shipped_tables_load() -> None:
    for path in SHIPPED.glob("*/calibration.json"):
        t = Calibration.load(path)
        assert t.cpu == path.parent.name and t.kernels
        stale = {name for name, v in t.kernels.items() if v != version(name, TARGETS[t.cpu])}
        assert not stale, "the code of these kernels has changed: run skimtvm calibrate again"
        assert all(t.knows(k, BETWEEN, 16) for k in applicable(BETWEEN)), "of interleaved images, too"
        for shape in (SMALL, BETWEEN, LARGE, FC):
            assert all(t.knows(k, shape) for k in applicable(shape) if k.name != "bsr16" or shape is not FC)


def test_an_unfinished_calibration_is_kept(tmp_path: Path) -> None:
    path, head = tmp_path / "c.partial", {"cpuid": "V-1-2", "kernels": {"csr_conv2d": "a"}}
    points = {w: [p for p in table(lambda k, w, x: 2.0, (w,)).points] for w in (SMALL, FC)}
    first = Kept(path, head)
    assert first.rates is None and not first.shapes
    first.add_rates(PEAK, [[1e6, 1e11]])
    for workload, measured in points.items():
        first.add(workload, measured)
    assert Kept(path, head).shapes == points and Kept(path, head).rates == (PEAK, [[1e6, 1e11]])
    path.write_text(path.read_text()[:-9])
    again = Kept(path, head)
    assert list(again.shapes) == [SMALL], "a line that was cut off"
    again.add(FC, points[FC])
    assert Kept(path, head).shapes == points
    assert not Kept(path, head | {"kernels": {"csr_conv2d": "b"}}).shapes, "other kernels"
    assert not Kept(path, head).shapes, "begun anew"
    with pytest.raises(OutputExists, match="cannot be written"):
        Kept(tmp_path / "none" / "c.partial", head)
