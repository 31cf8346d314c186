"""Pruning in the Winograd domain by the change of the output."""

import numpy as np
import pytest

from skimtvm import winograd
from skimtvm.errors import InputMismatch, InvalidOption
from skimtvm.prune import WinogradConv2d
from skimtvm.prune.surgeon import output_moments, prune_rows


def smooth(rng, shape):
    """Images whose neighbouring pixels are alike, as feature maps are."""
    x = rng.standard_normal(shape).cumsum(axis=-1).cumsum(axis=-2)
    return x / x.std()


@pytest.mark.parametrize(("m", "r"), winograd.SIZES)
def test_moments_give_the_variance_of_the_outputs(m, r):
    rng = np.random.default_rng(0)
    layer = WinogradConv2d(rng.standard_normal((5, 3, m + r - 1, m + r - 1)), r=r, pads=(1, 1, 1, 1))
    side = 3 * m + r - 3  # outputs are whole tiles
    x = smooth(rng, (6, 3, side, side)) + 2
    h = output_moments(layer, x)
    u = layer.u.reshape(5, -1)
    expected = layer.forward(x).var(axis=(0, 2, 3))
    np.testing.assert_allclose(np.einsum("kd,de,ke->k", u, h, u), expected, rtol=1e-8)
    np.testing.assert_allclose(h, h.T, atol=1e-9 * np.abs(h).max())
    few = output_moments(layer, x, tiles=7)  # a sample
    assert few.shape == h.shape and np.isfinite(few).all() and not np.allclose(few, h)


def problem(rows=6):
    rng = np.random.default_rng(1)
    layer = WinogradConv2d.from_spatial(rng.standard_normal((rows, 4, 3, 3)))
    return layer.u.reshape(rows, -1), output_moments(layer, smooth(rng, (40, 4, 12, 12)))


def loss(change, h):
    return float(np.einsum("kd,de,ke->", change, h, change))


@pytest.mark.parametrize("sparsity", [0.3, 0.82, 0.95])
def test_what_stays_is_the_least_squares_fit(sparsity):
    w, h = problem()
    before = w.copy()
    out = prune_rows(w, h, sparsity)
    assert (w == before).all() and np.count_nonzero(out == 0) == round(sparsity * w.size)
    damped = h + 1e-3 * np.diag(h.diagonal())
    slope = (out - w) @ damped
    assert np.abs(slope[out != 0]).max() <= 1e-7 * np.abs(w @ damped).max()
    # Rows take their share in proportion to what they put out: the scale of one does not matter.
    factors = np.array([1, 10, 0.1, 1, 1e3, 1])[:, None]
    assert ((prune_rows(w * factors, h, sparsity) == 0) == (out == 0)).all()


def test_it_is_far_better_than_the_largest_by_effect():
    w, h = problem()
    size = np.abs(w) * np.tile(winograd.transform(4, 3).effect.reshape(-1), 4)
    plain = np.where(size >= np.quantile(size, 0.82), w, 0)
    ours = prune_rows(w, h, 0.82)
    assert loss(ours - w, h) < 0.2 * loss(plain - w, h)
    assert loss(ours - w, h) < 0.3 * loss(w, h)


def test_zeros_stay_and_nothing_to_do_changes_nothing():
    w, h = problem()
    half = prune_rows(w, h, 0.5)
    assert (prune_rows(half, h, 0.4) == half).all()
    assert (prune_rows(w, h, 0.0) == w).all()
    more = prune_rows(half, h, 0.8)
    assert not more[half == 0].any() and np.count_nonzero(more == 0) == round(0.8 * w.size)


def test_dead_inputs_and_dead_filters():
    w, h = problem()
    h[:36] = h[:, :36] = 0  # an input channel that is always the same
    w[2] = 0
    out = prune_rows(w.astype("f"), h, 0.7)
    assert out.dtype == np.float32 and np.isfinite(out).all() and not out[2].any()
    assert np.count_nonzero(out[:, :36]) < 0.05 * np.count_nonzero(out)
    assert not prune_rows(w, np.zeros_like(h), 0.999).all()


def test_refuses_what_does_not_fit():
    w, h = problem()
    with pytest.raises(InputMismatch, match=r"\[D, D\]"):
        prune_rows(w[:, :-1], h, 0.5)
    with pytest.raises(InvalidOption, match="share of zeros"):
        prune_rows(w, h, 1.0)
    with pytest.raises(InputMismatch, match="channels"):
        output_moments(WinogradConv2d(np.zeros((2, 3, 6, 6))), np.zeros((1, 2, 8, 8)))
