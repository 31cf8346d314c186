"""Projections by hand, guided pruning's decisions, the sensitivity scan."""

import json

import numpy as np
import pytest

from skimtvm import prune
from skimtvm.errors import InvalidOption
from skimtvm.prune.guide import Guide, GuidedPruning, Machine, sensitivity
from skimtvm.workload import ConvWorkload, DenseWorkload

CONV = ConvWorkload(1, 64, 56, 56, 64, 3, 3, padding=(1, 1, 1, 1))
SLIM = ConvWorkload(1, 2, 56, 56, 2, 1, 1)  # moves more bytes than it computes
FC = DenseWorkload(1, 4096, 1000)


def test_projection_is_the_formula():
    machine = Machine(flops=100e9, bandwidth=20e9)
    p = Guide({"a": CONV}, machine).project("a", 0.1)
    c = 2 * 64 * 64 * 9 * 56 * 56
    activations, weights = 4 * 2 * 64 * 56 * 56, 4 * 64 * 64 * 9
    assert p.dense_time == pytest.approx(c / 100e9)
    assert p.sparse_time == pytest.approx(max(1.8 * 0.1 * c / 100e9, (activations + 2 * 0.1 * weights) / 20e9))
    assert p.break_even == pytest.approx(1 / 1.8)
    both = 1.8 * p.ceiling * c / 100e9, (activations + 2 * p.ceiling * weights) / 20e9
    assert both[0] == pytest.approx(both[1]) and 0 < p.ceiling < p.break_even
    assert p.worth and p.target == max(0.05, p.ceiling)
    # Half the bytes of a dense layer, if each stored weight has as many again for its index.
    fc = Guide({"fc": FC}, machine).project("fc", 0.25)
    assert fc.dense_time == pytest.approx(4 * (4096 * 1000 + 5096) / 20e9)
    assert fc.sparse_time == pytest.approx(4 * (2 * 0.25 * 4096 * 1000 + 5096) / 20e9)
    assert fc.break_even == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("density", "words"), [(1.0, "prune to"), (0.7, "prune to"), (0.3, "prune on"), (0.005, "stop")], ids=str
)
def test_reasons(density, words):
    assert Guide({"a": CONV}, Machine()).project("a", density).reason.startswith(words)


def test_layers_without_gain_are_left():
    plan = Guide({"slim": SLIM, "conv": CONV, "fc": FC}, Machine()).plan()
    assert not plan["slim"].worth and plan["slim"].target == 1 and plan["slim"].reason.startswith("leave dense")
    assert plan["conv"].worth and plan["fc"].worth
    assert plan["fc"].ceiling == 0  # bound by the bytes of its weights: every zero saves some
    guide = Guide({"conv": CONV, "fc": FC}, Machine())
    assert guide.network({"conv": 1.0, "fc": 1.0}) == pytest.approx(1.0)
    assert guide.network({"conv": 0.1, "fc": 0.1}) > 3


def test_alpha_tables(tmp_path):
    file = tmp_path / "alpha.json"
    file.write_text(json.dumps({"alpha": {"csr": 2.5, "res*": 1.2, "res1": 1.4}, "flops": 5e10}))
    for source in (file, json.loads(file.read_text()), {"csr": 2.5, "res*": 1.2, "res1": 1.4, "flops": 5e10}):
        machine = Machine.load(source)
        assert [machine.alpha_of(n) for n in ("conv", "res1", "res2")] == [2.5, 1.4, 1.2]
        assert machine.alpha_of("conv", "bsr4") == 1.15 and machine.flops == 5e10
    rows = [{"kernel_name": k, "alpha": a, "macs": 5e8, "dense": {"median_ms": 10.0}, "bandwidth_gbs": 20.0}
            for k, a in (("csr", 1.5), ("csr", 1.7), ("bsr4", 1.2), ("dense", 9.0))]  # fmt: skip
    machine = Machine.load({"schema": 1, "layers": rows})
    assert machine.alpha == {"csr": 1.6, "bsr4": 1.2, "bsr8": 1.1, "bsr16": 1.1}
    assert (machine.flops, machine.bandwidth) == (1e11, 2e10)
    for bad in ({"schema": 1, "layers": rows[3:]}, {"schema": 1, "layers": [{"alpha": 1, "kernel_name": "csr"}]}):
        with pytest.raises(InvalidOption, match="alpha table: the benchmark"):
            Machine.load(bad)
    for bad in ({"csr": 0}, {"csr": "fast"}, {"flops": -1}, {"alpha": 3}, tmp_path / "none.json"):
        with pytest.raises(InvalidOption, match="alpha table"):
            Machine.load(bad)
    with pytest.raises(InvalidOption, match="no alpha for kernel 'ell'"):
        Guide({"a": CONV}, kernel="ell").project("a")
    with pytest.raises(InvalidOption, match="there are: a"):
        Guide({"a": CONV}).project("b")


def test_guided_pruning_leaves_stops_and_restores():
    rng = np.random.default_rng(0)
    shape = (64, 64, 3, 3)
    ps = {f"{n}.weight": rng.standard_normal(shape).astype("f") for n in ("stops", "restored", "goes_on")}
    ps["slim.weight"] = rng.standard_normal((2, 2, 1, 1)).astype("f")
    first = {n: w.copy() for n, w in ps.items()}
    small = prune.Rule(prune.L1(1e-3), prune.Threshold(1e-3))
    sgd = prune.SGD(ps, {"*": small}, lr=0.1)
    guide = Guide({"stops": CONV, "restored": CONV, "goes_on": CONV, "slim": SLIM}, Machine())
    drive = GuidedPruning(sgd.pruner, guide)
    assert list(drive.decisions) == ["slim"]
    ceiling = guide.project("stops").ceiling
    assert ceiling > 0
    for share, name in ((1 - ceiling / 2, "stops"), (0.2, "restored"), (0.7, "goes_on")):
        w = ps[f"{name}.weight"]
        w[~prune.Mask().keep(w, share)] = 0
    new = [drive.update() for _ in range(4)]
    assert list(new[0]) == ["stops"] and new[0]["stops"].startswith("stop")
    assert {k for n in new[1:] for k in n} == {"restored"}
    assert ps["restored.weight"].tobytes() == first["restored.weight"].tobytes()
    zero = ps["stops.weight"] == 0
    for step in range(5):
        sgd.step({n: np.random.default_rng(step).standard_normal(w.shape).astype("f") for n, w in ps.items()})
    assert not ps["stops.weight"][zero].any() and (ps["slim.weight"] != 0).all()
    assert np.count_nonzero(ps["stops.weight"]) == np.count_nonzero(~zero)  # its penalty and threshold are off
    again = prune.SGD({n: w.copy() for n, w in ps.items()}, {"*": small}, lr=0.1)
    again.load_state_dict(sgd.state_dict())
    assert again.pruner.layers["stops.weight"].frozen and again.pruner.layers["slim.weight"].off


def test_guided_pruning_needs_common_names():
    pruner = prune.Pruner({"a.weight": np.ones((2, 2))}, {"a": prune.Rule()})
    with pytest.raises(InvalidOption, match="no layer with a rule"):
        GuidedPruning(pruner, Guide({"conv": CONV}))


def test_sensitivity_restores_every_bit_also_after_an_error():
    rng = np.random.default_rng(0)
    ps = {"a.weight": rng.standard_normal((10, 10)), "b.weight": rng.standard_normal((5, 5)), "a.bias": np.ones(10)}
    before = {n: w.copy() for n, w in ps.items()}
    rows = sensitivity(ps, lambda: sum(float(np.abs(w).sum()) for w in ps.values()), (0.0, 0.5, 0.9))
    assert [(r.layer, r.sparsity) for r in rows] == [(n, s) for n in "ab" for s in (0.0, 0.5, 0.9)]
    assert rows[0].score == rows[0].base and rows[0].score > rows[1].score > rows[2].score
    assert all(w.tobytes() == before[n].tobytes() for n, w in ps.items())
    calls = []

    def breaks():
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("no")
        return 0.0

    with pytest.raises(RuntimeError):
        sensitivity(ps, breaks, (0.5,))
    assert all(w.tobytes() == before[n].tobytes() for n, w in ps.items())
    with pytest.raises(InvalidOption, match=r"there are: a\.weight"):
        sensitivity(ps, lambda: 0.0, (0.5,), layers=["c"])
