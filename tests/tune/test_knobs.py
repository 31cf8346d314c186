"""Spaces: legal by construction, without doubles, with the default among them."""

from __future__ import annotations

import dataclasses
import random
import re

import pytest
import tvm

from skimtvm.schedules import knobs as k
from skimtvm.schedules import unrolled_knobs
from skimtvm.schedules.sites import ConvSite, Site, version
from skimtvm.schedules.winograd import WinogradKnobs
from skimtvm.target import TARGETS, CpuTarget, resolve
from skimtvm.tune.lookup import knobs_from
from skimtvm.tune.worker import Bench, Options

from .samples import conv_site, fc_site, winograd_site

CPUS = ("znver4", "haswell")
SITES = {
    "csr": conv_site(),
    "bsr4": conv_site(kernel="bsr4", rows=4),
    "dense": conv_site(kernel="dense", density=1.0),
    "wide": conv_site(c=70, size=30, k=8),
    "one-channel": conv_site(c=1, size=3, k=1),
    "across": conv_site(c=64, size=14, k=96, kernel="dense", density=1.0),
    "fc": fc_site(),
    "winograd": winograd_site(size=30),
    "winograd-dense": winograd_site(kernel="dense", size=30),
    "winograd-batch": winograd_site(images=16, size=30, k=70),
    "winograd-dense-batch": winograd_site(kernel="dense", images=8, m=2),
}


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("name", SITES)
def test_spaces_hold_the_default_and_no_doubles(name: str, cpu: str) -> None:
    site, target = SITES[name], TARGETS[cpu]
    for threads in (1, 2):
        space = site.space(target, threads)
        listed = list(space)
        assert listed[0] == site.default(target) and len(listed) == len(set(listed))
        assert all(x in space for x in listed[:3])
    if name == "wide" and cpu == "znver4":
        assert len(listed) > 100


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("name", ["csr", "bsr4", "dense", "wide"])
def test_conv_spaces_are_legal(name: str, cpu: str) -> None:
    site, target = SITES[name], TARGETS[cpu]
    assert isinstance(site, ConvSite)
    cg = site.workload.c
    for x in list(site.space(target))[1:]:
        assert x.lanes in (8, 16) and x.lanes <= target.lanes
        if x.across:
            assert name == "dense" and x.rows // 16 * x.vectors < target.registers - 4
            continue
        if x.unrolled:
            assert name in ("csr", "wide") and cpu == "znver4" and x.rows <= 30 and not x.aligned and x.lanes == 16
            continue
        assert x.rows * x.vectors < target.registers and x.vectors * x.lanes * 4 < 1024
        assert 1 <= x.channel_block <= cg and x.dense == (site.kernel == "dense")
        assert not x.aligned or (name in ("csr", "wide") and x.vectors * x.lanes >= k.ALIGNED_SHORTEST)
        if x.aligned:
            copies = site.copies(x.vectors, x.lanes)
            assert copies is not None and 4 * copies.floats(x.channel_block) <= target.l2_bytes / 4
        total = -(-site.dst.layout.positions // x.lanes)
        assert x.vectors == -(-total // -(-total // x.vectors)), "a lower tile would give as many tiles"


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("name", [n for n in SITES if n.startswith("winograd")])
def test_winograd_spaces_are_legal(name: str, cpu: str) -> None:
    site, target = SITES[name], TARGETS[cpu]
    if site.workload.n > target.lanes:  # type: ignore[union-attr]
        return
    found = list(site.space(target))
    assert len(found) > 5 and (site.kernel == "dense" or len({x.together for x in found}) > 1)
    for x in found[1:]:
        assert isinstance(x, WinogradKnobs) and x.dense == (site.kernel == "dense")
        assert x.rows * x.together * x.unroll < target.registers and x.together * x.unroll * x.lanes * 4 < 1024
        assert x.vectors % x.together == 0 and x.channel_block % x.rows == 0 and x.lanes % (x.segment) == 0
    for x in (found[0], found[-1]):
        assert knobs_from(site, dataclasses.asdict(x), target) == x
    far = dataclasses.asdict(found[-1])
    for change in ({"vectors": 1000}, {"rows": 31}, {"lanes": 4}, {"unroll": 3}, {"wings": 1}):
        assert knobs_from(site, far | change, target) is None


@pytest.mark.parametrize("name", ["winograd", "winograd-dense", "winograd-batch"])
def test_winograd_candidates_compute_the_same(name: str) -> None:
    site, target = SITES[name], resolve()
    if site.workload.n > target.lanes:  # type: ignore[union-attr]
        pytest.skip("no vector of so many images on this machine")
    found = list(site.space(target))
    picked = [found[0], *random.Random(0).sample(found[1:], 2)]
    bench = Bench(site, target, 1, Options())
    assert [bench.build(i, x) for i, x in enumerate(picked)] == [""] * 3


def test_channels_in_the_lanes_stay_in_registers() -> None:
    site, target = SITES["across"], TARGETS["znver4"]
    found = list(site.space(target))
    assert len(found) > 3 and all(isinstance(x, k.Knobs) and x.across and x.dense for x in found)
    assert {x.rows for x in found if isinstance(x, k.Knobs)} == {16, 32}, "96 channels have no groups of 64"
    tallest = max(found, key=lambda x: x.rows * x.vectors if isinstance(x, k.Knobs) else 0)
    assert _spills(site, tallest, target) == 0
    assert isinstance(tallest, k.Knobs)
    for change in ({"rows": 64}, {"rows": 16, "vectors": 3}, {"rows": 32, "vectors": 14}, {"across": False}):
        assert knobs_from(site, dataclasses.asdict(dataclasses.replace(tallest, **change)), target) is None
    assert knobs_from(site, dataclasses.asdict(tallest), target) == tallest


def test_known_spills_are_out() -> None:
    zmm, ymm = TARGETS["znver4"], TARGETS["haswell"]
    assert not k.fits(8, 3, 16, zmm) and k.fits(8, 2, 16, zmm) and k.fits(8, 1, 16, zmm) and k.fits(1, 15, 16, zmm)
    assert not k.fits(1, 16, 16, zmm), "accumulators of 1 KB live on the heap"
    assert not k.fits(4, 4, 8, ymm) and k.fits(3, 4, 8, ymm) and not k.fits(1, 1, 16, ymm) and not k.fits(1, 1, 12, zmm)


def _spills(site: Site, knobs: k.Knobs | k.FcKnobs, target: CpuTarget) -> int:
    """Vector registers that are stored to the stack in loops that multiply."""
    func = site.build(knobs, target).emit().with_attr("global_symbol", "main")
    asm = tvm.compile(func, target=target.tvm()).mod.inspect_source("asm")
    assert "AllocWorkspace" not in asm or getattr(knobs, "aligned", False)
    count = loops = 0
    for label, body in re.findall(r"^(\.LBB\w+):(.*?)(?=^\.LBB\w+:|\Z)", asm, re.M | re.S):
        if "vfmadd" in body and re.search(rf"\tj\w+\t{re.escape(label)}\b", body):
            loops += 1
            count += len(re.findall(r"vmov[au]ps\s+%[yz]mm\d+, -?\d*\(%r[sb]p\)", body))
    assert loops, "no loop found"
    return count


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("name", ["csr", "bsr4", "dense"])
def test_the_tallest_tiles_do_not_spill(name: str, cpu: str) -> None:
    site, target = SITES[name], TARGETS[cpu]
    tallest: dict[tuple[int, int, bool], k.Knobs] = {}
    for x in site.space(target):
        assert isinstance(x, k.Knobs)
        if not x.unrolled and x.ahead and x.channel_block == site.workload.c:  # type: ignore[union-attr]
            old = tallest.get((x.rows, x.lanes, x.aligned))
            tallest[x.rows, x.lanes, x.aligned] = max(old or x, x, key=lambda y: y.vectors)
    for x in tallest.values():
        assert _spills(site, x, target) == 0, x


def test_a_tile_that_is_left_out_does_spill() -> None:
    site, target = SITES["dense"], TARGETS["znver4"]
    assert _spills(site, k.Knobs(8, 3, 12, 1, True, 16), target) > 0


def test_versions_tell_kernels_and_targets_apart() -> None:
    names = ("csr_conv2d", "bsr4_conv2d", "dense_conv2d", "sell_fc", "dense_fc")
    hashes = {version(n, TARGETS["znver4"]) for n in names}
    assert len(hashes) == len(names)
    assert version("csr_conv2d", TARGETS["haswell"]) not in hashes
    version.cache_clear()
    assert version("csr_conv2d", TARGETS["znver4"]) in hashes, "the same code has the same version"


def test_versions_do_not_depend_on_the_choice_of_knobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms of an unstructured layer are hashed, whatever the cost model prefers."""
    target = TARGETS["znver4"]
    known = version.__wrapped__("csr_conv2d", target)  # without its cache
    for cycles in (0.0, 1e9):
        monkeypatch.setattr(unrolled_knobs, "STORE", cycles)
        assert version.__wrapped__("csr_conv2d", target) == known
