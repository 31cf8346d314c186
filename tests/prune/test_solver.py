"""The solver's order of operations, masks that hold, state that continues bit for bit, bad input."""

import subprocess
import sys

import numpy as np
import pytest

from skimtvm import prune
from skimtvm.errors import InvalidOption
from skimtvm.prune.files import load_arrays, save_arrays
from skimtvm.prune.steering import Dial, Steering


def parameters(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {
        "conv1.weight": rng.standard_normal((8, 4, 3, 3)).astype(dtype) * dtype(0.1),
        "fc.weight": rng.standard_normal((10, 20)).astype(dtype) * dtype(0.1),
        "fc.bias": np.zeros(10, dtype),
    }


def gradients(of, step):
    rng = np.random.default_rng([7, step])
    return {n: rng.standard_normal(w.shape).astype(w.dtype) * w.dtype.type(0.01) for n, w in of.items()}


def test_one_step_is_the_seeds_arithmetic():
    """Clip, normalise, regularize, momentum, update, threshold: against the formulas written out."""
    ps = parameters(dtype=np.float64)
    old = {n: w.copy() for n, w in ps.items()}
    lr, mu, decay, clip, size = 0.1, 0.9, 1e-2, 0.05, 2
    rules = {"fc": prune.Rule(prune.L1(decay), prune.GradientAdjusted(1e-2, factor=10), lr_mult=2.0)}
    sgd = prune.SGD(ps, rules, lr=lr, momentum=mu, clip=clip, iter_size=size)
    h = {n: np.zeros_like(w) for n, w in ps.items()}
    for step in range(3):
        gs = gradients(ps, step)
        sgd.step(gs)
        norm = np.sqrt(sum((g**2).sum() for g in gs.values()))
        for n, w in old.items():
            g = gs[n] * min(1, clip / norm) / size
            if n == "fc.weight":
                h[n] = mu * h[n] + 2 * lr * (g + decay * np.sign(w))
            else:
                h[n] = mu * h[n] + lr * g
            np.subtract(w, h[n], out=w)
            if n == "fc.weight":
                w[np.abs(w) <= 1e-2 / (np.abs(g) + 0.1)] = 0
            assert np.allclose(ps[n], w, rtol=1e-12, atol=1e-15), (n, step)
    assert 0 < (ps["fc.weight"] == 0).mean() < 1


@pytest.mark.parametrize("reading", ["gradient", "update"])
def test_both_readings_of_the_gradient(reading):
    ps = parameters(dtype=np.float64)
    w, g = ps["fc.weight"].copy(), gradients(ps, 0)
    prune.SGD(ps, {"fc": prune.Rule(threshold=prune.GradientAdjusted(0.01, reading=reading))}, lr=0.5, momentum=0).step(
        g
    )
    update = 0.5 * g["fc.weight"]
    d = g["fc.weight"] if reading == "gradient" else update
    expected = w - update
    expected[np.abs(expected) <= 0.01 / (np.abs(d) + 0.1)] = 0
    assert np.array_equal(ps["fc.weight"], expected)


MASKS = {
    "elements": (prune.Mask(0.08), None),
    "groupwise": (prune.GroupwiseMask(0.0), None),
    "2:4": (prune.NofM(), None),
    "blocks": (prune.Mask(groups=prune.Blocks(4)), 0.8),
    "ramp": (prune.Mask(), prune.ramp_to_sparsity(0.9, begin=0, end=5)),
}


@pytest.mark.parametrize("name", MASKS)
def test_masked_weights_stay_exactly_zero(name):
    mask, sparsity = MASKS[name]
    ps = parameters()
    ps["conv1.weight"][2] = 0  # a dead row for the groupwise mask
    sgd = prune.SGD(ps, {"*": prune.Rule(prune.L2(1e-3), mask=mask, sparsity=sparsity)}, lr=0.1)
    for step in range(8):
        sgd.step(gradients(ps, step))
    dead = {n: ps[n] == 0 for n in ("conv1.weight", "fc.weight")}
    assert dead["conv1.weight"].any()
    for step in range(100):
        sgd.step(gradients(ps, 100 + step))
        for n, zero in dead.items():
            assert not ps[n][zero].any() and not np.signbit(ps[n][zero]).any()
    if name in ("blocks", "ramp"):
        assert (ps["fc.weight"] == 0).mean() == pytest.approx(0.8 if name == "blocks" else 0.9, abs=0.02)


def test_masked_weights_are_zero_in_the_exported_model_and_stay_so_when_it_is_trained_on(tmp_path):
    from skimtvm.prune import nets, weights

    spec, image = nets.NETWORKS["mlp"], (1, 4, 4)
    net = nets.NumpyNet(spec, image, 0)
    sgd = prune.SGD(net.parameters, {"*": prune.Rule(mask=prune.Mask(), sparsity=0.8)}, lr=0.1)
    dead = {n: w == 0 for n, w in net.parameters.items() if w.ndim == 2}
    assert all(d.mean() == pytest.approx(0.8, abs=1e-3) for d in dead.values())
    for again in range(2):
        for step in range(20):
            sgd.step(gradients(net.parameters, 20 * again + step))
        path = tmp_path / f"{again}.onnx"
        path.write_bytes(nets.to_onnx(spec, net.parameters, image).SerializeToString())
        read = weights.read(path)
        for name, zero in dead.items():
            mine = read[name.removesuffix(".weight")]
            assert np.array_equal(mine == 0, zero) and np.array_equal(mine, net.parameters[name])
            np.copyto(net.parameters[name], mine)
        sgd = prune.SGD(net.parameters, {"fc*": prune.Rule(mask=prune.Mask())}, lr=0.1)  # the mask of what is zero


def test_a_regularizer_alone_is_a_rule():
    ps = {"conv1/3x3": np.ones((2, 2, 3, 3)), "fc6": np.ones((2, 2)), "conv1/1x1": np.ones((2, 2, 1, 1))}
    sgd = prune.SGD(ps, {"*/3x3": prune.L1(0.5), "fc*": prune.L2(0.25)}, lr=1.0, momentum=0.0)
    sgd.step({n: np.zeros_like(w) for n, w in ps.items()})
    assert [float(w.max()) for w in ps.values()] == [0.5, 0.75, 1.0]


def test_surgery_lets_weights_come_back():
    w = np.array([[0.5, 0.05, -0.05, 0.5]])
    ps = {"a.weight": w}
    sgd = prune.SGD(ps, {"a": prune.Rule(prune.L1Surgery(0.0), prune.Threshold(0.1))}, lr=1.0, momentum=0.0)
    sgd.step({"a.weight": np.zeros((1, 4))})
    assert w.tolist() == [[0.5, 0, 0, 0.5]]
    sgd.step({"a.weight": np.array([[0, -0.1, 0, 0.0]])})
    assert np.allclose(w, [[0.5, 0.15, 0, 0.5]])  # 0.05 of the copy + 0.1


RULES = {
    "l1": {"*": prune.Rule(prune.L1(1e-3), prune.GradientAdjusted(1e-3))},
    "update": {"*": prune.Rule(prune.L1(1e-3), prune.GradientAdjusted(1e-3, reading="update"))},
    "surgery": {"*": prune.Rule(prune.L1Surgery(1e-3), prune.GradientAdjusted(1e-2))},
    "ista": {"*": prune.Rule(prune.ISTA(1e-2))},
    "ramp": {"*": prune.Rule(mask=prune.Mask(), sparsity=prune.ramp_to_sparsity(0.8, begin=2, end=15), every=3)},
    "lasso": {"*": prune.Rule(prune.GroupLasso(1e-3, prune.Blocks(4)), prune.Threshold(1e-2, prune.Blocks(4)))},
}


@pytest.mark.parametrize("name", RULES)
def test_saved_and_restored_is_bit_for_bit(name, tmp_path):
    def make(ps):
        return prune.SGD(ps, RULES[name], lr=prune.Cosine(0.1, total=20), momentum=0.9)

    straight = parameters()
    sgd = make(straight)
    for step in range(20):
        sgd.step(gradients(straight, step))
    first = parameters()
    sgd = make(first)
    for step in range(9):
        sgd.step(gradients(first, step))
    save_arrays(tmp_path / "c.npz", sgd.state_dict() | {f"p/{n}": w for n, w in first.items()})
    saved = load_arrays(tmp_path / "c.npz")
    second = {n.removeprefix("p/"): w.copy() for n, w in saved.items() if n.startswith("p/")}
    sgd = make(second)
    sgd.load_state_dict(saved)
    for step in range(9, 20):
        sgd.step(gradients(second, step))
    for n, w in straight.items():
        assert w.tobytes() == second[n].tobytes(), n
    assert [p.name for p in tmp_path.iterdir()] == ["c.npz"]


def test_steering_reaches_the_target():
    ps = {"a.weight": np.random.default_rng(0).standard_normal((50, 100)).astype(np.float32) * 0.05}
    dial = Dial()
    rules = Steering.rules({"a": prune.Rule(prune.L1(1e-4), prune.GradientAdjusted())}, dial)
    sgd = prune.SGD(ps, rules, lr=0.02)
    steering = Steering(
        sgd.pruner, ["a.weight"], dial, prune.ramp_to_sparsity(0.8, begin=0, end=800, power=1.5), every=5, limit=100
    )
    target = ps["a.weight"].copy()
    for _ in range(1000):  # the loss pulls every weight to where it was
        sgd.step({"a.weight": np.float32(0.05) * (ps["a.weight"] - target)})
        steering.update()
    assert steering.sparsity() == pytest.approx(0.8, abs=0.06)


# ---- bad input ---------------------------------------------------------------------------------------------------------


def test_unknown_layer_lists_what_exists():
    with pytest.raises(InvalidOption, match=r"'conv2\*' matches nothing; there are: conv1, fc$"):
        prune.SGD(parameters(), {"conv2*": prune.Rule()}, lr=0.1)


def test_first_pattern_wins_and_biases_need_their_name():
    pruner = prune.Pruner(
        parameters(), {"fc": prune.Rule(prune.L2(1)), "*": prune.Rule(prune.L1(1)), "fc.bias": prune.Rule()}
    )
    found = {n: type(layer.rule.regularizer).__name__ for n, layer in pruner.layers.items()}
    assert found == {"fc.weight": "L2", "conv1.weight": "L1", "fc.bias": "NoneType"}


def test_mask_of_the_wrong_shape():
    with pytest.raises(InvalidOption, match=r"layer 'fc': mask has shape \(20, 10\), its weight \(10, 20\)"):
        prune.Pruner(parameters(), {"fc": prune.Rule(mask=np.ones((20, 10)))})
    with pytest.raises(InvalidOption, match="other than 0 and 1"):
        prune.Pruner(parameters(), {"fc": prune.Rule(mask=np.full((10, 20), 0.5))})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_names_the_layer_and_changes_nothing(bad):
    ps = parameters()
    sgd = prune.SGD(ps, {"*": prune.Rule(prune.L1(1e-3))}, lr=0.1)
    sgd.step(gradients(ps, 0))
    state, before = sgd.state_dict(), {n: w.copy() for n, w in ps.items()}
    gs = gradients(ps, 1)
    gs["fc.weight"][3, 4] = bad
    with pytest.raises(prune.TrainingDiverged, match=r"layer 'fc': 1 of 200 gradients .* at step 1"):
        sgd.step(gs)
    assert all(w.tobytes() == before[n].tobytes() for n, w in ps.items())
    assert all(a.tobytes() == state[n].tobytes() for n, a in sgd.state_dict().items())


def test_large_finite_gradients_are_no_nan():
    ps = {"a.weight": np.zeros((2, 2), np.float32)}
    prune.SGD(ps, lr=0.0).step({"a.weight": np.full((2, 2), 3e38, np.float32)})


@pytest.mark.parametrize(
    "options", [{"lr": -1}, {"lr": 0.1, "momentum": 1.0}, {"lr": 0.1, "iter_size": 0}, {"lr": 0.1, "clip": 0}]
)
def test_senseless_solver_options(options):
    with pytest.raises(InvalidOption, match="solver"):
        prune.SGD(parameters(), **options)


def test_state_of_other_layers():
    a = prune.SGD(parameters(), {"fc": prune.Rule()}, lr=0.1)
    b = prune.SGD(parameters(), {"conv1": prune.Rule()}, lr=0.1)
    with pytest.raises(InvalidOption, match="other layers"):
        b.load_state_dict(a.state_dict())


def test_import_is_quick_and_alone():
    text = (
        "import time, sys; t = time.process_time(); import skimtvm.prune; t = time.process_time() - t\n"
        "print(t, [m for m in ('tvm', 'torch', 'onnx', 'matplotlib') if m in sys.modules])"
    )
    runs = [
        subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout
        for _ in range(3)
    ]
    assert all(r.endswith("[]\n") for r in runs)
    assert min(float(r.split()[0]) for r in runs) < 0.3
