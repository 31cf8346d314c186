"""The benchmark's records, tables and protocol. Nothing here asserts a time."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from skimtvm.bench import layer_cases, markdown, records, sparsity, sweeps, timing
from skimtvm.bench.deepsparse_client import DeepSparse
from skimtvm.bench.engines import Case, Unavailable, aligned, difference
from skimtvm.errors import InvalidOption
from skimtvm.report import LayerRecord

TERMS = records.Terms("2026-01-01T00:00:00+00:00", "skimtvm bench", "a CPU", 2, "Linux", {"skimtvm": "0.1.0"})
CONV = next(c for c in layer_cases.CASES if c.name == "3x3_128_128_28")


def spread(ms):
    return records.Spread(ms, ms * 0.9, ms * 1.2, 5)


def engine(name, ms, **more):
    return records.EngineTime(name, "1.0", time=spread(ms), gflops=10.0, dense_gflops=100.0, **more)


def network_row(ours=10.0, **changes):
    engines = (
        engine("skimtvm", ours),
        engine("onnxruntime", 20.0, difference=1e-6),
        engine("deepsparse", 15.0, model="unstructured 0.9"),
        records.EngineTime("openvino", status="not installed: pip install openvino"),
    )
    row = records.NetworkRow(TERMS, "resnet50", "0.9", "random", 1, 1, 0.1, 1000, 100, 5, 1.0, engines)
    return dataclasses.replace(row, **changes)


def layer_row():
    return records.LayerRow(
        *(
            TERMS,
            "fc7_b1",
            "1x4096 * 4096x4096",
            "0.8437",
            "random",
            1,
            1,
            0.1563,
            "f32_sell_fc_1x16w128_avx512",
            "why",
        ),
        *(16777216, 15000000, spread(0.8), spread(0.01), spread(2.0), 118.0, 6.5, 42.0, 0.06, 1.5, 25.0, 80.0, 18.0),
        *("", 0.0238, 2.3, (engine("skimtvm", 0.9), engine("onnxruntime", 3.0, kernel=spread(2.8)))),
    )


def full_report():
    sweep = records.SweepRow(
        *(TERMS, "batch", 4, "resnet50", "0.9", "random", 4, 224, 1),
        (engine("auto", 1.0), engine("all dense", 2.0), engine("all sparse", 1.1)),
    )
    memory = records.MemoryRow(TERMS, "resnet50", "0.9", "random", 1, 1, "skimtvm", "0.1.0", "ok", 100.0, 80.0, 10**6)
    report = records.Report()
    for row in (network_row(), network_row(ours=30.0, sparsity="none"), layer_row(), sweep, memory):
        report = report.with_row(row)
    return report


def test_report_round_trip():
    report = full_report()
    assert records.Report.from_json(report.to_json()) == report


def test_row_replaces_its_predecessor():
    report = full_report().with_row(network_row(ours=9.0))
    assert [r.sparsity for r in report.networks] == ["0.9", "none"]
    assert records.ours(report.networks[0]).time.median_ms == 9.0


def test_markdown_keeps_lost_rows_and_absent_engines():
    text = markdown.page(full_report())
    assert "1.50x" in text and "0.50x (slower)" in text  # the fastest peer takes 15 ms, we take 10 and 30
    assert "not installed: pip install openvino" in text
    assert text.count("DeepSparse, sparse, ms |") == 1 and "(unstructured 0.9) |" in text
    assert "18.0 (72%; 22%)" in text and "2.30x" in text and layer_cases.REFERENCE in text
    for title in ("## Networks", "## Layers", "## Sweep over batch", "## Memory", "## Terms"):
        assert title in text
    assert text.count("\n    skimtvm bench") == 1  # terms once, not once a row


def test_best_peer_takes_the_lesser_of_run_and_layer():
    peer, ms = records.best_peer(layer_row().engines, kernel=True)
    assert (peer.engine, ms) == ("onnxruntime", 2.8)


def test_readme(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{markdown.START}\nold\n{markdown.END}\nafter\n")
    markdown.update_readme(full_report(), readme)
    once = readme.read_text()
    assert once.startswith(f"before\n{markdown.START}\n| network |") and once.endswith(f"{markdown.END}\nafter\n")
    assert "old" not in once and "(slower)" in once
    markdown.update_readme(full_report(), readme)
    assert readme.read_text() == once


@pytest.mark.parametrize("text", ["nothing", markdown.START, f"{markdown.END}{markdown.START}"])
def test_readme_without_markers(tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(InvalidOption, match="markers"):
        markdown.update_readme(full_report(), readme)
    assert readme.read_text() == text


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 99}', '{"schema": 1, "networks": [{}]}'], ids=repr)
def test_foreign_json(tmp_path, text):
    file = tmp_path / "bench.json"
    file.write_text(text)
    with pytest.raises(InvalidOption, match=r"bench\.json"):
        records.read(file)


@pytest.mark.parametrize("text", ["none", "seed", "0.9", "block4:0.9", "block16:0.75"])
def test_sparsity_round_trip(text):
    assert str(sparsity.Sparsity.parse(text)) == text


@pytest.mark.parametrize("text", ["1", "1.0", "-0.1", "nan", "block:0.9", "block4", "block0:0.9", "90%", ""])
def test_sparsity_that_makes_no_sense(text):
    with pytest.raises(InvalidOption):
        sparsity.Sparsity.parse(text)


@pytest.mark.parametrize(
    ("text", "network", "part"),
    [
        ("winograd:0.9", "bert", "'bert' has no convolutions"),
        ("seed", "bert", "no table"),
        ("seed", "vgg19", "no table"),
    ],
)
def test_sparsity_that_a_network_cannot_have(text, network, part):
    with pytest.raises(InvalidOption, match=part):
        sparsity.Sparsity.parse(text).build(network)


class Fake:
    """Notes whose turn it is; takes no time."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def seconds(self, calls):
        self.log.append((self.name, calls))
        return 0.001


def test_engines_take_turns():
    log = []
    engines = {name: Fake(name, log) for name in "AB"}
    times = timing.interleave(engines, timing.Rounds(repeat=3, warmup=2, min_time=0.004))
    assert log[:4] == [("A", 2), ("A", 1), ("B", 2), ("B", 1)]
    assert log[4:] == [("A", 1), ("A", 4), ("B", 1), ("B", 4)] * 3
    assert {len(t.samples) for t in times.values()} == {3} and times["A"].calls == 4


@pytest.mark.parametrize("case", layer_cases.CASES, ids=lambda c: c.name)
def test_layer_cases(case):
    names = {c.name for c in layer_cases.CASES}
    assert case.base in names or not case.base
    if case.skimcaffe:
        pruned = case.pruned(sparsity.Sparsity.parse("0.9"))
        assert 0 < layer_cases.skimcaffe_share(case, pruned) < 1
    assert layer_cases.skimcaffe_share(case, sparsity.Sparsity.parse("block4:0.9")) is None


def test_layer_model():
    import onnx

    model = layer_cases.build(CONV, sparsity.Sparsity.parse("0.9"))
    onnx.checker.check_model(model)
    weight = onnx.numpy_helper.to_array(model.graph.initializer[0])
    assert weight.shape == CONV.workload.weight_shape
    assert np.count_nonzero(weight) == weight.size - round(0.9 * weight.size)


def test_choices_of_equal_kernels_are_one_module():
    first = LayerRecord("a", "conv2d", "1x1x1x1", kernel="f32_csr", reason="measured")
    module = lambda *layers: SimpleNamespace(manifest=SimpleNamespace(layers=layers))
    forced, other = (dataclasses.replace(first, **c) for c in ({"reason": "forced"}, {"kernel": "f32_dense"}))
    assert sweeps.kernels(module(first)) == sweeps.kernels(module(forced)) != sweeps.kernels(module(other))


def test_sweep_points():
    asked = sparsity.Sparsity.parse("block4:0.9")
    made = sweeps.points("sparsity", "resnet50", asked, 2, (0.5, 0.99))
    assert [(str(p.sparsity), p.batch) for p in made] == [("block4:0.5", 2), ("block4:0.99", 2)]
    assert [p.size for p in sweeps.points("size", "resnet50", asked, 1, (112,))] == [112]
    assert [p.batch for p in sweeps.points("batch", "bert", asked, 1, (3,))] == [3]
    with pytest.raises(InvalidOption, match="'bert' takes no images"):
        sweeps.points("size", "bert", asked, 1)
    for sweep, value in (("sparsity", 1.0), ("batch", 0), ("size", 1.5), ("weather", 1)):
        with pytest.raises(InvalidOption):
            sweeps.points(sweep, "resnet50", asked, 1, (value,))


def test_difference():
    a = np.array([1.0, -4.0], np.float32)
    assert difference([a], [a]) == 0
    assert difference([a + 1], [a]) == 0.25
    assert difference([a], [a[:1]]) is None
    assert difference([a * np.nan], [a]) == difference([a], [a * np.inf]) == sys.float_info.max


def test_aligned():
    a = aligned(np.arange(6, dtype=np.float32).reshape(2, 3))
    assert a.ctypes.data % 64 == 0 and a.flags.c_contiguous and a.sum() == 15


@pytest.fixture
def case(tmp_path):
    return Case(tmp_path / "m.onnx", {"x": np.zeros((1, 3), np.float32)}, 1, 1)


def test_deepsparse_that_is_not_there(case, tmp_path):
    with pytest.raises(Unavailable, match="--deepsparse-python"):
        DeepSparse(case, None)
    with pytest.raises(Unavailable, match="cannot start"):
        DeepSparse(case, tmp_path / "python")


def test_deepsparse_worker_speaks_the_protocol(case, tmp_path, monkeypatch):
    """With an engine of a few lines in the place of the real one, which also prints where it should not."""
    fake = tmp_path / "site" / "deepsparse"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text(
        "import numpy\n__version__ = '9.9'\nprint('banner')\n"
        "class Engine:\n"
        "    def __init__(self, model, batch_size, num_cores): print('loading')\n"
        "    def run(self, inputs): return [inputs[0] + 1]\n"
    )
    numpy_home = Path(np.__file__).parent.parent
    python = tmp_path / "python"
    paths = f"{tmp_path / 'site'}:{numpy_home}"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={paths} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    peer = DeepSparse(case, python)
    try:
        assert peer.version == "9.9"
        assert peer.seconds(3) >= 0
        np.testing.assert_array_equal(peer.outputs()[0], np.ones((1, 3), np.float32))
        with pytest.raises(Unavailable, match="TypeError"):
            peer._ask(do="run", times=1)
    finally:
        child = peer._child
        peer.close()
    assert child.returncode == 0


def test_deepsparse_worker_that_dies(case, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho the reason >&2\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(Unavailable, match="the reason"):
        DeepSparse(case, python)
