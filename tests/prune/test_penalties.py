"""Regularizers against finite differences; thresholds and masks at their defining values."""

import numpy as np
import pytest

from skimtvm import prune
from skimtvm.errors import InvalidOption, UnsupportedWorkload
from skimtvm.prune import groups
from skimtvm.winograd import SIZES, transform

RNG = np.random.default_rng(5)
BLOCKS = prune.Blocks(4)
CASES = {
    "l2": (prune.L2(0.3), (5, 3)),
    "l1": (prune.L1(0.3), (5, 3)),
    "l1-scaled": (prune.L1(0.3, transform(4, 3).effect), (2, 3, 6, 6)),
    "ista": (prune.ISTA(0.3), (4, 4)),
    "surgery": (prune.L1Surgery(0.3), (4, 4)),
    "filters": (prune.GroupLasso(0.2, prune.Filters()), (4, 3, 3, 3)),
    "channels": (prune.GroupLasso(0.2, prune.Channels()), (4, 3, 3, 3)),
    "columns": (prune.GroupLasso(0.2, prune.Columns()), (4, 3, 3, 3)),
    "blocks-4x1": (prune.GroupLasso(0.2, BLOCKS), (10, 3, 3, 3)),
    "blocks-3x2-ragged": (prune.GroupLasso(0.2, prune.Blocks(3, 2)), (7, 5)),
    "blocks-grouped": (prune.GroupLasso(0.2, prune.Blocks(4, 1, groups=2)), (12, 2, 3, 3)),
    "by-size": (prune.GroupLasso(0.2, prune.Blocks(3, 2), by_size=True), (7, 5)),
    "winograd-3x3": (prune.WinogradL1(0.1), (3, 2, 3, 3)),
    "winograd-5x5": (prune.WinogradL1(0.1), (3, 2, 5, 5)),
    "winograd-f2": (prune.WinogradL1(0.1, m=2), (3, 2, 3, 3)),
    "sum": (prune.L2(0.3) + prune.GroupLasso(0.1, BLOCKS), (8, 3)),
}


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_that_of_the_penalty(name):
    regularizer, shape = CASES[name]
    w = RNG.standard_normal(shape)
    gradient, h = regularizer.gradient(w), 1e-6
    assert gradient.shape == shape and gradient.dtype == w.dtype
    for index in RNG.choice(w.size, 12):
        there = np.unravel_index(index, shape)
        old = w[there]
        w[there] = old + h
        above = regularizer.penalty(w)
        w[there] = old - h
        below = regularizer.penalty(w)
        w[there] = old
        assert (above - below) / (2 * h) == pytest.approx(gradient[there], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_zero_has_no_gradient_and_float32_stays(name):
    regularizer, shape = CASES[name]
    w = np.zeros(shape, np.float32)
    gradient = regularizer.gradient(w)
    assert gradient.dtype == np.float32 and not gradient.any() and regularizer.penalty(w) == 0
    assert regularizer.scaled(2).penalty(w + 1) == pytest.approx(2 * regularizer.penalty(w + 1))


def test_group_lasso_leaves_dead_groups_alone():
    w = np.ones((8, 3))
    w[:4, 1] = 0
    gradient = prune.GroupLasso(1.0, BLOCKS).gradient(w)
    assert not gradient[:4, 1].any() and np.allclose(gradient[:4, 0], 0.5) and np.isfinite(gradient).all()


def test_ista_shrinks_by_rate_times_decay():
    w = np.array([0.5, -0.5, 0.05, -0.05, 0.1, 0.0])
    prune.ISTA(1.0).shrink(w, 0.1)
    assert np.allclose(w, [0.4, -0.4, 0, 0, 0, 0]) and not np.signbit(w[w == 0]).any()


@pytest.mark.parametrize("decay", [-1, np.nan, np.inf])
def test_senseless_decay(decay):
    with pytest.raises(InvalidOption, match="decay"):
        prune.L1(decay)


def test_winograd_penalty_needs_square_filters_it_knows():
    with pytest.raises(UnsupportedWorkload):
        prune.WinogradL1(1.0).gradient(np.ones((2, 2, 7, 7)))


# ---- thresholds --------------------------------------------------------------------------------------------------------


def test_adjusted_threshold_at_0_and_1():
    t = prune.GradientAdjusted(1e-4, factor=10)
    d = np.array([0.0, 1.0])
    assert np.allclose(t.limit(d, (2,), np.float64), [1e-3, 1e-4 / 1.1])
    # The other form in which it is written: 1 / (|d| / t0 + 1 / (f t0)).
    d = np.abs(RNG.standard_normal(20))
    assert np.allclose(t.limit(d, (20,), np.float64), 1 / (d / 1e-4 + 1 / (10 * 1e-4)))
    w = np.array([1e-3, 1.001e-3, 9e-5, 9.2e-5, -1e-3])
    t.apply(w, np.array([0, 0, 1, 1, 0.0]))
    assert w.tolist() == [0, 1.001e-3, 0, 9.2e-5, 0]


def test_small_factor_is_the_plain_threshold():
    w = np.array([1e-4, 1.01e-4, -5e-5])
    prune.GradientAdjusted(1e-4, factor=1.9).apply(w)
    assert w.tolist() == [0, 1.01e-4, 0]
    with pytest.raises(InvalidOption, match="needs the update"):
        prune.GradientAdjusted(reading="update").apply(w)
    with pytest.raises(InvalidOption, match="gradient or update"):
        prune.GradientAdjusted(reading="momentum")


def test_group_threshold_takes_the_group_as_a_whole():
    w = np.array([[1e-3, 1.0], [1e-5, 1e-5]])
    prune.Threshold(1e-3, prune.Blocks(2)).apply(w)
    assert w.tolist() == [[0, 1.0], [0, 1e-5]]  # root mean square of the first column: 7e-4


@pytest.mark.parametrize(("m", "r"), SIZES)
def test_winograd_threshold_follows_the_output_norms(m, r):
    f = transform(m, r)
    w = np.ones((2, 2, f.tile, f.tile)) / f.output_norms
    limit = prune.WinogradAdjusted(0.5, factor=0, r=r).limit(None, w.shape, np.float64)
    assert np.allclose(limit * f.output_norms, 0.5)
    kept = w.copy()
    prune.WinogradAdjusted(0.99, factor=0, r=r).apply(kept)
    assert (kept == w).all()
    prune.WinogradAdjusted(1.01, factor=0, r=r).apply(kept)
    assert not kept.any()


def test_winograd_projection_gives_the_nearest_filter():
    w = RNG.standard_normal((2, 3, 3, 3))
    same = w.copy()
    prune.WinogradProjection(0.0).apply(same)
    assert np.allclose(same, w)
    prune.WinogradProjection(1e9).apply(same)
    assert not same.any()


# ---- masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.999])
def test_mask_hits_the_sparsity_exactly(sparsity):
    w = RNG.integers(-2, 3, (20, 50)).astype(np.float32)  # full of ties
    keep = prune.Mask().keep(w, sparsity)
    assert keep.shape == w.shape and (~keep).sum() == round(sparsity * w.size)
    assert np.abs(w[keep]).min() >= np.abs(w[~keep]).max(initial=0)


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 1.5, np.nan, "much"])
def test_sparsity_outside_of_0_to_1(sparsity):
    with pytest.raises(InvalidOption, match="from 0 to below 1"):
        prune.Mask().keep(np.ones((2, 2)), sparsity)
    with pytest.raises(InvalidOption, match="from 0 to below 1"):
        prune.Rule(sparsity=sparsity)


def test_block_mask_keeps_whole_blocks_also_ragged_and_grouped():
    w = RNG.standard_normal((10, 3, 3, 3))
    keep = prune.Mask(groups=prune.Blocks(4)).keep(w, 0.7).reshape(10, -1)
    for rows in (keep[:4], keep[4:8], keep[8:]):
        assert (rows == rows[:1]).all()
    w = RNG.standard_normal((12, 2, 3, 3))
    keep = prune.Mask(groups=prune.Blocks(4, 1, groups=2)).keep(w, 0.5).reshape(12, -1)
    for rows in (keep[:4], keep[4:6], keep[6:10], keep[10:]):
        assert (rows == rows[:1]).all()


def test_groupwise_mask_holds_only_dead_rows_and_columns():
    w = np.ones((3, 4))
    w[1] = 0
    w[:, 2] = 0
    w[0, 0] = 0
    keep = prune.GroupwiseMask().keep(w)
    assert keep[0, 0] and not keep[1].any() and not keep[:, 2].any() and keep.sum() == 6


@pytest.mark.parametrize("channels", [8, 7, 3])
def test_two_of_four(channels):
    w = RNG.standard_normal((5, channels, 3, 3))
    keep = prune.NofM().keep(w)
    for start in range(0, channels, 4):
        part = keep[:, start : start + 4]
        assert (part.sum(axis=1) == min(2, part.shape[1])).all()
        magnitude = np.abs(w[:, start : start + 4])
        assert (np.where(part, magnitude, np.inf).min(axis=1) >= np.where(part, 0, magnitude).max(axis=1)).all()


@pytest.mark.parametrize(("text", "expected"), [("element", prune.Elements()), ("block4", BLOCKS),
                                                ("4x2", prune.Blocks(4, 2)),
                                                ("filter", prune.Filters()), ("columns", prune.Columns())])  # fmt: skip
def test_patterns(text, expected):
    assert groups.parse(text) == expected


@pytest.mark.parametrize("text", ["", "4", "block", "block0", "0x3", "diagonal"])
def test_unknown_patterns(text):
    with pytest.raises(InvalidOption, match="unknown"):
        groups.parse(text)


def test_ramp():
    ramp = prune.ramp_to_sparsity(0.9, begin=100, end=300)
    assert [ramp.at(s) for s in (0, 100, 300, 1000)] == [0, 0, 0.9, 0.9] and ramp.at(200) == pytest.approx(0.9 * 7 / 8)
    values = [ramp.at(s) for s in range(400)]
    assert values == sorted(values)
    with pytest.raises(InvalidOption):
        prune.ramp_to_sparsity(1.0, begin=0, end=1)
    with pytest.raises(InvalidOption):
        prune.ramp_to_sparsity(0.5, begin=5, end=5)
